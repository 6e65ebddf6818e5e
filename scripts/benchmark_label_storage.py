"""What one label costs in each storage form: bytes, time to encode and decode, error of the round trip.

    python scripts/benchmark_label_storage.py --bundle BUNDLE --images FOLDER [--short-side 518]

A teacher predicts disparity for every image of the folder, which each form then stores and reads back. Without --bundle
the teacher is a tiny model with random weights, without --images the images are procedural. Errors: `worst` and `mean`
of |read - predicted| relative to the range (maximum - minimum) of the label, and `far`, the mean of
|read - predicted| / predicted over the tenth of the pixels with the smallest disparity above 1/1000 of the maximum.
Forms whose package is not installed (zstandard, imagecodecs) are left out, and named.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import hydra
import numpy as np
import torch

from depthkit.bundle import BundleFacts, load_model, save_bundle
from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR
from depthkit.data.decode import PNG_OPTIONS, decode_target, encode_disparity
from depthkit.data.label_store import TARGET
from depthkit.data.manifest import load_manifest
from depthkit.data.procedural import WorldSpec, write_world
from depthkit.data.shards import ShardReader, image_member
from depthkit.data.windows import crop_image, full_window, inference_size, normalize
from depthkit.models import build_model

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
NUM_IMAGES = 62_000_000
REPEATS = 3
ZLIB_1 = (cv2.IMWRITE_PNG_COMPRESSION, 1)

Encoded = tuple[bytes, dict[str, float]]


class Form(NamedTuple):
    name: str
    encode: Callable[[np.ndarray], Encoded]
    decode: Callable[[bytes, dict[str, float], tuple[int, int]], np.ndarray]


def png(codes: np.ndarray, options: Sequence[int] = PNG_OPTIONS) -> bytes:
    return cv2.imencode(".png", codes, options)[1].tobytes()


def unpng(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


# --- forms -----------------------------------------------------------------------------------------------------------


def linear_codes(disparity: np.ndarray, largest: int) -> tuple[np.ndarray, dict[str, float]]:
    low, high = float(disparity.min()), float(disparity.max())
    codes = np.rint((disparity - low) * (largest / max(high - low, 1e-30)))
    return codes.astype(np.uint16 if largest > 255 else np.uint8), {"scale": (high - low) / largest, "offset": low}


def from_linear(codes: np.ndarray, facts: dict[str, float]) -> np.ndarray:
    return (codes * facts["scale"] + facts["offset"]).astype(np.float32)


def png16_linear(name: str, *options: int) -> Form:
    """The codes of the label sets under other settings of the same format; theirs is level 1 with run lengths alone."""

    def encode(disparity: np.ndarray) -> Encoded:
        codes, facts = linear_codes(disparity, 65535)
        return png(codes, options), facts

    return Form(f"16-bit PNG, linear, {name}", encode, lambda data, facts, _: from_linear(unpng(data), facts))


def current() -> Form:
    def decode(data: bytes, facts: dict[str, float], _: tuple[int, int]) -> np.ndarray:
        return decode_target(data, TARGET, facts, "disparity")[0]

    return Form("**16-bit PNG, linear (label sets)**", encode_disparity, decode)


def png16_log() -> Form:
    """Code 0 is disparity 0; 1 to 65535 are equal steps of the logarithm, from 1/1000 of the maximum on."""

    def encode(disparity: np.ndarray) -> Encoded:
        high = max(float(disparity.max()), 1e-30)
        low = max(high / 1000, float(disparity[disparity > 0].min(initial=high)))
        step = max(np.log(high / low) / 65534, 1e-30)
        codes = np.rint(np.log(np.maximum(disparity, low) / low) / step) + 1
        return png(np.where(disparity > 0, codes, 0).astype(np.uint16)), {"low": low, "step": step}

    def decode(data: bytes, facts: dict[str, float], _: tuple[int, int]) -> np.ndarray:
        codes = unpng(data).astype(np.float32)
        return np.where(codes > 0, facts["low"] * np.exp((codes - 1) * facts["step"]), 0).astype(np.float32)

    return Form("16-bit PNG, logarithmic, 0 kept", encode, decode)


def float16_zstd() -> Form:
    """Float16 bits, difference to the left neighbour, low and high bytes apart, zstd level 3."""
    import zstandard

    compressor, decompressor = zstandard.ZstdCompressor(3), zstandard.ZstdDecompressor()

    def encode(disparity: np.ndarray) -> Encoded:
        bits = disparity.astype(np.float16).view(np.uint16)
        bits[:, 1:] = bits[:, 1:] - bits[:, :-1]
        return compressor.compress(bits.view(np.uint8).reshape(-1, 2).T.tobytes()), {}

    def decode(data: bytes, _: dict[str, float], size: tuple[int, int]) -> np.ndarray:
        planes = np.frombuffer(decompressor.decompress(data), np.uint8).reshape(2, -1)
        bits = np.ascontiguousarray(planes.T).view(np.uint16).reshape(size)
        return np.cumsum(bits, axis=1, dtype=np.uint16).view(np.float16).astype(np.float32)

    return Form("float16, delta + shuffle + zstd 3", encode, decode)


def linear16_zstd() -> Form:
    """The codes of the linear PNG in the container of `float16_zstd`."""
    import zstandard

    compressor, decompressor = zstandard.ZstdCompressor(3), zstandard.ZstdDecompressor()

    def encode(disparity: np.ndarray) -> Encoded:
        codes, facts = linear_codes(disparity, 65535)
        codes[:, 1:] = codes[:, 1:] - codes[:, :-1]
        return compressor.compress(codes.view(np.uint8).reshape(-1, 2).T.tobytes()), facts

    def decode(data: bytes, facts: dict[str, float], size: tuple[int, int]) -> np.ndarray:
        planes = np.frombuffer(decompressor.decompress(data), np.uint8).reshape(2, -1)
        codes = np.ascontiguousarray(planes.T).view(np.uint16).reshape(size)
        return from_linear(np.cumsum(codes, axis=1, dtype=np.uint16), facts)

    return Form("16-bit linear, delta + shuffle + zstd 3", encode, decode)


def float16_npz() -> Form:
    def encode(disparity: np.ndarray) -> Encoded:
        file = io.BytesIO()
        np.savez_compressed(file, disparity=disparity.astype(np.float16))
        return file.getvalue(), {}

    def decode(data: bytes, _: dict[str, float], __: tuple[int, int]) -> np.ndarray:
        return np.load(io.BytesIO(data))["disparity"].astype(np.float32)

    return Form("float16 .npz (compressed)", encode, decode)


def png8_linear() -> Form:
    def encode(disparity: np.ndarray) -> Encoded:
        codes, facts = linear_codes(disparity, 255)
        return png(codes), facts

    return Form("8-bit PNG, linear", encode, lambda data, facts, _: from_linear(unpng(data), facts))


def jpeg_xl() -> Form:
    """Lossless JPEG XL of the codes of the linear PNG, effort 1 (fastest)."""
    import imagecodecs

    def encode(disparity: np.ndarray) -> Encoded:
        codes, facts = linear_codes(disparity, 65535)
        return bytes(imagecodecs.jpegxl_encode(codes, lossless=True, effort=1, numthreads=1)), facts

    def decode(data: bytes, facts: dict[str, float], _: tuple[int, int]) -> np.ndarray:
        return from_linear(imagecodecs.jpegxl_decode(data, numthreads=1), facts)

    return Form("16-bit JPEG XL, linear, lossless, effort 1", encode, decode)


MAKERS: list[Callable[[], Form]] = [
    current,
    lambda: png16_linear("zlib level 6", cv2.IMWRITE_PNG_COMPRESSION, 6),
    lambda: png16_linear("zlib level 1", *ZLIB_1),
    lambda: png16_linear("Huffman alone", *ZLIB_1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY),
    png16_log,
    linear16_zstd,
    float16_zstd,
    float16_npz,
    jpeg_xl,
    png8_linear,
]


# --- labels ----------------------------------------------------------------------------------------------------------


def images_of(folder: Path) -> Iterator[np.ndarray]:
    """RGB (H, W, 3) uint8 of every image below `folder`, in the order of names."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is not None:
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def procedural_images(folder: Path, count: int) -> Iterator[np.ndarray]:
    world = WorldSpec(domain="target", split="benchmark", num_images=count, size=(96, 128), labeled=False)
    manifest = write_world(folder, world)
    reader = ShardReader(load_manifest(manifest), folder)
    for index in range(count):
        data = np.frombuffer(image_member(reader.read(0, index).members), np.uint8)
        yield cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def tiny_bundle(folder: Path) -> Path:
    register_schemas()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        model = to_config(hydra.compose("train", ["data=tiny_teacher"])).model
    facts = BundleFacts(content="depth_model", model=model, kind="disparity", short_side=96)
    return save_bundle(folder, build_model(model), facts)


