"""Images per second and core: depthkit's training streams beside plain Datasets that read the same files with OpenCV,
and beside a stock webdataset pipeline over the same shard with the same decode. Then labels per second and core into a
shard, beside the same with PNGs as OpenCV compresses them.

    python scripts/benchmark_data.py                   # procedural pictures
    python scripts/benchmark_data.py --images FOLDER   # pictures of your own, with procedural depth

Both sides give normalised float32 batches of 518x518 crops with target and mask, in one process and one thread, from
warm files, in alternation. Time is the CPU time of the process, so that other work on the machine counts little.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

from depthkit.config import AugmentConfig, DataConfig, DatasetConfig
from depthkit.data.datamodule import DepthDataModule
from depthkit.data.decode import encode_disparity
from depthkit.data.labeling import TARGET as PSEUDO_LABEL
from depthkit.data.manifest import LabelsOf, Manifest, TargetSpec, save_manifest
from depthkit.data.procedural.pack import TARGET as DEPTH
from depthkit.data.procedural.world import render_clip
from depthkit.data.transforms import PhotometricPerturbation
from depthkit.data.windows import IMAGENET_MEAN, IMAGENET_STD, inference_size
from depthkit.data.writer import ShardWriter

CROP = 518
PATCH = 14
JPEG_QUALITY = 95
NOISE = 4.0  # grey levels; without a sensor's noise a JPEG would be far too small
RENDER_SIZE = (720, 960)
SIZES = [(1440, 1920), (960, 1280), (480, 640)]
PERTURBED = AugmentConfig(color_jitter=0.8, grayscale=0.2, blur=0.5)
NEVER_ENDING = 10**6


class Source(NamedTuple):
    """A picture (H, W, 3) uint8 RGB and its depth (H, W) in metres."""

    image: np.ndarray
    depth: np.ndarray


class Row(NamedTuple):
    """One comparison: stream of ours against the way of preparing a sample that stands under `PREPARE`."""

    stream: str
    prepare: str
    reader: str = "Dataset"  # or "webdataset"


# --- the files -------------------------------------------------------------------------------------------------------


def make_sources(num_images: int, pictures: Path | None) -> list[Source]:
    """Procedural pictures with depth; with `pictures` that folder's images stand in the place of the rendered ones."""
    files = sorted(path for path in pictures.iterdir() if path.suffix.lower() in (".jpg", ".png")) if pictures else []
    if pictures and not files:
        raise SystemExit(f"{pictures} holds no .jpg or .png")
    sources = []
    for index in range(num_images):
        (frame,) = render_clip(domain="source", split="benchmark", index=index, seed=0, size=RENDER_SIZE)
        image = read_file(files[index % len(files)])[..., ::-1] if files else frame.image
        sources.append(Source(image, frame.depth.astype(np.float32)))
    return sources


