"""The demo, small: what it writes, that it can be started again, and that it does not mix two of its kind."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import pytest

from depthkit.config import ConfigError, DemoConfig
from depthkit.demo import demo
from depthkit.evaluation.protocols import protocol_id

pytestmark = pytest.mark.slow

OVERRIDES = ["data.num_workers=0", "trainer.enable_progress_bar=false"]


class Demo(NamedTuple):
    config: DemoConfig
    summary: dict[str, Any]

    @property
    def out(self) -> Path:
        return Path(self.config.out)


def read_summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    config = DemoConfig(seed=3, out=str(tmp_path_factory.mktemp("demo")), scale=0.01, overrides=OVERRIDES)
    demo(config)
    return Demo(config, read_summary(Path(config.out)))


def test_summary_says_protocol_seed_metrics_and_time(done, compose):
    protocol = compose("experiment=tiny_evaluate").protocol
    assert done.summary["protocol"] == protocol_id(protocol)
    assert done.summary["seed"] == 3
    for model in ("teacher", "student"):
        assert 0 < done.summary[model]["abs_rel"] < math.inf
        assert 0 <= done.summary[model]["delta1"] <= 1
    assert done.summary["images"] == 24
    assert done.summary["seconds"] > 0


def test_report_and_pictures(done):
    report = (done.out / "report.html").read_text()
    assert done.summary["protocol"] in report
    assert f"{done.summary['student']['abs_rel']:.4f}" in report
    assert cv2.imread(str(done.out / "grid.png")).std() > 20


def test_each_stage_leaves_its_result(done):
    assert (done.out / "tiny_label" / "labels" / "manifest.json").is_file()
    student = json.loads((done.out / "tiny_student" / "bundle" / "model.json").read_text())
    teacher = json.loads((done.out / "tiny_teacher" / "bundle" / "model.json").read_text())
    assert student["provenance"]["data"]["unlabeled.target"]["teacher_sha256"] == teacher["sha256"]


def test_a_finished_demo_is_not_trained_again(done):
    weights = done.out / "tiny_student" / "bundle" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    demo(done.config)
    assert weights.stat().st_mtime_ns == written
    again = read_summary(done.out)
    assert {**again, "seconds": 0} == {**done.summary, "seconds": 0}


def test_another_seed_in_the_same_folder_is_refused(done):
    with pytest.raises(ConfigError, match=r"holds a run with other settings:(?s:.*)seed: was 3, is 4"):
        demo(DemoConfig(seed=4, out=done.config.out, scale=0.01, overrides=OVERRIDES))
    assert read_summary(done.out)["seed"] == 3
