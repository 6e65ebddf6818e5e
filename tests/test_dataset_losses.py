"""Loss curves of each data set: means over its images alone, and as many readings of the device as log lines."""

from types import SimpleNamespace

import pytest
import torch

from depthkit.runtime.dataset_losses import DatasetLosses
from depthkit.train import run


class Log(list):
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.append((step, metrics))


def steps(callback: DatasetLosses, batches: list[tuple[dict, dict]], every: int) -> Log:
    """Run the callback over (losses per image, batch) of some steps."""
    log = Log()
    for index, (losses, batch) in enumerate(batches):
        trainer = SimpleNamespace(log_every_n_steps=every, loggers=[log], global_step=index + 1)
        callback.on_train_batch_end(trainer, None, {"loss": None, "image_losses": losses}, batch, index)
    return log


def test_means_are_over_the_images_of_a_data_set():
    batch = {"labeled": {"dataset": ["a", "b", "a"]}, "unlabeled": {"dataset": ["c", "c"]}}
    losses = {"labeled": torch.tensor([1.0, 5.0, 3.0]), "feature": torch.tensor([0.2, 0.4])}
    later = {"labeled": torch.tensor([5.0, 7.0, 9.0]), "feature": torch.tensor([0.6, 0.8])}
    log = steps(DatasetLosses(), [(losses, batch), (later, batch)], every=2)
    assert [step for step, _ in log] == [2]
    expected = {"loss/labeled/a": 4.5, "loss/labeled/b": 6.0, "loss/feature/c": 0.5}
    assert log[0][1] == pytest.approx(expected)


def test_an_interval_starts_anew():
    batch = {"labeled": {"dataset": ["a"]}}
    batches = [({"labeled": torch.tensor([value])}, batch) for value in (1.0, 2.0, 3.0, 5.0)]
    log = steps(DatasetLosses(), batches, every=2)
    assert [metrics["loss/labeled/a"] for _, metrics in log] == [1.5, 4.0]


def test_stages_without_losses_per_image_log_nothing():
    log = Log()
    trainer = SimpleNamespace(log_every_n_steps=1, loggers=[log], global_step=1)
    DatasetLosses().on_train_batch_end(trainer, None, {"loss": torch.zeros(())}, {}, 0)
    assert all(metrics == {} for _, metrics in log)


def test_curves_of_a_student_are_in_its_log(tiny_config, tmp_path):
    run(tiny_config("student", tmp_path, "trainer.log_every_n_steps=3"))
    header, *lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    assert {"loss/labeled/source", "loss/unlabeled/target", "loss/feature/target"} <= set(names)
    column = names.index("loss/labeled/source")
    assert len([line for line in lines if line.split(",")[column]]) == 2
