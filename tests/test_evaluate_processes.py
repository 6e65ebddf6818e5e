"""Threads and processes that share the images of an evaluation: every image once, and the same numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import CRUDE, PERFECT, PROTOCOL, sample, write_dataset

from depthkit.evaluation.evaluate import collect, evaluate, prepare, score_share
from depthkit.evaluation.processes import Process, this_process
from depthkit.evaluation.scoring import Outcome, Scoring

MODELS = {"perfect": PERFECT, "crude": CRUDE}


@pytest.fixture
def scoring(tmp_path: Path) -> Scoring:
    """Seven images of two data sets in three shards, one of them broken."""
    near = write_dataset(tmp_path / "near", [sample(n) for n in range(4)], name="near")
    broken = sample(5) | {"png": b"no image"}
    far = write_dataset(tmp_path / "far", [sample(4), broken, sample(6)], name="far")
    return prepare(MODELS, [near, far], PROTOCOL)[0]


def outcomes_of(scoring: Scoring, world_size: int, num_workers: int = 2) -> list[Outcome]:
    processes = [Process(rank, world_size, rank) for rank in range(world_size)]
    return [outcome for process in processes for outcome in score_share(scoring, process, num_workers)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 10])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_processes_and_threads_gives_the_same_numbers(scoring, world_size, num_workers):
    """Also where the images cannot be dealt out evenly, and where there are fewer images than processes."""
    whole = collect(scoring, outcomes_of(scoring, 1, 2), [], seconds=0)
    outcomes = outcomes_of(scoring, world_size, num_workers)
    assert sorted(outcome.place.number for outcome in outcomes) == list(range(7))
    found = collect(scoring, outcomes, [], seconds=0)
    assert found.images == whole.images
    assert found.skipped == whole.skipped
    assert [rejection.key for rejection in found.skipped] == ["image_1"]
    for name in MODELS:
        np.testing.assert_array_equal(found.depth_errors[name], whole.depth_errors[name])


def test_padded_duplicates_are_refused(scoring):
    """A distributed sampler repeats images until every process has as many."""
    outcomes = outcomes_of(scoring, 2)
    with pytest.raises(RuntimeError, match="8 results for 7 different images, and the manifests list 7"):
        collect(scoring, [*outcomes, outcomes[0]], [], seconds=0)


def test_dropped_images_are_refused(scoring):
    """`drop_last` leaves out those that do not fill a batch."""
    with pytest.raises(RuntimeError, match="6 results for 6 different images, and the manifests list 7"):
        collect(scoring, outcomes_of(scoring, 2)[:-1], [], seconds=0)
    twice = outcomes_of(scoring, 1)
    with pytest.raises(RuntimeError, match="7 results for 6 different images"):
        collect(scoring, [*twice[:-1], twice[0]], [], seconds=0)


def test_few_images_are_held_at_a_time(scoring):
    """The number of images that are read before the first is done does not grow with that of the data set."""
    read = 0
    original = Scoring.read

    class Counting(Scoring):
        def read(self, place):
            nonlocal read
            read += 1
            return original(self, place)

    many = [place for _ in range(50) for place in scoring.places()]
    counting = Counting(models=scoring.models, datasets=scoring.datasets, protocol=scoring.protocol)
    outcomes = counting.outcomes(many, num_workers=2)
    next(outcomes)
    assert read < 20
    assert len(list(outcomes)) == 349


def test_an_image_is_scored_by_one_thread(scoring, monkeypatch):
    """Sums that are split over several are other sums; the network keeps the threads that it had."""
    before, seen = torch.get_num_threads(), []
    original = Scoring.score
    monkeypatch.setattr(Scoring, "score", lambda *args: seen.append(torch.get_num_threads()) or original(*args))
    torch.set_num_threads(3)
    try:
        outcomes_of(scoring, 1)
        assert seen == [1] * 7
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_failing_model_ends_the_evaluation_of_all_threads(tmp_path):
    manifest = write_dataset(tmp_path, [sample(n) for n in range(6)])
    bad = replace(PERFECT, function=lambda depth: depth * np.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate({"bad": bad}, [manifest], PROTOCOL, num_workers=3)


def test_a_model_given_twice_is_refused(tmp_path):
    manifest = write_dataset(tmp_path, [sample(0)])
    with pytest.raises(ValueError, match="a and b are one model"):
        evaluate({"a": PERFECT, "b": replace(PERFECT)}, [manifest], PROTOCOL)


def test_processes_know_their_place(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Process(0, 1, 0)
    for name, value in {"STEP_NUM_TASKS": 4, "PROCID": 3, "LOCALID": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert this_process() == Process(3, 4, 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": 2, "WORLD_SIZE": 8, "LOCAL_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert this_process() == Process(2, 8, 2)
    assert Process(2, 8, 2).device("cpu") == "cpu"


def start(*command: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def srun(rank: int, world_size: int) -> dict[str, str]:
    """What srun says to a task of a step on this machine."""
    said = {"STEP_NUM_TASKS": world_size, "PROCID": rank, "LOCALID": rank, "JOB_ID": os.getpid(), "STEP_ID": 0}
    return {f"SLURM_{name}": str(value) for name, value in said.items()} | {"SLURM_STEP_NODELIST": "localhost"}


@pytest.mark.slow
def test_devices_torchrun_and_srun_write_what_one_process_writes(tiny_world, tiny_teacher, tmp_path):
    manifests = ",".join(str(tiny_world / name / "manifest.json") for name in ("source_val", "source_train"))
    settings = [f"model={tiny_teacher}", f"dataset={manifests}", "num_pictures=1", "device=cpu"]
    depthkit = ["-m", "depthkit", "evaluate", *settings]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    finish(start(sys.executable, *depthkit, "out=one", folder=tmp_path))
    finish(start(sys.executable, *depthkit, "out=two", "devices=2", folder=tmp_path))
    finish(start(sys.executable, *torchrun, *depthkit, "out=three", folder=tmp_path))
    tasks = [start(sys.executable, *depthkit, "out=four", folder=tmp_path, **srun(rank, 2)) for rank in range(2)]
    printed = [finish(task) for task in tasks]
    assert ["report: " in text for text in printed] == [True, False], "the first process alone writes and prints"
    whole = json.loads((tmp_path / "one" / "results.json").read_text())
    assert whole["num_images"] == 32
    for name in ("two", "three", "four"):
        assert (tmp_path / name / "per_image.csv").read_bytes() == (tmp_path / "one" / "per_image.csv").read_bytes()
        assert json.loads((tmp_path / name / "results.json").read_text()) | {"seconds": 0} == whole | {"seconds": 0}