def predict(bundle: Path, images: Iterator[np.ndarray], short_side: int | None, count: int) -> list[np.ndarray]:
    """The teacher's own maps, at the size it predicts, as `depthkit label` stores them."""
    model, facts = load_model(bundle)
    model.eval()
    labels = []
    for _, image in zip(range(count), images, strict=False):
        size = inference_size(image.shape[:2], short_side or facts.short_side, model.encoder.multiple)
        resized = crop_image(image, full_window(image.shape[:2], size), image.shape[:2])
        with torch.inference_mode():
            batch = normalize(torch.from_numpy(resized).permute(2, 0, 1)[None], facts.mean, facts.std)
            labels.append(model(batch).values[0].float().numpy())
    return labels


# --- measuring -------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Medians over the labels, but `worst`, the largest; times in ms, errors as the module says."""

    num_bytes: float
    encode_ms: float
    decode_ms: float
    worst: float
    mean: float
    far: float


def measure(form: Form, labels: list[np.ndarray]) -> Cost:
    rows = []
    for disparity in labels:
        encode_ms, (data, facts) = fastest(partial(form.encode, disparity))
        decode_ms, found = fastest(partial(form.decode, data, facts, disparity.shape))
        error = np.abs(found.astype(np.float64) - disparity)
        span = max(float(np.ptp(disparity)), 1e-30)
        seen = disparity > disparity.max() / 1000
        far = seen & (disparity <= np.quantile(disparity[seen], 0.1))
        relative = (error[far] / disparity[far]).mean()
        rows.append(Cost(len(data), encode_ms, decode_ms, error.max() / span, error.mean() / span, relative))
    columns = list(zip(*rows, strict=True))
    medians = [statistics.fmean(columns[0]), *(statistics.median(column) for column in columns[1:])]
    return Cost(*medians)._replace(worst=max(columns[3]))


