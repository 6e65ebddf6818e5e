"""Parameter groups and the schedule, against the rates that the paper states."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from depthkit.config import Algorithm, ConfigError, OptimConfig, Schedule
from depthkit.optim import build_optimizer, build_schedule, decay_schedule, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        self.decoder = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(1))


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {group["name"]: group for group in groups}


def rates(config: OptimConfig, num_steps: int, schedule=decay_schedule) -> list[list[float]]:
    """Rate of every group at every step, as a training loop would use them."""
    model = Model()
    optimizer = build_optimizer(parameter_groups(model, model.encoder, config), config)
    schedule = schedule(optimizer, config, num_steps=num_steps)
    used = []
    for _ in range(num_steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return used


def test_groups_cover_every_trainable_parameter_once():
    model = Model()
    groups = by_name(parameter_groups(model, model.encoder, OptimConfig()))
    assert set(groups) == {"encoder", "decoder"}
    assert set(map(id, groups["encoder"]["params"])) == set(map(id, model.encoder.parameters()))
    assert set(map(id, groups["decoder"]["params"])) == {*map(id, model.decoder.parameters()), id(model.scale)}


def test_published_rates():
    """V1 section 4: encoder 5e-6, decoder ten times that."""
    model = Model()
    groups = by_name(parameter_groups(model, model.encoder, OptimConfig()))
    assert groups["encoder"]["lr"] == 5e-6
    assert groups["decoder"]["lr"] == pytest.approx(5e-5)


def test_frozen_parameters_are_left_out():
    model = Model()
    model.decoder.bias.requires_grad_(False)
    groups = parameter_groups(model, model.encoder, OptimConfig())
    assert id(model.decoder.bias) not in {id(parameter) for group in groups for parameter in group["params"]}
    model.encoder.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model, model.encoder, OptimConfig())] == ["decoder"]


def test_a_shared_parameter_is_taken_once():
    model = Model()
    model.tied = model.encoder[0]
    groups = parameter_groups(model, model.encoder, OptimConfig())
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == 7


def test_optimizer_takes_betas_and_decay():
    model = Model()
    config = OptimConfig(weight_decay=0.3, betas=[0.8, 0.9])
    optimizer = build_optimizer(parameter_groups(model, model.encoder, config), config)
    assert all(group["betas"] == (0.8, 0.9) and group["weight_decay"] == 0.3 for group in optimizer.param_groups)


def test_linear_decay_to_zero():
    used = rates(OptimConfig(encoder_lr=1.0), 10)
    assert [encoder for encoder, _ in used] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert all(decoder == pytest.approx(10 * encoder) for encoder, decoder in used)


def test_warmup_then_decay_to_a_fraction():
    used = [encoder for encoder, _ in rates(OptimConfig(encoder_lr=2.0, warmup_steps=4, final_lr_fraction=0.5), 12)]
    assert used[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert used[4] == 2.0
    assert used[8] == pytest.approx(1.5)  # half way from step 4 to 12
    assert used[11] == pytest.approx(2.0 - 7 / 8)


def test_rate_stays_at_its_end_value():
    config = OptimConfig(encoder_lr=1.0, final_lr_fraction=0.25)
    model = Model()
    optimizer = build_optimizer(parameter_groups(model, model.encoder, config), config)
    schedule = decay_schedule(optimizer, config, num_steps=4)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_first_step_has_a_rate():
    assert all(rate > 0 for pair in rates(OptimConfig(encoder_lr=1.0, warmup_steps=5), 10) for rate in pair)


CONFIG = OptimConfig(encoder_lr=1e-3, weight_decay=0.0)


def clipped_step(precision: str) -> list[torch.Tensor]:
    """Weights after one step whose gradient is clipped, in a Trainer."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return (self.model.decoder(self.model.encoder(batch)) * self.model.scale).float().square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(parameter_groups(self.model, self.model.encoder, CONFIG), CONFIG)

    torch.manual_seed(0)
    module = Module()
    plain = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, precision=precision, gradient_clip_val=1e-12, **plain)
    trainer.fit(module, torch.ones(1, 4, 2))
    return [parameter.detach() for parameter in module.parameters()]


