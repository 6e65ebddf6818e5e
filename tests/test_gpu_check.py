"""`scripts/gpu_check.py` on the CPU with small numbers: every row is there, and one that fails does not end it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Bench, Table


@pytest.fixture
def bench(tmp_path):
    """A run with a minute left."""
    table = Table("a machine", tmp_path / "gpu.md")
    return Bench(torch.device("cpu"), tiny=True, deadline=time.monotonic() + 60, table=table)


def test_a_row_that_fails_says_why_and_the_next_one_follows(bench, tmp_path):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    def no_compiler():
        raise RuntimeError("no g++ | here\nand more")

    assert not bench.attempt("big", full)
    assert not bench.attempt("compiled", no_compiler)
    assert bench.attempt("small", lambda: bench.table.add("small", remark="done"))
    bench.deadline = 0
    assert not bench.attempt("late", lambda: bench.table.add("never"))
    assert [re.split(r" \| ", row)[-1] for row in bench.table.rows] == [
        "not measured: out of memory |",
        "not measured: RuntimeError: no g++ / here |",
        "done |",
        "not measured: the time is up |",
    ]
    assert (tmp_path / "gpu.md").read_text().splitlines()[-4:] == bench.table.rows


def test_batches_grow_until_one_does_not_fit(bench, monkeypatch):
    seen = []

    def row(bench, model, factor):
        seen.append(factor)
        if factor > 8:
            raise torch.OutOfMemoryError
        bench.rates[model] = float(factor)

    monkeypatch.setattr(gpu_check, "train_row", row)
    bench.tiny = False
    gpu_check.sweep(bench, "vitl")
    assert seen == [2, 4, 8, 16]
    assert bench.rates == {"vitl": 8.0}


@pytest.mark.slow
def test_the_whole_table(tmp_path):
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.md")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert all(len(row) == 7 for row in rows)
    names = [row[0] for row in rows]
    assert names == [
        "matrix product",
        *[name for name in names if name == "train tiny"],
        "label tiny, 64 x 80",
        "loader, one core",
        "loader for tiny",
        "train tiny, ZeRO 2",
        "train tiny compiled",
    ]
    by_name = dict(zip(names, rows, strict=True))
    assert not [row for row in rows if "not measured" in row[6] and row[0] != "train tiny, ZeRO 2"]
    assert "bound: needs" in by_name["loader for tiny"][6]
    images, milliseconds, rate = map(float, by_name["train tiny"][1:4])
    assert rate == pytest.approx(1000 * images / milliseconds, rel=0.02)
    assert all(line in finished.stdout for line in lines)
    assert Path(gpu_check.__file__).name in (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
