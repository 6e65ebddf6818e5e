"""Depth maps as files: values, a JSON that says what they are, and a picture to look at.

For an image NAME: `NAME.png` (16 bits, `value = code / 65535 * scale + offset`) or `NAME.npy` (float32), `NAME.json`
and `NAME.color.png`. The JSON is written last: where it is, the others are whole and belong to it.
"""

import io
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from depthkit.data.decode import MAX_CODE, encode_disparity
from depthkit.files import atomic_write
from depthkit.inference.predictor import BATCH_SIZE, Predictor
from depthkit.types import Prediction
from depthkit.visualize import colorize, kind_scale, value_range, with_color_bar

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_THREADS = 4  # that read and write files
FORMULA = f"value = code / {MAX_CODE} * scale + offset"
PICTURE_WIDTH = 480  # pixels, at least: room for the label of the bar
PICTURE_SIDE = 1920  # pixels, at most


def encode_npy(values: np.ndarray) -> tuple[bytes, dict[str, float]]:
    file = io.BytesIO()
    np.save(file, values.astype(np.float32, copy=False))
    return file.getvalue(), {}


FORMATS: dict[str, Callable[[np.ndarray], tuple[bytes, dict[str, float]]]] = {
    "png": encode_disparity,
    "npy": encode_npy,
}
"""Extension of the values: what encodes them, and returns the scale and offset that the JSON must hold, if any."""


def read_values(path: Path, codes: Mapping[str, float]) -> np.ndarray:
    """The float32 values of a file that `FORMATS` wrote; `codes` are the scale and offset of a PNG."""
    if path.suffix == ".npy":
        return np.load(path)
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise OSError(f"{path} cannot be read")
    return (stored * (codes["scale"] / MAX_CODE) + codes["offset"]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class DepthJob:
    """How files are predicted and stored. `options` are the arguments of `Predictor.predict` that were asked for."""

    predictor: Predictor
    format: str = "png"
    batch_size: int = BATCH_SIZE
    options: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, images: list[np.ndarray]) -> list[Prediction | Exception]:
        """One outcome per image; the images of a batch that fails as a whole are tried again one by one."""
        if len(images) > 1:
            try:
                return list(self._predict(images))
            except Exception as error:
                # Not the message: Python shows a warning once per text, and memory errors hold changing numbers.
                warnings.warn(
                    f"a batch failed ({type(error).__name__}) and is done image by image; "
                    "if it was out of memory, choose a smaller --batch-size",
                    RuntimeWarning,
                    stacklevel=2,
                )
        # Outside the handler: its traceback holds the memory of the batch.
        return [self._attempt(image) for image in images]

    def _attempt(self, image: np.ndarray) -> Prediction | Exception:
        try:
            return self._predict([image])[0]
        except Exception as error:  # whatever a runtime may raise: it belongs to this image alone
            return error

    def _predict(self, images: list[np.ndarray]) -> list[Prediction]:
        return self.predictor.predict(images, batch_size=self.batch_size, **self.options)

    def encode(self, prediction: Prediction) -> tuple[bytes, dict[str, float]]:
        if not np.isfinite(prediction.values).all():
            raise ValueError("the prediction is not finite; try --precision float32")
        return FORMATS[self.format](prediction.values)

    def facts(self, source: Path) -> dict[str, Any]:
        """What every JSON says."""
        return {
            "kind": self.predictor.kind,
            "unit": self.predictor.unit,
            "source": str(source),
            "model": self.predictor.name,
            "model_sha256": self.predictor.sha256,
            **self.options,
            **({"formula": FORMULA} if self.format == "png" else {}),
        }


def result_files(base: Path, depth_format: str) -> list[Path]:
    """Values, picture and JSON of an image, in the order in which they appear."""
    return [base.with_name(base.name + suffix) for suffix in (f".{depth_format}", ".color.png", ".json")]


def foreign_results(base: Path, depth_format: str) -> list[Path]:
    """What lies where the results of an image would go and is no result of an earlier run."""
    files = [file for file in result_files(base, depth_format) if file.exists()]
    record = read_record(base.with_name(base.name + ".json"))
    own = {record["values"], record["picture"], base.name + ".json"} if record else set()
    return [file for file in files if file.name not in own]


def write_prediction(prediction: Prediction, base: Path, source: Path, job: DepthJob) -> None:
    """Write the values, the picture and the JSON of an image; the error of a 16-bit value is at most half a code."""
    values, picture, record = result_files(base, job.format)
    data, codes = job.encode(prediction)
    height, width = prediction.values.shape
    names = {"values": values.name, "picture": picture.name}
    facts = {**job.facts(source), **names, "size": [height, width], **codes}
    earlier = read_record(record).get("values", values.name)
    base.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        # Files of a stack appear in the reverse order, and only when all of them are complete.
        files.enter_context(atomic_write(record)).write(to_json(facts))
        files.enter_context(atomic_write(picture)).write(color_picture(prediction))
        files.enter_context(atomic_write(values)).write(data)
        record.unlink(missing_ok=True)
    if earlier != values.name:
        values.with_name(earlier).unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """The content of a JSON that an earlier run wrote; empty if there is none or somebody else wrote it."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and "model_sha256" in record and "values" in record else {}


def to_json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, indent=2).encode() + b"\n"


def color_picture(prediction: Prediction) -> bytes:
    """A PNG of the map above a bar that says what its colours mean, at the size of the image within limits."""
    size = fitted_size(prediction.values.shape, min_width=PICTURE_WIDTH, max_side=PICTURE_SIDE)
    scale = kind_scale(prediction.kind, *value_range(prediction.values))
    picture = with_color_bar(colorize(resize(prediction.values, size), None, scale), scale)
    written, data = cv2.imencode(".png", picture[..., ::-1])
    assert written
    return data.tobytes()


def fitted_size(size: tuple[int, ...], *, min_width: int, max_side: int) -> tuple[int, int]:
    """(height, width) of a picture of a map of `size`, aspect kept: no longer than `max_side`, but `min_width` wide."""
    height, width = size
    factor = max(min(1.0, max_side / max(size)), min_width / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, 3) to (height, width) of `size`, each pixel the mean of what it covers when that is smaller."""
    smaller = size[0] < image.shape[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], limit: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """`function` of each item in order, worked on by `pool` while the caller is busy; at most `limit` are held."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= limit:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
