"""The manifest of a data set: which shards it has, and the facts needed to read them. Nothing about how to use it.

A manifest is a JSON file that mirrors `Manifest`; shard paths are relative to its folder or URL. Reading is strict: an
unknown, missing or wrong-typed key is an error that names the file, the key and the value.
"""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from depthkit.data.remote import is_remote, read_url, shown
from depthkit.files import atomic_write

Quantity = Literal["depth", "ray_distance", "inverse_depth", "stereo_disparity_px", "disparity"]
"""`depth`: planar z. `ray_distance`: along the viewing ray. `inverse_depth`: 1/z. `stereo_disparity_px`: pixel offset.
`disparity`: inverse depth up to scale and shift (pseudo-labels)."""

Codec = Literal["png16", "png8", "pgm16", "png16_sunrgbd", "pgm16_nyu_raw", "npy", "npz", "pfm", "tiff32f", "exr"]
"""How the stored numbers are written; `depthkit.data.codecs` has one reader for each."""


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """How the label member of a data set is to be read.

    `extension` is the member's name after the key, such as `depth.png`. The stored number divided by `scale` gives
    metres (depth, ray distance), 1/m (inverse depth) or pixels (stereo). `metric` is False when the unit is unknown or
    the stereo calibration is missing: such labels serve relative training only. Stored 0, negative, NaN and inf always
    mean "no measurement", `invalid_values` lists further ones; `sky_values` mean sky, which has no depth and disparity
    0. `aligned` is False when the label is not registered to the image. `depth_range` is what the authors state, in
    metres.
    """

    quantity: Quantity
    codec: Codec
    extension: str
    scale: float = 1.0
    metric: bool = True
    invalid_values: tuple[float, ...] = ()
    sky_values: tuple[float, ...] = ()
    aligned: bool = True
    depth_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"target.scale: {self.scale!r} is not a positive number")
        if self.quantity == "disparity" and self.metric:
            raise ValueError("target.metric: affine-invariant disparity has no unit; set metric to false")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar: `path` relative to the manifest's folder or URL, or itself a URL, and what it holds.

    `runs` are the lengths of the runs of consecutive frames of one video, in the order of the tar; () without video.
    """

    path: str
    num_samples: int
    num_bytes: int
    sha256: str
    runs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"shard {self.path}: num_samples: {self.num_samples!r} is not positive")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"shard {self.path}: sha256: {self.sha256!r} is not 64 lower-case hexadecimal digits")
        if self.runs and (min(self.runs) < 1 or sum(self.runs) != self.num_samples):
            raise ValueError(f"shard {self.path}: runs: {self.runs!r} are not the {self.num_samples} samples, cut up")


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How a teacher was asked: the shorter side of the image in pixels (aspect kept, multiples of its patch), the
    precision of its arithmetic, the views of an image whose mean a label is, and the network that found the sky (sha256
    of its file, empty for none) with its class for sky."""

    short_side: int
    precision: str
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    sky_model: str = ""
    sky_class: int | None = None

    def __str__(self) -> str:
        scales = " and ".join(f"{scale:g}" for scale in self.scales)
        views = f"scale {scales}{', also mirrored' if self.flip else ''}"
        sky = f", sky is class {self.sky_class} of network {self.sky_model[:12]}" if self.sky_model else ""
        return f"shorter side {self.short_side} px, precision {self.precision}, {views}{sky}"


