"""MiDaS mixing: the published settings against a table written apart from them, balance, and a short run."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import logged

import depthkit
from depthkit.checks import validate
from depthkit.config import ConfigError, TrainConfig
from depthkit.losses import gradient_matching_loss, scale_shift_invariant_loss
from depthkit.models import build_model
from depthkit.optim import build_optimizer, build_schedule, parameter_groups
from depthkit.planning.plan import make_plan
from depthkit.train import build_data, build_module, run

PARETO = ["stage.pareto=true"]


def test_settings_are_the_published_ones(compose: Any):
    config: TrainConfig = compose("experiment=midas_mix")
    stage, data, model = config.stage, config.data, config.model
    assert (stage.name, stage.encoder_weights, stage.loss.value) == ("teacher", "timm", "scale_shift_invariant")
    assert (stage.drop_fraction, stage.gradient_matching_weight, stage.pareto) == (0.2, 0.5, False)
    assert (data.crop_size, data.balanced, data.augment.horizontal_flip) == ([384, 384], True, 0.5)
    assert data.batch_size == 8 * len(data.labeled)
    assert list(data.labeled) == ["blendedmvs", "diml", "hrwsi", "irs", "megadepth", "tartanair"]
    assert config.trainer.max_steps * data.batch_size == 60 * 72_000
    assert (model.encoder, model.tap_layers, model.features) == ("vit_large_patch16_384", [5, 11, 17, 23], 256)
    assert model.out_channels == [256, 512, 1024, 1024]
    assert model.max_depth is None


def test_rates_are_1e_5_and_1e_4_throughout(compose: Any):
    config: TrainConfig = compose("experiment=midas_mix")
    with torch.device("meta"):
        model = build_model(config.model)
    optimizer = build_optimizer(parameter_groups(model, model.encoder, config.optim), config.optim)
    schedule = build_schedule(optimizer, config.optim, num_steps=3)
    assert type(optimizer) is torch.optim.Adam
    for _ in range(3):
        groups = {
            group["name"]: (group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups
        }
        assert groups == {"encoder": (1e-5, (0.9, 0.999), 0.0), "decoder": (pytest.approx(1e-4), (0.9, 0.999), 0.0)}
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("model", "multiple"), [("dpt_large", 16), ("dpt_resnext101", 32), ("dpt_convnext_large", 32)])
def test_other_encoders_take_one_override(compose: Any, model: str, multiple: int):
    config: TrainConfig = compose("experiment=midas_mix", f"model={model}")
    with torch.device("meta"):
        network = build_model(config.model)
        assert network.encoder.multiple == multiple
        assert network(torch.empty(1, 3, 384, 384)).values.shape == (1, 384, 384)


# Balance


def tiny(world: Path, runs: Path) -> list[str]:
    """The tiny experiment with data of other sizes: 24 and 8 images."""
    overrides = ["experiment=tiny_midas_mix", f"paths.runs={runs}", "data.num_workers=0", "data.shuffle_block=4"]
    overrides += ["data.crop_size=[32,32]", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"]
    overrides += ["optim.warmup_steps=0", "model.encoder_args.img_size=32"]
    for name, folder in {
        "labeled.source": "source_train",
        "labeled.target": "source_val",
        "val.source": "source_val",
    }.items():
        overrides += [f"data.{name}.world=null", f"data.{name}.manifest={world / folder / 'manifest.json'}"]
    return overrides


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_batch_holds_as_many_of_each_data_set(compose: Any, tiny_world: Path, tmp_path: Path, world_size: int):
    config = compose(*tiny(tiny_world, tmp_path), "trainer.max_steps=10")
    loaders = [build_data(config).train_loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    num_each = 4 // world_size
    for loader in loaders:
        for batch in loader:
            assert batch["labeled"]["dataset"] == ["source", "target"] * num_each  # which Pareto mixing relies on


def test_the_small_data_set_is_seen_more_often(compose: Any, tiny_world: Path, tmp_path: Path):
    config = compose(*tiny(tiny_world, tmp_path), "trainer.max_steps=12")
    seen = Counter(key for batch in build_data(config).train_loader() for key in batch["labeled"]["key"])
    assert sorted(seen.values()) == [2] * 24 + [6] * 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=7"], r"data\.batch_size=7.*7 labeled images hold as many of each of source, target"),
        (["data.labeled.target.weight=2"], r"data\.labeled\.target\.weight=2.*data\.balanced=true"),
        ([*PARETO, "data.balanced=false"], r"data\.balanced=False.*stage\.pareto=true"),
        ([*PARETO, "~data.labeled.target"], r"data\.labeled=.*two data sets or more"),
        (
            [*PARETO, "trainer.devices=2", "data.batch_size=6", "trainer.strategy=ddp"],
            r"multiple of 2 data sets x 2 ranks",
        ),
        ([*PARETO, "trainer.precision=16-mixed", "trainer.accelerator=gpu"], r"trainer\.precision='16-mixed'"),
    ],
)
def test_what_cannot_be_balanced_is_refused(
    compose: Any, tiny_world: Path, tmp_path: Path, overrides: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        validate(compose(*tiny(tiny_world, tmp_path), *overrides))


# Pareto mixing


def module_and_batch(compose: Any, world: Path, runs: Path, *overrides: str) -> tuple[Any, Any]:
    config = compose(*tiny(world, runs), *overrides, "trainer.max_steps=1")
    torch.manual_seed(0)
    module = build_module(config)
    data = build_data(config)
    batch = data.on_after_batch_transfer(next(iter(data.train_loader())), 0)
    module.log = module.log_dict = lambda *_args, **_kwargs: None
    return module, batch


def test_pareto_mixing_follows_the_shortest_gradient(compose: Any, tiny_world: Path, tmp_path: Path):
    """The gradient of the mixed loss is no longer than any mixture of those of the data sets, equal shares included."""
    module, batch = module_and_batch(compose, tiny_world, tmp_path, *PARETO)
    output = module.training_step(batch, 0)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    mixed = gradient(output["loss"])
    labeled = batch["labeled"]
    losses = module.loss(module(labeled["image"]).values, labeled["target"], labeled["valid_mask"])
    own = [gradient(losses[start::2].mean()) for start in range(2)]
    shares = np.linspace(0, 1, 101)
    norms = [float((share * own[0] + (1 - share) * own[1]).norm()) for share in shares]
    assert float(mixed.norm()) == pytest.approx(min(norms), rel=1e-3)
    assert min(norms) < 0.999 * norms[50]
    torch.testing.assert_close(output["image_losses"]["labeled"], losses.detach())


def test_pareto_weights_are_those_of_all_ranks(compose: Any, tiny_world: Path, tmp_path: Path, monkeypatch: Any):
    """Two ranks with half of the batch each weigh the data sets as one with all of it."""
    module, batch = module_and_batch(compose, tiny_world, tmp_path, *PARETO)
    labeled = batch["labeled"]
    losses = module.loss(module(labeled["image"]).values, labeled["target"], labeled["valid_mask"])
    parts = [part.view(-1, 2).mean(0) for part in (losses, losses[:4], losses[4:])]
    monkeypatch.setattr("depthkit.stages.teacher.distributed.is_initialized", lambda: True)
    rows: list[torch.Tensor] = []
    monkeypatch.setattr("depthkit.stages.teacher.distributed.all_reduce", rows.append)
    for part in parts[1:]:
        module.pareto(part)
    monkeypatch.setattr("depthkit.stages.teacher.distributed.all_reduce", lambda own: own.copy_(rows[0] + rows[1]))
    both = sum(module.pareto(part) for part in parts[1:])
    monkeypatch.undo()
    torch.testing.assert_close(both / 2, module.pareto(parts[0]))


def test_without_pareto_mixing_the_loss_is_the_mean(compose: Any, tiny_world: Path, tmp_path: Path):
    module, batch = module_and_batch(compose, tiny_world, tmp_path)
    output = module.training_step(batch, 0)
    torch.testing.assert_close(output["loss"].detach(), output["image_losses"]["labeled"].mean())


def test_the_loss_is_trimmed_and_matches_gradients(compose: Any, tiny_world: Path, tmp_path: Path):
    """`ssitrim` and 0.5 times gradient matching, as MiDaS has it: a fifth of the residuals may be anything."""
    module, _ = module_and_batch(compose, tiny_world, tmp_path)
    target = torch.rand(2, 16, 16)
    prediction = torch.rand(2, 16, 16)
    mask = torch.rand(2, 16, 16) < 0.8
    expected = scale_shift_invariant_loss(prediction, target, mask, trim_fraction=0.2)
    expected = expected + 0.5 * gradient_matching_loss(prediction, target, mask, num_scales=4)
    torch.testing.assert_close(module.loss(prediction, target, mask), expected)


def test_pareto_mixing_can_be_planned(compose: Any):
    plan = make_plan(compose("experiment=tiny_midas_mix", *PARETO, "cluster=laptop", config_name="plan"))
    assert {row.largest_batch % 2 for row in plan.rows} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], PARETO], ids=["mean", "pareto"])
def test_a_short_run_learns_and_leaves_a_bundle(compose: Any, tiny_world: Path, tmp_path: Path, overrides: list[str]):
    config = compose(*tiny(tiny_world, tmp_path), *overrides, "trainer.max_steps=60")
    run(config)
    losses = [float(row["loss"]) for row in logged(Path(config.run_dir)) if row.get("loss")]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    prediction = depthkit.load(Path(config.run_dir) / "bundle").predict(np.zeros((40, 50, 3), np.uint8))
    assert (prediction.kind, prediction.values.shape) == ("disparity", (40, 50))
