"""The simulation of scale runs, and its proof fails where the order is wrong."""

import sys

import numpy as np
import pytest
import simulate_scale
from simulate_scale import main, prove_by_arithmetic, prove_by_enumeration

from depthkit.data.order import Order


def test_it_runs_at_small_scale(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulate_scale.py", "--shards", "300", "--samples", "7", "--ranks", "2", "4"])
    main()
    printed = capsys.readouterr().out
    assert "300 shards, 2,100 samples" in printed
    assert "| 4 | 32 |" in printed
    assert "8 ranks read each of" in printed


class Repeating(Order):
    """Gives the first sample of a block twice, and the last one never."""

    def _permute_block(self, *arguments: int) -> np.ndarray:
        permutation = super()._permute_block(*arguments)
        permutation[permutation == permutation.max()] = 0
        return permutation


def test_the_proofs_find_a_sample_that_is_read_twice(monkeypatch):
    monkeypatch.setattr(simulate_scale, "Order", Repeating)
    with pytest.raises(AssertionError):
        prove_by_enumeration(2)
    with pytest.raises(AssertionError):
        prove_by_arithmetic([100] * 50, 2)
