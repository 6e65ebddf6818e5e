"""Normals as a second task: their targets, their loss, and what training makes of them."""

import math

import pytest
import torch

from depthkit.auxiliary import NormalsTask, feature_width
from depthkit.bundle import load_model
from depthkit.checks import validate
from depthkit.config import ConfigError
from depthkit.doctor.bench import Bench
from depthkit.models import build_model
from depthkit.train import build_module, run


@pytest.fixture(scope="module")
def task(compose):
    torch.manual_seed(0)
    encoder = build_model(compose("model=tiny", "data=tiny_teacher").model).encoder
    return NormalsTask(encoder)


def plane_batch(normal, size=(32, 40), unit=1.0):
    """A plane 4 m away, as depth, seen by a camera of 50 px."""
    rows, cols = (torch.arange(side) + 0.5 for side in size)
    rays = torch.stack([(cols - 20)[None].expand(size) / 50, (rows - 16)[:, None].expand(size) / 50, torch.ones(size)])
    depth = unit * -4 / torch.einsum("c,chw->hw", torch.tensor(normal), rays)
    intrinsics_px = torch.tensor([[50.0, 50.0, 20.0, 16.0]])
    return {"target": depth[None], "valid_mask": (depth > 0)[None], "intrinsics_px": intrinsics_px}


def answer(task, normal):
    """Make the head say one direction everywhere."""
    with torch.no_grad():
        task.head[2].weight.zero_()
        task.head[2].bias.copy_(torch.tensor(normal))


@pytest.mark.parametrize("kind", ["depth", "disparity"])
def test_the_loss_is_the_angle_to_the_plane(task, kind):
    batch = plane_batch((0.6, 0.0, -0.8))
    if kind == "disparity":
        batch["target"] = 7 / batch["target"]
        batch["target"][0, :2], batch["valid_mask"][0, :2] = 0, True  # sky
    features = torch.randn(1, 96, 4, 5)
    for said, expected in (((1.2, 0.0, -1.6), 0.0), ((0.0, 0.0, -1.0), 0.2), ((-0.6, 0.0, 0.8), 2.0)):
        answer(task, said)
        assert task(features, batch, kind).item() == pytest.approx(expected, abs=1e-4)


def test_an_image_without_a_camera_adds_nothing(task):
    batch = plane_batch((0.0, 0.0, -1.0))
    batch["intrinsics_px"][:] = torch.nan
    features = torch.randn(1, 96, 4, 5, requires_grad=True)
    loss = task(features, batch, "depth")
    loss.sum().backward()
    assert loss.item() == 0
    assert not features.grad.any()


def test_two_losses_become_one(task):
    with torch.no_grad():
        task.log_variances.copy_(torch.tensor([0.0, math.log(4)]))
    combined = task.combine(torch.tensor(3.0), torch.tensor(2.0))
    assert float(combined) == pytest.approx((3 + 2 / 4 + math.log(4)) / 2)


def test_the_width_of_features_leaves_the_encoder_as_it_was(compose):
    encoder = build_model(compose("model=tiny", "data=tiny_teacher").model).encoder
    assert feature_width(encoder) == 96
    assert encoder.training


def test_all_of_it_is_trained_at_the_rate_of_the_decoder(tiny_config, tmp_path):
    module = build_module(tiny_config("teacher", tmp_path, "stage.normals=true", "optim.encoder_lr=1e-3"))
    module.trainer = type("Trainer", (), {"max_steps": 10})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    (group,) = [group for group in groups if group["name"] == "normals"]
    assert group["lr"] == pytest.approx(1e-2)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_both_losses_of_a_batch_fall(tiny_config, tmp_path, stage):
    bench = Bench(tiny_config(stage, tmp_path, "stage.normals=true"))
    batch = bench.on_device(next(bench.batches())[1])
    before = bench.module.training_step(batch, 0)["image_losses"]
    assert before["normals"].shape == (len(batch["labeled"]["image"]),)
    losses = list(bench.train(batch, steps=30))
    after = bench.module.training_step(batch, 0)["image_losses"]
    assert losses[-1] < losses[0]
    assert after["normals"].mean() < 0.8 * before["normals"].mean()
    assert after["labeled"].mean() < before["labeled"].mean()


def test_labels_without_a_unit_have_no_normals(tiny_config, tmp_path, tiny_labels, tiny_world):
    target = tiny_world / "target_train" / "manifest.json"
    overrides = [f"data.labeled.source.manifest={target}", f"data.labeled.source.labels={tiny_labels}"]
    validate(tiny_config("teacher", tmp_path, *overrides))
    with pytest.raises(
        ConfigError, match=r"stage.normals=True: must be false: the labels of data.labeled.source .* no unit"
    ):
        validate(tiny_config("teacher", tmp_path, *overrides, "stage.normals=true"))


def test_the_bundle_is_that_of_depth_alone(tiny_config, tmp_path):
    run(tiny_config("teacher", tmp_path / "with", "stage.normals=true", "trainer.max_steps=2"))
    model, _ = load_model(tmp_path / "with" / "bundle")
    assert not [name for name in model.state_dict() if "normals" in name]
