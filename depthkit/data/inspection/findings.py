"""What a run of `depthkit inspect` found, and how to say it in few words."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from depthkit.data.inspection.contradictions import percentiles
from depthkit.data.inspection.duplicates import BITS, Duplicates, Match, Pictures
from depthkit.data.inspection.look import DataSet, Look
from depthkit.data.manifest import Manifest
from depthkit.data.remote import shown
from depthkit.types import Kind

DENSE, HALF = 0.98, 0.5  # share of valid pixels
CONNECTED = 0.9  # share of the measured pixels with a neighbour
IN_LINES = 3.0  # times as many neighbours beside a pixel as above and below it


@dataclass(kw_only=True)
class Findings:
    """What was seen in one data set. Problems are reasons not to use it as it is, warnings reasons to look."""

    path: Path | str
    data: DataSet | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def name(self) -> str:
        """Path or URL of the manifest, for messages."""
        return shown(self.path)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the images."""
        return [look.image_size for look in self.looks if look.image_size]

    @property
    def valid_shares(self) -> list[float]:
        return [look.valid_share for look in self.looks if look.valid_share is not None]

    @property
    def sky_shares(self) -> list[float]:
        return [look.sky_share for look in self.looks if look.sky_share is not None]

    def percentiles(self) -> np.ndarray | None:
        return percentiles(self.looks)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that one run found."""

    findings: list[Findings]
    duplicates: Duplicates

    def describe(self, match: Match) -> str:
        """Key of the second image of a match, and what it looks like; a manifest is named where it is another one."""
        (first, number), (second, other) = match.first, match.second
        file = f"{self.findings[first].name}: " if first != second else ""
        relation = "looks the same as" if match.distance == 0 else "looks nearly the same as"
        distance = f"(distance {match.distance} of {BITS})"
        return f"{self.key(second, other)} {relation} {file}{self.key(first, number)} {distance}"

    def key(self, number: int, picture: int) -> str:
        """Key of a hashed image."""
        found = self.findings[number]
        assert found.data is not None
        return found.data.key(*found.pictures.places[picture].tolist())


def label_kind(manifest: Manifest) -> Kind:
    """Depth where the labels can give it, else disparity."""
    return "depth" if manifest.target and manifest.target.metric else "disparity"


def facts(found: Findings) -> dict[str, str]:
    """Name -> what was seen, for a table."""
    if found.data is None:
        return {}
    manifest = found.data.manifest
    span = found.percentiles()
    unit = " m" if label_kind(manifest) == "depth" else ""
    return {
        "decoded": f"{len(found.looks)} of {manifest.num_samples}",
        "image size": _sizes(found.sizes),
        "label size": _label_sizes(found.looks),
        "video": _video(manifest),
        "valid": _share(found.valid_shares),
        "layout": layout(found.looks),
        "sky": _share(found.sky_shares) if any(found.sky_shares) else "",
        "1, 50, 99 % of values": "" if span is None else "  ".join(f"{value:.3g}" for value in span) + unit,
    }


def _video(manifest: Manifest) -> str:
    """The frames that lie in runs, and the shortest and longest of them; empty where there are none."""
    runs = [run for shard in manifest.shards for run in shard.runs if run > 1]
    ends = " to ".join(map(str, sorted({min(runs), max(runs)}))) if runs else ""
    return f"{sum(runs)} frames in runs of {ends}" if runs else ""


def layout(looks: Sequence[Look]) -> str:
    """How the measured pixels lie: dense, with holes, in lines as a LiDAR leaves them, or scattered."""
    patterns = [look.pattern for look in looks if look.pattern]
    if not patterns:
        return ""
    valid_share = np.mean([look.valid_share for look in looks if look.valid_share is not None])
    if valid_share >= DENSE:
        return "dense"
    beside, above = np.mean(patterns, axis=0)
    if beside > IN_LINES * above:
        return "sparse, in lines"
    if min(beside, above) < CONNECTED:
        return "sparse, scattered"
    return "dense with holes" if valid_share >= HALF else "sparse, in clusters"


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Width x height of the smallest and the largest image."""
    ordered = sorted(set(sizes), key=lambda size: size[0] * size[1])
    ends = ordered[:1] + ordered[1:][-1:]
    return " to ".join(f"{width}x{height}" for height, width in ends)


def _label_sizes(looks: Sequence[Look]) -> str:
    """Empty where every label has the size of its image."""
    pairs = [(look.label_size, look.image_size) for look in looks if look.label_size]
    if all(label == image for label, image in pairs):
        return ""
    ratios = [label[0] / image[0] for label, image in pairs if image]
    text = _sizes([label for label, _ in pairs])
    return f"{text} ({min(ratios):.2g} of the image)" if ratios else text


def _share(shares: Sequence[float]) -> str:
    return f"{np.mean(shares):.1%}" if shares else ""
