"""Your own data: an index or CSV, a folder with `images/` and `depth/`, columns of Hugging Face `datasets`, or images.

Each form becomes the rows that `depthkit.data.rows` describes, but for images alone, which may be too many to hold.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from depthkit.data.pairs import Pair, PairSet, PairStream, safe, safe_key
from depthkit.data.rows import (
    FIELDS,
    HDF5_SUFFIXES,
    Row,
    check_row,
    csv_rows,
    json_rows,
    read_index,
    read_source,
    row_sets,
)
from depthkit.data.sources import (
    IMAGE_SUFFIXES,
    Source,
    images_below,
    optional,
    read_parquet_value,
    suffix_of,
)

LABEL_CODECS = {
    ".pgm": "pgm16",
    ".npy": "npy",
    ".npz": "npz",
    ".exr": "exr",
    ".pfm": "pfm",
    ".tif": "tiff32f",
    ".tiff": "tiff32f",
    **dict.fromkeys(HDF5_SUFFIXES, "npz"),
}
"""The codec that the suffix of a label tells; that of a PNG depends on its bit depth."""

PNG_BIT_DEPTH = 24  # its place in the file
IMAGE_COLUMNS = ("image", "rgb")
DEPTH_COLUMNS = ("depth", "depth_map")
METADATA = {"metadata.jsonl": json_rows, "metadata.csv": csv_rows}
MOST_NAMED = 3


def read_input(path: Path, label_fields: Row) -> list[PairSet]:
    """Data sets of a file or folder. `label_fields` are fields of rows that say nothing else, for labels alone.

    ValueError names the file, the place and the value of what is wrong.
    """
    if path.is_file() and path.suffix.lower() != ".parquet":
        unlabeled = path.parent / "unlabeled"
        return read_index(path, label_fields) + ([read_folder(unlabeled)] if unlabeled.is_dir() else [])
    defaults = {"target": "depth"} | label_fields
    if path.is_file():
        return [_read_parquet([path], safe(path.stem), defaults)]
    if (path / "images").is_dir() and (path / "depth").is_dir():
        return [_read_pairs(path, defaults)]
    for name, read in METADATA.items():
        if (path / name).is_file():
            return [_read_metadata(path / name, read, defaults)]
    if parquets := sorted(path.rglob("*.parquet")):
        return [_read_parquet(parquets, _name(path), defaults)]
    if label_fields:
        raise ValueError(
            f"{path}: {', '.join(label_fields)} speaks of labels, but there are none: no depth/ beside images/, no "
            "metadata.jsonl or metadata.csv, no .parquet"
        )
    return [read_folder(path)]


def read_folder(folder: Path) -> PairSet:
    """All images below a folder, in archives too, hidden files left out. ValueError when there are none.

    Looked through twice, since a key must be a name that no other image gets: a key that several would get has a hash
    of the whole name appended. What is held is eight bytes an image.
    """
    hashes = np.fromiter((_hash(_key(name)) for name, _ in images_below(folder)), np.uint64)
    if not len(hashes):
        raise ValueError(f"{folder}: no image here; known suffixes are {', '.join(sorted(IMAGE_SUFFIXES))}")
    values, counts = np.unique(hashes, return_counts=True)
    repeated = set(values[counts > 1].tolist())

    def find() -> Iterator[Pair]:
        for name, source in images_below(folder):
            key = _key(name)
            if _hash(key) in repeated:
                key = f"{key}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            yield Pair(key=key, image=source, facts={"source_id": name})

    facts = read_source(next(images_below(folder))[1].path.parent, folder)
    return PairSet(name=_name(folder), target=None, pairs=PairStream(find), expected=len(hashes), **facts)


def _key(name: str) -> str:
    return safe_key(name.rpartition(".")[0])


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _name(folder: Path) -> str:
    return safe(folder.resolve().name)


# --- images/ and depth/ ----------------------------------------------------------------------------------------------


def _read_pairs(folder: Path, defaults: Row) -> PairSet:
    """Files of the same name below `images/` and `depth/`. One that lacks its partner is rejected when packed."""
    images = _by_stem(folder / "images", IMAGE_SUFFIXES)
    labels = _by_stem(folder / "depth", {".png", *LABEL_CODECS})
    if not images.keys() & labels.keys():
        raise ValueError(
            f"{folder}: no label has the name of an image: images/ holds {_some(images)}, depth/ holds {_some(labels)}"
        )
    suffixes = {path.suffix.lower() for path in labels.values()}
    if len(suffixes) > 1:
        raise ValueError(
            f"{folder / 'depth'}: labels of several kinds ({', '.join(sorted(suffixes))}); make a folder of each"
        )
    (suffix,) = suffixes
    with min(labels.values()).open("rb") as first:
        codec = codec_of(suffix, first.read(PNG_BIT_DEPTH + 1))
    rows = []
    for stem in sorted(images.keys() | labels.keys()):
        image = images.get(stem, folder / "images" / f"{stem}.jpg")
        label = labels.get(stem, folder / "depth" / f"{stem}{suffix}")
        files = {"rgb": str(image.relative_to(folder)), "label": str(label.relative_to(folder))}
        row = {"id": stem, "source": _name(folder), "codec": codec, **files}
        rows.append(check_row(defaults | row | {"where": str(folder)}))
    return row_sets(rows, folder / "images")[0]


def codec_of(suffix: str, data: bytes) -> str:
    """The codec of a label by its suffix and, for a PNG, by how it begins."""
    if suffix == ".png":
        return "png8" if data[PNG_BIT_DEPTH:][:1] == b"\x08" else "png16"
    return LABEL_CODECS[suffix]


def _by_stem(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    """Files by their path below the folder without its suffix; ValueError when two have the same."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise ValueError(f"{path} and {found[stem]} have the same name; move one of them")
            found[stem] = path
    return found


