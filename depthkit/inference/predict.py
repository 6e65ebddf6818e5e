"""`depthkit predict MODEL INPUT --out DIR`: depth maps of images and videos as files.

What is written for an image is said in `depth_files`, for a video in `depth_video`. A run replaces the results of an
earlier one and nothing else.
"""

import argparse
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from depthkit.data.windows import inference_size
from depthkit.importing import add_checkpoint_arguments
from depthkit.inference import depth_video, video
from depthkit.inference.depth_files import (
    FORMATS,
    NUM_THREADS,
    DepthJob,
    ahead,
    foreign_results,
    read_record,
    result_files,
    write_prediction,
)
from depthkit.inference.loading import PRECISIONS, load
from depthkit.inference.predictor import BATCH_SIZE, read_image
from depthkit.types import Prediction

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
IMAGES_AHEAD = 8  # read or predicted, not yet used
WAITING_PIXELS = 100_000_000  # of images that wait for others of their size


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("short_side", "flip", "tile", "focal_px")}
    loading = {name: getattr(arguments, name) for name in ("device", "precision", "compile", "taps", "max_depth")}
    try:
        paths = find_inputs(arguments.input)
        bases = output_bases(paths, arguments.out, arguments.format)
        predictor = load(arguments.model, **loading)
        predictor.focal_lengths(arguments.focal_px, num_images=1)
        job = DepthJob(
            predictor=predictor,
            format=arguments.format,
            batch_size=arguments.batch_size,
            options={name: value for name, value in options.items() if value},
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"depthkit predict: {error}", file=sys.stderr)
        return 1
    failures = predict_files(job, bases)
    print(f"{len(paths) - len(failures)} of {len(paths)} files -> {arguments.out}")
    for path, reason in failures.items():
        print(f"failed: {reason if str(path) in reason else f'{path}: {reason}'}", file=sys.stderr)
    return 1 if failures else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="depthkit predict",
        description="Depth maps of images and videos. For an image NAME: NAME.png (16 bits; NAME.json says how codes "
        "become values) or NAME.npy, and NAME.color.png to look at. For a video NAME: the folder NAME/ with the values "
        "of every frame and depth.json, and NAME.mp4, image and depth side by side.",
    )
    add = parser.add_argument
    add("model", help="bundle folder, Hugging Face folder, .onnx file or official .pth")
    add("input", help="an image or video, a folder of them, or a quoted pattern such as 'photos/**/*.jpg'")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--format", choices=FORMATS, default="png", help="of the values: 16-bit PNG, or float32 .npy (default: png)")
    group = parser.add_argument_group("prediction")
    add = group.add_argument
    add("--short-side", type=positive_int, metavar="PIXELS", help="of the network's input (default: as in training)")
    add("--flip", action="store_true", help="average with the prediction of the mirrored image; twice the time")
    add(
        "--tile",
        type=positive_int,
        metavar="PIXELS",
        help="side of overlapping tiles in which larger images are predicted too, for finer detail (default: none)",
    )
    add(
        "--focal-px",
        type=float,
        metavar="PIXELS",
        help="horizontal focal length of the camera in pixels of its images, for models that were trained with it",
    )
    group = parser.add_argument_group("speed")
    add = group.add_argument
    add(
        "--batch-size",
        type=positive_int,
        default=BATCH_SIZE,
        metavar="N",
        help="images at once; fewer need less memory (default: %(default)s)",
    )
    add("--device", default="auto", help="torch device (default: a GPU where there is one)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of weights and activations; 16 bits are faster on a GPU, less exact (default: %(default)s)",
    )
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster")
    add_checkpoint_arguments(parser.add_argument_group("official .pth files, which do not say it themselves"))
    return parser


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def is_video(path: Path) -> bool:
    return path.suffix.lower() in video.EXTENSIONS


def find_inputs(source: str) -> list[Path]:
    """The image and video files that a path, a folder or a pattern means, sorted; FileNotFoundError if there are none.

    Of a folder only files with a usual extension are taken; a path or a pattern means what it names. Results of earlier
    runs are inputs only where a path names one.
    """
    path = Path(source)
    extensions = IMAGE_EXTENSIONS + video.EXTENSIONS
    if path.is_dir():
        paths = [file for file in path.iterdir() if file.suffix.lower() in extensions]
    elif path.is_file():
        return [path]
    else:
        paths = [Path(name) for name in glob.glob(source, recursive=True)]  # noqa: PTH207  (Path.glob refuses "/...")
    files = sorted(file for file in paths if file.is_file() and not is_result(file))
    if not files:
        raise FileNotFoundError(f"{source}: no image or video found ({', '.join(extensions)})")
    return files


