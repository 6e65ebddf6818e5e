"""The card says what is known, calls unrecorded what is not, and never makes a licence freer than its sources."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from origins import ORIGINS, TEACHER, UNRECORDED, data_row, trained_on

from depthkit.bundle import BundleFacts
from depthkit.config import DPTConfig
from depthkit.formats.model_card import model_card
from depthkit.licences import derived_licence

SHA256 = "5d" * 32


STUDENT: dict[str, Any] = {
    "stage": "student",
    "run_name": "my_student",
    "seed": 17,
    "steps": 4321,
    "num_parameters": 24785089,
    "data": {
        "labeled.source": data_row("rooms", "CC BY 4.0", num_images=123456, source="somewhere"),
        "unlabeled.target": data_row("streets", "CC0", num_images=7, teacher_sha256=TEACHER),
    },
    "teachers": {TEACHER: {"forests/train": "Apache-2.0"}},
    "encoder_weights": {"name": "pretrained", "sha256": "9a" * 32, "sources": {"photos/train": "MIT"}},
    "hyperparameters": {"stage": {"loss": "affine_invariant"}, "optim": {"encoder_lr": 5e-6, "nothing": None}},
    "validation": {"val.rooms": data_row("rooms_val")},
    "metrics": {
        "val/affine_disparity@0123abcd/abs_rel": 0.12344,
        "val/affine_disparity@0123abcd/delta1": 0.9,
        "abs_rel": 0.77777,
    },
    "versions": {"depthkit": "0.1.0", "torch": "2.99.1"},
}


def facts(provenance: dict[str, Any], *, max_depth: float | None = None, **more: Any) -> BundleFacts:
    model = DPTConfig(
        encoder="vit_tiny_patch16_224",
        tap_layers=[0, 1, 2, 3],
        features=16,
        out_channels=[8, 8, 16, 16],
        max_depth=max_depth,
    )
    settings: dict[str, Any] = {"content": "depth_model", "sha256": SHA256, "short_side": 518} | more
    kind = "disparity" if max_depth is None else "depth"
    return BundleFacts(model=model, kind=kind, provenance=provenance, **settings)


def front_matter(card: str) -> dict[str, Any]:
    """The metadata as the hub cuts it out."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    content: dict[str, Any] = yaml.safe_load(found[1])
    return content


