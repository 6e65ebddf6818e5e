"""How far a mean over images could be off: percentile bootstrap, by drawing images with replacement."""

from collections.abc import Iterator

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
MAX_DRAWS = 4_000_000
"""Drawn images held at once, which bounds the memory for any number of images."""


def resampled_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means of the columns of `values` (N, K) over `NUM_RESAMPLES` draws of N rows, (NUM_RESAMPLES, K).

    `weights` is (N,). All columns see the same draws, so differences of columns are paired. NaN is left out; a draw
    without any number gives NaN. The generator is seeded: the same values give the same means.
    """
    is_number, is_infinite = ~np.isnan(values), np.isinf(values)
    finite = np.where(is_number & ~is_infinite, values, 0.0)
    parts = np.concatenate([finite, is_number, is_infinite], axis=1, dtype=float) * weights[:, None]
    totals = np.concatenate([counts @ parts for counts in _draw(len(values))])
    sums, numbers, infinities = np.split(totals, 3, axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(infinities > 0, np.inf, sums / numbers)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The middle `LEVEL` of resampled means (NUM_RESAMPLES,); NaN where one of them is not a finite number."""
    if not np.isfinite(resampled).all():
        return np.nan, np.nan
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _draw(num_rows: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, (draws, num_rows), `NUM_RESAMPLES` draws in all."""
    generator = np.random.default_rng(SEED)
    size = max(1, MAX_DRAWS // num_rows)
    for start in range(0, NUM_RESAMPLES, size):
        num_draws = min(size, NUM_RESAMPLES - start)
        rows = generator.integers(num_rows, size=(num_draws, num_rows))
        rows += num_rows * np.arange(num_draws)[:, None]
        yield np.bincount(rows.ravel(), minlength=num_draws * num_rows).reshape(num_draws, num_rows).astype(float)