def is_result(path: Path) -> bool:
    """Whether an earlier run wrote a file: it is a JSON of ours, or the one that belongs to it names it."""
    if path.suffix == ".json":
        return bool(read_record(path))
    base = path.with_name(path.name.removesuffix(path.suffix).removesuffix(".color"))
    records = [base.with_name(base.name + ".json"), base / depth_video.RECORD, path.parent / depth_video.RECORD]
    return any(_names(read_record(record), path.name) for record in records)


def _names(record: Mapping[str, Any], name: str) -> bool:
    return name in (record.get("values"), record.get("picture")) or name in record.get("frames", ())


def output_bases(paths: Sequence[Path], out: Path, depth_format: str = "png") -> dict[Path, Path]:
    """Input -> where its results go, without suffix: `out` mirrors the folders below the one that all inputs share.

    `a/x.jpg` gives `out/x`; with other files in `b` it gives `out/a/x`. Where two results would have one name, all
    keep their extension: `out/x.jpg`. ValueError when a result would replace an input, or any file that no earlier
    run wrote.
    """
    absolute = [path.absolute() for path in paths]
    shared = Path(os.path.commonpath([path.parent for path in absolute]))
    names = [out / path.relative_to(shared) for path in absolute]
    stems = [base.with_suffix("") for base in names]
    bases = dict(zip(paths, names if _collide(paths, stems, depth_format) else stems, strict=True))
    inputs = {path.resolve() for path in paths}
    for path, base in bases.items():
        own = [file for file in _results(path, base, depth_format) if file.resolve() in inputs]
        foreign = depth_video.foreign_results(base) if is_video(path) else foreign_results(base, depth_format)
        for file in [*own, *foreign]:
            raise ValueError(
                f"--out {out}: {file} would be replaced, which is an input or no result of an earlier run; "
                "choose another folder"
            )
    return bases


def _results(path: Path, base: Path, depth_format: str) -> list[Path]:
    return [depth_video.mp4_of(base), base] if is_video(path) else result_files(base, depth_format)


def _collide(paths: Sequence[Path], bases: Sequence[Path], depth_format: str) -> bool:
    """Whether two results would have one name, on any file system, or one would lie in the folder of a video."""
    results = [file for path, base in zip(paths, bases, strict=True) for file in _results(path, base, depth_format)]
    folders = {base for path, base in zip(paths, bases, strict=True) if is_video(path)}
    return len({str(file).casefold() for file in results}) < len(results) or any(
        not folders.isdisjoint(file.parents) for file in results
    )


def predict_files(job: DepthJob, bases: Mapping[Path, Path]) -> dict[Path, str]:
    """Predict each file and write the results at its base; returns the files that failed, with the reason."""
    images = {path: base for path, base in bases.items() if not is_video(path)}
    failures: dict[Path, str] = {}
    with progress_bar() as progress:
        if images:
            failures |= _predict_images(job, images, progress)
        for path in filter(is_video, bases):
            try:
                problems = depth_video.predict_video(job, path, bases[path], progress)
            except Exception as error:  # it belongs to this video alone
                problems = [describe(error)]
            if problems:
                failures[path] = "; ".join(problems)
    return failures


def _predict_images(job: DepthJob, bases: Mapping[Path, Path], progress: Progress) -> dict[Path, str]:
    def write(item: tuple[Path, Prediction | BaseException]) -> None:
        path, outcome = item
        if isinstance(outcome, BaseException):
            raise outcome
        write_prediction(outcome, bases[path], path, job)

    failures = {}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        images = ahead(pool, read_image, bases, IMAGES_AHEAD)
        written = ahead(pool, write, _outcomes(job, images), IMAGES_AHEAD)
        for (path, _), done in progress.track(written, len(bases), description="images"):
            if error := done.exception():
                failures[path] = describe(error)
    return failures


def _outcomes(
    job: DepthJob, images: Iterable[tuple[Path, Future[np.ndarray]]]
) -> Iterator[tuple[Path, Prediction | BaseException]]:
    """Predictions in batches of one size for the network, so not in order; few images are held for that."""
    waiting: dict[tuple[int, int], dict[Path, np.ndarray]] = {}
    for path, read in images:
        if error := read.exception():
            yield path, error
            continue
        image = read.result()
        size = image.shape[0], image.shape[1]
        short_side = job.options.get("short_side", job.predictor.facts.short_side)
        group = waiting.setdefault(inference_size(size, short_side, job.predictor.multiple), {})
        group[path] = image
        num_pixels = sum(image.size // 3 for group in waiting.values() for image in group.values())
        if len(group) == job.batch_size or num_pixels > WAITING_PIXELS:
            fullest = waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
            yield from zip(fullest, job.predict(list(fullest.values())), strict=True)
    for group in waiting.values():
        yield from zip(group, job.predict(list(group.values())), strict=True)


def describe(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


class RateColumn(ProgressColumn):
    """Files or frames per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g}/s", style="progress.data.speed")
