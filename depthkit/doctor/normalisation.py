"""Does the encoder see images normalised as when its weights were trained?"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from depthkit.bundle import read_facts
from depthkit.doctor.bench import Bench
from depthkit.doctor.finding import Finding, Level


class Normalisation(NamedTuple):
    """`(image / 255 - mean) / std`, a number for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in self)
        return f"mean {mean} and std {std}"


def check_normalisation(bench: Bench) -> Finding:
    """What batches go through, against what the weights of the encoder come with."""
    used, expected = used_normalisation(bench), expected_normalisation(bench)
    values: dict[str, Any] = {"used": used._asdict()}
    if expected is None:
        text = "the encoder starts from random weights, which expect no normalisation of their own"
        return Finding(Level.ok, text, values)
    values["expected"] = expected._asdict()
    if np.allclose(used.mean, expected.mean, atol=2e-3) and np.allclose(used.std, expected.std, atol=2e-3):
        text = f"images are normalised as the encoder's weights expect ({used})"
        return Finding(Level.ok, text, values)
    text = f"images are normalised by {used}, the encoder's weights expect {expected}: it starts from worse features; "
    text += "choose an encoder of the first kind, or train it fully"
    return Finding(Level.warning, text, values)


def used_normalisation(bench: Bench) -> Normalisation:
    """Read off a black and a white image that take the way of every batch."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    batch: Any = {"labeled": {"image": pixels}}
    black, white = bench.on_device(batch)["labeled"]["image"].double().cpu()[:, :, 0, 0]
    std = 1 / (white - black)
    return Normalisation(tuple((-black * std).tolist()), tuple(std.tolist()))


def expected_normalisation(bench: Bench) -> Normalisation | None:
    """Of the weights that the encoder starts from; None for random ones, and where timm does not know."""
    weights = bench.config.stage.encoder_weights
    if weights is None:
        return None
    if weights != "timm":
        facts = read_facts(Path(weights))
        return Normalisation(facts.mean, facts.std)
    nets = [net for net in bench.module.modules() if hasattr(net, "pretrained_cfg")]
    published: dict[str, Any] = nets[0].pretrained_cfg if nets else {}  # type: ignore[assignment]
    return Normalisation(published["mean"], published["std"]) if published.get("mean") else None
