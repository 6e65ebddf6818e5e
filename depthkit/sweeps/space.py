"""The search space in Hydra's words: interval(1e-6, 1e-4), tag(log, interval(...)), range(1, 9), choice(a, b)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer

from depthkit.config import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = dict[str, "BaseDistribution"]


def split(overrides: Sequence[Override]) -> tuple[list[str], Space]:
    """The overrides of every trial, and a distribution for each that is searched. The last one of a key holds."""
    last = {override.get_key_element(): override for override in overrides}
    fixed = [str(override.input_line) for override in last.values() if not override.is_sweep_override()]
    space = {key: distribution(override) for key, override in last.items() if override.is_sweep_override()}
    if not space:
        raise ConfigError(
            "nothing to search: give ranges, such as optim.encoder_lr='tag(log, interval(1e-6, 1e-4))', or sweep=NAME"
        )
    return fixed, space


def distribution(override: Override) -> "BaseDistribution":
    """What Optuna draws from. A number of a range is near its neighbours; the values of a choice know no order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    log = "log" in getattr(sweep, "tags", ())
    try:
        if isinstance(sweep, IntervalSweep):
            ends: dict[str, Any] = {"low": sweep.start, "high": sweep.end}
            is_whole = isinstance(sweep.start, int)  # int(interval(1, 8))
            return (IntDistribution if is_whole else FloatDistribution)(**ends, log=log)
        if isinstance(sweep, RangeSweep):
            numbers: list[Any] = sorted(sweep.range())
            step = abs(sweep.step)
            if isinstance(numbers[0], int):
                return IntDistribution(numbers[0], numbers[-1], step=int(step), log=log)
            return FloatDistribution(numbers[0], numbers[-1], step=None if log else float(step), log=log)
        choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
        return CategoricalDistribution(choices)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{override.input_line}: {error}") from error


def probes(space: Space) -> list[dict[str, Any]]:
    """Few points of the space in which every choice and both ends of every range occur."""
    values = {key: list(getattr(each, "choices", None) or [each.low, each.high]) for key, each in space.items()}  # type: ignore[attr-defined]
    count = max(map(len, values.values()))
    return [{key: each[i % len(each)] for key, each in values.items()} for i in range(count)]


def as_overrides(point: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in point.items()]
