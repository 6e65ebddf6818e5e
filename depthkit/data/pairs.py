"""What there is to pack: the lines of an index, or the images of a folder, with the facts about them.

An index is a text file with one JSON object a line. Paths are relative to its folder; null is the same as absent.

    id, source       name of the pair; name of the data set it belongs to (required, as is rgb)
    rgb, label       image and label file; a source without labels has images alone
    target           depth | ray_distance | inverse_depth | disparity (pixel offset of a rectified stereo pair)
    codec, scale     how the label is stored (`manifest.Codec`); stored number / scale = metres, 1/m or pixels
    metric           false: the unit or the stereo calibration is unknown
    invalid_also     further stored numbers that mean "no measurement"
    depth_range      [low, high] in metres, as its authors state
    aligned          false: the label is not registered to the image
    label_size       [width, height] where the label is smaller than the image
    K, camera        [fx, fy, cx, cy] in pixels of the image; what camera it is when not a pinhole
    baseline_m, doffs   calibrated stereo: metres and pixels
    pose, seq, frame    text file with the 4x4 camera-to-world matrix; place in a video
    right, domain, derived, synthetic   known, not packed
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from depthkit.data.manifest import Codec, TargetSpec
from depthkit.data.sources import Source, file

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp", ".tif", ".tiff"}
MAX_KEY_LENGTH = 60  # a tar header has room for 100 bytes, extension included

FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "source", "rgb", "label", "target", "codec"), str),
    **dict.fromkeys(("camera", "pose", "seq", "right", "domain"), str),
    **dict.fromkeys(("scale", "baseline_m", "doffs"), (int, float)),
    **dict.fromkeys(("metric", "aligned", "derived", "synthetic"), bool),
    **dict.fromkeys(("K", "invalid_also", "label_size", "depth_range"), list),
    "frame": int,
}
QUANTITIES = {
    "depth": "depth",
    "ray_distance": "ray_distance",
    "inverse_depth": "inverse_depth",
    "disparity": "stereo_disparity_px",
}
CODEC_SUFFIXES = {
    "png16": "png",
    "png8": "png",
    "pgm16": "pgm",
    "png16_sunrgbd": "png",
    "pgm16_nyu_raw": "pgm",
    "npy": "npy",
    "npz": "npz",
    "exr": "exr",
    "pfm": "pfm",
    "tiff32f": "tiff",
}
SAMPLE_FACTS = {
    "id": "source_id",
    "K": "intrinsics_px",
    "baseline_m": "baseline_m",
    "doffs": "doffs_px",
    "camera": "camera",
    "seq": "sequence",
    "frame": "frame",
}
"""Field of the index -> name in the sample's JSON member."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image with its label and its sky mask (8-bit grey PNG of the label's size, above 0 = sky), where it has them.

    `label_size` is (height, width), `facts` are those of the sample's JSON member.
    """

    key: str
    image: Source
    label: Source | None = None
    sky: Source | None = None
    pose: Path | None = None
    label_size: tuple[int, int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """The pairs of one data set, sorted by key; `split` is None where the command line says it.

    The texts are those of `data_manifests`, or come from a `SOURCE.md` beside the images, if any.
    """

    name: str
    target: TargetSpec | None
    pairs: tuple[Pair, ...]
    licence: str
    source: str
    description: str
    citation: str = ""
    split: str | None = None


def read_input(path: Path) -> list[PairSet]:
    """Data sets of an index (and of the folder `unlabeled/` beside it), or the one of a folder of images."""
    if path.is_dir():
        return [read_folder(path)]
    unlabeled = path.parent / "unlabeled"
    return read_index(path) + ([read_folder(unlabeled)] if unlabeled.is_dir() else [])


def read_folder(folder: Path) -> PairSet:
    """All images below a folder, hidden files left out. ValueError when there are none."""
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    }
    if not paths:
        raise ValueError(f"{folder}: no image here; known suffixes are {', '.join(sorted(IMAGE_SUFFIXES))}")
    keys = safe_keys({name: name.rpartition(".")[0] for name in paths})
    pairs = [Pair(key=keys[name], image=file(path), facts={"source_id": name}) for name, path in paths.items()]
    return _pair_set(safe(folder.resolve().name), None, pairs, folder)


def read_index(path: Path) -> list[PairSet]:
    """Data sets of an index, one per source. ValueError names the file, the line and the value that is wrong."""
    sources: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = _parse_line(line, f"{path}, line {number}")
            sources[safe(row["source"])].append(row)
    if not sources:
        raise ValueError(f"{path}: the index is empty")
    return [_index_set(name, rows, path.parent) for name, rows in sorted(sources.items())]


def safe(name: str) -> str:
    """A name for files: everything but letters, digits, `_` and `-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


def safe_keys(names: dict[str, str]) -> dict[str, str]:
    """Keys for ids, from their readable names. Names that become the same key get a hash of their id appended."""
    keys = {id_: safe(name)[-MAX_KEY_LENGTH:] for id_, name in names.items()}
    counts = Counter(keys.values())
    return {
        id_: key if counts[key] == 1 else f"{key}_{hashlib.sha256(id_.encode()).hexdigest()[:8]}"
        for id_, key in keys.items()
    }


def _parse_line(line: str, where: str) -> dict[str, Any]:
    """One index line without its null fields; `where` is kept in the row for later messages."""
    try:
        row = {name: value for name, value in json.loads(line).items() if value is not None}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where}: not a JSON object ({error}): {line[:80]!r}") from error
    for name, value in row.items():
        if name not in FIELDS:
            raise ValueError(f"{where}: unknown field {name!r}; known are {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]):
            raise ValueError(f"{where}: {name} is {value!r}, which has the wrong type")
    required = ["id", "source", "rgb"] + (["target", "codec"] if "label" in row else [])
    for name in required:
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing")
    for name, length in {"K": 4, "label_size": 2, "depth_range": 2}.items():
        if name in row and [type(value) in (int, float) for value in row[name]] != [True] * length:
            raise ValueError(f"{where}: {name} is {row[name]}, which is not a list of {length} numbers")
    return row | {"where": where}


def _index_set(name: str, rows: list[dict[str, Any]], root: Path) -> PairSet:
    """One source. ValueError when two of its rows share an id, or differ in how the label is to be read."""
    first, target = rows[0], _target(rows[0])
    by_id: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["id"] in by_id:
            raise ValueError(f"{row['where']}: id {row['id']!r} is already that of {by_id[row['id']]['where']}")
        by_id[row["id"]] = row
        other = _target(row)
        if other != target:
            raise ValueError(
                f"{row['where']}: source {name!r} is {other} here, but {target} at {first['where']}; "
                "labels that are read differently need different source names"
            )
    keys = safe_keys({id_: id_ for id_ in by_id})
    return _pair_set(name, target, [_pair(keys[id_], row, root) for id_, row in by_id.items()], root)


def _target(row: dict[str, Any]) -> TargetSpec | None:
    if "label" not in row:
        return None
    for name, known in {"target": tuple(QUANTITIES), "codec": get_args(Codec)}.items():
        if row[name] not in known:
            raise ValueError(f"{row['where']}: {name} is {row[name]!r}; known are {', '.join(known)}")
    quantity, metric = QUANTITIES[row["target"]], row.get("metric", True)
    if quantity == "stereo_disparity_px" and metric and not {"K", "baseline_m"} <= row.keys():
        raise ValueError(f"{row['where']}: metric stereo disparity needs K and baseline_m, else set metric to false")
    stem = "stereo" if quantity == "stereo_disparity_px" else "depth"
    try:
        return TargetSpec(
            quantity=quantity,  # type: ignore[arg-type]
            codec=row["codec"],
            extension=f"{stem}.{CODEC_SUFFIXES[row['codec']]}",
            scale=float(row.get("scale", 1.0)),
            metric=metric,
            invalid_values=tuple(map(float, row.get("invalid_also", ()))),
            aligned=row.get("aligned", True),
            depth_range=tuple(map(float, row["depth_range"])) if "depth_range" in row else None,  # type: ignore[arg-type]
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{row['where']}: {error}") from error


def _pair(key: str, row: dict[str, Any], root: Path) -> Pair:
    size = row.get("label_size")
    return Pair(
        key=key,
        image=file(root / row["rgb"]),
        label=file(root / row["label"]) if "label" in row else None,
        pose=root / row["pose"] if "pose" in row else None,
        label_size=(size[1], size[0]) if size else None,
        facts={name: row[old] for old, name in SAMPLE_FACTS.items() if old in row},
    )


def _pair_set(name: str, target: TargetSpec | None, pairs: Iterable[Pair], root: Path) -> PairSet:
    ordered = tuple(sorted(pairs, key=lambda pair: pair.key))
    return PairSet(name=name, target=target, pairs=ordered, **_read_source(ordered[0].image.path.parent, root))


def _read_source(folder: Path, root: Path) -> dict[str, str]:
    """Title, origin and licences from the nearest `SOURCE.md` from `folder` up to `root`.

    The title is its `# ` line, the others are rows of a table: `| repository | ... |`, `commit`, `licence of ...`.
    """
    folders = [folder, *folder.parents]
    for candidate in folders[: folders.index(root) + 1] if root in folders else [folder]:
        if (candidate / "SOURCE.md").is_file():
            text = (candidate / "SOURCE.md").read_text(encoding="utf-8")
            rows = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", text, re.MULTILINE))
            title = re.search(r"^# (.+)$", text, re.MULTILINE)
            licences = [value for name, value in rows.items() if name.startswith("licence of")]
            origin = [value for name, value in rows.items() if name in ("repository", "commit")]
            return {
                "licence": " / ".join(licences) or "see SOURCE.md of the originals",
                "source": " ".join(origin) or "see SOURCE.md of the originals",
                "description": title[1] if title else "",
            }
    return {"licence": "not stated", "source": "not stated", "description": ""}