def _some(found: dict[str, Path]) -> str:
    return ", ".join([path.name for path in found.values()][:MOST_NAMED]) + (", ..." if len(found) > MOST_NAMED else "")


# --- columns of Hugging Face datasets --------------------------------------------------------------------------------


def _read_metadata(path: Path, read: Callable[[Path], Iterator[Row]], defaults: Row) -> PairSet:
    """An image folder: `file_name` (or `image_file_name`) and `depth_file_name` in each row of `metadata.*`.

    Columns with the names of fields are used, others ignored.
    """
    rows = []
    for found in read(path):
        row = defaults | {name: value for name, value in found.items() if name in FIELDS or name == "where"}
        row["rgb"] = _first(found, "file_name", *(f"{name}_file_name" for name in IMAGE_COLUMNS))
        label = _first(found, *(f"{name}_file_name" for name in DEPTH_COLUMNS))
        if row["rgb"] is None:
            raise ValueError(f"{found['where']}: column 'file_name' is missing; there are {', '.join(found)}")
        row |= {"id": str(found.get("id", row["rgb"])), "source": _name(path.parent)}
        if label is not None:
            row |= {"label": label, "codec": found.get("codec") or _codec_of_file(path.parent / label, found["where"])}
        rows.append(check_row(row))
    return row_sets(rows, path)[0]


def _codec_of_file(path: Path, where: str) -> str:
    if path.suffix.lower() not in {".png", *LABEL_CODECS}:
        known = ", ".join([".png", *LABEL_CODECS])
        raise ValueError(f"{where}: no depth is read from {path.name!r}; known suffixes are {known}")
    try:
        with path.open("rb") as file:
            return codec_of(path.suffix.lower(), file.read(PNG_BIT_DEPTH + 1))
    except OSError:
        return codec_of(path.suffix.lower(), b"")


def _first(row: Row, *names: str) -> Any:
    return next((row[name] for name in names if name in row), None)


def _read_parquet(paths: list[Path], name: str, defaults: Row) -> PairSet:
    """Parquet files with a column of images and one of depth, as `datasets` stores them: bytes, or {bytes, path}.

    How the images and labels of all rows are stored is seen from the first. Columns with the names of fields are used.
    """
    rows = [row for path in paths for row in _parquet_rows(path, name, defaults)]
    if not rows:
        raise ValueError(f"{paths[0]}: no row in it")
    return row_sets(rows, paths[0])[0]


def _parquet_rows(path: Path, name: str, defaults: Row) -> Iterator[Row]:
    with optional("pyarrow.parquet").ParquetFile(path) as content:
        columns = content.schema_arrow.names
        image, depth = (next((c for c in columns if c in known), None) for known in (IMAGE_COLUMNS, DEPTH_COLUMNS))
        if image is None:
            raise ValueError(f"{path}: no column {' or '.join(IMAGE_COLUMNS)}; there are {', '.join(columns)}")
        facts = [column for column in columns if column in FIELDS]
        groups = [content.read_row_group(group, facts) for group in range(content.num_row_groups)]
        sizes = [content.metadata.row_group(group).num_rows for group in range(content.num_row_groups)]
    if not sum(sizes):
        return
    first = next(group for group, size in enumerate(sizes) if size)
    image_suffix = _cell_suffix(path, image, first)
    label_data = read_parquet_value(path, depth, first, 0) if depth else b""
    label_suffix = suffix_of(label_data)
    if depth and label_suffix not in {".png", *LABEL_CODECS}:
        raise ValueError(f"{path}: column {depth!r}: no depth is read from values that begin with {label_data[:8]!r}")
    for group, size in enumerate(sizes):
        values = groups[group].to_pylist() if facts else [{}] * size
        for row, given in enumerate(values):
            fields = {column: value for column, value in given.items() if value is not None}
            fields |= {"id": str(fields.get("id", f"{path.stem}/{sum(sizes[:group]) + row}")), "source": name}
            fields |= {"rgb": Source(path, image_suffix, read_parquet_value, (image, group, row))}
            if depth:
                fields["label"] = Source(path, label_suffix, read_parquet_value, (depth, group, row))
                fields.setdefault("codec", codec_of(label_suffix, label_data))
            where = f"{path}, row {sum(sizes[:group]) + row}"
            yield check_row(defaults | fields | {"where": where})


def _cell_suffix(path: Path, column: str, group: int) -> str:
    data = read_parquet_value(path, column, group, 0)
    suffix = suffix_of(data)
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: column {column!r}: no image begins with {data[:8]!r}")
    return suffix
