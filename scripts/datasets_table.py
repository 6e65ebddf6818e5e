"""Write docs/datasets.md, the page of all public data sets, from the facts in data_manifests/.

python scripts/datasets_table.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from depthkit.data.facts import DatasetFacts, Split, known_datasets, load_facts
from depthkit.data.manifest import TargetSpec
from depthkit.files import atomic_write

PAGE = Path(__file__).parents[1] / "docs" / "datasets.md"

HEAD = """\
# Public data sets

`depthkit pack dataset=NAME root=DIR --out OUT` packs a data set as its authors ship it. This page is made from the
facts in `data_manifests/` by `python scripts/datasets_table.py`. "Images" are counts as published, "?" where none is
known to us; "commercial use" is what the licence says, "?" where it does not. Read the licence itself before you rely
on either. Links in a defect lead to where it is reported.
"""

COLUMNS = ("data set", "role", "images", "licence", "commercial use", "label")

QUANTITIES = {
    "depth": "planar depth",
    "ray_distance": "ray distance",
    "inverse_depth": "inverse depth",
    "stereo_disparity_px": "stereo disparity",
}
UNITS = {"depth": "m", "ray_distance": "m", "inverse_depth": "1/m"}
"""Where the labels are metric; a pixel offset is one with or without calibration."""

ENCODINGS = {"png16": "16-bit PNG", "png8": "8-bit PNG", "tiff32f": "32-bit float TIFF", "npy": ".npy", "npz": ".npz"}


def main() -> None:
    with atomic_write(PAGE) as file:
        file.write(page().encode())


def page() -> str:
    """The whole page: one table, then a section for each data set."""
    facts = [load_facts(name) for name in known_datasets()]
    table = [row(COLUMNS), row(["---"] * len(COLUMNS)), *(row(cells(f)) for f in facts)]
    return "\n".join([HEAD, *table, "", *(line for f in facts for line in section(f))])


def row(values: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(" ".join(value.split()).replace("|", "\\|") for value in values) + " |"


def cells(facts: DatasetFacts) -> list[str]:
    link = f"[{facts.name}](#{facts.name})"
    images = "<br>".join(f"{name} {count(split)}" for name, split in facts.splits.items())
    commercial = {True: "yes", False: "no", None: "?"}[facts.commercial_use]
    return [link, ", ".join(facts.roles), images, facts.licence, commercial, label(facts.target)]


def count(split: Split) -> str:
    return "?" if split.images is None else f"{split.images:,}"


def label(target: TargetSpec | None) -> str:
    """What is stored, how, and in which unit."""
    if target is None:
        return "none"
    unit = "px" if target.quantity == "stereo_disparity_px" else UNITS[target.quantity] if target.metric else "no unit"
    scaled = f"stored / {target.scale:g} = {unit}" if target.scale != 1 else unit
    encoding = ENCODINGS.get(target.codec, target.codec.upper().replace("_", " "))
    return f"{QUANTITIES[target.quantity]}, {encoding}, {scaled}"


def section(facts: DatasetFacts) -> Iterator[str]:
    yield f"## {facts.name}\n"
    yield f"{facts.title}\n"
    yield f"Source: {facts.source}\n"
    yield f"Cite: {' '.join(facts.citation.split())}\n"
    yield f"```text\n{facts.layout.rstrip()}\n```\n"
    for name, split in facts.splits.items():
        yield f"- {name}: {count(split)} images" + (f" ({split.reported})" if split.reported else "")
    if facts.sky:
        yield f"- sky: {' '.join(facts.sky.split())}"
    for defect in facts.defects:
        yield f"- known defect: {' '.join(defect.text.split())} ({reference(defect.reported)})"
    yield ""


def reference(reported: str) -> str:
    """A link called `repository#number` for an issue, by its site otherwise; text that is no address as it is."""
    if not reported.startswith("http"):
        return reported
    issue = re.match(r"https://github\.com/[^/]+/([^/]+)/(?:issues|pull)/(\d+)", reported)
    return f"[{issue[1]}#{issue[2]}]({reported})" if issue else f"[{urlparse(reported).netloc}]({reported})"


if __name__ == "__main__":
    main()
