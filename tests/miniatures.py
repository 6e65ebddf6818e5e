"""Writing small copies of public data sets, and reading back what `depthkit pack` makes of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthkit.data.decode import decode_image, decode_target
from depthkit.data.manifest import Manifest, load_manifest
from depthkit.data.pack import main
from depthkit.data.shards import RawSample, ShardReader, image_member
from depthkit.types import Kind

SIZE = (24, 32)
"""(height, width) of a miniature image."""


def write(path: Path, data: bytes | np.ndarray | str) -> Path:
    """Bytes, text, or pixels (encoded as the suffix says; BGR) in a file whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, np.ndarray):
        done, encoded = cv2.imencode(path.suffix, data)
        assert done
        data = encoded.tobytes()
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> Path:
    return write(path, np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@dataclass(frozen=True)
class Packed:
    """A packed data set: its manifest and its samples by the id they have where they come from."""

    manifest: Manifest
    samples: dict[str, RawSample]

    def facts(self, source_id: str) -> dict[str, Any]:
        return json.loads(self.samples[source_id].members["json"])  # type: ignore[no-any-return]

    def image(self, source_id: str) -> np.ndarray:
        return decode_image(image_member(self.samples[source_id].members))

    def target(self, source_id: str, kind: Kind = "depth") -> np.ndarray:
        """(H, W) with NaN where nothing is valid."""
        spec, members = self.manifest.target, self.samples[source_id].members
        assert spec is not None
        sky = members.get("sky.png")
        values, valid_mask = decode_target(members[spec.extension], spec, self.facts(source_id), kind, sky=sky)
        return np.where(valid_mask, values, np.nan)


def pack_dataset(name: str, root: Path, out: Path, *, exit_code: int = 0) -> dict[str, Packed]:
    """Every split of `dataset=NAME root=ROOT`, by the name of its folder."""
    arguments = [f"dataset={name}", f"root={root}", "--out", str(out), "--workers", "1"]
    assert main(arguments) == exit_code
    return {path.parent.name: _read(path) for path in sorted(out.glob("*/manifest.json"))}


def rejected(out: Path, name: str) -> list[dict[str, str]]:
    path = out / name / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _read(path: Path) -> Packed:
    manifest = load_manifest(path)
    reader = ShardReader(manifest, path.parent)
    samples = [reader.read(i, j) for i in range(len(manifest.shards)) for j in range(len(reader.keys(i)))]
    return Packed(manifest, {json.loads(sample.members["json"])["source_id"]: sample for sample in samples})
