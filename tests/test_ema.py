"""The average of the weights: its values, what uses it, and that a killed run ends with the same one."""

import copy

import lightning as L
import pytest
import torch
from test_train import bundle_weights, train, train_and_die

from depthkit.config import ConfigError
from depthkit.runtime.averaging import WeightAverage
from depthkit.train import run

EVERY_2 = "callbacks.checkpoint.every_n_train_steps=2"
AVERAGED = [EVERY_2, "optim.ema_decay=0.3"]


class Weights(L.Callback):
    """The model's weights before the first step, after every step, and at each validation."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, torch.Tensor]] = {}
        self.validated: list[dict[str, torch.Tensor]] = []

    def keep(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.by_step[trainer.global_step] = copy.deepcopy(pl_module.model.state_dict())

    on_train_start = on_train_batch_end = keep

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(copy.deepcopy(pl_module.model.state_dict()))


def averaged(by_step: dict[int, dict[str, torch.Tensor]], name: str, decay: float, last: int) -> torch.Tensor:
    """By the formula, one step at a time, in float64."""
    value = by_step[0][name].double()
    for step in range(last):
        kept = min(decay, (1 + step) / (10 + step))
        value = kept * value + (1 - kept) * by_step[step + 1][name].double()
    return value


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
    """A run of six steps, validated in the middle and at the end."""
    run_dir, weights = tmp_path_factory.mktemp("whole"), Weights()
    run(tiny_config("student", run_dir, *AVERAGED, "trainer.val_check_interval=3"), [weights])
    return run_dir, weights


def test_the_bundle_and_validations_have_the_average(whole):
    run_dir, weights = whole
    bundle = bundle_weights(run_dir)
    middle, end, of_bundle = weights.validated
    for name in ("encoder.vit.blocks.0.attn.qkv.weight", "decoder.head_in.weight"):
        assert bundle[name].double() == pytest.approx(averaged(weights.by_step, name, 0.3, 6), abs=1e-7)
        assert middle[name].double() == pytest.approx(averaged(weights.by_step, name, 0.3, 3), abs=1e-7)
        assert torch.equal(end[name], bundle[name])
        assert torch.equal(of_bundle[name], bundle[name])
        assert not torch.equal(weights.by_step[6][name], bundle[name])


def test_training_does_not_notice(whole, tiny_config, tmp_path):
    _, averaged_run = whole
    plain = Weights()
    run(tiny_config("student", tmp_path, EVERY_2, "trainer.val_check_interval=3"), [plain])
    for name, value in plain.by_step[6].items():
        assert torch.equal(value, averaged_run.by_step[6][name])
    assert torch.equal(plain.validated[-1]["decoder.head_in.weight"], plain.by_step[6]["decoder.head_in.weight"])


@pytest.mark.parametrize("settings", [[], ["trainer.val_check_interval=1", "trainer.accumulate_grad_batches=2"]])
def test_killed_and_continued_run_has_the_same_average(tiny_config, tmp_path, settings):
    train(tiny_config("student", tmp_path / "whole", *AVERAGED, *settings))
    cut = tiny_config("student", tmp_path / "cut", *AVERAGED, *settings)
    train_and_die(cut, at_step=5)
    train(cut)
    expected, found = bundle_weights(tmp_path / "whole"), bundle_weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_died_before_its_bundle_writes_it_with_the_average(whole, tiny_config, tmp_path):
    """The last checkpoint is of the last step: nothing is left to train."""
    config = tiny_config("student", tmp_path, *AVERAGED)

    class DieAtTheEnd(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        run(config, [DieAtTheEnd()])
    assert not (tmp_path / "bundle").exists()
    assert train(config) == {}
    expected, found = bundle_weights(whole[0]), bundle_weights(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_is_frozen_is_left_out(whole):
    run_dir, _ = whole
    state = torch.load(run_dir / "checkpoints" / "00000006.ckpt", weights_only=False)
    average = state["callbacks"]["WeightAverage"]["average"]
    assert {name.split(".")[0] for name in average} == {"model"}


def test_a_checkpoint_in_the_middle_of_a_validation_has_the_weights_of_the_step(tiny_config, tmp_path):
    class SaveInValidation(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, module: object, batch: object, batch_idx: int) -> None:
            if trainer.state.fn == "fit" and batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    weights = Weights()
    config = tiny_config("teacher", tmp_path, "optim.ema_decay=0.9", "trainer.val_check_interval=6")
    run(config, [weights, SaveInValidation()])
    state = torch.load(tmp_path / "middle.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(state[f"model.{name}"], value) for name, value in weights.by_step[6].items())
    assert all(torch.equal(weights.validated[0][name], value) for name, value in bundle_weights(tmp_path).items())


def test_half_life():
    """Of a jump of the weights from 0 to 1, half is seen after ln 2 / (1 - decay) steps."""
    callback, module = WeightAverage(0.99), torch.nn.Linear(1, 1, bias=False)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.completed = 2000
    with torch.no_grad():
        module.weight.fill_(0.0)
    callback.on_train_start(trainer, module)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for _ in range(69):
        progress.completed += 1
        callback.on_train_batch_end(trainer, module)
    assert float(callback.average["weight"]) == pytest.approx(0.5, abs=0.01)


def test_statistics_that_go_with_the_weights_are_averaged_too():
    """Those of a trained BatchNorm layer, as its weights are; those of a frozen one stay out."""
    callback, module = WeightAverage(0.5), torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1))
    module[1].requires_grad_(False)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.completed = 100
    callback.on_train_start(trainer, module)
    module[0].running_mean.fill_(4.0)
    progress.completed += 1
    callback.on_train_batch_end(trainer, module)
    assert set(callback.average) == {f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    callback.on_fit_end(trainer, module)
    assert module[0].running_mean.tolist() == [2.0]


def test_what_cannot_be_averaged_is_refused(tiny_config, tmp_path):
    sharded = ["optim.ema_decay=0.9", "trainer.strategy=deepspeed", "trainer.zero_stage=3"]
    with pytest.raises(ConfigError, match=r"optim\.ema_decay=0\.9: must be null with ZeRO stage 3"):
        run(tiny_config("teacher", tmp_path, *sharded))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    own = ["optim.ema_decay=0.9", "trainer.strategy=deepspeed", f"trainer.deepspeed_config={tmp_path / 'zero.json'}"]
    with pytest.raises(ConfigError, match=r"optim\.ema_decay=0\.9: must be null with ZeRO stage 3"):
        run(tiny_config("teacher", tmp_path, *own))
    with pytest.raises(ConfigError, match=r"optim\.ema_decay"):
        tiny_config("teacher", tmp_path, "optim.ema_decay=1.0")