def section(card: str, title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    return text


def table_rows(text: str) -> list[list[str]]:
    """The cells of all table lines."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# --- what the publisher declares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", ["MIT", "CC BY-SA 4.0", "my own terms", "MIT / strange"])
@pytest.mark.parametrize("origin", ORIGINS)
def test_declaring_what_a_source_forbids_is_refused(origin, declared):
    with pytest.raises(ValueError, match=r"forests/train.*CC BY-NC 4\.0") as error:
        model_card(facts(origin("CC BY-NC 4.0")), licence=declared)
    assert repr(declared) in str(error.value)


@pytest.mark.parametrize(
    ("provenance", "declared", "metadata"),
    [
        (trained_on("MIT"), "Apache-2.0", {"license": "apache-2.0"}),
        (trained_on("not stated"), "MIT", {"license": "mit"}),
        (trained_on("CC BY-NC 4.0"), "CC BY-NC-SA 4.0", {"license": "cc-by-nc-sa-4.0"}),
        (
            trained_on("CC BY-NC 4.0"),
            "ACME Research Only, v2",
            {"license": "other", "license_name": "acme-research-only-v2"},
        ),
    ],
)
def test_declared_licence_is_stated_as_declared(provenance, declared, metadata):
    card = model_card(facts(provenance), licence=declared)
    assert metadata.items() <= front_matter(card).items()
    assert f"**{declared}**, declared by the publisher" in section(card, "Licence")
    assert derived_licence(provenance).summary in section(card, "Licence")


def test_without_a_declaration_the_derived_licence_is_the_card_s():
    assert front_matter(model_card(facts(trained_on("MIT"))))["license"] == "mit"
    own_terms = front_matter(model_card(facts(trained_on("research only"))))
    assert (own_terms["license"], own_terms["license_name"]) == ("other", "non-commercial")


# --- the card --------------------------------------------------------------------------------------------------------


def test_front_matter_is_what_the_hub_reads():
    metadata = front_matter(model_card(facts(STUDENT)))
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "depth-estimation"
    assert metadata["datasets"] == ["rooms", "streets"]
    assert {"relative-depth", "vit_tiny_patch16_224"} <= set(metadata["tags"])
    assert metadata["license"] == "cc-by-4.0"


@pytest.mark.parametrize("name", ["no", "1e3", "a: b # c", "'\"", "${x", "- x", "ünï\n---\nlicense: mit", "a|b"])
def test_a_strange_name_stays_one_name(name):
    card = model_card(facts({"data": {"labeled.a": data_row(name)}}))
    assert front_matter(card)["datasets"] == [name]
    row = table_rows(section(card, "Training data"))[2]
    assert len(row) == 6
    assert row[0].replace("\\|", "|") == " ".join(name.split())


def test_tables_hold_what_was_given():
    card = model_card(facts(STUDENT))
    first, second = table_rows(section(card, "Training data"))[2:]
    assert first[:5] == ["rooms", "train", "labeled", "123456", "CC BY 4.0"]
    assert first[5] == f"`{STUDENT['data']['labeled.source']['digest']}`"
    assert second[:5] == ["streets", "train", "unlabeled", "7", "CC0"]
    training = dict(table_rows(section(card, "Training")))
    assert training["stage"] == "student"
    assert (training["seed"], training["optimizer steps"]) == ("17", "4321")
    assert training["losses"] == "loss affine_invariant"
    assert training["optimizer (AdamW)"] == "encoder_lr 5e-06"
    assert "torch 2.99.1" in training["versions"]
    assert "24,785,089" in card
    assert "# my_student\n" in card
    assert SHA256 in card
    data = section(card, "Training data")
    assert TEACHER in data
    assert "forests/train: Apache-2.0" in data
    assert f"pretrained, sha256 `{'9a' * 32}`" in data
    sources = {row[0]: row[1:] for row in table_rows(section(card, "Licence"))}
    assert sources["forests/train"] == [f"teacher {TEACHER[:12]}", "Apache-2.0", "allowed"]
    assert sources["photos/train"] == ["initial encoder pretrained", "MIT", "allowed"]


def test_seed_and_steps_of_zero_are_recorded():
    training = dict(table_rows(section(model_card(facts(trained_on("MIT", seed=0, steps=0))), "Training")))
    assert (training["seed"], training["optimizer steps"]) == ("0", "0")


def test_relative_and_metric_models_have_other_limits():
    relative, metric = model_card(facts(STUDENT)), model_card(facts(STUDENT, max_depth=80.0))
    assert "not for measuring" in relative
    assert "Scale and shift are unknown" in relative
    assert "metres" not in relative.split("## Training data")[0]
    assert "0 to 80 metres" in metric
    assert "metres, planar z" in metric
    assert "not for measuring" not in metric
    assert "metric-depth" in front_matter(metric)["tags"]
    for card in (relative, metric):
        assert "Not for safety-critical use" in section(card, "Intended use and limits")


def test_limits_follow_from_the_data():
    def limits(**row: Any) -> str:
        return section(model_card(facts({"data": {"labeled.a": data_row(**row)}})), "Intended use and limits")

    assert "Trained on 65 images" in limits(num_images=65)
    assert "Trained on" not in limits(num_images=1_000_000)
    assert "synthetic" in limits(source="depthkit.data.procedural")
    assert "synthetic" not in limits(source="elsewhere")
    assert "another model" not in limits()
    assert "another model" in limits(teacher_sha256=TEACHER)


@pytest.mark.parametrize("kind", [None, 20.0])
@pytest.mark.parametrize("provenance", [{}, {"stage": "imported", "source": None, "licence": None}, STUDENT])
def test_nothing_is_made_up_and_nothing_reads_none(provenance, kind):
    card = model_card(facts(provenance, max_depth=kind))
    assert not re.search(r"\bNone\b|\bnull\b|Undefined|\{[{%]", card)
    assert "nothing" not in card


@pytest.mark.parametrize("provenance", UNRECORDED)
def test_card_of_an_unrecorded_origin_is_of_unknown_licence(provenance):
    assert front_matter(model_card(facts(provenance)))["license"] == "unknown"


def test_card_of_an_empty_provenance_is_honest():
    card = model_card(facts({}))
    assert "datasets" not in front_matter(card)
    assert "What it was trained on is not recorded" in section(card, "Intended use and limits")
    assert "No evaluation is recorded" in section(card, "Intended use and limits")
    for title in ("Training data", "Training"):
        assert "Not recorded." in section(card, title)
    assert "No metrics are recorded" in section(card, "Metrics")
    assert "**unknown: ask the owners of training data" in section(card, "Licence")
    assert "allowed" not in section(card, "Licence")


def test_imported_weights():
    provenance = {"stage": "imported", "source": "official.pth", "source_sha256": "ee" * 32, "licence": "CC BY-NC 4.0"}
    card = model_card(facts(provenance))
    assert front_matter(card)["license"] == "cc-by-nc-4.0"
    assert "imported from `official.pth`" in section(card, "Training")
    assert "ee" * 32 in section(card, "Training")
    assert ["weights official.pth", "imported weights", "CC BY-NC 4.0", "**forbidden**"] in table_rows(card)


def test_an_encoder_alone_has_no_card():
    with pytest.raises(ValueError, match="encoder alone"):
        model_card(facts(STUDENT, content="encoder"))


# --- metrics ---------------------------------------------------------------------------------------------------------


RESULTS: dict[str, Any] = {
    "protocol": {"id": "nyu@89abcdef", "name": "nyu", "max_depth": 10.0, "crop": None, "metrics": ["abs_rel"]},
    "models": {
        "other": {"sha256": "00" * 32, "overall": {"abs_rel": 0.5555}, "datasets": {"nyu": {"abs_rel": 0.6666}}},
        "mine": {"sha256": SHA256, "overall": {"abs_rel": 0.25}, "datasets": {"nyu": {"abs_rel": 0.04321}}},
    },
    "datasets": {"nyu": {"manifest_digest": "c0ffee00" * 8, "num_images": 654, "num_skipped": 0}},
    "num_images": 654,
}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_every_number_stands_under_its_protocol(tmp_path):
    card = model_card(facts(STUDENT), results=[write(tmp_path / "results.json", RESULTS)])
    own, evaluated = re.split(r"^### nyu@89abcdef$", section(card, "Metrics"), flags=re.MULTILINE)
    assert "### affine_disparity@0123abcd" in own
    assert table_rows(own)[0][2:] == ["abs_rel ↓", "delta1 ↑"]
    assert table_rows(own)[2][0].endswith("rooms_val/train (726f6f6d)")
    assert table_rows(own)[2][2:] == ["0.1234", "0.9000"]
    assert table_rows(evaluated) == [
        ["data", "images", "abs_rel ↓"],
        ["---", "---", "---:"],
        ["nyu (c0ffee00)", "654", "0.0432"],
    ]
    assert "max_depth 10" in evaluated
    for absent in ("0.5555", "0.6666", "0.7777"):  # of another model, and a number without a protocol
        assert absent not in card


def test_results_of_the_validation_s_protocol_join_its_table(tmp_path):
    results = deepcopy(RESULTS)
    results["protocol"]["id"] = "affine_disparity@0123abcd"
    metrics = section(model_card(facts(STUDENT), results=[write(tmp_path / "a.json", results)]), "Metrics")
    assert metrics.count("###") == 1
    assert [row[2:] for row in table_rows(metrics)[2:]] == [["0.1234", "0.9000"], ["0.0432", "-"]]


def test_several_data_sets_have_a_mean_and_training_data_are_marked(tmp_path):
    results = deepcopy(RESULTS)
    digest = STUDENT["data"]["labeled.source"]["digest"]
    results["datasets"]["rooms"] = {"manifest_digest": digest, "num_images": 3, "num_skipped": 2}
    results["models"]["mine"]["datasets"]["rooms"] = {"abs_rel": 0.01}
    card = model_card(facts(STUDENT | {"metrics": {}}), results=[write(tmp_path / "results.json", results)])
    nyu, rooms, overall = table_rows(section(card, "Metrics"))[2:]
    assert "trained on" not in nyu[0]
    assert "**trained on these images**" in rooms[0]
    assert rooms[1] == "3 (2 skipped)"
    assert overall == ["all images", "654", "0.2500"]


def test_results_of_another_model_are_refused_with_both_hashes(tmp_path):
    results = deepcopy(RESULTS)
    del results["models"]["mine"]
    with pytest.raises(ValueError, match=r"results\.json") as error:
        model_card(facts(STUDENT), results=[write(tmp_path / "results.json", results)])
    assert SHA256 in str(error.value)
    assert "00" * 32 in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"models": {}, "datasets": {}}', '{"models": {"a": 3}}'])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        model_card(facts(STUDENT), results=[tmp_path / "results.json"])
