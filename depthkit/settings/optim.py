"""The optimizer and its schedule."""

from dataclasses import dataclass, field
from enum import Enum

from depthkit.errors import check


class Algorithm(Enum):
    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"


class Schedule(Enum):
    decay = "decay"
    one_cycle = "one_cycle"


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer, the rates of its groups, and a schedule in optimizer steps."""

    algorithm: Algorithm = Algorithm.adamw
    encoder_lr: float = 5e-6
    decoder_lr_multiplier: float = 10.0  # decoder rate = encoder rate x this
    layer_lrs: dict[str, float] = field(
        default_factory=dict
    )  # by the start of a parameter's name, before the two above
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of Adam
    momentum: float = 0.9  # of SGD
    schedule: Schedule = Schedule.decay
    warmup_steps: int = 0  # of decay: linear from 0 to the peak
    schedule_power: float = 1.0  # of decay: 1 is linear, 0.9 the "poly" of the metric models
    rise_fraction: float = 0.3  # of one_cycle: share of the steps until the peak
    start_lr_fraction: float = 0.04  # of one_cycle: rate at the first step relative to the peak
    final_lr_fraction: float = 0.0  # rate at the last step relative to the peak
    cycle_momentum: bool = False  # of one_cycle: momentum (Adam's first beta) from 0.95 to 0.85 at the peak and back
    ema_decay: float | None = None  # per step, of an average of the weights; its half-life is ln 2 / (1 - decay) steps

    def __post_init__(self) -> None:
        check(self.encoder_lr >= 0, "optim.encoder_lr", self.encoder_lr, ">= 0")
        check(self.decoder_lr_multiplier > 0, "optim.decoder_lr_multiplier", self.decoder_lr_multiplier, "> 0")
        for name, rate in self.layer_lrs.items():
            check(rate >= 0, f"optim.layer_lrs.{name}", rate, ">= 0")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        check(0 <= self.momentum < 1, "optim.momentum", self.momentum, "0 to < 1")
        check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, ">= 0")
        check(self.schedule_power > 0, "optim.schedule_power", self.schedule_power, "> 0")
        check(0 < self.rise_fraction < 1, "optim.rise_fraction", self.rise_fraction, "> 0 and < 1")
        check(0 < self.start_lr_fraction <= 1, "optim.start_lr_fraction", self.start_lr_fraction, "> 0 and <= 1")
        check(0 <= self.final_lr_fraction <= 1, "optim.final_lr_fraction", self.final_lr_fraction, "0 to 1")
        decay = self.ema_decay
        check(decay is None or 0 < decay < 1, "optim.ema_decay", decay, "> 0 and < 1, or null for no average")
        self._check_schedule()

    def _check_schedule(self) -> None:
        """What the chosen schedule cannot do is refused, rather than left out in silence."""
        if self.schedule is Schedule.one_cycle:
            check(
                self.warmup_steps == 0,
                "optim.warmup_steps",
                self.warmup_steps,
                "0: schedule=one_cycle has its own rise",
            )
            check(self.final_lr_fraction > 0, "optim.final_lr_fraction", self.final_lr_fraction, "> 0 for one_cycle")
