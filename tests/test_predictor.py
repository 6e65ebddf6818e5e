"""Predicting: what comes out has the size of the image and says what it is; what is no image is named."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from depthkit.bundle import BundleFacts, load_model
from depthkit.config import DPTConfig
from depthkit.data.quarantine import SampleError
from depthkit.inference.loading import load
from depthkit.inference.predictor import BATCHES_WAITING, Predictor


@pytest.fixture(scope="module")
def predictor(tiny_teacher) -> Predictor:
    return load(tiny_teacher, device="cpu")


class Recorder:
    """A network that gives the red channel back and keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.batches.append(image)
        return red(image)


def red(image: torch.Tensor) -> torch.Tensor:
    """The red channel, 0 to 1, of a normalised image."""
    return image[:, 0] * 0.229 + 0.485


def predictor_of(network: Callable[[torch.Tensor], torch.Tensor], *, short_side: int, multiple: int) -> Predictor:
    model = DPTConfig(encoder="fake", tap_layers=[0, 1, 2, 3], features=2, out_channels=[1, 1, 1, 1])
    facts = BundleFacts(content="depth_model", model=model, kind="disparity", short_side=short_side)
    return Predictor(network, facts, name="fake", multiple=multiple, device=torch.device("cpu"))


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (50, 33), (7, 90), (1, 1)])
def test_prediction_has_the_size_of_the_image(predictor, size):
    prediction = predictor.predict(np.zeros((*size, 3), np.uint8))
    assert prediction.values.shape == size
    assert prediction.values.dtype == np.float32
    assert np.isfinite(prediction.values).all()
    assert prediction.values.min() >= 0


def test_prediction_at_the_size_of_the_model_is_the_models_output(predictor, tiny_teacher):
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    tensor = torch.from_numpy(((image / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        expected = load_model(tiny_teacher)[0](tensor).values[0].numpy()
    np.testing.assert_allclose(predictor.predict(image).values, expected, rtol=1e-4, atol=1e-5)


def test_array_path_and_list_agree(predictor, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), image[..., ::-1])
    one = predictor.predict(image).values
    many = predictor.predict([image, tmp_path / "image.png", str(tmp_path / "image.png")])
    assert len(many) == 3
    for prediction in many:
        np.testing.assert_allclose(prediction.values, one, rtol=1e-4, atol=1e-6)
    assert predictor.predict([]) == []


def test_short_side_changes_the_resolution_of_the_model(predictor):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    coarse, fine = predictor.predict(image), predictor.predict(image, short_side=64)
    assert coarse.values.shape == fine.values.shape
    assert not np.allclose(coarse.values, fine.values)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((32, 40), np.uint8), r"shape \(32, 40\), uint8"),
        (np.zeros((32, 40, 4), np.uint8), r"shape \(32, 40, 4\), uint8"),
        (np.zeros((3, 32, 40), np.uint8), r"shape \(3, 32, 40\), uint8"),
        (np.zeros((32, 40, 3), np.float32), r"shape \(32, 40, 3\), float32"),
        (np.zeros((0, 40, 3), np.uint8), r"shape \(0, 40, 3\), uint8"),
    ],
)
def test_arrays_that_are_no_image(predictor, image, message):
    with pytest.raises(ValueError, match=r"expected an \(H, W, 3\) uint8 RGB image, got " + message):
        predictor.predict(image)


def test_other_objects_are_no_image(predictor):
    with pytest.raises(ValueError, match=r"image or a path, got Tensor"):
        predictor.predict(torch.zeros(3, 8, 8))


