"""Label arrays and sweeps on a real Slurm cluster, of which one process is killed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from slurm_cluster import SCRIPTS, Cluster, cluster_of_two, wait_for
from test_train import assert_same_weights

from depthkit.data.procedural import WorldSpec, write_world

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SIXTY_STEPS = ["trainer.max_steps=60", "callbacks.checkpoint.every_n_train_steps=5"]
SLOW = "+callbacks.slow={_target_:slurm_cluster.SlowSteps,seconds:0.3}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of_two(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def test_a_label_array_of_four_does_the_work_of_the_one_that_is_killed(cluster: Cluster, tiny_teacher: Path) -> None:
    images, out = cluster.folder / "images", cluster.folder / "labels"
    write_world(
        images,
        WorldSpec(domain="target", split="train", num_images=96, size=(32, 40), labeled=False, samples_per_shard=4),
        progress=False,
    )
    settings = [f"bundle={tiny_teacher}", f"images={images / 'manifest.json'}", "stage.num_workers=0"]
    settings += ["stage.short_side=512", "stage.batch_size=1", "stage.claim_timeout=10"]
    array = cluster.submit(
        "--array=0-3", "--job-name=label", "--mem-per-cpu=500", SCRIPTS / "label.sbatch", *settings, f"out={out}"
    )
    kill_holder_of_a_claim(cluster, out / ".claims")
    wait_for(lambda: not cluster.run("squeue", "--noheader", f"--jobs={array}", check=False), "the array to end")
    states = [cluster.facts(f"{array}_{task}")["JobState"] for task in range(4)]
    assert sorted(states) == ["COMPLETED"] * 3 + ["FAILED"]

    cluster.run("python", "-m", "depthkit", "label", *settings, f"out={cluster.folder / 'alone'}")
    one, four = (sorted((cluster.folder / name).glob("*.tar")) for name in ("alone", "labels"))
    assert len(four) == 24
    assert [path.read_bytes() for path in four] == [path.read_bytes() for path in one]
    assert json.loads((out / "manifest.json").read_text())


def kill_holder_of_a_claim(cluster: Cluster, claims: Path) -> None:
    holders: list[tuple[str, int]] = []

    def found() -> bool:
        for path in claims.glob("*"):
            try:
                holder = json.loads(path.read_text())
                holders.append((holder["host"].split()[0], holder["pid"]))
            except (OSError, ValueError):  # released, or being written
                continue
        return bool(holders)

    wait_for(found, "a label task to begin", lambda: cluster.run("squeue"))
    node, pid = holders[0]
    cluster.on_node(node, "kill", "-9", str(pid))


@pytest.fixture(scope="module")
def sweep(cluster: Cluster, tiny_settings) -> tuple[Path, int, str]:
    """Folder, exit code and output of a sweep over three seeds: the first is killed, the second preempted."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'depthkit[slurm]'")
    folder = cluster.folder / "sweep"
    settings = [*tiny_settings("teacher", folder), *SIXTY_STEPS]
    settings += ["hydra/launcher=slurm", "seed=0,1,2", SLOW, "hydra.launcher.mem_gb=1"]
    process = cluster.start("python", "-m", "depthkit", "train", "--multirun", *settings)
    wait_for(
        lambda: all(any((folder / str(n) / "checkpoints").glob("*.ckpt")) for n in range(3)), "all trials to train"
    )
    for number, name in enumerate(("KILL", "USR2")):
        facts = OmegaConf.load(folder / str(number) / "hydra" / "hydra.yaml")
        cluster.run("scancel", f"--signal={name}", str(facts.hydra.job.id))
    wait_for(lambda: process.poll() is not None, "the sweep to end", lambda: cluster.run("squeue"))
    return folder, process.wait(), (cluster.folder / "started.out").read_text()


def test_a_killed_trial_takes_no_other_one_along(sweep: tuple[Path, int, str]) -> None:
    folder, code, said = sweep
    assert code == 1, said
    assert "seed=0" in said
    assert not (folder / "0" / "bundle").exists()
    assert json.loads((folder / "2" / "job.json").read_text())["value"] > 0
    assert (folder / "2" / "bundle" / "model.json").is_file()


def test_a_preempted_trial_goes_on_and_ends_with_the_weights_of_an_undisturbed_run(
    cluster: Cluster, tiny_settings, sweep: tuple[Path, int, str]
) -> None:
    folder, _, _ = sweep
    record = json.loads((folder / "1" / "job.json").read_text())
    assert record["value"] > 0
    logs = "".join(path.read_text() for path in (folder / ".submitit").rglob("*_log.*"))
    saved = re.findall(rf"SIGUSR2: saved {folder}/1/checkpoints/(\d+)\.ckpt", logs)
    assert len(saved) == 1
    assert f"Restored all states from the checkpoint at {folder}/1/checkpoints/{saved[0]}.ckpt" in logs
    alone = cluster.folder / "alone_1"
    cluster.run("python", "-m", "depthkit", "train", *tiny_settings("teacher", alone), *SIXTY_STEPS, "seed=1")
    assert_same_weights(folder / "1", alone)