def test_gradients_can_be_clipped_in_mixed_precision():
    """A norm far below AdamW's epsilon leaves the weights where they were; unclipped, they would move by the rate."""
    torch.manual_seed(0)
    start = list(Model().parameters())
    for precision in ("32-true", "bf16-mixed"):
        for after, before in zip(clipped_step(precision), start, strict=True):
            assert (after - before).abs().max() < 0.1 * CONFIG.encoder_lr


def test_layers_have_rates_of_their_own():
    """The longest start holds, whole names only, and no parameter is in two groups."""
    model = Model()
    rates = {"encoder.0": 1e-3, "encoder.0.bias": 2e-3, "scale": 0.5}
    groups = by_name(parameter_groups(model, model.encoder, OptimConfig(layer_lrs=rates)))
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"encoder": 5e-6, "decoder": 5e-5, **rates}
    )
    found = {name: [id(parameter) for parameter in group["params"]] for name, group in groups.items()}
    first, second = model.encoder
    assert found == {
        "encoder": [id(second.weight), id(second.bias)],
        "decoder": [id(model.decoder.weight), id(model.decoder.bias)],
        "encoder.0": [id(first.weight)],
        "encoder.0.bias": [id(first.bias)],
        "scale": [id(model.scale)],
    }


@pytest.mark.parametrize("name", ["encoder.7", "enc", "scale.x"])
def test_a_rate_for_no_layer_is_refused(name: str):
    with pytest.raises(ConfigError, match=rf"optim\.layer_lrs\.{name}: no parameter .*encoder, decoder"):
        parameter_groups(Model(), Model().encoder, OptimConfig(layer_lrs={name: 1.0}))


@pytest.mark.parametrize(
    ("algorithm", "expected"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_the_algorithm_is_the_one_that_is_named(algorithm: str, expected: type):
    config = OptimConfig(algorithm=Algorithm(algorithm), momentum=0.7, betas=[0.8, 0.9], weight_decay=0.3)
    model = Model()
    optimizer = build_optimizer(parameter_groups(model, model.encoder, config), config)
    assert type(optimizer) is expected
    assert optimizer.defaults["weight_decay"] == 0.3
    assert optimizer.defaults.get("momentum", 0.7) == 0.7
    assert optimizer.defaults.get("betas", (0.8, 0.9)) == (0.8, 0.9)


def test_one_cycle_rises_and_falls_along_a_cosine():
    """ZoeDepth's numbers: at the peak from the first step for 70 % of them, then down to 1e-4 of it."""
    one_cycle = {"schedule": Schedule.one_cycle, "rise_fraction": 0.7, "start_lr_fraction": 1.0}
    config = OptimConfig(encoder_lr=2.0, decoder_lr_multiplier=3.0, final_lr_fraction=1e-4, **one_cycle)
    found = np.array(rates(config, num_steps=100, schedule=build_schedule))
    np.testing.assert_allclose(found[:, 1], 3 * found[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found[:70, 0], 2.0)
    way = (np.arange(100) - (0.7 * 101 - 1)) / (100 - (0.7 * 101 - 1))
    falling = 2e-4 + (2 - 2e-4) * (1 + np.cos(np.pi * way)) / 2
    np.testing.assert_allclose(found[70:, 0], falling[70:], rtol=1e-6)


def test_one_cycle_refuses_what_it_does_not_do():
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps=5: must be 0"):
        OptimConfig(schedule=Schedule.one_cycle, warmup_steps=5, final_lr_fraction=0.1)
    with pytest.raises(ConfigError, match=r"optim\.final_lr_fraction=0\.0: must be > 0"):
        OptimConfig(schedule=Schedule.one_cycle)
