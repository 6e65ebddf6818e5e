"""Steps whose loss or gradients are not finite: left out, written down, bounded."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from depthkit.config import check
from depthkit.runtime.bad_steps import Step, StepWatcher, reproduce
from depthkit.runtime.checkpoint import save_now
from depthkit.types import Batch, BudgetExceeded


class NonFiniteGuard(StepWatcher):
    """A step with a loss or gradient that is not finite changes neither weights nor optimizer state, on any rank.

    A loss that is not finite makes its gradients so too; averaging over the ranks spreads that to all, and each comes
    to the same verdict from the same gradients. The fused optimizer takes it as `found_inf` and leaves the step out on
    the device. The step counts all the same: schedule and data go on. Buffers, such as a batch norm's, are put back.

    Left-out steps are reported in `run_dir/bad_steps`. The run saves a checkpoint and stops after more than
    `max_consecutive` of them in a row or `max_total` in all, resumed runs included. With precision 16-mixed a step that
    was left out because its scaled gradients overflowed is part of the search for the scale: neither reported nor
    counted in the total.
    """

    def __init__(self, run_dir: str, max_consecutive: int, max_total: int) -> None:
        super().__init__(run_dir)
        check(max_consecutive >= 0, "callbacks.non_finite.max_consecutive", max_consecutive, ">= 0 (steps)")
        check(max_total >= 0, "callbacks.non_finite.max_total", max_total, ">= 0 (steps)")
        self.max_consecutive = max_consecutive
        self.max_total = max_total
        self.consecutive = 0
        self.total = 0
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []
        self._is_bad: Tensor | None = None
        self._reason_to_stop: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._buffers = list(pl_module.buffers())
        deepspeed = deepspeed_optimizer(trainer)
        if deepspeed is not None and not getattr(deepspeed, "torch_autocast_gradscaler", None):
            deepspeed.check_grad_overflow = True  # ZeRO 1 and 2 look at it; ZeRO 3 always checks

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Batch], batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._before = [buffer.clone() for buffer in self._buffers]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        is_finite = torch.isfinite(loss.detach())
        loss.register_hook(lambda gradient: torch.where(is_finite, gradient, torch.nan))  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if deepspeed_optimizer(trainer) is not None:
            return  # its gradients lie elsewhere, and it leaves the step out by itself
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._is_bad = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # which finds the same
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = self._is_bad.float()  # type: ignore[attr-defined]
        elif self._is_bad:
            optimizer.zero_grad(set_to_none=True)  # parameters without gradient are left out

    def measure(self, trainer: L.Trainer, losses: Tensor) -> Tensor:
        """[is the step left out, is a loss of this rank not finite]"""
        deepspeed = deepspeed_optimizer(trainer)
        if deepspeed is not None:
            self._is_bad = torch.tensor(bool(deepspeed.overflow), device=losses.device)
        assert self._is_bad is not None
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(self._is_bad, before, buffer))
        return torch.stack([self._is_bad, ~torch.isfinite(losses).all()])

    def judge(self, trainer: L.Trainer, step: Step, numbers: list[float]) -> None:
        is_bad, is_bad_here = map(bool, numbers)
        if not is_bad:
            self.consecutive = 0
            return
        self.consecutive += 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        lowers_scale = scaler is not None and not trainer.strategy.reduce_boolean_decision(is_bad_here, all=False)
        self.total += not lowers_scale
        stops = self.consecutive > self.max_consecutive or self.total > self.max_total
        if stops or not lowers_scale:
            problem = "the loss is not finite" if is_bad_here else "a gradient is not finite"
            path = self.report(trainer, step, problem)
            rank_zero_warn(f"step {step.number} was left out: {problem}; its samples are in {path}")
        if stops:
            self._reason_to_stop = (
                f"{self.consecutive} steps in a row and {self.total} in all had a loss or gradient that is not finite "
                f"(callbacks.non_finite.max_consecutive={self.max_consecutive}, max_total={self.max_total}). None of "
                f"them changed the weights. Their samples are in {self.run_dir / 'bad_steps'}; to see the last again:\n"
                f"  {reproduce(self.run_dir, step.number)}\n"
                "Started again, the run goes on after it: repair the data, lower optim.encoder_lr, or allow more."
            )

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        if self._reason_to_stop is not None:
            save_now(trainer)
            raise BudgetExceeded(self._reason_to_stop)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = state_dict["total"]


def deepspeed_optimizer(trainer: L.Trainer) -> Any | None:
    """DeepSpeed's wrapper of the optimizer, where it is the engine."""
    return trainer.model.optimizer if isinstance(trainer.strategy, DeepSpeedStrategy) else None  # type: ignore