def read_file(path: Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    image = cv2.imread(str(path), flags)
    if image is None:
        raise SystemExit(f"{path}: OpenCV cannot read it")
    return image


def write_files(folder: Path, sources: list[Source], size: tuple[int, int]) -> None:
    """Each source at `size` as NAME.jpg, NAME.depth.png and NAME.disparity.png, and the same bytes as data sets."""
    folder.mkdir()
    labels: dict[str, dict[str, bytes]] = {}
    with ShardWriter(folder / "images.tar") as writer:
        for index, source in enumerate(sources):
            key = f"{index:04d}"
            jpg, depth = encode(source, size, np.random.default_rng(index))
            png, facts = encode_disparity(pseudo_label(source.depth, inference_size(size, CROP, PATCH)))
            writer.add(key, {"jpg": jpg, "depth.png": depth})
            labels[key] = {"disparity.png": png, "json": json.dumps(facts).encode()}
            for name, data in (("jpg", jpg), ("depth.png", depth), ("disparity.png", png)):
                (folder / f"{key}.{name}").write_bytes(data)
    images = save(folder / "images.json", DEPTH, writer, labels_of=None)
    (folder / "labels").mkdir()
    with ShardWriter(folder / "labels" / "images.tar") as writer:
        for key, members in labels.items():
            writer.add(key, members)
    teacher = LabelsOf(images=images.name, images_digest=images.digest(), teacher_sha256="", code_version="")
    save(folder / "labels" / "labels.json", PSEUDO_LABEL, writer, labels_of=teacher)


def encode(source: Source, size: tuple[int, int], generator: np.random.Generator) -> tuple[bytes, bytes]:
    """JPEG and 16-bit PNG at `size`."""
    image = cv2.resize(source.image, size[::-1], interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(image + generator.normal(0, NOISE, image.shape), 0, 255).astype(np.uint8)
    depth = cv2.resize(source.depth, size[::-1], interpolation=cv2.INTER_LINEAR)
    _, jpg = cv2.imencode(".jpg", noisy[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    _, png = cv2.imencode(".png", np.round(depth * DEPTH.scale).astype(np.uint16))
    return jpg.tobytes(), png.tobytes()


def pseudo_label(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A disparity as a teacher would give it; sky, depth 0 here, must not become infinite."""
    return 1 / (1 + cv2.resize(depth, size[::-1], interpolation=cv2.INTER_LINEAR))


def save(path: Path, target: TargetSpec, writer: ShardWriter, labels_of: LabelsOf | None) -> Manifest:
    manifest = Manifest(
        name="benchmark",
        split="train",
        target=target,
        shards=(writer.close(),),
        licence="generated",
        source="scripts/benchmark_data.py",
        labels_of=labels_of,
    )
    save_manifest(manifest, path)
    return manifest


# --- the plain side --------------------------------------------------------------------------------------------------

Prepare = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Image (H, W, 3) uint8 and target (H, W) float32 to a crop (3, 518, 518) float32 and its target."""


class PlainDataset(Dataset):
    """Reads image and label files with OpenCV and leaves the rest to `prepare`."""

    def __init__(self, folder: Path, label: str, prepare: Prepare) -> None:
        self.images = sorted(folder.glob("*.jpg"))
        self.label = label
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path = self.images[index]
        stored = read_file(path.with_suffix(f".{self.label}"), cv2.IMREAD_UNCHANGED)
        return to_tensors(read_file(path), stored, self.prepare, np.random.default_rng(index))


def to_tensors(
    bgr: np.ndarray, stored: np.ndarray, prepare: Prepare, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """What either plain side makes of a decoded image and label."""
    target = stored.astype(np.float32) / np.float32(DEPTH.scale)
    image, target = prepare(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), target, generator)
    target = np.ascontiguousarray(target)
    tensors = {"image": np.ascontiguousarray(image), "target": target, "valid_mask": target > 0}
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


def official_order(
    image: np.ndarray, target: np.ndarray, generator: np.random.Generator, *, dtype: type[np.floating]
) -> tuple[np.ndarray, np.ndarray]:
    """What the official metric training does: the whole image becomes floats, is resized and normalised, then cropped.

    There the numbers are float64, because `image / 255.0` gives that (Depth-Anything-V2 metric_depth/dataset).
    """
    image, target = resize(image.astype(dtype) / dtype(255), target)
    image = (image - np.asarray(IMAGENET_MEAN, dtype)) / np.asarray(IMAGENET_STD, dtype)
    return crop_and_flip(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32), target, generator)


def perturbed_crop(
    image: np.ndarray, target: np.ndarray, generator: np.random.Generator, *, perturb: PhotometricPerturbation
) -> tuple[np.ndarray, np.ndarray]:
    """The order of work of a student: resize in 8 bits, crop, perturb, normalise the crop."""
    image, target = resize(image, target)
    image, target = crop_and_flip(image.transpose(2, 0, 1), target, generator)
    image = perturb(np.ascontiguousarray(image.transpose(1, 2, 0)), generator).astype(np.float32) / np.float32(255)
    image = (image - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32)
    return image.transpose(2, 0, 1), target


def resize(image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both to the size at which the shorter side is 518 and the longer one a multiple of the patch."""
    size = inference_size(image.shape[:2], CROP, PATCH)[::-1]
    image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return image, cv2.resize(target, size, interpolation=cv2.INTER_NEAREST)


def crop_and_flip(
    image: np.ndarray, target: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of image (3, H, W) and target, mirrored half of the time."""
    top = int(generator.integers(target.shape[0] - CROP + 1))
    left = int(generator.integers(target.shape[1] - CROP + 1))
    image, target = image[:, top : top + CROP, left : left + CROP], target[top : top + CROP, left : left + CROP]
    return (image[:, :, ::-1], target[:, ::-1]) if generator.random() < 0.5 else (image, target)


PREPARE: dict[str, Prepare] = {
    "official order, float64": partial(official_order, dtype=np.float64),
    "the same in float32": partial(official_order, dtype=np.float32),
    "8 bits, crop, perturb": partial(perturbed_crop, perturb=PhotometricPerturbation(PERTURBED)),
}
ROWS = [
    Row("labeled", "official order, float64"),
    Row("labeled", "the same in float32"),
    Row("labeled", "the same in float32", reader="webdataset"),
    Row("unlabeled", "8 bits, crop, perturb"),
]
LABEL_FILES = {"labeled": "depth.png", "unlabeled": "disparity.png"}


# --- timing ----------------------------------------------------------------------------------------------------------


def our_batches(folder: Path, stream: str, batch_size: int) -> Iterator[Any]:
    """Endless normalised batches of one stream, on the way that training takes."""
    labels = str(folder / "labels" / "labels.json") if stream == "unlabeled" else None
    datasets = {"benchmark": DatasetConfig(manifest=str(folder / "images.json"), labels=labels)}
    groups: dict[str, Any] = {stream: datasets}
    config = DataConfig(**groups, crop_size=[CROP, CROP], batch_size=batch_size, num_workers=0, augment=PERTURBED)
    data = DepthDataModule(config, seed=0, num_steps=NEVER_ENDING, multiple=PATCH)
    for batch in data.train_loader():
        yield data.on_after_batch_transfer(batch, 0)


def plain_batches(folder: Path, row: Row, batch_size: int) -> Iterator[Any]:
    """Endless batches of the plain Dataset."""
    loader = DataLoader(PlainDataset(folder, LABEL_FILES[row.stream], PREPARE[row.prepare]), batch_size=batch_size)
    while True:
        yield from loader


def webdataset_batches(folder: Path, row: Row, batch_size: int) -> Iterator[Any]:
    """Endless batches of a stock webdataset pipeline over the shard that our side reads."""
    generator = np.random.default_rng(0)

    def prepare(sample: dict[str, bytes]) -> dict[str, torch.Tensor]:
        image = cv2.imdecode(np.frombuffer(sample["jpg"], np.uint8), cv2.IMREAD_COLOR)
        stored = cv2.imdecode(np.frombuffer(sample[LABEL_FILES[row.stream]], np.uint8), cv2.IMREAD_UNCHANGED)
        return to_tensors(image, stored, PREPARE[row.prepare], generator)

    dataset = webdataset.WebDataset(str(folder / "images.tar"), shardshuffle=False).map(prepare)
    yield from webdataset.WebLoader(dataset.repeat(), batch_size=batch_size)


READERS = {"Dataset": plain_batches, "webdataset": webdataset_batches}


def time_row(folder: Path, row: Row, *, num_images: int, rounds: int) -> tuple[float, float]:
    """Images per second of our stream and of the other side: medians over rounds of every image once."""
    sides = [our_batches(folder, row.stream, num_images), READERS[row.reader](folder, row, num_images)]
    rates: list[list[float]] = [[], []]
    for side in sides:
        next(side)  # opens shards, fills the page cache
    for _ in range(rounds):
        for side, rate in zip(sides, rates, strict=True):
            start = time.process_time()
            next(side)
            rate.append(num_images / (time.process_time() - start))
    return statistics.median(rates[0]), statistics.median(rates[1])


# --- the label writer ------------------------------------------------------------------------------------------------


def plain_png(disparity: np.ndarray, *options: int) -> tuple[bytes, dict[str, float]]:
    """The codes of `encode_disparity`, compressed as `options` say."""
    values = disparity.astype(np.float64)
    offset, scale = float(values.min()), float(np.ptp(values))
    _, data = cv2.imencode(".png", np.rint((values - offset) * (65535 / scale)).astype(np.uint16), options)
    return data.tobytes(), {"scale": scale, "offset": offset}


ENCODERS: dict[str, Callable[[np.ndarray], tuple[bytes, dict[str, float]]]] = {
    "depthkit": encode_disparity,
    "PNG as cv2.imencode has it": plain_png,
    "PNG with zlib level 6": lambda disparity: plain_png(disparity, cv2.IMWRITE_PNG_COMPRESSION, 6),
}


def rough_label(depth: np.ndarray, noise: float) -> np.ndarray:
    """A disparity with `noise` of its range; that of a network's output is between none and 1e-3."""
    smooth = pseudo_label(depth, inference_size(depth.shape, CROP, PATCH))
    return (smooth + np.random.default_rng(0).normal(0, noise * np.ptp(smooth), smooth.shape)).astype(np.float32)


def print_writer(folder: Path, sources: list[Source], rounds: int, *, noise: float) -> None:
    """Medians over rounds of every label once, encoded and written to a tar."""
    labels = [rough_label(source.depth, noise) for source in sources]
    rates: dict[str, list[float]] = {name: [] for name in ENCODERS}
    num_bytes = {}
    for number in range(rounds):
        for name, encode_label in ENCODERS.items():
            with ShardWriter(folder / f"{number}-{name}.tar") as writer:
                start = time.process_time()
                for index, disparity in enumerate(labels):
                    png, facts = encode_label(disparity)
                    writer.add(f"{index:04d}", {"disparity.png": png, "json": json.dumps(facts).encode()})
                rates[name].append(len(labels) / (time.process_time() - start))
                num_bytes[name] = writer.close().num_bytes / len(labels)
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    print("{}x{} labels of 16 bits, noise {}".format(*labels[0].shape, noise))
    for name, rate in medians.items():
        speed = f"{rate:6.1f} labels/s {rate * labels[0].size * 2 / 1e6:6.1f} MB/s {num_bytes[name] / 1e3:6.0f} kB each"
        print(f"  {name:28} {speed}  depthkit is {medians['depthkit'] / rate:.2f} times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of .jpg and .png pictures; default: procedural ones")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side (default 9)")
    parser.add_argument("--quick", action="store_true", help="one small source, few rounds: only shows that it runs")
    arguments = parser.parse_args()
    sizes, num_images, rounds = (SIZES[-1:], 2, 2) if arguments.quick else (SIZES, 8, arguments.rounds)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)

    sources = make_sources(num_images, arguments.images)
    ratios = []
    print(f"{'height x width':15} {'stream':10} {'depthkit':>13} {'plain':>13} {'ratio':>6}  the plain side")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            name = f"{size[0]}x{size[1]}"
            write_files(Path(folder) / name, sources, size)
            for row in ROWS:
                ours, plain = time_row(Path(folder) / name, row, num_images=num_images, rounds=rounds)
                ratios.append(ours / plain)
                rates = f"{ours:7.1f} im/s {plain:7.1f} im/s"
                print(f"{name:15} {row.stream:10}  {rates} {ratios[-1]:6.2f}  {row.reader}: {row.prepare}", flush=True)
        for noise in (1e-3, 0.0):
            print_writer(Path(folder), sources, rounds, noise=noise)
    print(f"ratio of the first row (largest source, {ROWS[0].prepare}): {ratios[0]:.2f}")


if __name__ == "__main__":
    main()
