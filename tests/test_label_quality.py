"""Labels from several views with their uncertainty, and sky that a network finds."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import jpeg, png, unlabeled_sample, write_dataset
from torch import Tensor

from depthkit.bundle import load_model
from depthkit.config import ConfigError, DatasetConfig, PseudoLabelConfig
from depthkit.data.decode import decode_image, decode_target
from depthkit.data.manifest import LabelSettings, load_manifest
from depthkit.data.reader import DatasetReader
from depthkit.data.shards import ShardReader
from depthkit.data.uncertainty import decode_uncertainty, encode_uncertainty
from depthkit.data.windows import normalize
from depthkit.ensembling import Views, combine, predict_views
from depthkit.label import label
from depthkit.select import main as select

SIZE = (32, 48)


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 1


def reference(predictions: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Label, uncertainty and disagreement of (variants, H, W), at the valid pixels of one image, in float64."""
    maps = predictions[:, mask].astype(np.float64)
    aligned = [maps[0]]
    for values in maps[1:]:
        design = np.stack([values, np.ones_like(values)], axis=1)
        aligned.append(design @ np.linalg.lstsq(design, maps[0], rcond=None)[0])
    mean, std = np.mean(aligned, axis=0), np.std(aligned, axis=0)
    return mean, std / mean.std(), float((std**2).mean() / mean.var())


# Combining


@pytest.mark.parametrize("num_views", [2, 3, 5])
def test_an_ensemble_is_the_mean_of_aligned_predictions_with_its_spread(num_views: int):
    predictions = random_maps(num_views, 3, 9, 11)
    predictions[1] = 4 * predictions[0] + 0.3 * predictions[1] + 7
    valid_mask = random_maps(3, 9, 11, seed=1) > 1.3
    found = combine(list(predictions), valid_mask)
    for image in range(3):
        mask = valid_mask[image].numpy()
        mean, uncertainty, disagreement = reference(predictions[:, image].numpy(), mask)
        np.testing.assert_allclose(found.values[image].numpy()[mask], mean, rtol=1e-4)
        np.testing.assert_allclose(found.uncertainty[image].numpy()[mask], uncertainty, rtol=1e-3, atol=1e-4)
        assert float(found.disagreement[image]) == pytest.approx(disagreement, rel=1e-3)
        assert not found.values[image][~valid_mask[image]].any()
        assert not found.uncertainty[image][~valid_mask[image]].any()


def test_the_spread_does_not_depend_on_scale_and_shift():
    a, b = random_maps(2, 2, 9, 11)
    everywhere = torch.ones_like(a, dtype=torch.bool)
    found = combine([a, b], everywhere)
    assert (found.disagreement > 0.1).all()
    for scaled in (combine([50 * a + 3, b], everywhere), combine([a, 0.1 * b + 9], everywhere)):
        torch.testing.assert_close(scaled.uncertainty, found.uncertainty, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scaled.disagreement, found.disagreement, rtol=1e-3, atol=1e-4)
    agreeing = combine([a, 0.1 * a + 9], everywhere)
    assert agreeing.disagreement.max() < 1e-6
    torch.testing.assert_close(agreeing.values, a)


def test_what_is_outside_the_mask_does_not_count():
    a, b = random_maps(2, 2, 9, 11)
    valid_mask = random_maps(2, 9, 11, seed=1) > 1.5
    found = combine([a, b], valid_mask)
    other = combine([a.where(valid_mask, 100.0), b.where(valid_mask, -5.0)], valid_mask)
    for mine, its in zip(found, other, strict=True):
        torch.testing.assert_close(mine, its)


def test_a_constant_map_and_an_empty_mask_are_without_disagreement():
    a, b = random_maps(2, 2, 9, 11)
    a[1] = 2.5
    valid_mask = torch.ones_like(a, dtype=torch.bool)
    valid_mask[0] = False
    found = combine([a, b], valid_mask)
    assert found.disagreement.tolist() == [0, 0]
    assert not found.uncertainty.any()
    assert not found.values[0].any()
    torch.testing.assert_close(found.values[1], a[1])


