"""The commands of docs/real-samples.md on real files: packed, inspected, trained, labeled, selected, evaluated."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthkit.data.manifest import Manifest, load_manifest

pytestmark = pytest.mark.slow

TEST_SOURCES = ["kitti_metric3d", "nyu_metric3d", "nyu_unidepth", "tum_open3d", "sunrgbd_kinect2", "realsense_graspnet"]
SHARED_SCENE = "nyu_open3d_raw"
"""Has a photograph of a test source; its labels are not registered, so it is evaluated nowhere."""
NUM_TEST_IMAGES = 9
PAGE = Path(__file__).parents[1] / "docs" / "real-samples.md"
FASTER = {
    "pack": "--workers 1",
    "inspect": "--workers 1",
    "train": "trainer.max_steps=4 optim.warmup_steps=2 data.num_workers=0 trainer.enable_progress_bar=false",
    "label": "stage.num_workers=0 trainer.enable_progress_bar=false",
}

Settings = Callable[..., Any]


@pytest.fixture(scope="module")
def root(samples_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all commands of the page were run, one after the other, with a handful of steps."""
    root = tmp_path_factory.mktemp("real")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = [line.split(maxsplit=2)[1:] for block in blocks for line in block.splitlines()]
    verbs = ["pack", "inspect", "train", "label", "train", "evaluate", "label", "select", "train"]
    assert [verb for verb, _ in commands] == verbs
    for verb, rest in commands:
        arguments = f"{rest.replace('SAMPLES', shlex.quote(str(samples_dir)))} {FASTER.get(verb, '')}"
        command = f"{shlex.quote(sys.executable)} -m depthkit {verb} {arguments}"
        done = subprocess.run(
            command,
            shell=True,
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return root


@pytest.fixture(scope="module")
def manifests(root: Path) -> dict[str, Manifest]:
    paths = (root / "data" / "real").glob("*/manifest.json")
    return {path.parent.name: load_manifest(path) for path in paths}


@pytest.fixture(scope="module")
def settings(root: Path, compose: Settings) -> Settings:
    """`settings(experiment, *overrides)`: the experiment below `root`."""

    def compose_experiment(experiment: str, *overrides: str) -> Any:
        paths = [f"paths.data={root / 'data'}", f"paths.runs={root / 'runs'}"]
        return compose(f"experiment={experiment}", *paths, *overrides)

    return compose_experiment


@pytest.fixture(scope="module")
def bundles(root: Path) -> list[Path]:
    """Bundles of the teacher and of the student that learned its labels."""
    return [root / "runs" / f"tiny_real_{stage}" / "bundle" for stage in ("teacher", "student")]


def test_every_sample_is_packed_and_a_source_is_in_one_split(samples_dir, manifests):
    rows = [json.loads(line) for line in (samples_dir / "index.jsonl").read_text().splitlines()]
    packed = {name: manifest.num_samples for name, manifest in manifests.items() if name != "unlabeled"}
    assert packed == {source: sum(row["source"] == source for row in rows) for source in {r["source"] for r in rows}}
    splits = {name: manifest.split for name, manifest in manifests.items()}
    assert {name for name, split in splits.items() if split == "test"} == {*TEST_SOURCES, SHARED_SCENE}
    assert set(splits.values()) == {"train", "test"}


@pytest.mark.parametrize("experiment", ["tiny_real_teacher", "tiny_real_student"])
def test_no_test_source_is_trained_on(settings, manifests, experiment):
    data = settings(experiment).data
    trained = {Path(dataset.manifest).parent.name for dataset in [*data.labeled.values(), *data.unlabeled.values()]}
    assert len(trained) >= 15
    assert {manifests[name].split for name in trained} == {"train"}


def test_student_learned_the_labels_of_this_teacher(root, bundles, manifests):
    teacher, student = (json.loads((bundle / "model.json").read_text()) for bundle in bundles)
    photos = student["provenance"]["data"]["unlabeled.photos"]
    assert photos["teacher_sha256"] == teacher["sha256"]
    labels = load_manifest(root / "runs" / "tiny_real_label" / "labels" / "manifest.json")
    assert labels.num_samples == manifests["unlabeled"].num_samples > 200
    assert not list((root / "runs").glob("*/quarantine/*"))


def test_both_are_evaluated_on_the_sources_left_out(root):
    out = root / "runs" / "tiny_real_evaluate"
    results = json.loads((out / "results.json").read_text())
    assert f"`{results['protocol']['id']}`" in PAGE.read_text()
    assert results["num_images"] == NUM_TEST_IMAGES
    assert results["skipped"] == []
    assert set(results["datasets"]) == {f"{name}/test" for name in TEST_SOURCES}
    for model in ("tiny_real_teacher", "tiny_real_student"):
        overall = results["models"][model]["overall"]
        assert 0 < overall["abs_rel"] < 2
        assert 0 < overall["delta1"] <= 1
    with (out / "per_image.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * NUM_TEST_IMAGES


def test_no_test_image_is_in_training(root):
    """`inspect` would have ended with 1, and its page would list the pair."""
    assert "LEAKAGE" not in (root / "data" / "real" / "inspect.html").read_text()


def test_the_images_on_which_the_teacher_wavers_are_chosen_and_trained_on(root):
    labels = root / "runs" / "tiny_real_flip" / "labels" / "manifest.json"
    samples = json.loads((root / "data" / "real" / "hard.json").read_text())["samples"]
    assert sum(map(len, samples.values())) == round(0.3 * load_manifest(labels).num_samples)
    assert (root / "runs" / "tiny_real_hard" / "bundle").is_dir()
