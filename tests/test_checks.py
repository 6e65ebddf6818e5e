"""Settings that contradict the data sets or each other; `test_config.py` has those that need no data set."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade import DEPTH, labeled_sample, pseudo_labels, unlabeled_sample, write_dataset

from depthkit.checks import validate
from depthkit.config import ConfigError, DatasetConfig, TrainConfig
from depthkit.data.manifest import load_manifest
from depthkit.evaluation.settings import Aggregation, Alignment


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders rooms (labels in metres), relative (labels without a unit), images, labels (pseudo-labels for them)."""
    root = tmp_path_factory.mktemp("data")
    samples = {f"k{i}": labeled_sample(i) for i in range(8)}
    write_dataset(root / "rooms", samples)
    write_dataset(root / "relative", samples, replace(DEPTH, metric=False))
    images = write_dataset(root / "images", {f"k{i}": unlabeled_sample(i) for i in range(16)}, None)
    pseudo_labels(root / "labels", images, [f"k{i}" for i in range(16)])
    return root


@pytest.fixture
def student(compose: Any, root: Path) -> TrainConfig:
    """A student that validates: 4 labeled and 8 unlabeled images a step."""
    config: TrainConfig = compose("experiment=tiny_student", "data.crop_size=[32,32]", "data.batch_size=12")
    config.data.labeled = {"rooms": dataset(root, "rooms")}
    config.data.unlabeled = {"target": dataset(root, "images", labels=str(root / "labels" / "manifest.json"))}
    config.data.val = {"rooms": dataset(root, "rooms")}
    config.stage.encoder_weights = None
    config.trainer.max_steps = 100
    return config


def dataset(root: Path, folder: str, **settings: Any) -> DatasetConfig:
    return DatasetConfig(manifest=str(root / folder / "manifest.json"), **settings)


def test_the_world_of_a_data_set_is_not_rendered_into_another_folder(compose: Any, tmp_path: Path, root: Path):
    """Settings of a tiny experiment whose manifest alone is exchanged."""
    own = compose("experiment=tiny_teacher", f"data.labeled.source.manifest={root}/rooms/manifest.json")
    assert own.data.labeled["source"].world is None
    validate(own)
    lost = compose("experiment=tiny_teacher", f"data.labeled.source.manifest={tmp_path}/typo/manifest.json")
    with pytest.raises(ConfigError, match=r"data\.labeled\.source\.manifest=.*typo/manifest\.json: no such file"):
        validate(lost)
    moved = compose("experiment=tiny_teacher", f"paths.data={tmp_path}")
    assert moved.data.labeled["source"].world is not None
    validate(moved)


def test_a_student_with_its_labels_is_fine(student: TrainConfig):
    validate(student)


def test_relative_labels_serve_training_but_no_validation(student: TrainConfig, root: Path):
    student.data.labeled = {"relative": dataset(root, "relative")}
    validate(student)
    student.data.val = {"relative": dataset(root, "relative")}
    with pytest.raises(ConfigError, match=r"data\.val\.relative.*metric: false.*cannot give depth in metres"):
        validate(student)


def test_relative_labels_cannot_be_held_to_a_range_in_metres(student: TrainConfig, root: Path):
    student.data.labeled = {"rooms": dataset(root, "rooms", depth_range=[1.0, 10.0])}
    validate(student)
    student.data.labeled = {"relative": dataset(root, "relative", depth_range=[1.0, 10.0])}
    with pytest.raises(ConfigError, match=r"data\.labeled\.relative.*depth_range=\[1\.0, 10\.0\] in metres"):
        validate(student)
    student.data.labeled = {}
    student.data.unlabeled["target"].depth_range = [1.0, 10.0]
    with pytest.raises(ConfigError, match=r"data\.unlabeled\.target.*depth_range=\[1\.0, 10\.0\]"):
        validate(student)


def test_pseudo_labels_that_are_not_finished_are_missed_by_name(student: TrainConfig, root: Path):
    student.data.unlabeled["target"].labels = str(root / "nowhere" / "manifest.json")
    with pytest.raises(ConfigError, match=r"nowhere/manifest\.json: no such file; `depthkit label` writes it"):
        validate(student)
    student.data.unlabeled["target"].labels = None
    with pytest.raises(ConfigError, match=r"data\.unlabeled\.target.*without labels.*labels=PATH"):
        validate(student)


def test_a_missing_manifest_is_missed_with_the_cure(student: TrainConfig, root: Path):
    student.data.val = {"streets": dataset(root, "streets")}
    with pytest.raises(ConfigError, match=r"data\.val\.streets\.manifest=.*streets/manifest\.json: .*`depthkit pack`"):
        validate(student)


@pytest.mark.parametrize(("warmup_steps", "works"), [(3, True), (4, False), (400, False)])
def test_warm_up_is_shorter_than_the_run_that_sweeps_make(student: TrainConfig, warmup_steps: int, works: bool):
    """Two sweeps of 16 unlabeled images, 8 a step, are 4 steps."""
    student.trainer.max_steps = -1
    student.sweeps = 2.0
    student.optim.warmup_steps = warmup_steps
    if works:
        validate(student)
        return
    with pytest.raises(ConfigError, match=rf"optim\.warmup_steps={warmup_steps}: must be below 4, .* sweeps=2\.0"):
        validate(student)


def test_cutmix_boxes_must_fit_into_the_crop(student: TrainConfig):
    """A crop of 32 x 512 is 16 times as long as high, a box at most 3.3 times: 0.2 of the crop is the largest."""
    student.data.crop_size = [32, 512]
    with pytest.raises(ConfigError, match=r"data\.augment\.cutmix_area=\[0\.02, 0\.4\]: must be .*\[32, 512\]"):
        validate(student)
    student.data.augment.cutmix_area = [0.02, 0.2]
    validate(student)
    student.data.augment = replace(student.data.augment, cutmix_area=[0.02, 0.4], cutmix=0.0)
    validate(student)


@pytest.mark.parametrize("field", ["devices", "num_nodes"])
@pytest.mark.parametrize("value", [0, -1])
def test_the_number_of_ranks_is_known(student: TrainConfig, field: str, value: int):
    setattr(student.trainer, field, value)
    with pytest.raises(ConfigError, match=rf"trainer\.{field}={value}: must be a number > 0"):
        validate(student)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": True}, r"protocol\.flip=True: must be False in training; `depthkit evaluate` knows the others"),
        ({"window": [24, 32]}, r"protocol\.window=\[24, 32\]"),
        ({"aggregation": Aggregation.pixels}, r"protocol\.aggregation"),
        ({"alignment": Alignment.none}, r"the model predicts disparity.*use an affine_disparity protocol"),
        (
            {"datasets": ["nyuv2_raw"]},
            r"protocol\.datasets=\['nyuv2_raw'\]: must be null, or among them .*data\.val\.rooms",
        ),
    ],
)
def test_a_protocol_that_validation_cannot_follow_is_refused(
    student: TrainConfig, settings: dict[str, Any], message: str
):
    student.protocol = replace(student.protocol, **settings)
    with pytest.raises(ConfigError, match=message):
        validate(student)
    student.data.val = {}
    validate(student)


def test_a_protocol_of_the_validation_set_is_fine(student: TrainConfig, root: Path):
    name = load_manifest(root / "rooms" / "manifest.json").name
    student.protocol = replace(student.protocol, datasets=[name])
    validate(student)
