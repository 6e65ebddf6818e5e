"""DA-2K: photographs with pairs of points, one of them closer to the camera."""

import json
from collections.abc import Iterator
from pathlib import Path

from depthkit.data.datasets.layouts import required
from depthkit.data.pairs import Pair, safe_keys
from depthkit.data.sources import file


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """Every annotated image; the fact `pairs` lists [row 1, column 1, row 2, column 2, closer], closer being 1 or 2."""
    annotations = json.loads(required(root / "annotations.json", "of DA-2K.zip").read_text())
    keys = safe_keys({path: path.rpartition(".")[0].removeprefix("images/") for path in annotations})
    return {
        "test": (
            Pair(
                key=keys[path],
                image=file(root / path),
                facts={"source_id": path, "scene_type": Path(path).parent.name, "pairs": [_pair(p) for p in points]},
            )
            for path, points in annotations.items()
        )
    }


def _pair(annotation: dict[str, list[int] | str]) -> list[int]:
    closer = ("point1", "point2").index(str(annotation["closer_point"])) + 1
    return [int(number) for name in ("point1", "point2") for number in annotation[name]] + [closer]
