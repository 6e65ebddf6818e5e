"""Steps that are not finite: as if they had never been, written down, bounded."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthkit.config import ConfigError
from depthkit.runtime.checkpoint import Checkpoints
from depthkit.runtime.loss_spike import LossSpikes
from depthkit.runtime.non_finite import NonFiniteGuard
from depthkit.types import BudgetExceeded

pytestmark = pytest.mark.filterwarnings("ignore:step .* was left out")
NAN, INF = float("nan"), float("inf")


class Small(L.LightningModule):
    """A model with a batch norm that learns from batches of four numbers; `poison` maps a batch to what spoils it."""

    def __init__(self, poison: dict[int, str], *, fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.poison = poison
        self.fused = fused

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        inputs = batch["labeled"]["image"].clone()
        how = self.poison.get(batch_idx)
        if how == "input":
            inputs[0, 0] = NAN
        losses = self.net(inputs)[:, 0].square()
        if how == "gradient":
            losses.register_hook(lambda gradient: gradient * INF)
        loss = losses.mean()
        if how == "loss":
            loss = loss + torch.tensor(INF)  # its gradient is as without it
        return {"loss": loss, "image_losses": {"labeled": losses.detach()}}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1, fused=self.fused)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"}]


class Batches(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        keys = [f"{index}-{image}" for image in range(4)]
        names = {"key": keys, "dataset": ["d"] * 4, "shard": ["s.tar"] * 4}
        return {"labeled": {"image": torch.randn(4, 3, generator=generator), **names}}

    def __len__(self) -> int:
        return 24


class States(L.Callback):
    """Copies of everything that training changes, after each optimizer step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.after):
            state = deepcopy(trainer.optimizers[0].state_dict()["state"])
            moments = {f"{key} {name}": value for key, values in state.items() for name, value in values.items()}
            self.after.append({**moments, **deepcopy(pl_module.state_dict())})
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def guard(run_dir: Path, max_consecutive: int = 10, max_total: int = 100) -> NonFiniteGuard:
    return NonFiniteGuard(str(run_dir), max_consecutive, max_total)