@dataclass(frozen=True, kw_only=True)
class LabelsOf:
    """What a pseudo-label set was made from: the images (manifest name and digest), the teacher (hash of its bundle),
    the settings, the version of the code, and the stated licence of each thing that the teacher was made from
    (`licences.stated_licences`). Settings and licences are None in label sets that did not record them yet; what these
    say of their settings, in words, stands in `resolution`, `views` and `sky_model`."""

    images: str
    images_digest: str
    teacher_sha256: str
    code_version: str
    settings: LabelSettings | None = None
    teacher_licences: dict[str, str] | None = None
    resolution: str = ""
    views: str = ""
    sky_model: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One split of one data set. `target` is None for unlabeled images; `labels_of` is set for pseudo-labels alone."""

    name: str
    split: str
    target: TargetSpec | None
    shards: tuple[Shard, ...]
    licence: str
    source: str
    description: str = ""
    citation: str = ""
    labels_of: LabelsOf | None = None

    def __post_init__(self) -> None:
        counts = Counter(shard.path for shard in self.shards)
        repeated = [path for path, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"shards: {repeated} are listed more than once")

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def digest(self) -> str:
        """sha256 of the content, whatever the layout of the file it was read from.

        Fields that hold their default are left out, so that a field that is added later changes no digest. So are
        `runs`: they repeat what lies in the shards, and data sets that were packed before there were any stay the same.
        """
        shards = tuple(replace(shard, runs=()) for shard in self.shards)
        content = _without_defaults(parse(Manifest, asdict(replace(self, shards=shards)), ""))
        return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(path: Path | str) -> Manifest:
    """Read a manifest from a path or URL; ValueError names it, the key and the value of whatever is wrong.

    ConfigError, which is a ValueError, when a URL cannot be read.
    """
    content = read_url(path) if isinstance(path, str) and is_remote(path) else Path(path).read_bytes()
    try:
        return parse(Manifest, json.loads(content.decode()), "")
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from error


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest atomically as sorted, indented JSON."""
    text = json.dumps(_to_json(manifest), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def _to_json(manifest: Manifest) -> dict[str, Any]:
    """Parsed once more, so that `scale=1000` and `scale=1000.0` are one text and nothing unreadable is written."""
    content: dict[str, Any] = asdict(parse(Manifest, asdict(manifest), ""))
    for shard in content["shards"]:
        if not shard["runs"]:
            del shard["runs"]  # data sets without video keep the file that they always had
    return content


def _without_defaults(value: Any) -> Any:
    """A parsed value as JSON, without the fields of dataclasses that hold their default."""
    if is_dataclass(value):
        held = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
        return {name: _without_defaults(item) for name, (item, default) in held.items() if item != default}
    return [_without_defaults(item) for item in value] if isinstance(value, tuple) else value


def parse(expected: Any, value: Any, key: str) -> Any:
    """A JSON value as the annotated type `expected`."""
    origin, arguments = get_origin(expected), get_args(expected)
    if is_dataclass(expected):
        return _parse_dataclass(expected, value, key)
    if origin is UnionType:
        return None if value is None else parse(arguments[0], value, key)
    if origin is tuple:
        return _parse_tuple(arguments, value, key)
    if origin is dict and isinstance(value, dict):
        return {
            parse(arguments[0], name, key): parse(arguments[1], item, f"{key}.{name}") for name, item in value.items()
        }
    if origin is Literal and value in arguments:
        return value
    if expected is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is expected:
        return value
    wanted = f"one of {', '.join(arguments)}" if origin is Literal else f"of type {expected.__name__}"
    raise ValueError(f"{key}: {value!r} is not {wanted}")


def _parse_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    """A JSON list as `tuple[X, ...]` or as a tuple of fixed length."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key}: {value!r} is not a list")
    types = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(value) != len(types):
        raise ValueError(f"{key}: {value!r} does not hold {len(types)} values")
    return tuple(parse(types[i], item, f"{key}[{i}]") for i, item in enumerate(value))


@cache
def _fields_of(expected: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of all fields of a dataclass, and the names of those without a default; a manifest has many shards."""
    required = {
        field.name for field in fields(expected) if field.default is MISSING and field.default_factory is MISSING
    }
    return get_type_hints(expected), frozenset(required)


def _parse_dataclass(expected: Any, value: Any, key: str) -> Any:
    """A JSON object as a dataclass with exactly its fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{key or 'manifest'}: {value!r} is not an object")
    prefix = f"{key}." if key else ""
    types, required = _fields_of(expected)
    for name, item in value.items():
        if name not in types:
            raise ValueError(f"{prefix}{name}: unknown key (value {item!r}); known keys: {', '.join(types)}")
    for name in sorted(required - value.keys()):
        raise ValueError(f"{prefix}{name}: missing key")
    return expected(**{name: parse(types[name], item, prefix + name) for name, item in value.items()})
