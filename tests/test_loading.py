"""`depthkit.load`: each format becomes the same predictor, and an option that does not fit is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_table import randomise

import depthkit
from depthkit.bundle import FACTS, WEIGHTS, BundleError, BundleFacts, save_bundle, sha256
from depthkit.formats.huggingface import write_huggingface
from depthkit.formats.official import published, write_checkpoint
from depthkit.formats.onnx import export_onnx
from depthkit.inference.loading import load
from depthkit.inference.predictor import Predictor
from depthkit.models import build_model


@pytest.fixture(scope="module")
def predictor(tiny_teacher) -> Predictor:
    return load(tiny_teacher, device="cpu")


@pytest.fixture
def folder(tiny_teacher, tmp_path) -> Path:
    return shutil.copytree(tiny_teacher, tmp_path / "bundle")


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def change(folder: Path, **values: object) -> None:
    text = json.loads((folder / FACTS).read_text()) | values
    (folder / FACTS).write_text(json.dumps(text))


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> dict[str, tuple[Path, dict[str, object]]]:
    """One model in each format: its path, and what `load` must be told."""
    root = tmp_path_factory.mktemp("formats")
    settings = replace(published(384), encoder_args={"img_size": 70, "depth": 4}, tap_layers=[0, 1, 2, 3])
    model = randomise(build_model(settings))
    facts = BundleFacts(content="depth_model", model=settings, kind="disparity", short_side=518)
    save_bundle(root / "bundle", model, facts)
    write_huggingface(model, facts, root / "hf", card="")
    write_checkpoint(model, root / "model.pth")
    export_onnx(model, facts, root / "model.onnx")
    names = {"bundle": {}, "hf": {}, "model.pth": {"taps": "0,1,2,3"}, "model.onnx": {}}
    return {name: (root / name, options) for name, options in names.items()}


@pytest.mark.parametrize("name", ["hf", "model.pth", "model.onnx"])
def test_every_format_is_the_same_predictor(formats, name):
    expected = load(formats["bundle"][0], device="cpu")
    path, options = formats[name]
    found = load(path, device="cpu", **options)
    assert (found.kind, found.unit, found.multiple) == (expected.kind, expected.unit, 14)
    assert found.facts.short_side == 518
    assert len(found.sha256) == 64
    image = random_image(60, 80)
    values = expected.predict(image, short_side=70).values
    assert np.abs(found.predict(image, short_side=70).values - values).max() <= 1e-4 * np.ptp(values)


def test_each_file_has_its_own_hash(formats):
    hashes = {load(path, device="cpu", **options).sha256 for path, options in formats.values()}
    assert len(hashes) == len(formats)
    assert load(formats["model.pth"][0], device="cpu", taps="v1").sha256 == sha256(formats["model.pth"][0])


def test_metric_checkpoint(formats):
    metric = load(formats["model.pth"][0], device="cpu", taps="v1", max_depth=80)
    values = metric.predict(random_image(60, 80), short_side=70).values
    assert metric.kind == "depth"
    assert 0 < values.min() < values.max() < 80


@pytest.mark.parametrize(
    ("name", "options", "refused"),
    [
        ("bundle", {"taps": "v2"}, "taps=v2"),
        ("hf", {"max_depth": 20.0}, r"max_depth=20\.0"),
        ("model.onnx", {"precision": "bfloat16"}, "precision=bfloat16"),
        ("model.onnx", {"compile": True}, "compile=True"),
        ("model.onnx", {"taps": "v2"}, "taps=v2"),
    ],
)
def test_options_that_do_not_fit_are_refused(formats, name, options, refused):
    with pytest.raises(ValueError, match=rf"^{refused}: not for .*{name}"):
        load(formats[name][0], device="cpu", **options)


def test_an_encoder_alone_cannot_predict(formats, tmp_path):
    state = torch.load(formats["model.pth"][0], weights_only=True)
    encoder = {key.removeprefix("pretrained."): value for key, value in state.items() if key.startswith("pretrained.")}
    torch.save(encoder, tmp_path / "dinov2.pth")
    with pytest.raises(BundleError, match=r"dinov2\.pth holds an encoder alone: it cannot predict; `depthkit import`"):
        load(tmp_path / "dinov2.pth")


def test_public_entry_carries_kind_unit_and_hash(folder):
    loaded = depthkit.load(str(folder), device="cpu")
    prediction = loaded.predict(np.zeros((8, 8, 3), np.uint8))
    assert (prediction.kind, prediction.unit) == ("disparity", "relative, larger = nearer")
    assert (loaded.kind, loaded.unit) == ("disparity", "relative, larger = nearer")
    assert loaded.sha256 == sha256(folder / WEIGHTS)
    model = json.loads((folder / FACTS).read_text())["model"]
    change(folder, kind="depth", model=model | {"max_depth": 80.0})
    assert depthkit.load(str(folder), device="cpu").predict(np.zeros((8, 8, 3), np.uint8)).unit == "metres, planar z"


def test_a_copied_bundle_is_the_same_bundle(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert load(copy, device="cpu").sha256 == load(folder, device="cpu").sha256


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_near(predictor, tiny_teacher, precision, tolerance):
    image = random_image(64, 96)
    exact = predictor.predict(image, short_side=64).values
    half = load(tiny_teacher, device="cpu", precision=precision).predict(image, short_side=64).values
    assert half.dtype == np.float32
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < tolerance


def test_unknown_precision_is_refused(tiny_teacher):
    with pytest.raises(ValueError, match=r"precision='int8': expected one of float32, bfloat16, float16"):
        load(tiny_teacher, device="cpu", precision="int8")


@pytest.mark.slow
def test_compiled_model_predicts_the_same_and_leaves_sizes_open(predictor, tiny_teacher, monkeypatch):
    """Without the code generator, whose first run takes a minute and a C++ compiler."""
    has_open_sizes: list[bool] = []

    def compile_eagerly(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        has_open_sizes.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compile_eagerly))
    image = random_image(32, 48)
    compiled = load(tiny_teacher, device="cpu", compile=True).predict(image)
    np.testing.assert_allclose(compiled.values, predictor.predict(image).values, atol=1e-5)
    assert has_open_sizes == [True]


def test_the_package_offers_load_and_nothing_else_by_accident():
    assert depthkit.load is load
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = depthkit.lod
