"""The licence of a model, as it follows from the stated licences of all that the model was made from.

A licence is free text in manifests and provenance. Only the identifiers below and words that plainly forbid commercial
use are understood; everything else is unknown, which is never taken for a permission.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

NOT_STATED = "not stated"
UNKNOWN = "unknown"
OTHER = "other"

COMMERCIAL_USE = {
    "unlicense": True,
    "cc0-1.0": True,
    "isc": True,
    "mit": True,
    "bsd-2-clause": True,
    "bsd-3-clause": True,
    "apache-2.0": True,
    "cc-by-3.0": True,
    "cc-by-4.0": True,
    "cc-by-sa-3.0": True,
    "cc-by-sa-4.0": True,
    "cc-by-nc-2.0": False,
    "cc-by-nc-3.0": False,
    "cc-by-nc-4.0": False,
    "cc-by-nc-sa-3.0": False,
    "cc-by-nc-sa-4.0": False,
    OTHER: False,
}
"""Identifier of the Hugging Face hub (SPDX in lower case) -> whether commercial use is allowed; the strictest last.
`other` stands for a text that forbids commercial use and is none of the named licences."""

ALIASES = {"cc0": "cc0-1.0", "apache-2": "apache-2.0", "apache-license-2.0": "apache-2.0"}

FORBIDS_COMMERCIAL_USE = re.compile(
    r"non-?\s?commercial|not[- ]for[- ]profit|\bnc\b|research[- ](use|only|purposes)|academic[- ]use", re.IGNORECASE
)

LEAVES_DOUBT = re.compile(r"\b(code|software|no|not|only|but|except)\b", re.IGNORECASE)
"""Words beside a permissive licence after which it may not be that of the data or weights."""


@dataclass(frozen=True)
class Source:
    """Something a model was made from: its name, its licence as stated, and the part it had in the model."""

    name: str
    stated: str
    part: str

    @property
    def licences(self) -> list[str]:
        return read_licences(self.stated)

    @property
    def commercial_use(self) -> bool | None:
        """Whether all its licences allow commercial use; False if one forbids it, None if it is not known."""
        return allows_commercial_use(self.licences)


@dataclass(frozen=True)
class Licence:
    """A licence by its identifier on the hub, and the sources that it follows from."""

    id: str
    sources: tuple[Source, ...]

    @property
    def commercial_use(self) -> bool | None:
        return allows_commercial_use([licence for source in self.sources for licence in source.licences])

    def names(self, commercial_use: bool | None) -> list[str]:
        """The sources of this kind, each once."""
        return list(dict.fromkeys(each.name for each in self.sources if each.commercial_use is commercial_use))

    @property
    def summary(self) -> str:
        forbidding, unknown = ", ".join(self.names(False)), ", ".join(self.names(None))
        if forbidding:
            ask = f"; not known for {unknown}: ask the owners" if unknown else ""
            return f"{self.id}: non-commercial use only, because of {forbidding}{ask}"
        if unknown:
            return f"unknown: ask the owners of {unknown}"
        return f"{self.id}: the strictest licence of the sources; all of them allow commercial use"


def derived_licence(provenance: Mapping[str, Any]) -> Licence:
    """The licence that follows from `sources_of` a model. By the first rule that holds:

    1. A source forbids commercial use: so does the model. It gets the strictest Creative Commons NC licence among the
       sources; `other` when a source has terms of its own, is unknown, or is CC BY-SA, which cannot be joined with NC.
    2. The licence of a source is unknown or not stated: `unknown`, ask its owners.
    3. All sources allow commercial use: the strictest of their licences, by the order of `COMMERCIAL_USE`.
    """
    sources = tuple(sources_of(provenance))
    found = {licence for source in sources for licence in source.licences}
    strictest = max(found & COMMERCIAL_USE.keys(), key=list(COMMERCIAL_USE).index, default=UNKNOWN)
    if COMMERCIAL_USE.get(strictest) is False:
        is_joint = UNKNOWN not in found and not any(licence.startswith("cc-by-sa") for licence in found)
        return Licence(strictest if is_joint else OTHER, sources)
    return Licence(UNKNOWN if UNKNOWN in found else strictest, sources)


def check_declared(declared: str, derived: Licence) -> None:
    """ValueError naming the source when `declared` does not forbid the commercial use that a source forbids."""
    if derived.commercial_use is False and allows_commercial_use(read_licences(declared)) is not False:
        reasons = {f"{each.name} ({each.stated})": None for each in derived.sources if each.commercial_use is False}
        raise ValueError(
            f"licence={declared!r} does not forbid commercial use, but the model was made from {', '.join(reasons)}: "
            "declare a non-commercial licence, or train without it"
        )


def allows_commercial_use(licences: Iterable[str]) -> bool | None:
    """False if one of the identifiers forbids it, else None if one is not known, else True."""
    answers = {COMMERCIAL_USE.get(licence) for licence in licences}
    return next((answer for answer in (False, None) if answer in answers), True)


def read_licences(stated: str) -> list[str]:
    """The hub identifiers that a text means, all of which hold; several are joined by " / ", as `depthkit pack` does.

    Remarks in brackets and a leading `NAME: ` are passed over, unless a word leaves a doubt, as in "MIT (code)".
    """
    return [_read_licence(part.replace("_", "-")) for part in stated.split(" / ")]


def _read_licence(text: str) -> str:
    plain = re.sub(r"\([^)]*\)", "", text).split(": ")[-1]
    name = re.sub(r"-licen[cs]e$", "", re.sub(r"[\s-]+", "-", plain.strip().lower()))
    name = ALIASES.get(name, name)
    if FORBIDS_COMMERCIAL_USE.search(text):
        return name if COMMERCIAL_USE.get(name) is False else OTHER
    return name if COMMERCIAL_USE.get(name) and not LEAVES_DOUBT.search(text) else UNKNOWN


# --- sources ---------------------------------------------------------------------------------------------------------


def sources_of(provenance: Mapping[str, Any]) -> list[Source]:
    """All that a model was made from, by the `provenance` of its bundle: training data, the teachers of its
    pseudo-labels and the initial encoder weights with all that these were made from, or imported weights.

    What the provenance does not record is a source whose licence is not stated.
    """
    data, encoder = provenance.get("data") or {}, encoder_of(provenance)
    sources = [Source(name_of(row), row.get("licence") or NOT_STATED, "training data") for row in data.values()]
    for row in data.values():
        if row.get("labels_licence", row.get("licence")) != row.get("licence"):
            sources.append(Source(f"labels of {name_of(row)}", row["labels_licence"] or NOT_STATED, "training data"))
    for sha256, parts in teachers_of(provenance).items():
        sources += _parts(parts, f"teacher {sha256[:12]}")
    if encoder:
        sources += _parts(encoder["sources"], f"initial encoder {encoder['name']}")
    if "licence" in provenance or provenance.get("stage") == "imported":
        name = f"weights {provenance.get('source') or 'of unknown origin'}"
        return [Source(name, provenance.get("licence") or NOT_STATED, "imported weights"), *sources]
    if not data:
        sources.append(Source("training data that are not recorded", NOT_STATED, "training data"))
    if "encoder_weights" not in provenance:
        sources.append(Source("initial encoder weights that are not recorded", NOT_STATED, "initial encoder"))
    return sources


def stated_licences(provenance: Mapping[str, Any]) -> dict[str, str]:
    """`sources_of` as name -> stated licence, for the provenance of what is made from the model in turn."""
    stated: dict[str, str] = {}
    for source in sources_of(provenance):
        parts = stated.get(source.name, source.stated).split(" / ")
        stated[source.name] = " / ".join(dict.fromkeys([*parts, *source.stated.split(" / ")]))
    return stated


def name_of(row: Mapping[str, Any]) -> str:
    """A data set by name, split and the start of its manifest's digest."""
    name = "/".join(str(row[key]) for key in ("name", "split") if row.get(key)) or "data without a name"
    return f"{name} ({row['digest'][:8]})" if row.get("digest") else name


def teachers_of(provenance: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Sha256 of each teacher that labeled training data -> its `stated_licences`, empty where not recorded."""
    rows = (provenance.get("data") or {}).values()
    recorded = provenance.get("teachers") or {}
    hashes = [row["teacher_sha256"] or "of unknown hash" for row in rows if "teacher_sha256" in row]
    return {sha256: recorded.get(sha256) or {} for sha256 in dict.fromkeys(hashes)}


def encoder_of(provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """`name`, `sha256` and `sources` of the initial encoder weights; None for random ones or if not recorded."""
    encoder = provenance.get("encoder_weights")
    if not encoder:
        return None
    if isinstance(encoder, str):  # as bundles said it first: "timm", or the folder of a bundle
        return {"name": "/".join(PurePath(encoder).parts[-2:]), "sha256": "", "sources": {}}
    return {"name": "", "sha256": "", "sources": {}, **encoder}


def _parts(stated: Mapping[str, str], part: str) -> list[Source]:
    if not stated:
        return [Source(f"{part} of unrecorded origin", NOT_STATED, part)]
    return [Source(name, licence or NOT_STATED, part) for name, licence in stated.items()]
