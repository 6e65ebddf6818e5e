"""Checks of how the network learns: gradients, learning rate, one batch by heart."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from depthkit.doctor.bench import Batches, Bench
from depthkit.doctor.finding import Finding, Level

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of the rates in the settings, that the sweep tries."""
BLIND, USED = 1.001, 1.05
"""Of the loss of one batch learned by heart: what the images of others must exceed."""
LEARNED, STUCK = 0.5, 0.9
"""Of the first loss: what one batch learned by heart must come below, and what is as good as nothing."""


def check_gradients(bench: Bench, batch: Batches) -> Finding:
    """Does every trainable parameter get a gradient, in one of two steps? LoRA's first factor has none in the first."""
    reached: set[str] = set()
    losses = []
    for loss in bench.train(batch, steps=2):
        losses.append(loss)
        for name, parameter in bench.module.named_parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                reached.add(name)
    if not all(map(math.isfinite, losses)):
        text = f"the loss of step {len(losses)} is {losses[-1]}: look at labels and rates"
        return Finding(Level.problem, text)
    parameters = {name: p for name, p in bench.module.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in bench.module.parameters())
    trained = sum(p.numel() for p in parameters.values())
    values = {"parameters": total, "trained": trained}
    missing = [name for name in parameters if name not in reached]
    if missing:
        text = f"{len(missing)} trainable parameters get no gradient: {shown_modules(missing)}; leave them out of the "
        text += "optimizer (requires_grad_(False)) or connect them to the loss: DDP stops at those that never get one"
        return Finding(Level.problem, text, values | {"without": missing})
    text = f"every trained parameter gets a gradient ({trained:,} of {total:,} are trained)"
    return Finding(Level.ok, text, values)


def shown_modules(names: Sequence[str], most: int = 4) -> str:
    """Names by the module that they lie in, a few of them."""
    modules = [module for module, _ in groupby(name.rpartition(".")[0] or name for name in names)]
    return ", ".join(modules[:most]) + (f" and {len(modules) - most} more" if len(modules) > most else "")


def sweep_rates(bench: Bench, batch: Batches, steps: int) -> dict[float, float]:
    """Factor on the rates -> loss after so many steps on one batch, relative to the first one; inf if it diverged."""
    found = {}
    for factor in FACTORS:
        losses = list(bench.train(batch, steps=steps, factor=factor))
        is_whole = len(losses) == steps + 1 and math.isfinite(losses[-1])
        found[factor] = losses[-1] / losses[0] if is_whole else math.inf
    return found


def judge_rates(sweep: Mapping[float, float], rates: Mapping[str, float], steps: int) -> Finding:
    """Is the rate of the settings (factor 1) where the loss falls? `rates` are those of the groups, by name."""
    best = min(sweep, key=lambda factor: sweep[factor])
    own = sweep[1.0]
    cure = ", ".join(f"{name} {rate:.2g}" for name, rate in ((n, r * best) for n, r in rates.items()))
    values = {"loss_ratio": {f"{factor:g}": ratio for factor, ratio in sweep.items()}, "best_factor": best}
    seen = f"{steps} steps on one batch leave {own:.0%} of the loss, {best:g} times the rates {sweep[best]:.0%}"
    if own > 1.05 or not math.isfinite(own):
        outcome = "diverges" if not math.isfinite(own) else f"grows to {own:.0%}"
        most = "at most " if best == min(FACTORS) else ""
        text = f"the loss {outcome} in {steps} steps at these rates: too high; try {most}{best:g} times ({cure})"
        level = Level.problem if best < 1 else Level.warning
    elif best > 1 and own > 0.98:
        text = f"next to nothing is learned at these rates ({seen}): too low for a short run; try {cure}"
        level = Level.warning
    elif best < 1 and sweep[best] < 0.5 * own:
        text, level = f"the rates are high ({seen}): try {cure}, or a longer warm-up", Level.warning
    else:
        text, level = f"the rates are in the range that learns ({seen})", Level.ok
    return Finding(level, text, values)


def check_learning_rate(bench: Bench, batch: Batches, steps: int) -> Finding:
    optimizer = bench.optimizer()
    groups = {
        group.get("name", f"group {number}"): group.get("max_lr", group["initial_lr"])
        for number, group in enumerate(optimizer.param_groups)
    }
    return judge_rates(sweep_rates(bench, batch, steps), groups, steps)


def check_overfit(bench: Bench, batch: Batches, steps: int, factor: float) -> Finding:
    """Can the network learn one batch by heart, at the best rate of the sweep? And does it look at the images?"""
    losses = list(bench.train(batch, steps=steps, factor=factor))
    values: dict[str, Any] = {"losses": losses, "factor": factor}
    if not math.isfinite(losses[-1]):
        text = f"the loss is {losses[-1]} after {len(losses) - 1} steps on one batch"
        return Finding(Level.problem, text, values)
    ratio = losses[-1] / losses[0]
    exchanged = values["exchanged"] = exchanged_loss(bench, batch)
    seen = f"{losses[0]:.3g} to {losses[-1]:.3g} in {steps} steps"
    if ratio > STUCK and factor == min(FACTORS):
        text = (
            f"not to be judged: even {factor:g} times the rates of the settings is too high ({seen}); lower them first"
        )
        level = Level.skipped
    elif ratio > STUCK:
        text = f"the loss of one batch does not fall ({seen}): network, loss or labels do not go together"
        level = Level.problem
    elif exchanged is not None and exchanged < USED * losses[-1]:
        text = f"the loss of one batch falls ({seen}), but is {exchanged:.3g} with the images of others: "
        is_blind = exchanged < BLIND * losses[-1]
        text += "they are not used" if is_blind else "they are hardly used yet; steps=N gives it longer"
        level = Level.problem if is_blind else Level.warning
    elif ratio > LEARNED:
        text, level = f"one batch is learned slowly ({seen}); steps=N gives it longer", Level.warning
    else:
        text, level = f"one batch is learned by heart ({seen})", Level.ok
    return Finding(level, text, values)


@torch.no_grad()
def exchanged_loss(bench: Bench, batch: Batches) -> float | None:
    """The loss of a batch where every image has the label of its neighbour; None where nothing can be exchanged."""
    if any(len(part["image"]) < 2 or not bool(part["valid_mask"].any()) for part in batch.values()):
        return None
    exchanged: Batches = {name: {**part, "image": part["image"].roll(1, 0)} for name, part in batch.items()}
    return float(bench.loss(exchanged))
