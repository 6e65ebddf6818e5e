"""`depthkit inspect`: does a data set hold what its manifest says, and do the labels look as stated?"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from depthkit.data.decode import decode_image, decode_target
from depthkit.data.manifest import Manifest, load_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.shards import RawSample, ShardReader, image_member, verify_shard
from depthkit.types import Kind

DESCRIPTION = """\
Check data sets: size and sha256 of every shard, the number of samples, and a sample of the images and labels, decoded.
Prints what the labels look like, and what contradicts the manifest. Exit code: 0 all as stated, 1 a contradiction."""

NUM_PIXELS = 10_000  # taken from each label for the percentiles
PERCENTILES = (1, 50, 99)
LOG_WIDTH = 140  # columns of the table where there is no terminal
STATED_RANGE_SLACK = 1.05  # sensors and roundings overstep a range a little; a wrong scale does by far


@dataclass(kw_only=True)
class Findings:
    """What was seen in one data set. `values` are depths in metres, or disparities when the labels have no unit."""

    manifest: Manifest | None = None
    problems: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    valid_shares: list[float] = field(default_factory=list)
    sky_shares: list[float] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def percentiles(self) -> np.ndarray | None:
        return np.percentile(np.concatenate(self.values), PERCENTILES) if self.values else None


def main(argv: list[str]) -> int:
    """Inspect the manifests of the command line; returns the exit code that `--help` describes."""
    parser = argparse.ArgumentParser(
        "depthkit inspect", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="manifest.json of a data set")
    parser.add_argument(
        "--samples", type=int, default=200, metavar="N", help="samples to decode per data set; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error("--samples must be at least 1")
    findings = {path: inspect(path, num_samples=args.samples) for path in args.manifests}
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(_table(findings))
    problems = [f"{path}: {problem}" for path, found in findings.items() for problem in found.problems]
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


def inspect(path: Path, *, num_samples: int) -> Findings:
    """Check one data set; `num_samples` of its samples, evenly spread, are decoded. Problems are listed, not raised."""
    found = Findings()
    try:
        found.manifest = load_manifest(path)
    except (OSError, ValueError) as error:
        found.problems.append(str(error))
        return found
    reader = ShardReader(found.manifest, path.parent)
    for number, shard in enumerate(found.manifest.shards):
        try:
            verify_shard(path.parent, shard)
            reader.keys(number)  # opening a shard compares the number of samples
        except (OSError, SampleError) as error:
            found.problems.append(str(error))
    if not found.problems:
        _look_at_samples(found, found.manifest, reader, num_samples)
        _compare_range(found, found.manifest)
    return found


def label_kind(manifest: Manifest) -> Kind:
    """Depth where the labels can give it, else disparity."""
    return "depth" if manifest.target and manifest.target.metric else "disparity"


def _look_at_samples(found: Findings, manifest: Manifest, reader: ShardReader, num_samples: int) -> None:
    for shard, sample in _spread(manifest, num_samples):
        where = f"{manifest.shards[shard].path}, sample {sample}"
        try:
            raw = reader.read(shard, sample)
            where = f"{manifest.shards[shard].path}, {raw.key}"
            _look_at(found, manifest, raw)
        except (OSError, ValueError) as error:
            found.problems.append(f"{where}: {error}")


def _spread(manifest: Manifest, num_samples: int) -> Iterator[tuple[int, int]]:
    """(shard, sample) of at most `num_samples` positions, evenly spread."""
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    total = manifest.num_samples
    for position in np.unique(np.linspace(0, total - 1, min(num_samples, total)).astype(int)):
        shard = int(np.searchsorted(ends, position, side="right"))
        yield shard, int(position - ends[shard] + manifest.shards[shard].num_samples)


def _look_at(found: Findings, manifest: Manifest, raw: RawSample) -> None:
    """Decode one sample into the findings. Labels are often lossless and large, so few of their pixels are kept."""
    image = decode_image(image_member(raw.members))
    found.sizes.append((image.shape[0], image.shape[1]))
    if manifest.target is None:
        return
    facts = json.loads(raw.members.get("json", b"{}"))
    target, valid_mask = decode_target(
        raw.members[manifest.target.extension], manifest.target, facts, label_kind(manifest)
    )
    values = target[valid_mask]
    found.valid_shares.append(float(valid_mask.mean()))
    found.values.append(values[:: max(1, values.size // NUM_PIXELS)])
    if "sky.png" in raw.members:
        sky = decode_image(raw.members["sky.png"])
        found.sky_shares.append(float((sky > 0).mean()))


def _compare_range(found: Findings, manifest: Manifest) -> None:
    """A wrong scale moves the percentiles out of the range that the authors state."""
    percentiles = found.percentiles()
    if (
        percentiles is None
        or manifest.target is None
        or manifest.target.depth_range is None
        or not manifest.target.metric
    ):
        return
    low, high = manifest.target.depth_range
    if percentiles[0] < low / STATED_RANGE_SLACK or percentiles[-1] > high * STATED_RANGE_SLACK:
        found.problems.append(
            f"98 % of the labels lie in {percentiles[0]:.3g} to {percentiles[-1]:.3g} m, the manifest states "
            f"{low:g} to {high:g} m; is target.scale = {manifest.target.scale:g} right?"
        )


def _table(findings: dict[Path, Findings]) -> Table:
    table = Table("data set", "split", "decoded", "image size", "valid", "sky", "1, 50, 99 % of values", "verdict")
    for path, found in findings.items():
        manifest = found.manifest
        verdict = f"[red]{len(found.problems)} problems" if found.problems else "[green]as stated"
        if manifest is None:
            table.add_row(str(path), *[""] * 6, verdict)
            continue
        table.add_row(
            manifest.name,
            manifest.split,
            f"{len(found.sizes)} of {manifest.num_samples}",
            _sizes(found.sizes),
            _share(found.valid_shares),
            _share(found.sky_shares),
            _values(found.percentiles(), "m" if label_kind(manifest) == "depth" else ""),
            verdict,
        )
    return table


def _sizes(sizes: list[tuple[int, int]]) -> str:
    """Width x height of the smallest and the largest image."""
    ordered = sorted(set(sizes), key=lambda size: size[0] * size[1])
    ends = ordered[:1] + ordered[1:][-1:]
    return " to ".join(f"{width}x{height}" for height, width in ends)


def _share(shares: list[float]) -> str:
    return f"{np.mean(shares):.1%}" if shares else ""


def _values(percentiles: np.ndarray | None, unit: str) -> str:
    return "" if percentiles is None else "  ".join(f"{value:.3g}" for value in percentiles) + f" {unit}"
