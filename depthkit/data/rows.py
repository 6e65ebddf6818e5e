"""Your own data as rows: the lines of an index (JSON lines) or of a CSV, checked and turned into data sets.

Paths are relative to the folder of the file; null, or an empty cell, is the same as absent. In a CSV a list is numbers
with spaces between them, or JSON.

    id, source       name of the pair; name of the data set it belongs to (required, as is rgb)
    rgb, label       image and label file; a source without labels has images alone
    sky              8-bit grey PNG of the label's size, above 0 = sky
    target           depth | ray_distance | inverse_depth | disparity (pixel offset of a rectified stereo pair)
    codec, scale     how the label is stored (`manifest.Codec`); stored number / scale = metres, 1/m or pixels.
                     Integers need a scale, unless metric is false
    array            name of the array, where the label is an HDF5 file; its codec is npz
    metric           false: the unit or the stereo calibration is unknown
    invalid_also     further stored numbers that mean "no measurement"
    depth_range      [low, high] in metres, as its authors state
    aligned          false: the label is not registered to the image
    label_size       [width, height] where the label is smaller than the image
    K, camera        [fx, fy, cx, cy] in pixels of the image; what camera it is when not a pinhole
    baseline_m, doffs   calibrated stereo: metres and pixels
    pose, seq, frame    text file with the 4x4 camera-to-world matrix; place in a video. Frames of one seq, with K, are
                     what `stage=video` learns from: they are packed in order, and the manifest lists their runs
    right, domain, derived, synthetic   known, not packed
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from depthkit.data.codecs import CODECS
from depthkit.data.manifest import Codec, TargetSpec
from depthkit.data.pairs import Pair, PairSet, in_order, safe, safe_keys
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, file, h5_array

FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "source", "rgb", "label", "sky", "target", "codec", "array"), str),
    **dict.fromkeys(("camera", "pose", "seq", "right", "domain"), str),
    **dict.fromkeys(("scale", "baseline_m", "doffs"), (int, float)),
    **dict.fromkeys(("metric", "aligned", "derived", "synthetic"), bool),
    **dict.fromkeys(("K", "invalid_also", "label_size", "depth_range"), list),
    "frame": int,
}
LENGTHS = {"K": 4, "label_size": 2, "depth_range": 2}
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
HDF5_SUFFIXES = {".h5", ".hdf5"}
SAMPLE_FACTS = {
    "id": "source_id",
    "K": "intrinsics_px",
    "baseline_m": "baseline_m",
    "doffs": "doffs_px",
    "camera": "camera",
    "seq": "sequence",
    "frame": "frame",
}
"""Field of a row -> name in the sample's JSON member."""

Row = dict[str, Any]
"""Fields of one pair, and `where` it stands. `rgb` and `label` may be sources instead of paths."""


def read_index(path: Path, defaults: Row) -> list[PairSet]:
    """Data sets of an index or CSV, one per source; `defaults` are fields of rows that say nothing else.

    ValueError names the file, the line and the value that is wrong.
    """
    rows = csv_rows(path) if path.suffix.lower() == ".csv" else json_rows(path)
    return row_sets([check_row(defaults | row) for row in rows], path)


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON-lines file, without their null fields."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                row = {name: value for name, value in json.loads(line).items() if value is not None}
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{where}: not a JSON object ({error}): {line[:80]!r}") from error
            yield row | {"where": where}


