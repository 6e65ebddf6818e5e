"""Eigen 2014: the published settings against a table written apart from them, and a short run of both phases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import logged

import depthkit
from depthkit.bundle import load_model
from depthkit.checks import check_model, validate
from depthkit.config import ConfigError, TrainConfig
from depthkit.models import build_model
from depthkit.optim import build_optimizer, build_schedule, parameter_groups
from depthkit.planning.plan import make_plan
from depthkit.train import build_module, run
from depthkit.transfer import apply_to_encoder

# arXiv 1406.2283, sections 3.2, 3.3 and 4; sizes are height, width.
PUBLISHED = {
    "nyu": {"input": [228, 304], "coarse": 2_000_000, "fine": 1_500_000, "zoom": [1.0, 1.5], "rotation": 5.0},
    "kitti": {"input": [172, 576], "coarse": 1_500_000, "fine": 1_000_000, "zoom": [1.0, 1.2], "rotation": 0.0},
}
RATES = {
    "coarse": {f"encoder.layers.coarse{i}": 0.001 if i < 6 else 0.1 for i in range(1, 8)},
    "fine": {"decoder.fine1": 0.001, "decoder.fine3": 0.01, "decoder.fine4": 0.001},
}


@pytest.mark.parametrize("phase", ["coarse", "fine"])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_settings_are_the_published_ones(compose: Any, name: str, phase: str):
    config: TrainConfig = compose(f"experiment=eigen2014_{name}_{phase}")
    table = PUBLISHED[name]
    stage, data, augment = config.stage, config.data, config.data.augment
    assert (stage.name, stage.loss.value, stage.variance_focus, stage.loss_scale) == (
        "metric",
        "scale_invariant_log",
        0.5,
        1.0,
    )
    assert (config.model.input_size, config.model.fine) == (table["input"], phase == "fine")
    assert (data.crop_size, data.batch_size) == (table["input"], 32)
    assert config.trainer.max_steps * 32 == table[phase]
    assert config.trainer.accumulate_grad_batches == 1
    assert config.trainer.gradient_clip_val is None
    assert augment.horizontal_flip == 0.5
    assert (augment.camera.zoom, augment.camera.rotation) == (table["zoom"], table["rotation"])
    assert (augment.camera.color, augment.camera.channel_gain) == (1.0, [0.8, 1.2])
    assert augment.camera.gamma == augment.camera.brightness == [1.0, 1.0]
    assert config.transfer.mode.value == ("full" if phase == "coarse" else "frozen")
    assert stage.encoder_weights == (None if phase == "coarse" else f"runs/eigen2014_{name}_coarse/bundle")


@pytest.mark.parametrize("phase", ["coarse", "fine"])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_layer_learns_at_its_published_rate_from_the_first_step_to_the_last(compose: Any, name: str, phase: str):
    """And what the other phase trains stays as it is."""
    config: TrainConfig = compose(f"experiment=eigen2014_{name}_{phase}")
    with torch.device("meta"):
        model = build_model(config.model)
    apply_to_encoder(model.encoder, config.transfer)
    optimizer = build_optimizer(parameter_groups(model, model.encoder, config.optim), config.optim)
    schedule = build_schedule(optimizer, config.optim, num_steps=3)
    assert type(optimizer) is torch.optim.SGD
    for _ in range(3):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        found: dict[str, set[float | None]] = {}
        for parameter_name, parameter in model.named_parameters():
            layer = next((key for part in RATES.values() for key in part if parameter_name.startswith(key)), "other")
            found.setdefault(layer, set()).add(rates.get(id(parameter)))
        expected = {layer: {rate} for layer, rate in RATES[phase].items()}
        frozen = {layer: {None} for layer in RATES["coarse"]} if phase == "fine" else {}
        assert found == expected | frozen
        assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.9, 0.0)}
        optimizer.step()
        schedule.step()


def small(phase: str, world: Path, runs: Path, **settings: Any) -> list[str]:
    overrides = [f"experiment=tiny_eigen2014_{phase}", f"paths.runs={runs}", "data.num_workers=0", "data.batch_size=8"]
    overrides += ["trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "data.shuffle_block=4"]
    overrides += ["data.crop_size=[64,80]", "model.input_size=[64,80]", "model.predicted_rows=60"]
    for name, folder in {"labeled.source": "source_train", "val.source": "source_val"}.items():
        overrides += [f"data.{name}.world=null", f"data.{name}.manifest={world / folder / 'manifest.json'}"]
    return overrides + [f"{name}={value}" for name, value in settings.items()]


@pytest.mark.slow
def test_both_phases_train_and_the_coarse_network_stays_as_it_was(compose: Any, tiny_world: Path, tmp_path: Path):
    losses = {}
    for phase, steps in (("coarse", 60), ("fine", 40)):
        config = compose(*small(phase, tiny_world, tmp_path, **{"trainer.max_steps": steps}))
        run(config)
        losses[phase] = [float(row["loss"]) for row in logged(Path(config.run_dir)) if row.get("loss")]
        assert len(losses[phase]) == steps
    assert np.mean(losses["coarse"][-10:]) < 0.5 * np.mean(losses["coarse"][:5])
    assert np.mean(losses["fine"][-10:]) < np.mean(losses["fine"][:5])
    bundles = [tmp_path / f"tiny_eigen2014_{phase}" / "bundle" for phase in ("coarse", "fine")]
    image = np.random.default_rng(0).integers(0, 255, (48, 70, 3), dtype=np.uint8)
    predictions = [depthkit.load(bundle).predict(image) for bundle in bundles]
    for prediction in predictions:
        assert (prediction.kind, prediction.unit, prediction.values.shape) == ("depth", "metres, planar z", (48, 70))
        assert prediction.values.min() > 0
    assert not np.array_equal(*(prediction.values for prediction in predictions))
    coarse, both = (load_model(bundle)[0].encoder.state_dict() for bundle in bundles)
    assert coarse.keys() == both.keys()
    assert all(torch.equal(coarse[key], both[key]) for key in coarse)


def test_the_fine_phase_holds_the_coarse_network_still(compose: Any, tiny_world: Path, tmp_path: Path):
    """Its weights, and its dropout: two passes over one image agree while the rest trains."""
    run(compose(*small("coarse", tiny_world, tmp_path, **{"trainer.max_steps": 1})))
    config = compose(*small("fine", tiny_world, tmp_path, **{"trainer.max_steps": 1, "model.dropout": 0.5}))
    validate(config)
    module = build_module(config).train()
    image = torch.randn(1, 3, 64, 80)
    assert torch.equal(module.model.encoder(image)[0][1], module.model.encoder(image)[0][1])
    assert module.model.decoder.training
    assert not any(parameter.requires_grad for parameter in module.model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in module.model.decoder.parameters())


@pytest.mark.parametrize("phase", ["coarse", "fine"])
def test_it_can_be_planned(compose: Any, phase: str):
    """Without activation checkpointing, which the network does not have, and with what is frozen."""
    plan = make_plan(compose(f"experiment=eigen2014_nyu_{phase}", "cluster=laptop", config_name="plan"))
    assert {row.checkpointing for row in plan.rows} == {False}
    with pytest.raises(ConfigError, match=r"activation_checkpointing=True and model eigen2014"):
        check_model(compose(f"experiment=eigen2014_nyu_{phase}", "trainer.activation_checkpointing=true"))
