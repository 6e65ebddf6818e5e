"""The CSV file of a run: one row for each step, whatever logs at it, and however often the run was begun again."""

import re
from pathlib import Path

import pytest

from depthkit.runtime.curves import CsvCurves, read_curves


def write(folder: Path, *rows: tuple[int, dict[str, float]]) -> None:
    """One process of a run."""
    curves = CsvCurves(str(folder))
    for step, metrics in rows:
        curves.log_metrics(metrics, step=step)


def test_numbers_of_one_step_stand_in_one_row(tmp_path):
    write(tmp_path, (10, {"loss": 0.5}), (10, {"val/abs_rel": 0.1}), (20, {"loss": 0.25}))
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "step,loss,val/abs_rel\n10,0.5,0.1\n20,0.25,\n"


def test_names_that_come_later_get_their_column(tmp_path):
    write(tmp_path, (1, {"b": 1.0}), (2, {"b": 2.0}), (3, {"a": 3.0}), (4, {"a": 4.0, "b": 5.0}))
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,,1.0\n2,,2.0\n3,3.0,\n4,4.0,5.0\n"


def test_a_continued_run_replaces_the_steps_it_does_again(tmp_path):
    write(tmp_path, *((step, {"loss": float(step), "old": 1.0}) for step in (1, 2, 3, 4, 5)))
    write(tmp_path, (4, {"loss": -4.0}), (5, {"loss": -5.0, "new": 2.0}), (6, {"loss": -6.0}))
    rows = read_curves(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [1, 2, 3, -4, -5, -6]
    assert rows[2]["old"] == 1.0
    assert "old" not in rows[3]
    assert rows[4]["new"] == 2.0


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_row_cut_by_a_kill_is_left_out_or_whole(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    write(tmp_path, (1, {"a": 1.25, "b": 2.5}), (2, {"a": 3.25, "b": 4.5}))
    whole = path.read_bytes()
    assert whole.endswith(b"\n2,3.25,4.5\n")
    path.write_bytes(whole[:-cut])
    write(tmp_path, (3, {"a": 5.0}))
    rows = read_curves(path)
    assert [row["step"] for row in rows if row["step"] != 2] == [1, 3]
    assert all(row == {"step": 2, "a": 3.25, "b": 4.5} for row in rows if row["step"] == 2)


def test_the_snippet_of_the_docs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    write(tmp_path / "runs/tiny_teacher/csv", (1, {"loss": 0.5, "samples_seen": 8}), (2, {"val/p@1/abs_rel": 0.1}))
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(snippet, found)
    assert found["losses"] == [(8, 0.5)]
