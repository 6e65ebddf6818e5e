"""`depthkit export`: a bundle leaves in each format, or nothing is written and one message says why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity_table import randomise, relative_error

from depthkit.bundle import BundleFacts, save_bundle
from depthkit.config import DPTConfig
from depthkit.exporting import main
from depthkit.formats.official import read_checkpoint
from depthkit.inference.loading import load
from depthkit.models import build_model

SETTINGS = DPTConfig(
    encoder="vit_small_patch14_dinov2",
    encoder_args={"img_size": 70, "embed_dim": 48, "depth": 4, "num_heads": 3},
    tap_layers=[0, 1, 2, 3],
    features=16,
    out_channels=[8, 8, 16, 16],
)
IMAGE = np.random.default_rng(0).integers(0, 256, (70, 70, 3), np.uint8)
PROVENANCE = {
    "stage": "student",
    "run_name": "my_student",
    "seed": 3,
    "steps": 100,
    "data": {"labeled.a": {"name": "a", "split": "train", "digest": "0" * 64, "licence": "CC BY-NC 4.0"}},
    "encoder_weights": None,
    "metrics": {"val/affine_disparity@f018826e/abs_rel": 0.123},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    facts = BundleFacts(content="depth_model", model=SETTINGS, kind="disparity", short_side=70, provenance=PROVENANCE)
    return save_bundle(tmp_path_factory.mktemp("export") / "bundle", randomise(build_model(SETTINGS)), facts)


@pytest.mark.parametrize(("format", "name"), [("hf", "folder"), ("onnx", "model.onnx")])
def test_what_was_exported_predicts_the_same(bundle, tmp_path, format, name):
    out = tmp_path / "deep" / name
    assert main([str(bundle), "--format", format, "--out", str(out)]) == 0
    expected = torch.from_numpy(load(bundle, device="cpu").predict(IMAGE).values)
    found = load(out, device="cpu").predict(IMAGE)
    assert relative_error(torch.from_numpy(found.values), expected) <= 1e-5
    assert found.kind == "disparity"


def test_pth_has_the_keys_of_the_original(bundle, tmp_path, capsys):
    assert main([str(bundle), "--format", "pth", "--out", str(tmp_path / "deep" / "model.pth")]) == 0
    assert "the original repositories build only" in capsys.readouterr().out
    state = torch.load(tmp_path / "deep" / "model.pth", weights_only=True)
    assert len(state) == 239 - 8 * 14
    with pytest.raises(ValueError, match="widths: vits 384"):
        read_checkpoint(tmp_path / "deep" / "model.pth", taps="v1")


def test_model_card_tells_where_the_model_comes_from(bundle, tmp_path):
    assert main([str(bundle), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in ("CC BY-NC 4.0", "affine_disparity@f018826e", "0.123", "my_student", "cc-by-nc-4.0"):
        assert fact in card


def test_a_licence_that_the_data_forbid_is_refused(bundle, tmp_path, capsys):
    arguments = [str(bundle), "--format", "hf", "--out", str(tmp_path / "hf"), "--licence", "MIT"]
    assert main(arguments) == 1
    assert "does not forbid commercial use" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["hf", "pth"])
def test_an_encoder_that_the_format_cannot_hold(tmp_path, tiny_teacher, format, capsys):
    """The tiny model has a convolutional stem."""
    assert main([str(tiny_teacher), "--format", format, "--out", str(tmp_path / "x")]) == 1
    assert "a convolutional stem (model.conv_stem=false trains without)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_error_above_tolerance_leaves_nothing(bundle, tmp_path, capsys):
    arguments = [str(bundle), "--format", "onnx", "--out", str(tmp_path / "x.onnx"), "--tolerance", "1e-12"]
    assert main(arguments) == 1
    assert "above the tolerance of 1.0e-12" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle(tmp_path, capsys):
    assert main([str(tmp_path), "--format", "pth", "--out", str(tmp_path / "x.pth")]) == 1
    assert "is not a bundle" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--format", "tflite", "--out", "x"])
