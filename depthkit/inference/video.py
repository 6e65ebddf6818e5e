"""Videos: frame by frame in, and an mp4 that appears as a whole out.

Pictures are (H, W, 3) uint8 RGB. An mp4 is written with the first of `CODECS` that this OpenCV can write: H.264
(`avc1`), for which the wheels of opencv-python hold no software encoder, or MPEG-4 Part 2 (`mp4v`), which players take
and browsers do not. VP9, which browsers take, would need a hundred times as long. Sound is not copied.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from depthkit.bundle import sync_to_disk

# FFmpeg's own messages would tear the progress bar; OpenCV reads this once, before its first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
CODECS = ("avc1", "mp4v")
DEFAULT_RATE = 25.0  # frames per second, where the file states none
MAX_RATE = 1000.0  # frames per second; more is a time base, not a rate
FAILURES_AT_END = 1000  # as many reads in a row without a picture are the end of a video


class VideoError(ValueError):
    """A file that is no video, or one without any frame; the message names it."""


class Frame(NamedTuple):
    number: int  # in the source, from 0, those that could not be decoded counted
    seconds: float  # from the start
    image: np.ndarray  # (H, W, 3) uint8 RGB, turned as the file says


@contextmanager
def capture(path: Path) -> Iterator[cv2.VideoCapture]:
    with quiet_opencv():
        video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            path.open("rb").close()  # a missing or forbidden file says so itself
            raise VideoError(f"{path}: no video that can be opened; it is empty, damaged or of an unknown format")
        yield video
    finally:
        video.release()


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a video that can be decoded, in order.

    Numbers left out are frames that cannot be decoded. At the very end they cannot be told from the end.
    """
    with capture(path) as video:
        number, failures = 0, 0
        # A picture that cannot be decoded and the end of the video look the same; after the former comes another one.
        while failures < FAILURES_AT_END:
            is_decoded, image = video.read()
            if is_decoded:
                number, failures = number + failures, 0
                seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
                yield Frame(number, seconds, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
                number += 1
            else:
                failures += 1


def missing_bytes(path: Path) -> int:
    """How much of a file is missing at its end, by the lengths that MP4, MOV and AVI files state (0 for others).

    The number of frames in a header does not tell: editors trim videos by marking frames as not to be shown.
    """
    file_size = path.stat().st_size
    end = 0
    with path.open("rb") as file:
        while end < file_size:
            file.seek(end)
            header = file.read(16).ljust(16, b"\0")
            if header[:4] == b"RIFF":
                length = 8 + int.from_bytes(header[4:8], "little")
            elif path.suffix.lower() in (".mp4", ".mov"):
                length = int.from_bytes(header[:4], "big")
                length = int.from_bytes(header[8:], "big") if length == 1 else length
            else:
                return 0
            if length < 8:  # "up to the end of the file", or nothing that belongs to the format
                return 0
            end += length
    return end - file_size


def frame_rate(stated: float, first: Frame, last: Frame) -> float:
    """Frames per second: what a file states, unless its pictures come at another mean rate (by more than 5 %)."""
    seconds = last.seconds - first.seconds
    measured = (last.number - first.number) / seconds if seconds > 0 else None
    if 0 < stated <= MAX_RATE and (measured is None or abs(measured / stated - 1) < 0.05):
        return stated
    return measured or DEFAULT_RATE


@contextmanager
def atomic_mp4(path: Path, rate: float, size: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], None]]:
    """`write(picture)` for pictures of `size` (even sides) of a video that appears at `path` as by `atomic_write`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp.mp4")  # the suffix chooses the container
    num_written = 0

    def write(picture: np.ndarray) -> None:
        nonlocal num_written
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        num_written += 1

    try:
        writer = open_writer(temporary, rate, size)
        try:
            yield write
        finally:
            writer.release()
        with capture(temporary) as video:  # OpenCV does not say when a write fails
            num_stored = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if num_stored != num_written:
            raise OSError(f"{path}: {num_stored} of {num_written} frames were written; is the disk full?")
        sync_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_writer(path: Path, rate: float, size: tuple[int, ...]) -> cv2.VideoWriter:
    for codec in CODECS:
        with quiet_opencv():
            writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), rate, size[::-1])
        if writer.isOpened():
            return writer
    raise OSError(f"{path}: cannot be written as a video of {size[1]} x {size[0]} pixels ({', '.join(CODECS)})")


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Without OpenCV's own messages: what cannot be opened is reported as an exception."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
