"""Depth through a canonical camera: what is learned, what a bundle says of it, and the way back to metres."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import depthkit
from depthkit.__main__ import main
from depthkit.bundle import read_facts
from depthkit.checks import validate
from depthkit.config import ConfigError, MetricConfig
from depthkit.data.datamodule import build_streams
from depthkit.data.quarantine import SampleError
from depthkit.from_checkpoint import load_checkpoint
from depthkit.train import build_data, build_metric, run

METRIC = ["stage=metric", "protocol=metric", "model.max_depth=80", "data.labeled.source.depth_range=[0,80]"]
CANONICAL = [*METRIC, "stage.canonical_focal_px=100"]


@pytest.fixture(scope="module")
def bundle(tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canonical")
    run(tiny_config("teacher", folder, *CANONICAL, "callbacks.checkpoint.every_n_train_steps=3"))
    return folder / "bundle"


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)


def batch_of(*focal_lengths: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 32, 32, generator=generator).expand(len(focal_lengths), -1, -1, -1)
    depth = 1 + 4 * torch.rand(len(focal_lengths), 32, 32, generator=generator)
    intrinsics = torch.tensor([[focal, focal, 16, 16] for focal in focal_lengths])
    return {"image": image, "target": depth, "valid_mask": depth > 1.5, "intrinsics_px": intrinsics}


def test_the_loss_is_that_of_depth_divided_by_the_focal_length(tiny_config: Any, tmp_path: Path) -> None:
    """An image at focal length f and depth d counts as one at the canonical length and depth `d * canonical / f`."""
    torch.manual_seed(0)
    with_camera = build_metric(tiny_config("teacher", tmp_path, *CANONICAL)).eval()
    without = build_metric(tiny_config("teacher", tmp_path, *METRIC)).eval()
    without.load_state_dict(with_camera.state_dict())
    for module in (with_camera, without):
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    batch = batch_of(50.0, 400.0)
    canonical = batch | {"target": batch["target"] * torch.tensor([2.0, 0.25])[:, None, None]}
    losses = [
        module.training_step({"labeled": part}, 0)["image_losses"]["labeled"]
        for module, part in ((with_camera, batch), (without, canonical))
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert losses[0][0] != losses[0][1]


def test_a_longer_lens_sees_the_same_picture_farther_away(tiny_config: Any, tmp_path: Path) -> None:
    module = build_metric(tiny_config("teacher", tmp_path, *CANONICAL)).eval()
    near, far = module.predict(batch_of(100.0, 300.0)).detach()
    torch.testing.assert_close(far, 3 * near)
    torch.testing.assert_close(near, module(batch_of(100.0)["image"]).values[0])


def test_depths_beyond_what_the_canonical_camera_can_say_are_left_out(tiny_config: Any, tmp_path: Path) -> None:
    """The range of the head, 80 m, is 40 m at half the canonical focal length."""
    module = build_metric(tiny_config("teacher", tmp_path, *CANONICAL)).eval()
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    batch = batch_of(50.0)
    far, cut = batch["target"].clone(), batch["valid_mask"].clone()
    far[:, :10], cut[:, :10] = 41.0, False
    losses = [
        module.training_step({"labeled": batch | changed}, 0)["loss"]
        for changed in ({"target": far}, {"valid_mask": cut})
    ]
    assert losses[0] == losses[1]


def test_a_bundle_says_its_camera_and_predicts_metres_for_any_other(bundle: Path, image: np.ndarray) -> None:
    assert read_facts(bundle).canonical_focal_px == 100
    model = depthkit.load(bundle)
    short, long = (model.predict(image, focal_px=focal).values for focal in (60.0, 120.0))
    np.testing.assert_allclose(long, 2 * short, rtol=1e-5)
    both = model.predict([image, image], focal_px=[60.0, 120.0])
    np.testing.assert_allclose(both[1].values, long, rtol=1e-4)
    # The network saw it at another size, where the focal length is another.
    seen = model._input(0, image, 32, 60.0).pixels.shape[1]
    raw = model.network(torch.zeros(1, 3, 32, seen)).shape
    assert raw == (1, 32, seen)
    assert model._input(0, image, 32, 60.0).factor == pytest.approx(60 * seen / 64 / 100)
    tiled = model.predict(np.tile(image, (2, 2, 1)), focal_px=60.0, tile=64).values
    np.testing.assert_allclose(
        model.predict(np.tile(image, (2, 2, 1)), focal_px=120.0, tile=64).values, 2 * tiled, rtol=1e-3
    )


@pytest.mark.parametrize("focal_px", [None, 0.0, -5.0, float("nan"), [60.0, 60.0]])
def test_a_focal_length_is_needed(bundle: Path, image: np.ndarray, focal_px: Any) -> None:
    with pytest.raises(ValueError, match=r"focal_px=.*needs the horizontal focal length of each image"):
        depthkit.load(bundle).predict(image, focal_px=focal_px)


@pytest.mark.parametrize("form", ["hf", "pth"])
def test_formats_that_cannot_say_the_camera_are_refused(
    bundle: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["depthkit", "export", str(bundle), "--format", form, "--out", str(tmp_path / "x")])
    assert main() == 1
    assert f"--format {form} cannot say" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_says_its_camera_too(bundle: Path) -> None:
    path = max((bundle.parent / "checkpoints").glob("*.ckpt"))
    assert load_checkpoint(path)[1].canonical_focal_px == 100


def test_files_are_predicted_with_the_focal_length_of_the_command(
    bundle: Path, image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    words = f"predict {bundle} {tmp_path / 'a.png'} --out {tmp_path / 'out'} --format npy --device cpu"
    for more, code in (([], 1), (["--focal-px", "60"], 0)):
        monkeypatch.setattr("sys.argv", ["depthkit", *words.split(), *more])
        assert main() == code
    assert "needs the horizontal focal length" in capsys.readouterr().err
    expected = depthkit.load(bundle, "cpu").predict(image, focal_px=60.0).values
    np.testing.assert_allclose(np.load(tmp_path / "out" / "a.npy"), expected, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "a.json").read_text())["focal_px"] == 60


def test_others_take_none(tiny_teacher: Path, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"focal_px=60\.0: .* trained without focal lengths; leave it out"):
        depthkit.load(tiny_teacher).predict(image, focal_px=60.0)


def test_validation_and_evaluation_know_the_cameras_of_their_images(
    bundle: Path, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images keep their size in both, so `depthkit evaluate` gives the number of the validation."""
    manifest = tiny_world / "source_val" / "manifest.json"
    words = f"evaluate model={bundle} dataset={manifest} protocol=metric out={tmp_path} num_workers=1 device=cpu"
    monkeypatch.setattr("sys.argv", ["depthkit", *words.split()])
    assert main() == 0
    (found,) = json.loads((tmp_path / "results.json").read_text())["models"].values()
    (expected,) = (value for name, value in read_facts(bundle).provenance["metrics"].items() if "abs_rel" in name)
    assert found["overall"]["abs_rel"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("needs_camera", [False, True])
def test_images_of_unknown_cameras_are_counted_by_name(
    tiny_config: Any, tiny_world: Path, tmp_path: Path, needs_camera: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("teacher", tmp_path, *(CANONICAL if needs_camera else METRIC))
    monkeypatch.setattr("depthkit.data.reader.image_facts", lambda members: {})
    data = build_data(config)
    (stream,) = build_streams(config.data, "depth", 0, needs_camera=data.needs_camera).values()
    if needs_camera:
        with pytest.raises(SampleError, match=r"its facts lack intrinsics_px.*stage\.canonical_focal_px needs"):
            stream.load(0)
    else:
        assert np.isnan(stream.load(0)[0].intrinsics_px).all()


def test_a_focal_length_of_no_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage\.canonical_focal_px=0\.0: must be > 0"):
        MetricConfig(canonical_focal_px=0.0)


def test_the_range_of_the_data_is_not_that_of_the_canonical_camera(tiny_config: Any, tmp_path: Path) -> None:
    settings = ["model.max_depth=20", "data.labeled.source.depth_range=[0,80]"]
    validate(tiny_config("teacher", tmp_path, *CANONICAL, *settings))
    with pytest.raises(ConfigError, match=r"model\.max_depth=20\.0: must be at least 80 m"):
        validate(tiny_config("teacher", tmp_path, *METRIC, *settings))