def test_a_label_is_never_below_zero():
    a = torch.linspace(0, 1, 100).view(1, 10, 10)
    found = combine([a, (a - 0.5) ** 3], torch.ones_like(a, dtype=torch.bool))
    assert found.values.min() == 0


# Views


def test_a_view_is_seen_mirrored_or_at_another_size_and_put_back():
    images = torch.linspace(-1, 1, 48).repeat(2, 3, 32, 1)
    seen: list[Tensor] = []

    def network(image: Tensor) -> Tensor:
        seen.append(image)
        return image[:, 0]

    found = predict_views(network, images, Views(flip=True, scales=(1.0, 1.25, 0.6)), multiple=8)
    sizes = [tuple(image.shape[-2:]) for image in seen]
    assert sizes == [(32, 48)] * 2 + [(40, 64)] * 2 + [(16, 32)] * 2  # 60 and 28.8 px, to multiples of 8
    torch.testing.assert_close(seen[1], images.flip(-1))
    assert len(found) == 6
    for values in found:
        assert values.shape == (2, 32, 48)
        torch.testing.assert_close(values[..., 3:-3], images[:, 0, :, 3:-3], rtol=0, atol=0.02)


@pytest.mark.parametrize("scales", [[], [1.25], [1.25, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
def test_scales_that_cannot_be_are_refused(scales: list[float]):
    with pytest.raises(ConfigError, match=r"stage\.scales="):
        PseudoLabelConfig(bundle="b", images="i", out="o", scales=scales)


# As it is stored


def test_uncertainty_is_stored_within_half_a_code():
    values = random_maps(20, 30).numpy() * 7
    data, scale = encode_uncertainty(values)
    found = decode_uncertainty(data, scale)
    assert found.dtype == np.float32
    assert np.abs(found - values).max() <= scale / 510 * 1.0001
    assert scale == values.max()
    data, scale = encode_uncertainty(np.zeros((3, 4), np.float32))
    assert not decode_uncertainty(data, scale).any()


Label = Callable[..., Path]


@pytest.fixture(scope="module")
def run_label(compose: Any, tiny_teacher: Path) -> Label:
    def run(images: Path, out: Path, *overrides: str) -> Path:
        settings = [f"stage.bundle={tiny_teacher}", f"stage.images={images}", f"stage.out={out}"]
        settings += ["stage.batch_size=3", "stage.num_workers=0", "trainer.enable_progress_bar=false"]
        return label(compose("stage=pseudo_label", *settings, *overrides))

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = {f"image_{index}": unlabeled_sample(index, SIZE) for index in range(6)}
    samples["image_4"] = {"jpg": samples["image_4"]["jpg"][:-40]}
    return write_dataset(tmp_path_factory.mktemp("images"), samples, None, samples_per_shard=4)


ENSEMBLE = ["stage.flip=true", "stage.scales=[1.0,1.25]", "data.quarantine_budget=0.5"]


@pytest.fixture(scope="module")
def labels(run_label: Label, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_label(images, tmp_path_factory.mktemp("labels") / "set", *ENSEMBLE)


def read_label(labels: Path, index: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Disparity, uncertainty and facts."""
    manifest = load_manifest(labels)
    assert manifest.target is not None
    members = ShardReader(manifest, labels.parent).read(*divmod(index, 4)).members
    facts = json.loads(members["json"])
    disparity, _ = decode_target(members["disparity.png"], manifest.target, facts, "disparity")
    return disparity, decode_uncertainty(members["uncertainty.png"], facts["uncertainty_scale"]), facts


@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_label_of_two_views_is_their_mean(
    run_label: Label, images: Path, tiny_teacher: Path, tmp_path: Path, index: int
):
    """The reference: the image and its mirror image through the model alone, fitted by numpy."""
    labels = run_label(images, tmp_path / "labels", "stage.flip=true", "data.quarantine_budget=0.5")
    model, _ = load_model(tiny_teacher)
    pixels = decode_image(ShardReader(load_manifest(images), images.parent).read(*divmod(index, 4)).members["jpg"])
    views = np.stack([pixels, pixels[:, ::-1]])
    with torch.inference_mode():
        upright, mirrored = model(normalize(torch.from_numpy(views).permute(0, 3, 1, 2))).values.numpy()
    everywhere = np.ones(SIZE, bool)
    mean, spread, disagreement = reference(np.stack([upright, mirrored[:, ::-1]]), everywhere)
    disparity, uncertainty, facts = read_label(labels, index)
    np.testing.assert_allclose(disparity.ravel(), mean, atol=np.ptp(mean) / 65535 + 1e-5 * mean.max())
    np.testing.assert_allclose(uncertainty.ravel(), spread, atol=facts["uncertainty_scale"] / 500)
    assert facts["disagreement"] == pytest.approx(disagreement, rel=1e-2)
    assert disagreement > 1e-3


def test_an_ensemble_is_named_in_the_lineage_and_not_mixed_with_another(
    run_label: Label, images: Path, labels: Path, tmp_path: Path
):
    lineage = load_manifest(labels).labels_of
    assert lineage is not None
    assert lineage.settings == LabelSettings(short_side=32, precision="32-true", flip=True, scales=(1.0, 1.25))
    other = r"\(settings\.flip True, now False; settings\.scales \[1\.0, 1\.25\], now \[1\.0\]\)"
    with pytest.raises(ConfigError, match=other):
        run_label(images, labels.parent, "data.quarantine_budget=0.5")


def test_one_view_has_no_uncertainty_and_the_lineage_of_before(run_label: Label, images: Path, tmp_path: Path):
    found = run_label(images, tmp_path / "labels", "data.quarantine_budget=0.5")
    manifest = load_manifest(found)
    assert list(ShardReader(manifest, found.parent).read(0, 0).members) == ["disparity.png", "json"]
    content = json.loads(found.read_text())
    for name in ("flip", "scales", "sky_model", "sky_class"):
        del content["labels_of"]["settings"][name]
    (tmp_path / "earlier.json").write_text(json.dumps(content))
    assert load_manifest(tmp_path / "earlier.json").digest() == manifest.digest()


def test_labels_are_selected_and_trained_on(images: Path, labels: Path, tmp_path: Path):
    disagreement = {index: read_label(labels, index)[2]["disagreement"] for index in (0, 1, 2, 3, 5)}
    assert select([f"labels={labels}", f"out={tmp_path / 'chosen.json'}", "fraction=0.4"]) == 0
    settings = {"labels": str(labels), "selection": str(tmp_path / "chosen.json")}
    reader = DatasetReader("x", DatasetConfig(manifest=str(images), **settings), "disparity")
    places = [(shard, index) for shard, size in enumerate(reader.shard_sizes) for index in range(size)]
    keys = [reader.read_whole(*place, short_side=32, multiple=8).key for place in places]
    largest = sorted(disagreement, key=lambda index: disagreement[index])[-2:]
    assert keys == [f"image_{index}" for index in sorted(largest)]


# Sky


def write_sky_network(path: Path, shape: tuple[Any, ...] = ("batch", 3, "height", "width")) -> Path:
    """Scores of three classes at half the size; what is brighter than the mean of ImageNet has class 2."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make = onnx.helper.make_node
    nodes = [
        make("AveragePool", ["image"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        make("ReduceMean", ["small"], ["bright"], axes=[1], keepdims=1),
        make("Neg", ["bright"], ["dark"]),
        make("Sub", ["bright", "hundred"], ["never"]),
        make("Concat", ["dark", "never", "bright"], ["scores"], axis=1),
    ]
    floats = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info("image", floats, shape)]
    outputs = [onnx.helper.make_tensor_value_info("scores", floats, ("batch", 3, "h", "w"))]
    hundred = onnx.helper.make_tensor("hundred", floats, [1], [100.0])
    graph = onnx.helper.make_graph(nodes, "sky", inputs, outputs, [hundred])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def landscape(horizon: int) -> np.ndarray:
    """Bright above the horizon, dark below it."""
    rows = np.arange(SIZE[0])[:, None]
    return np.where(rows < horizon, 230, 20).astype(np.uint8).repeat(SIZE[1], axis=1)


def zeros_of(labels: Path, images: Path, index: int) -> np.ndarray:
    reader = DatasetReader("x", DatasetConfig(manifest=str(images), labels=str(labels)), "disparity")
    sample = reader.read_whole(0, index, short_side=32, multiple=8)
    assert sample.valid_mask.all()
    return sample.target == 0


@pytest.mark.parametrize("shape", [("batch", 3, "height", "width"), (1, 3, 64, 64)])
@pytest.mark.parametrize("overrides", [[], ["stage.flip=true"]])
def test_sky_that_the_network_finds_is_disparity_zero(
    run_label: Label, tmp_path: Path, shape: tuple[Any, ...], overrides: list[str]
):
    horizons = [8, 16, 0]
    samples = {f"k{index}": {"jpg": jpeg(landscape(row))} for index, row in enumerate(horizons)}
    images = write_dataset(tmp_path / "images", samples, None)
    network = write_sky_network(tmp_path / "sky.onnx", shape)
    labels = run_label(images, tmp_path / "labels", f"stage.sky_model={network}", *overrides)
    for index, horizon in enumerate(horizons):
        zeros = zeros_of(labels, images, index)
        assert zeros[:horizon].all()
        assert not zeros[horizon:].any()
        if overrides:
            _, uncertainty, _ = read_label(labels, index)
            assert not uncertainty[:horizon].any()
            assert uncertainty[horizon:].any()
    lineage = load_manifest(labels).labels_of
    assert lineage is not None
    assert lineage.settings is not None
    assert lineage.settings.sky_model == sha256(network.read_bytes()).hexdigest()
    assert lineage.settings.sky_class == 2


def test_a_sky_mask_of_the_data_set_comes_before_the_network(run_label: Label, tmp_path: Path):
    mask = np.zeros(SIZE, np.uint8)
    mask[:, :24] = 255
    given = {"jpg": jpeg(landscape(8)), "sky.png": png(mask)}
    images = write_dataset(tmp_path / "images", {"given": given, "not": {"jpg": jpeg(landscape(8))}}, None)
    network = write_sky_network(tmp_path / "sky.onnx")
    labels = run_label(images, tmp_path / "labels", f"stage.sky_model={network}")
    np.testing.assert_array_equal(zeros_of(labels, images, 0), mask > 0)
    np.testing.assert_array_equal(zeros_of(labels, images, 1), landscape(8) > 100)


def test_another_class_is_another_sky(run_label: Label, tmp_path: Path):
    images = write_dataset(tmp_path / "images", {"k": {"jpg": jpeg(landscape(8))}}, None)
    network = write_sky_network(tmp_path / "sky.onnx")
    labels = run_label(images, tmp_path / "labels", f"stage.sky_model={network}", "stage.sky_class=0")
    np.testing.assert_array_equal(zeros_of(labels, images, 0), landscape(8) < 100)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda path: write_sky_network(path, ("batch", 3)), "damaged|needs one input"),
        (lambda path: path.write_bytes(b"no network"), "not an ONNX file"),
        (lambda path: None, "sky.onnx"),
    ],
)
def test_a_sky_network_that_cannot_be_is_refused(
    run_label: Label, images: Path, tmp_path: Path, broken: Callable[[Path], Any], message: str
):
    broken(tmp_path / "sky.onnx")
    with pytest.raises((ValueError, OSError), match=message):
        run_label(images, tmp_path / "labels", f"stage.sky_model={tmp_path / 'sky.onnx'}")
    write_sky_network(tmp_path / "sky.onnx")
    with pytest.raises(ValueError, match=r"stage\.sky_class=3, but there are only 3 classes"):
        run_label(images, tmp_path / "labels", f"stage.sky_model={tmp_path / 'sky.onnx'}", "stage.sky_class=3")
