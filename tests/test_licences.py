"""A licence is never freer than the strictest source, and what is not known is never taken for a permission."""

import pytest
from origins import ORIGINS, TEACHER, UNRECORDED, trained_on

from depthkit.licences import derived_licence, read_licences, stated_licences

# --- what a licence text means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "identifiers"),
    [
        ("MIT", ["mit"]),
        ("mit license", ["mit"]),
        ("CC BY 4.0", ["cc-by-4.0"]),
        ("CC-BY-SA-4.0", ["cc-by-sa-4.0"]),
        ("CC BY-NC 4.0", ["cc-by-nc-4.0"]),
        ("cc_by_nc_4.0", ["cc-by-nc-4.0"]),
        ("CC0", ["cc0-1.0"]),
        ("Apache-2.0 (generated)", ["apache-2.0"]),
        ("Apache License 2.0", ["apache-2.0"]),
        ("BSD 3-Clause Licence", ["bsd-3-clause"]),
        ("KITTI: CC BY-NC-SA 3.0 (cvlibs.net; not restated in the repo)", ["cc-by-nc-sa-3.0"]),
        ("MIT / KITTI: CC BY-NC-SA 3.0", ["mit", "cc-by-nc-sa-3.0"]),
        ("research only", ["other"]),
        ("CC BY-NC-ND 4.0", ["other"]),
        ("NVIDIA source code licence, non-commercial", ["other"]),
        ("MIT (non-commercial)", ["other"]),
        ("fair-noncommercial-research-license", ["other"]),
        ("MIT (code)", ["unknown"]),
        ("CC0 (images only)", ["unknown"]),
        ("CC BY", ["unknown"]),
        ("same (repository)", ["unknown"]),
        ("dinov3-license", ["unknown"]),
        ("not stated", ["unknown"]),
        ("none", ["unknown"]),
        ("other", ["unknown"]),
        ("", ["unknown"]),
    ],
)
def test_licence_texts(text, identifiers):
    assert read_licences(text) == identifiers


# --- which licence follows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licences", "identifier", "commercial_use"),
    [
        (["MIT"], "mit", True),
        (["CC0", "Apache-2.0", "MIT"], "apache-2.0", True),
        (["CC BY 4.0", "Apache-2.0"], "cc-by-4.0", True),
        (["CC BY-SA 4.0", "CC BY 4.0"], "cc-by-sa-4.0", True),
        (["MIT", "CC BY-NC 4.0"], "cc-by-nc-4.0", False),
        (["CC BY-NC-SA 4.0", "CC BY-NC 4.0"], "cc-by-nc-sa-4.0", False),
        (["CC BY-SA 4.0", "CC BY-NC 4.0"], "other", False),
        (["research only", "CC BY-NC 4.0"], "other", False),
        (["strange terms", "CC BY-NC 4.0"], "other", False),
        (["strange terms", "MIT"], "unknown", None),
        (["MIT / strange terms"], "unknown", None),
        (["not stated"], "unknown", None),
        ([""], "unknown", None),
    ],
)
def test_strictest_source_decides(licences, identifier, commercial_use):
    for order in (licences, licences[::-1]):
        derived = derived_licence(trained_on(*order))
        assert (derived.id, derived.commercial_use) == (identifier, commercial_use)


@pytest.mark.parametrize("origin", ORIGINS)
def test_every_kind_of_source_counts_and_is_named(origin):
    assert derived_licence(origin("MIT")).id == "mit"
    forbidden = derived_licence(origin("CC BY-NC 4.0"))
    assert (forbidden.id, forbidden.commercial_use) == ("cc-by-nc-4.0", False)
    assert "forests/train" in forbidden.summary
    unknown = derived_licence(origin("own terms"))
    assert unknown.id == "unknown"
    assert unknown.summary.startswith("unknown: ask the owners of ")
    assert "forests/train" in unknown.summary
    assert "set0" not in unknown.summary


def test_a_data_set_is_named_by_name_split_and_digest():
    summary = derived_licence(trained_on("MIT", "not stated", "CC BY-NC 4.0")).summary
    assert "because of set2/train (73657432)" in summary
    assert "not known for set1/train (73657431)" in summary
    assert "set0" not in summary


@pytest.mark.parametrize("provenance", UNRECORDED)
def test_what_is_not_recorded_is_unknown(provenance):
    assert derived_licence(provenance).id == "unknown"


def test_stated_licences_pass_on_through_generations():
    """Teacher -> labels -> student -> what starts from the student: the first licence is still there."""
    teacher = trained_on("CC BY-NC 4.0")
    student = trained_on("MIT")
    student["data"]["labeled.0"] |= {"name": "other", "digest": "", "teacher_sha256": TEACHER}
    student["teachers"] = {TEACHER: stated_licences(teacher)}
    grandchild = trained_on(
        "CC0", encoder_weights={"name": "student", "sha256": "", "sources": stated_licences(student)}
    )
    assert derived_licence(grandchild).id == "cc-by-nc-4.0"
    assert "set0/train (73657430)" in derived_licence(grandchild).names(False)


def test_two_sources_of_one_name_keep_both_licences():
    provenance = trained_on("MIT", "CC BY-NC 4.0")
    for row in provenance["data"].values():
        row |= {"name": "rooms", "digest": ""}
    assert stated_licences(provenance) == {"rooms/train": "MIT / CC BY-NC 4.0"}
