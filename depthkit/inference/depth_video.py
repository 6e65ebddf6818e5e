"""Depth of videos: the values of every frame, and image and depth side by side as an mp4.

For a video NAME: the folder `NAME/` with the values of every frame, `000000.png` ... or `.npy`, numbered as in the
source, and one `depth.json` for all of them; and `NAME.mp4`, in which one colour scale holds for the whole video. Each
frame is predicted for itself: a model of relative disparity chooses scale and shift anew in every frame.
"""

import math
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import cv2
import numpy as np
from rich.progress import Progress

from depthkit.bundle import put_in_place, sync_to_disk
from depthkit.inference.depth_files import (
    NUM_THREADS,
    DepthJob,
    ahead,
    fitted_size,
    read_record,
    read_values,
    resize,
    to_json,
)
from depthkit.inference.video import Frame, VideoError, atomic_mp4, capture, frame_rate, missing_bytes, read_frames
from depthkit.types import Prediction
from depthkit.visualize import ColorScale, colorize, kind_scale, value_range, with_color_bar

RECORD = "depth.json"
FRAME_NAME = re.compile(r"\d{6,}\.(png|npy)")
WAITING_FRAMES = 16  # predicted, not yet written
SCALE_FRAMES = 100  # evenly spaced frames from which the colour scale is taken
SCALE_PIXELS = 20_000  # of each of them
PICTURE_WIDTH = 320  # pixels, at least, of the image and of the depth: room for the label of the bar
PICTURE_SIDE = 960  # pixels, at most
GAP = 4  # pixels between the two