def test_files_that_are_no_image(predictor, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SampleError, match=r"notes\.txt"):
        predictor.predict(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        predictor.predict(tmp_path / "none.jpg")


# --- preprocessing of the released models ----------------------------------------------------------------------------

PHOTOS = {
    "labeled/kitti_metric3d/rgb/0000000005.png": (375, 1242),
    "labeled/nuscenes_lidar/rgb/CAM_FRONT.jpg": (900, 1600),
    "labeled/kitti360_fisheye/rgb/kitti360.png": (1400, 1400),
    "labeled/nyu_metric3d/rgb/rgb_00000.jpg": (480, 640),
    "labeled/sunrgbd_kinect2/rgb/0000144.jpg": (530, 730),
    "labeled/iphone_lidar_promptda/rgb/image.jpg": (1440, 1920),
    "unlabeled/bsds_23025.jpg": (481, 321),
    "unlabeled/depthmaster_02.jpg": (640, 428),
    "unlabeled/slowtv_00_natural.jpg": (180, 320),
    "unlabeled/slowtv_image_0551.jpg": (242, 800),
}


def original_input(path: Path, input_size: int) -> np.ndarray:
    """What Depth Anything feeds to its network (V2 `image2tensor`, util/transform.py), in float64 from end to end."""
    image = cv2.imread(str(path))[:, :, ::-1] / 255.0
    scale = max(input_size / image.shape[0], input_size / image.shape[1])
    sides = []
    for side in image.shape[:2]:
        rounded = int(np.round(scale * side / 14) * 14)
        sides.append(rounded if rounded >= input_size else int(np.ceil(scale * side / 14) * 14))
    resized = cv2.resize(image, (sides[1], sides[0]), interpolation=cv2.INTER_CUBIC)
    return ((resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


@pytest.mark.parametrize(("photo", "size"), PHOTOS.items(), ids=[Path(photo).stem for photo in PHOTOS])
def test_the_network_sees_what_the_released_models_see(samples_dir, photo, size):
    network = Recorder()
    prediction = predictor_of(network, short_side=518, multiple=14).predict(samples_dir / photo)
    expected = original_input(samples_dir / photo, 518)
    (batch,) = network.batches
    assert batch.dtype == torch.float32
    assert batch.shape == (1, *expected.shape)
    np.testing.assert_allclose(batch[0].numpy(), expected, rtol=0, atol=1e-5)
    assert prediction.values.shape == size


def test_cubic_overshoot_reaches_the_network():
    """The released code resizes floats: 8 bits would round, and cut off what lies outside 0 to 255."""
    image = np.zeros((24, 24, 3), np.uint8)
    image[:, 12:] = 255
    network = Recorder()
    predictor_of(network, short_side=32, multiple=8).predict(image)
    values = red(network.batches[0])
    assert values.min() < -0.01
    assert values.max() > 1.01


def test_values_return_to_the_image_with_corners_on_corners():
    ramp = np.repeat(np.arange(0, 256, 17, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)

    def columns(image: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 1, image.shape[-1]).expand(image.shape[0], *image.shape[-2:])

    values = predictor_of(columns, short_side=64, multiple=8).predict(ramp).values
    np.testing.assert_allclose(values, np.tile(np.linspace(0, 1, 16), (16, 1)), atol=1e-6)


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_list_keeps_its_order_and_runs_in_batches_of_one_size():
    """Two sizes, taking turns: full batches all the same, every prediction where its image was."""
    images = [np.full((16, 16, 3) if i % 2 else (16, 24, 3), 10 * i, np.uint8) for i in range(10)]
    network = Recorder()
    predictions = predictor_of(network, short_side=16, multiple=8).predict(images, batch_size=3)
    assert [prediction.values.shape for prediction in predictions] == [image.shape[:2] for image in images]
    for i, prediction in enumerate(predictions):
        np.testing.assert_allclose(prediction.values, 10 * i / 255, atol=1e-5)
    assert sorted(len(batch) for batch in network.batches) == [2, 2, 3, 3]


def test_images_of_one_network_size_share_a_batch_and_return_to_their_own():
    network = Recorder()
    sizes = [(16, 16), (32, 32), (40, 41)]
    predictions = predictor_of(network, short_side=16, multiple=8).predict([random_image(*size) for size in sizes])
    assert [len(batch) for batch in network.batches] == [3]
    assert [prediction.values.shape for prediction in predictions] == sizes


def test_images_of_a_long_list_are_read_when_they_are_needed(tmp_path, monkeypatch):
    """With as many sizes as images, no more inputs wait than `BATCHES_WAITING` batches hold."""
    paths = [tmp_path / f"{i}.png" for i in range(24)]
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), random_image(16, 16 + 8 * i))
    reads: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self.name) or read_bytes(self))
    waiting: list[int] = []
    num_predicted = 0

    def network(image: torch.Tensor) -> torch.Tensor:
        nonlocal num_predicted
        waiting.append(len(reads) - num_predicted)
        num_predicted += len(image)
        return red(image)

    predictions = predictor_of(network, short_side=16, multiple=8).predict(paths, batch_size=2)
    assert [prediction.values.shape[1] for prediction in predictions] == [16 + 8 * i for i in range(24)]
    assert len(reads) == 24
    assert max(waiting) <= 2 * BATCHES_WAITING