def csv_rows(path: Path) -> Iterator[Row]:
    """The lines of a CSV with a header, without their empty cells; numbers, lists and true/false as their field has."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if None in cells:
                raise ValueError(f"{where}: {cells[None]} stand beyond the last column of the header; quote commas")
            row = {
                name: _parse_cell(name, text.strip(), where) for name, text in cells.items() if text and text.strip()
            }
            yield row | {"where": where}


def _parse_cell(name: str, text: str, where: str) -> Any:
    """The text of a CSV cell as its field has it; text where the field is unknown."""
    expected = FIELDS.get(name, str)
    try:
        if expected is str:
            return text
        if expected is list and not text.startswith("["):
            return [float(number) for number in text.split()]
        return json.loads(text.lower())
    except ValueError as error:
        form = "a list of numbers" if expected is list else "true or false" if expected is bool else "a number"
        raise ValueError(f"{where}: {name} is {text!r}, which is not {form}") from error


def check_row(row: Row) -> Row:
    """The row; ValueError says where it stands and which field is unknown, missing or of the wrong type."""
    where = row["where"]
    for name, value in row.items():
        if name == "where" or (name in ("rgb", "label") and isinstance(value, Source)):
            continue
        if name not in FIELDS:
            raise ValueError(f"{where}: unknown field {name!r}; known are {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]):
            raise ValueError(f"{where}: {name} is {value!r}, which has the wrong type")
    required = ["id", "source", "rgb"] + (["target", "codec"] if "label" in row else [])
    for name in required:
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing")
    for name in ("K", "label_size", "depth_range", "invalid_also"):
        length = LENGTHS.get(name, len(row.get(name, ())))
        if name in row and [type(value) in (int, float) for value in row[name]] != [True] * length:
            raise ValueError(f"{where}: {name} is {row[name]}, which is not a list of {length} numbers")
    return row


def row_sets(rows: Iterable[Row], path: Path) -> list[PairSet]:
    """Data sets of checked rows, one per source; paths are relative to the folder of `path`."""
    sources: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        sources[safe(row["source"])].append(row)
    if not sources:
        raise ValueError(f"{path}: the index is empty")
    return [_row_set(name, found, path.parent) for name, found in sorted(sources.items())]


def _row_set(name: str, rows: list[Row], root: Path) -> PairSet:
    """One source. ValueError when two of its rows share an id, or differ in how the label is to be read."""
    first = next((row for row in rows if "label" in row), rows[0])
    target = _target(first)
    by_id: dict[str, Row] = {}
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
    pairs = in_order(_pair(keys[id_], row, root) for id_, row in by_id.items())
    _check_scale(pairs, target, first)
    return PairSet(name=name, target=target, pairs=pairs, **read_source(pairs[0].image.path.parent, root))


def _target(row: Row) -> TargetSpec | None:
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


def _check_scale(pairs: Sequence[Pair], target: TargetSpec | None, first: Row) -> None:
    """ValueError where the labels hold integers and nobody said how many make one unit."""
    if target is None or "scale" in first or not target.metric:
        return
    for pair in pairs:
        try:
            stored = CODECS[target.codec](pair.label.read()) if pair.label else None
        except (OSError, SampleError):
            continue  # packing rejects it with the reason
        if stored is not None and stored.dtype.kind in "iu":
            raise ValueError(
                f"{first['where']}: {pair.label} holds {stored.dtype} numbers up to {stored.max()}, but no scale is "
                "stated; state scale (--scale): 1000 for millimetres, 256 for KITTI, 1 for metres or pixels"
            )
        return


def _pair(key: str, row: Row, root: Path) -> Pair:
    size = row.get("label_size")
    image, label = row["rgb"], row.get("label")
    return Pair(
        key=key,
        image=image if isinstance(image, Source) else file(root / image),
        label=_label(root / label, row) if isinstance(label, str) else label,
        sky=file(root / row["sky"]) if "sky" in row else None,
        pose=root / row["pose"] if "pose" in row else None,
        label_size=(size[1], size[0]) if size else None,
        facts={name: row[old] for old, name in SAMPLE_FACTS.items() if old in row},
    )


def _label(path: Path, row: Row) -> Source:
    if path.suffix.lower() not in HDF5_SUFFIXES:
        return file(path)
    if "array" not in row:
        raise ValueError(f"{row['where']}: {path} is an HDF5 file; state the name of its array as array (--array)")
    return Source(path, ".npz", h5_array, (row["array"],))


def read_source(folder: Path, root: Path) -> dict[str, Any]:
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