def predict_video(job: DepthJob, path: Path, base: Path, progress: Progress) -> list[str]:
    """Predict every frame of a video and write `base`/ and `base`.mp4; returns what went wrong with single frames.

    Two passes: the first predicts and stores, the second draws with one colour scale for all. Memory does not grow
    with the length. VideoError when there is no frame, OSError when a result cannot be written; then nothing is left.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(base) as folder:
        run = _VideoRun(job, path, folder, progress)
        run.predict()
        if not run.codes:
            raise VideoError(f"{path}: no frame could be predicted ({next(iter(run.failures.values()), 'none found')})")
        scale = kind_scale(job.predictor.kind, *run.common_range())
        run.write_record(mp4_of(base), scale)
        run.draw(mp4_of(base), scale)
    return run.problems()


def mp4_of(base: Path) -> Path:
    return base.with_name(base.name + ".mp4")


def foreign_results(base: Path) -> list[Path]:
    """What lies where the results of a video would go and is no result of an earlier run."""
    record = read_record(base / RECORD)
    inside = list(base.iterdir()) if base.is_dir() else [base] if base.exists() else []
    if record:
        inside = [file for file in inside if file.name != RECORD and not FRAME_NAME.fullmatch(file.name)]
    mp4 = mp4_of(base)
    return [*inside, *([mp4] if mp4.exists() and record.get("picture") != mp4.name else [])]


@dataclass
class _VideoRun:
    """A video on its way to `folder`. Frames go by their numbers in the source, those that failed counted."""

    job: DepthJob
    path: Path
    folder: Path
    progress: Progress
    codes: dict[int, dict[str, float]] = field(default_factory=dict)  # of the frames that were predicted
    failures: dict[int, str] = field(default_factory=dict)
    ends: list[Frame] = field(default_factory=list)  # the first and the last that was decoded

    def predict(self) -> None:
        """Store the values of every frame."""
        with capture(self.path) as video:
            num_frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        total = num_frames if num_frames > 0 else None  # WebM may state none
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            stored = ahead(pool, self._store, self._outcomes(), WAITING_FRAMES)
            for (frame, _), codes in self.progress.track(stored, total, description=f"{self.path.name}: depth"):
                self._note(frame, codes)

    def _outcomes(self) -> Iterator[tuple[Frame, Prediction | Exception]]:
        frames = read_frames(self.path)
        while batch := list(islice(frames, self.job.batch_size)):
            yield from zip(batch, self.job.predict([frame.image for frame in batch]), strict=True)

    def _store(self, outcome: tuple[Frame, Prediction | Exception]) -> dict[str, float]:
        frame, prediction = outcome
        if isinstance(prediction, Exception):
            raise ValueError(f"could not be predicted: {prediction}")
        data, codes = self.job.encode(prediction)
        file = self.folder / self._name(frame.number)
        file.write_bytes(data)
        sync_to_disk(file)
        return codes

    def _note(self, frame: Frame, codes: Future[dict[str, float]]) -> None:
        expected = self.ends[-1].number + 1 if self.ends else 0
        self.failures.update(dict.fromkeys(range(expected, frame.number), "could not be decoded"))
        self.ends = [*self.ends[:1], frame]
        try:
            self.codes[frame.number] = codes.result()
        except ValueError as error:
            self.failures[frame.number] = str(error)

    def common_range(self) -> tuple[float, float]:
        """The `value_range` of evenly spaced frames together."""
        numbers = sorted(self.codes)
        samples = []
        for number in numbers[:: math.ceil(len(numbers) / SCALE_FRAMES)]:
            values = self._values(number)
            step = math.ceil(math.sqrt(values.size / SCALE_PIXELS))
            samples.append(values[::step, ::step].ravel())
        return value_range(np.concatenate(samples))

    def write_record(self, mp4: Path, scale: ColorScale) -> None:
        facts = {
            **self.job.facts(self.path),
            "values": f"{{number:06d}}.{self.job.format}",
            "picture": mp4.name,
            "size": list(self.ends[0].image.shape[:2]),
            "frame_rate": self.rate,
            "color_range": [scale.low, scale.high],
            "failed_frames": self.failures,
            "frames": {self._name(number): codes for number, codes in self.codes.items()},
        }
        (self.folder / RECORD).write_bytes(to_json(facts))
        sync_to_disk(self.folder / RECORD)

    def draw(self, mp4: Path, scale: ColorScale) -> None:
        layout = SideBySide(self.ends[0].image.shape[:2], scale)
        predicted = (frame for frame in read_frames(self.path) if frame.number in self.codes)
        with atomic_mp4(mp4, self.rate, layout.size) as write:
            for frame in self.progress.track(predicted, len(self.codes), description=f"{self.path.name}: mp4"):
                write(layout.draw(frame.image, self._values(frame.number)))

    @property
    def rate(self) -> float:
        """Frames per second."""
        with capture(self.path) as video:
            stated = video.get(cv2.CAP_PROP_FPS)
        return frame_rate(stated, self.ends[0], self.ends[-1])

    def problems(self) -> list[str]:
        """What went wrong, each reason with its frames."""
        numbers: dict[str, list[int]] = {}
        for number, reason in sorted(self.failures.items()):
            numbers.setdefault(reason, []).append(number)
        problems = [f"{len(failed)} frames ({in_ranges(failed)}): {reason}" for reason, failed in numbers.items()]
        missing = missing_bytes(self.path)
        return [*problems, f"the file is cut off: {missing} bytes are missing at its end"] if missing else problems

    def _values(self, number: int) -> np.ndarray:
        return read_values(self.folder / self._name(number), self.codes[number])

    def _name(self, number: int) -> str:
        return f"{number:06d}.{self.job.format}"


class SideBySide:
    """Pictures of one `size` (height, width), even sides: image and coloured depth, and below them a bar for both."""

    def __init__(self, image_size: tuple[int, ...], scale: ColorScale) -> None:
        self.tile = fitted_size(image_size, min_width=PICTURE_WIDTH, max_side=PICTURE_SIDE)
        self.scale = scale
        empty = with_color_bar(np.full((self.tile[0], 2 * self.tile[1] + GAP, 3), 255, np.uint8), scale)
        self._empty = np.pad(empty, ((0, len(empty) % 2), (0, 0), (0, 0)), constant_values=255)
        self.size = self._empty.shape[:2]

    def draw(self, image: np.ndarray, values: np.ndarray) -> np.ndarray:
        height, width = self.tile
        picture = self._empty.copy()
        picture[:height, :width] = resize(image, self.tile)
        picture[:height, width + GAP :] = colorize(resize(values, self.tile), None, self.scale)
        return picture


def in_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: 3, 7-9."""
    groups = groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    ends = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in ends)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that takes the place of what is at `path` when the block ends without an exception.

    Until then it is `.NAME.RANDOM.tmp` beside it. An exception removes it; a killed process leaves it, safe to delete.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