def test_one_unreadable_file_of_a_list_is_named(predictor, tmp_path):
    cv2.imwrite(str(tmp_path / "good.png"), random_image(16, 16))
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(SampleError, match=r"bad\.jpg"):
        predictor.predict([tmp_path / "good.png", tmp_path / "bad.jpg"])


@pytest.mark.parametrize("name", ["short_side", "tile", "batch_size"])
def test_numbers_below_one_are_refused(predictor, name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        predictor.predict(random_image(16, 16), **{name: 0})


# --- flip and tiles --------------------------------------------------------------------------------------------------


def test_flip_is_the_average_with_the_mirrored_prediction_of_the_mirrored_image(predictor):
    image = random_image(32, 48)
    plain = predictor.predict(image).values
    mirrored = predictor.predict(np.ascontiguousarray(image[:, ::-1])).values[:, ::-1]
    np.testing.assert_allclose(predictor.predict(image, flip=True).values, (plain + mirrored) / 2, atol=1e-5)
    assert not np.allclose(plain, mirrored)


def smooth_image(height: int, width: int) -> np.ndarray:
    """Two waves: values between 30 and 220."""
    y, x = np.mgrid[:height, :width] / 30
    values = 125 + 60 * np.sin(x + 0.3 * y) + 35 * np.cos(0.7 * y - 0.2 * x)
    return np.repeat(values.round().astype(np.uint8)[..., None], 3, axis=2)


def largest_step(values: np.ndarray) -> float:
    return max(float(np.abs(np.diff(values, axis=axis)).max()) for axis in (0, 1))


@pytest.mark.parametrize("flip", [False, True])
def test_tiles_give_the_detail_of_the_tiles_on_the_scale_of_the_whole(flip):
    """A network that is right up to a scale and a shift of each call, and sees the whole image at a third."""
    seen: list[tuple[int, ...]] = []

    def network(image: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(image.shape))
        if len(seen) <= 1 + flip:
            return red(image) + 0.1
        # Mirrored and plain calls of a tile share their scale, as those of one network about do.
        state = torch.Generator().manual_seed(1000 + (len(seen) - 1) // (1 + flip))
        scale = 0.2 + 3 * torch.rand(len(image), 1, 1, generator=state)
        return scale * red(image) + torch.rand(len(image), 1, 1, generator=state)

    image = smooth_image(200, 328)
    image[90:110:2] += 20  # detail that the coarse prediction cannot hold
    truth = image[..., 0] / 255 + 0.1
    values = predictor_of(network, short_side=64, multiple=8).predict(image, tile=120, flip=flip, batch_size=3).values
    assert values.shape == (200, 328)
    assert seen[0] == (1, 3, 64, 104)
    assert {shape[2:] for shape in seen[1 + flip :]} == {(120, 120)}
    assert max(shape[0] for shape in seen) == 3
    # The fits see the coarse prediction, which is off by the resizing: 2% of the range.
    np.testing.assert_allclose(values, truth, atol=0.02)
    assert largest_step(values - truth) < 0.002


def test_an_image_smaller_than_a_tile_is_just_predicted():
    network = Recorder()
    fake = predictor_of(network, short_side=32, multiple=8)
    image = random_image(100, 120)
    np.testing.assert_array_equal(fake.predict(image, tile=120).values, fake.predict(image).values)
    assert [tuple(batch.shape) for batch in network.batches] == [(1, 3, 32, 40)] * 2


def test_tiles_add_nothing_where_the_network_sees_every_pixel_already():
    network = Recorder()
    predictor_of(network, short_side=104, multiple=8).predict(random_image(100, 120), tile=32)
    assert len(network.batches) == 1


def test_tiles_of_a_real_network_are_finite_and_not_negative(predictor):
    images = [smooth_image(90, 140), np.zeros((90, 140, 3), np.uint8), random_image(40, 40)]
    for image, prediction in zip(images, predictor.predict(images, tile=64, flip=True), strict=True):
        assert prediction.values.shape == image.shape[:2]
        assert prediction.values.dtype == np.float32
        assert np.isfinite(prediction.values).all()
        assert prediction.values.min() >= 0