def fastest(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of the fastest of a few calls, and the result."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - start) * 1000)
    return min(times), result


def table(costs: dict[str, Cost]) -> Iterator[str]:
    columns = ["form", "bytes per label", "encode ms", "decode ms", "worst error", "mean error", "far error"]
    columns += ["62M labels: TB", "62M labels: hours of a core"]
    yield f"| {' | '.join(columns)} |"
    yield "| --- " * len(columns) + "|"
    for name, cost in costs.items():
        yield (
            f"| {name} | {cost.num_bytes:,.0f} | {cost.encode_ms:.1f} | {cost.decode_ms:.1f} | {cost.worst:.1e} | "
            f"{cost.mean:.1e} | {cost.far:.1e} | {cost.num_bytes * NUM_IMAGES / 1e12:.1f} | "
            f"{cost.encode_ms * NUM_IMAGES / 3.6e6:,.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="the teacher; default: a tiny model with random weights")
    parser.add_argument("--images", type=Path, help="folder of images; default: procedural ones")
    parser.add_argument("--short-side", type=int, help="pixels; default: as the teacher was trained")
    parser.add_argument("--count", type=int, default=50, help="images, at most; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="2 images: only shows that it runs")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    count = 2 if arguments.quick else arguments.count

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = arguments.bundle or tiny_bundle(root / "teacher")
        images = images_of(arguments.images) if arguments.images else procedural_images(root / "images", count)
        labels = predict(bundle, images, arguments.short_side, count)

    costs, missing = {}, []
    for make in MAKERS:
        try:
            form = make()
        except ImportError as error:
            missing.append(str(error.name))
            continue
        costs[form.name] = measure(form, labels)
    height, width = np.median([label.shape for label in labels], axis=0)
    print(f"{len(labels)} labels, median size {height:.0f} x {width:.0f}, one thread\n")
    print("\n".join(table(costs)))
    if missing:
        print(f"\nnot installed: {', '.join(sorted(set(missing)))}")
    smallest = min(cost.num_bytes for cost in costs.values() if cost.worst < 1e-4)
    ours = costs[current().name].num_bytes
    print(f"\nratio of bytes, label sets to the smallest form within 1e-4: {ours / smallest:.2f}")


if __name__ == "__main__":
    main()
