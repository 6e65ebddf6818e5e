"""Loss spikes: reported with their samples, judged by steps before them, without a say in the training."""

import json
from collections import deque
from pathlib import Path

import pytest
import torch
from test_non_finite import Small, reports, train

from depthkit.config import ConfigError
from depthkit.runtime.bad_steps import Step
from depthkit.runtime.loss_spike import LossSpikes, spike_limit


class Rank:
    global_rank = 1
    world_size = 2


def judged(run_dir: Path, losses: list[float], **settings: float) -> list[int]:
    """The steps that are reported."""
    monitor = LossSpikes(str(run_dir), **{"window": 5, "threshold": 10.0, "max_reports": 100} | settings)  # type: ignore[arg-type]
    for number, loss in enumerate(losses):
        monitor.judge(Rank(), Step(number), [loss])  # type: ignore[arg-type]
    return [content["step"] for content in reports(run_dir).values()]


pytestmark = pytest.mark.filterwarnings("ignore:step .* its samples are in")


def test_limit_by_hand():
    assert spike_limit(deque([1.0, 2.0, 3.0, 4.0, 10.0]), 10.0) == pytest.approx(3 + 10 * 1.4826 * 1.0)
    assert spike_limit(deque([2.0, 2.0, 2.0]), 10.0) == pytest.approx(4.0)  # a tenth of the median at least


def test_spike_after_a_full_window(tmp_path):
    assert judged(tmp_path, [9.0, 1.0, 1.1, 0.9, 1.0, 1.0, 1.9, 5.0, 1.0]) == [7]


def test_window_without_an_outlier_limit_would_hide(tmp_path):
    """Spikes in the window neither raise the limit much nor end the watch; a new level is one after half a window."""
    assert judged(tmp_path, [1.0] * 5 + [50.0, 1.0, 50.0, 1.0, 1.0]) == [5, 7]
    assert judged(tmp_path / "level", [1.0] * 5 + [50.0] * 8) == [5, 6, 7]


def test_not_finite_is_left_to_the_other_guard(tmp_path):
    assert judged(tmp_path, [1.0] * 5 + [float("nan"), float("inf"), 1.0, 8.0]) == [8]


def test_reports_are_bounded(tmp_path):
    assert judged(tmp_path, [1.0] * 5 + [9.0, 1.0, 9.0, 1.0, 1.0, 9.0], max_reports=2) == [5, 7]


def test_report_of_a_run_names_the_samples_and_changes_nothing(tmp_path):
    class Spiky(Small):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            factor = 100.0 if batch_idx == 5 else 1.0
            return {"loss": output["loss"] * factor, "image_losses": {"labeled": output["image_losses"]["labeled"]}}

    settings = {"max_steps": 8, "log_every_n_steps": 3}
    monitor = LossSpikes(str(tmp_path), window=4, threshold=10.0, max_reports=5)
    with pytest.warns(UserWarning, match=r"step 5: loss .*, median .*; its samples are in .*step-00000005"):
        watched = train(tmp_path, Spiky({}), monitor, **settings)
    alone = train(tmp_path / "alone", Spiky({}), **settings)
    assert all(torch.equal(value, alone.after[-1][name]) for name, value in watched.after[-1].items())
    (report,) = reports(tmp_path).values()
    assert (report["step"], report["problem"]) == (5, "the loss spikes")
    assert report["loss"] > 10 * report["median"] > 0
    assert [sample["key"] for sample in report["samples"]] == [f"5-{image}" for image in range(4)]
    assert all(sample["losses"]["labeled"] >= 0 for sample in report["samples"])
    assert json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("wrong", [{"window": 1}, {"threshold": 0.0}, {"max_reports": -1}])
def test_wrong_settings_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"callbacks.loss_spikes.{name}="):
        judged(tmp_path, [], **wrong)
