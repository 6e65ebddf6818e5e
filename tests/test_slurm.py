"""Training on a real Slurm cluster that preempts, signals and loses nodes: the weights are those of an undisturbed run.

The jobs of a phase run side by side; the tests then look at what each of them left.
"""

import re
import sys
from collections.abc import Callable, Iterator

import pytest
from slurm_cluster import SCRIPTS, Cluster, boot, cluster_of_two, kill_node, wait_for
from test_train import assert_same_weights

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--mem-per-cpu=500"]
STEPS = 100
SLOW = "+callbacks.slow={_target_:slurm_cluster.SlowSteps,seconds:0.2}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of_two(tmp_path_factory.mktemp("slurm")) as started:
        yield started


Submit = Callable[..., str]


@pytest.fixture(scope="module")
def submit(cluster: Cluster, tiny_settings) -> Submit:
    """`submit(name, *settings, partition="main", path=None, limit="60", signal="USR1@300")`: a training job on two
    nodes in the folder `name`; its tasks find programs in `path`; `limit` is in minutes."""

    def submit_training(
        name: str,
        *settings: str,
        partition: str = "main",
        path: str | None = None,
        limit: str = "60",
        signal: str = "USR1@300",
    ) -> str:
        options = [*TWO_NODES, f"--partition={partition}", f"--job-name={name}"]
        options += [f"--time={limit}", f"--signal={signal}"]
        if path is not None:
            options.append(f"--export=ALL,DEPTHKIT_PYTHON=/usr/bin/env PATH={path} {sys.executable}")
        training = [*tiny_settings("teacher", cluster.folder / name), f"trainer.max_steps={STEPS}"]
        training += ["callbacks.checkpoint.every_n_train_steps=5", *settings]
        return cluster.submit(*options, SCRIPTS / "train.sbatch", *training)

    return submit_training


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, submit: Submit) -> dict[str, str]:
    """The training jobs, by what happens to them; all have ended."""
    found = {"undisturbed": submit("undisturbed"), "USR1": submit("USR1", SLOW)}
    found["no_scontrol"] = submit("no_scontrol", SLOW, path="/nowhere")
    for name in ("USR1", "no_scontrol"):
        wait_until_trained(cluster, name)
        cluster.run("scancel", "--signal=USR1", found[name])
    cluster.wait(list(found.values()))  # a preemption below would meet one that is still starting again

    found |= {"no_grace": submit("no_grace", SLOW), "grace": submit("grace", SLOW, partition="grace")}
    wait_until_trained(cluster, "no_grace", "grace")
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--job-name=urgent", "--wrap=sleep 1")
    wait_for(lambda: all(restarts(cluster, found[name]) for name in ("no_grace", "grace")), "both to be preempted")
    cluster.wait(list(found.values()))

    found["node"] = submit("node", SLOW)
    wait_until_trained(cluster, "node")
    kill_node(2)
    wait_for(lambda: restarts(cluster, found["node"]) > 0, "the dead node to be noticed", lambda: cluster.log("node"))
    boot()
    cluster.wait([found["node"]])
    return found


def wait_until_trained(cluster: Cluster, *names: str) -> None:
    def has_checkpoint(name: str) -> bool:
        return any((cluster.folder / name / "checkpoints").glob("*.ckpt"))

    wait_for(lambda: all(map(has_checkpoint, names)), f"{names} to train", lambda: cluster.run("squeue"))


def restarts(cluster: Cluster, job: str) -> int:
    return int(cluster.facts(job)["Restarts"])


def steps_in(text: str, pattern: str) -> list[int]:
    return [int(step) for step in re.findall(pattern + r"\S+/checkpoints/(\d+)\.ckpt", text)]


def test_two_nodes_train(cluster: Cluster, jobs: dict[str, str]) -> None:
    assert restarts(cluster, jobs["undisturbed"]) == 0
    assert "Starting with 2 processes" in cluster.log("undisturbed")
    assert (cluster.folder / "undisturbed" / "bundle" / "model.json").is_file()


@pytest.mark.parametrize("name", ["USR1", "no_scontrol", "no_grace", "grace"])
def test_a_signalled_job_saves_and_goes_on_at_that_very_step(name: str, cluster: Cluster, jobs: dict[str, str]) -> None:
    log = cluster.log(name)
    saved, restored = steps_in(log, "saved "), steps_in(log, "Restored all states from the checkpoint at ")
    assert saved
    assert saved == restored
    assert all(0 < step < STEPS for step in saved)
    assert restarts(cluster, jobs[name]) == len(saved)
    assert ("exit code 175 asks the batch script" in log) == (name == "no_scontrol")
    assert_same_weights(cluster.folder / name, cluster.folder / "undisturbed")


def test_a_job_on_a_node_that_dies_goes_on_from_its_last_checkpoint(cluster: Cluster, jobs: dict[str, str]) -> None:
    assert restarts(cluster, jobs["node"]) >= 1
    assert steps_in(cluster.log("node"), "Restored all states from the checkpoint at ")
    assert_same_weights(cluster.folder / "node", cluster.folder / "undisturbed")


def test_a_job_that_reaches_its_time_limit_goes_on_where_it_was(
    cluster: Cluster, submit: Submit, jobs: dict[str, str]
) -> None:
    """Slurm looks at limits every half minute, so the signal comes between one and two minutes after the start."""
    slow = SLOW.replace("0.2", "1.2")
    job = submit("limit", slow, limit="3", signal="USR1@90")
    cluster.wait([job])
    log = cluster.log("limit")
    saved = steps_in(log, "saved ")
    assert saved == steps_in(log, "Restored all states from the checkpoint at ")
    assert restarts(cluster, job) == len(saved) > 0
    assert_same_weights(cluster.folder / "limit", cluster.folder / "undisturbed")


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(
    cluster: Cluster, submit: Submit, jobs: dict[str, str]
) -> None:
    job = submit("cancelled", SLOW)
    wait_until_trained(cluster, "cancelled")
    cluster.run("scancel", job)
    wait_for(lambda: "Slurm is ending" in cluster.log("cancelled"), "the job to save")
    wait_for(lambda: not cluster.run("squeue", "--noheader", f"--jobs={job}", check=False), "the job to end")
    assert cluster.facts(job)["JobState"] == "CANCELLED"
    assert steps_in(cluster.log("cancelled"), "saved ")