def train(run_dir: Path, module: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> States:
    """Six steps on the CPU."""
    states = States()
    settings = {"max_steps": 6, "log_every_n_steps": 4, "gradient_clip_val": 1.0} | settings
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, states, Checkpoints(str(run_dir / "checkpoints"), every_n_train_steps=100)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    return states


def changed(states: States, step: int) -> list[str]:
    """What a step changed."""
    before, after = states.after[step - 1], states.after[step]
    return [name for name in after if not torch.equal(before[name], after[name])]


def reports(run_dir: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted((run_dir / "bad_steps").glob("*"))}


# --- the step leaves no trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["input", "loss", "gradient"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_optimizer_and_buffers_are_as_before(tmp_path, how, fused, accumulate):
    bad_batch = 3 * accumulate  # the first of those that its step accumulates
    settings = {"accumulate_grad_batches": accumulate}
    states = train(tmp_path, Small({bad_batch: how}, fused=fused), guard(tmp_path), **settings)
    assert changed(states, 3) == []
    assert len(changed(states, 4)) > 10
    assert all(value.isfinite().all() for value in states.after[-1].values())
    assert list(reports(tmp_path)) == ["step-00000003-rank-00000.json"]


def test_without_the_guard_it_is_otherwise(tmp_path):
    states = train(tmp_path, Small({3: "input"}))
    assert not states.after[-1]["net.0.weight"].isfinite().all()


def test_the_step_counts_for_the_schedule(tmp_path):
    good = train(tmp_path / "good", Small({}), guard(tmp_path))
    bad = train(tmp_path / "bad", Small({2: "loss"}), guard(tmp_path))
    assert bad.rates == good.rates
    assert len(set(good.rates)) > 4


def test_a_good_run_is_the_same_with_the_guard(tmp_path):
    with_guard = train(tmp_path / "a", Small({}), guard(tmp_path / "a"))
    without = train(tmp_path / "b", Small({}))
    assert all(torch.equal(value, without.after[-1][name]) for name, value in with_guard.after[-1].items())
    assert reports(tmp_path / "a") == {}


def test_a_scaler_leaves_the_step_out_and_its_search_is_not_reported(tmp_path):
    """Gradients beyond the range lower the scale; a loss that is not finite is a bad step as ever."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    settings = {"plugins": [plugin], "gradient_clip_val": None, "max_steps": 20}
    watch = guard(tmp_path)
    states = train(tmp_path, Small({12: "loss"}), watch, **settings)
    assert watch.total == 1
    assert changed(states, 1) == []
    assert scaler.get_scale() < 2**22
    assert list(reports(tmp_path)) == ["step-00000012-rank-00000.json"]
    assert changed(states, 12) == []
    assert len(changed(states, 19)) > 10


# --- what is written, and when the run ends --------------------------------------------------------------------------


def test_report_names_every_sample_and_its_loss(tmp_path):
    with pytest.warns(UserWarning, match=r"step 3 was left out: the loss is not finite; .*step-00000003-rank-00000"):
        train(tmp_path, Small({6: "input"}), guard(tmp_path), accumulate_grad_batches=2)
    (report,) = reports(tmp_path).values()
    assert report["step"] == 3
    assert report["problem"] == "the loss is not finite"
    assert report["reproduce"] == f"depthkit replay {tmp_path} --step 3"
    samples = report["samples"]
    assert [sample["key"] for sample in samples] == [f"{batch}-{image}" for batch in (6, 7) for image in range(4)]
    assert {(sample["dataset"], sample["shard"], sample["stream"]) for sample in samples} == {("d", "s.tar", "labeled")}
    losses = [sample["losses"]["labeled"] for sample in samples]
    assert losses[:4] == ["nan"] * 4  # the batch norm spreads it
    assert all(isinstance(loss, float) for loss in losses[4:])


@pytest.mark.parametrize(
    ("bad", "limits", "last"),
    [([1, 2, 3], (2, 9), 3), ([0, 2, 4, 8], (1, 3), 8), ([0, 1, 2], (2, 0), 0)],
    ids=["consecutive", "total", "none"],
)
def test_budget_ends_the_run_with_a_checkpoint(tmp_path, bad, limits, last):
    stop = guard(tmp_path, *limits)
    with pytest.raises(BudgetExceeded, match="max_consecutive=") as error:
        train(tmp_path, Small(dict.fromkeys(bad, "input")), stop, max_steps=12, log_every_n_steps=1)
    assert f"--step {last}" in str(error.value)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=False)
    assert content["global_step"] == last + 1
    assert content["callbacks"]["NonFiniteGuard"] == {"total": len([step for step in bad if step <= last])}


def test_budget_that_is_used_up_but_not_exceeded(tmp_path):
    states = train(tmp_path, Small(dict.fromkeys([0, 1, 4, 5], "input")), guard(tmp_path, 2, 4))
    assert len(states.after) == 6


def test_wrong_budgets_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks\.non_finite\.max_total=-1"):
        guard(tmp_path, 1, -1)


class CountReads(TorchDispatchMode):
    """Counts how often a tensor becomes a Python number, which waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_good_steps_do_not_wait_for_the_device(tmp_path):
    counts = []
    for callbacks in ([], [guard(tmp_path), LossSpikes(str(tmp_path), 10, 10.0, 10)]):
        with CountReads() as reads:
            train(tmp_path, Small({}), *callbacks, log_every_n_steps=100)
        counts.append(reads.count)
    assert counts[0] == counts[1]


# --- several ranks ---------------------------------------------------------------------------------------------------

RANKS = """
import os, sys
from pathlib import Path
import torch
from test_non_finite import Small, guard, train

run_dir, how, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
here = int(os.environ.get("LOCAL_RANK", 0))
module = Small({3: how} if here == rank else {})
states = train(run_dir, module, guard(run_dir), devices=2, strategy="ddp", use_distributed_sampler=False)
torch.save(states.after, run_dir / f"states-{here}.pt")
"""


def run_ranks(script: str, folder: Path, *arguments: str) -> None:
    """Run a script whose Trainer starts the second rank."""
    tests = Path(__file__).parent
    (folder / "run.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, folder / "run.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=400, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_no_rank_takes_a_step_that_is_bad_on_one(tmp_path, how):
    run_ranks(RANKS, tmp_path, str(tmp_path), how, "1")
    for rank in (0, 1):
        states = States()
        states.after = torch.load(tmp_path / f"states-{rank}.pt")
        assert changed(states, 3) == []
        assert len(changed(states, 4)) > 10
    problems = [report["problem"] for report in reports(tmp_path).values()]
    assert list(reports(tmp_path)) == [f"step-00000003-rank-{rank:05d}.json" for rank in (0, 1)]
    assert problems == ["a gradient is not finite", f"{'the' if how == 'loss' else 'a'} {how} is not finite"]


DEEPSPEED = """
import os, sys
from pathlib import Path
import lightning as L, torch
import depthkit.train
from depthkit.hydra_entry import hydra_main

class Spoil(L.Callback):
    def on_fit_start(self, trainer, module):
        step, self.after = module.training_step, []
        def spoiled(batch, batch_idx):
            output = step(batch, batch_idx)
            if batch_idx == 3 and trainer.global_rank == 1:
                output["loss"] = output["loss"] + torch.tensor(float("inf"))
            return output
        module.training_step = spoiled

    def on_train_batch_end(self, trainer, module, *_):
        parts = {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in module.named_parameters()}
        for number, state in enumerate(trainer.model.optimizer.optimizer.state.values()):
            parts |= {f"{number} {name}": torch.as_tensor(value).clone() for name, value in state.items()}
        self.after.append(parts)

def run(config):
    spoil = Spoil()
    depthkit.train.run(config, [spoil])
    torch.save(spoil.after, Path(config.run_dir) / f"states-{os.environ.get('LOCAL_RANK', 0)}.pt")

hydra_main("train", [item for item in sys.argv[1:] if item != "train"], run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_leaves_the_step_out(tiny_settings, tmp_path, zero_stage):
    pytest.importorskip("deepspeed")
    settings = ["trainer.devices=2", "trainer.strategy=deepspeed", f"trainer.zero_stage={zero_stage}", "data.val={}"]
    run_ranks(DEEPSPEED, tmp_path, *tiny_settings("teacher", tmp_path), *settings)
    for rank in (0, 1):
        states = States()
        states.after = torch.load(tmp_path / f"states-{rank}.pt")
        assert changed(states, 3) == []
        assert len(changed(states, 4)) > 60
    assert list(reports(tmp_path)) == [f"step-00000003-rank-{rank:05d}.json" for rank in (0, 1)]
