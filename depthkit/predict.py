"""`depthkit predict MODEL INPUT --out DIR`: depth maps of images as files.

For each image NAME the folder gets `NAME.png` (16 bits, `value = code / 65535 * scale + offset`), `NAME.json` (scale,
offset, and what the values are) and `NAME.color.png` to look at.
"""

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import track

from depthkit.data.decode import encode_disparity
from depthkit.files import atomic_write
from depthkit.inference import Predictor, load
from depthkit.types import Kind, Prediction
from depthkit.visualize import (
    COLORMAPS,
    ColorScale,
    PictureRow,
    Tile,
    colorize,
    depth_scale,
    picture_grid,
    render,
    value_range,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
SUFFIXES = (".png", ".json", ".color.png")
"""Of the results of an image."""
PICTURE_WIDTH = 6.0  # inches


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="depthkit predict", description="Depth maps of images.")
    parser.add_argument("model", help="bundle folder")
    parser.add_argument("input", help="an image, a folder of images, or a quoted pattern such as 'photos/**/*.jpg'")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")
    arguments = parser.parse_args(argv)
    try:
        paths = find_images(arguments.input)
        bases = output_bases(paths, arguments.out)
        predictor = load(arguments.model, arguments.device)
    except (ValueError, OSError) as error:
        print(f"depthkit predict: {error}", file=sys.stderr)
        return 1
    failures = predict_files(predictor, bases)
    print(f"{len(paths) - len(failures)} of {len(paths)} images -> {arguments.out}")
    for path, reason in failures.items():
        print(f"failed: {path}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def find_images(source: str) -> list[Path]:
    """The image files that a path, a folder or a pattern means, sorted; FileNotFoundError if there are none.

    Of a folder only files with a usual image extension are taken; a path or a pattern means what it names.
    """
    path = Path(source)
    if path.is_dir():
        paths = [file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS]
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(name) for name in glob.glob(source, recursive=True)]  # noqa: PTH207  (Path.glob refuses "/...")
    files = sorted(file for file in paths if file.is_file())
    if not files:
        raise FileNotFoundError(f"{source}: no image found ({', '.join(EXTENSIONS)})")
    return files


def output_bases(paths: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Image -> where its results go, without suffix: `out` mirrors the folders below the one that all images share.

    `a/x.jpg` gives `out/x`; with other images in `b` it gives `out/a/x`. Where two results would have one name, all
    keep their extension: `out/x.jpg`. ValueError when a result would replace one of the images.
    """
    absolute = [path.absolute() for path in paths]
    shared = Path(os.path.commonpath([path.parent for path in absolute]))
    bases = [out / path.relative_to(shared) for path in absolute]
    stems = [base.with_suffix("") for base in bases]
    if len(set(_results(stems))) == len(stems) * len(SUFFIXES):
        bases = stems
    replaced = {path.absolute() for path in _results(bases)} & set(absolute)
    if replaced:
        raise ValueError(f"--out {out}: {min(replaced)} would be replaced by its own result; choose another folder")
    return dict(zip(paths, bases, strict=True))


def _results(bases: Iterable[Path]) -> list[Path]:
    return [base.with_name(base.name + suffix) for base in bases for suffix in SUFFIXES]


def predict_files(predictor: Predictor, bases: Mapping[Path, Path]) -> dict[Path, str]:
    """Predict each image and write the results beside its base; returns the images that failed, with the reason."""
    failures: dict[Path, str] = {}
    for path, base in track(bases.items(), "predicting", console=Console(stderr=True)):
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            write_prediction(predictor.predict(path), base, source=str(path), sha256=predictor.sha256)
        except (ValueError, OSError) as error:
            failures[path] = str(error)
    return failures


def write_prediction(prediction: Prediction, base: Path, *, source: str, sha256: str) -> None:
    """Write `base`.png, `base`.json and `base`.color.png. The error of a stored value is at most half a code."""
    png, codes = encode_disparity(prediction.values)
    height, width = prediction.values.shape
    facts = {
        "kind": prediction.kind,
        "unit": prediction.unit,
        "formula": "value = code / 65535 * scale + offset",
        **codes,
        "size": [height, width],
        "source": source,
        "model_sha256": sha256,
    }
    text = json.dumps(facts, indent=2).encode() + b"\n"
    for path, data in zip(_results([base]), (png, text, color_picture(prediction)), strict=True):
        with atomic_write(path) as file:
            file.write(data)


def color_picture(prediction: Prediction) -> bytes:
    """A PNG of the map with a bar that says what its colours mean."""
    scale = COLOR_SCALES[prediction.kind](prediction)
    tile = Tile("", colorize(prediction.values, None, scale))
    picture = render(picture_grid([PictureRow([tile], [scale])], tile_width=PICTURE_WIDTH))
    written, data = cv2.imencode(".png", picture[..., ::-1])
    assert written
    return data.tobytes()


def _disparity_scale(prediction: Prediction) -> ColorScale:
    return ColorScale(*value_range(prediction.values), COLORMAPS["disparity"], f"disparity: {prediction.unit}")


COLOR_SCALES: dict[Kind, Callable[[Prediction], ColorScale]] = {
    "disparity": _disparity_scale,
    "depth": lambda prediction: depth_scale(prediction.values, None, prediction.unit),
}
