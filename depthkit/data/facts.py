"""What is known about a public data set: `data_manifests/NAME.yaml`. Facts only; how to use it is in `conf/dataset`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from depthkit.config import PACKAGE
from depthkit.data.manifest import TargetSpec, parse

FACTS_DIR = next(d for d in (PACKAGE / "data_manifests", PACKAGE.parent / "data_manifests") if d.is_dir())
"""Inside the package in a wheel, beside it in a checkout."""

Role = Literal["labeled", "unlabeled", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class Defect:
    """Something wrong with the files as they are shipped, and where it is reported."""

    text: str
    reported: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split as published: how many images, and where that number is stated."""

    images: int | None
    reported: str = ""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """One public data set.

    `name` is what `depthkit pack dataset=NAME` takes, `converter` the function that finds its files
    (`MODULE.FUNCTION` in `depthkit.data.datasets`). `commercial_use` is None where the licence does not say.
    `layout` describes the files as their authors ship them, relative to the root folder. `target` is None for images
    without labels; its `depth_range` is the one that the authors state, in metres.
    """

    name: str
    title: str
    roles: tuple[Role, ...]
    converter: str
    licence: str
    commercial_use: bool | None
    source: str
    citation: str
    layout: str
    splits: dict[str, Split]
    target: TargetSpec | None = None
    sky: str = ""
    defects: tuple[Defect, ...] = field(default_factory=tuple)


def load_facts(name: str) -> DatasetFacts:
    """The facts of a data set by name; ValueError lists the names that there are, or names the key that is wrong."""
    path = FACTS_DIR / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"dataset={name}: unknown; known are {', '.join(known_datasets())}")
    return read_facts(path)


def known_datasets() -> list[str]:
    return sorted(path.stem for path in FACTS_DIR.glob("*.yaml"))


def read_facts(path: Path) -> DatasetFacts:
    """One file of facts; ValueError names the file, the key and the value of whatever is wrong."""
    try:
        facts: DatasetFacts = parse(DatasetFacts, OmegaConf.to_container(OmegaConf.load(path)), "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if facts.name != path.stem:
        raise ValueError(f"{path}: name: {facts.name!r} is not that of the file")
    return facts
