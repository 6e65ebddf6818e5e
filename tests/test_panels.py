"""The pictures of a run: written at every validation, of the same images, and none where nothing is validated."""

import re
from pathlib import Path

import cv2
import lightning as L
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from depthkit.data.reader import DatasetReader
from depthkit.evaluation.protocols import compare, protocol_id
from depthkit.runtime import panels
from depthkit.runtime.panels import ImagePanels, fixed_batches
from depthkit.train import run
from depthkit.types import Rejection

NO_PANELS = "~callbacks.panels"


class Drawn:
    """Stands in the place of `panels.panel` and keeps what it was asked to draw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple] = []
        self.titles: list[str] = []
        monkeypatch.setattr(panels, "panel", self)

    def __call__(self, image, target, prediction, valid_mask, *, unit: str, title: str, aligned: bool) -> np.ndarray:
        self.calls.append((image, target, prediction, valid_mask))
        self.titles.append(title)
        return np.zeros((4, 8, 3), np.uint8)


def written(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "panels").iterdir())


def test_a_picture_for_each_validation_in_the_folder_and_in_tensorboard(tiny_config, tmp_path):
    settings = ["trainer.val_check_interval=3", "callbacks.panels.num_images=2", "logger=tensorboard"]
    config = tiny_config("teacher", tmp_path, *settings)
    run(config)

    assert written(tmp_path) == ["step-00000003.png", "step-00000006.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={IMAGES: 0})
    events.Reload()
    last = events.Images("val/panels")[-1]
    assert last.step == 6
    logged = cv2.imdecode(np.frombuffer(last.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    picture = cv2.imread(str(tmp_path / "panels" / "step-00000006.png"))
    assert np.array_equal(logged, picture)
    assert picture.shape[1] > 4 * 300  # four tiles side by side
    assert picture.std() > 20


def test_the_same_images_each_time_with_what_the_model_makes_of_them(tiny_config, tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch)
    config = tiny_config("teacher", tmp_path, "trainer.val_check_interval=3", "callbacks.panels.num_images=2")
    read: list[tuple[int, int]] = []
    read_whole = DatasetReader.read_whole

    def counted(self, shard, index, **arguments):
        read.append((shard, index))
        return read_whole(self, shard, index, **arguments)

    monkeypatch.setattr(DatasetReader, "read_whole", counted)
    run(config)

    assert len(drawn.calls) == 6  # after steps 3 and 6, and of the bundle
    name = re.escape(protocol_id(config.protocol))
    assert [re.fullmatch(rf"{name}, step (\d+)", title)[1] for title in drawn.titles] == list("336666")
    first, middle, *_ = drawn.calls
    assert not np.array_equal(first[0], middle[0])
    for image, again in ((first, drawn.calls[2]), (middle, drawn.calls[3])):
        assert np.array_equal(image[0], again[0])
        assert np.array_equal(image[1], again[1])
        assert not np.array_equal(image[2], again[2])  # the model has learned three steps more
    assert np.array_equal(drawn.calls[2][2], drawn.calls[4][2])
    assert len(read) == 3 * 8 + 2  # three validations of eight images; the two of the pictures were read once


def test_the_drawn_prediction_is_the_one_that_is_scored(tiny_config, tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch)

    class ScoredFirst(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                maps = (pl_module(batch["image"]).values, batch["target"], batch["valid_mask"])
                self.comparison = compare(*maps, pl_module.protocol)

    scored = ScoredFirst()
    run(tiny_config("teacher", tmp_path, "callbacks.panels.num_images=1", "trainer.val_check_interval=6"), [scored])
    image, target, prediction, valid_mask = drawn.calls[-1]
    assert image.shape == (32, 40, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(valid_mask, scored.comparison.valid_mask[0])
    np.testing.assert_array_equal(target, scored.comparison.target[0])
    np.testing.assert_allclose(prediction, scored.comparison.prediction[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("pretrain", []), ("teacher", ["~data.val.source"])],
    ids=["pretrain", "teacher without validation sets"],
)
def test_a_run_without_validation_draws_nothing(tiny_config, tmp_path, stage, settings):
    run(tiny_config(stage, tmp_path, *settings))
    assert (tmp_path / "bundle").is_dir()
    assert not (tmp_path / "panels").exists()


def test_training_is_the_same_with_and_without_pictures(tiny_config, tmp_path):
    scores = [
        run(tiny_config("teacher", tmp_path / str(number), "trainer.val_check_interval=3", *settings))
        for number, settings in enumerate(([], [NO_PANELS]))
    ]
    assert scores[0] == scores[1]
    assert not (tmp_path / "1" / "panels").exists()


def test_images_are_evenly_spread_and_broken_ones_left_out():
    broken = Rejection(dataset="d", shard="s", key="k", reason="r")
    assert fixed_batches(list(range(10)), 4) == [0, 2, 5, 7]
    assert fixed_batches([1, broken, 3], 9) == [1, 3]
    assert fixed_batches([], 4) == []


def test_training_steps_are_left_alone():
    assert {name for name in vars(ImagePanels) if not name.startswith("_")} == {"on_validation_end"}
