"""Loss curves: means over the images of each data set alone, and as many readings of the device as log lines."""

import pytest
import torch

from depthkit.runtime.curves import read_curves
from depthkit.runtime.loss_means import LossMeans
from depthkit.train import run

DATASETS = {"labeled": ["a", "b"], "unlabeled": ["c"]}
BATCH = {"labeled": {"dataset": ["a", "b", "a"]}, "unlabeled": {"dataset": ["c", "c"]}}


def test_means_are_over_the_images_of_a_data_set():
    losses = LossMeans(DATASETS)
    first = {"labeled": torch.tensor([1.0, 5.0, 3.0]), "feature": torch.tensor([0.2, 0.4])}
    later = {"labeled": torch.tensor([5.0, 7.0, 9.0]), "feature": torch.tensor([0.6, 0.8])}
    losses.add(torch.tensor(2.0), first, BATCH)
    losses.add(torch.tensor(3.0), later, BATCH)
    assert losses.means(losses.sums()) == pytest.approx(
        {"loss": 2.5, "loss/labeled": 5.0, "loss/labeled/a": 4.5, "loss/labeled/b": 6.0}
        | {"loss/feature": 0.5, "loss/feature/c": 0.5}
    )


def test_an_interval_starts_anew():
    losses = LossMeans(DATASETS)
    for expected in (1.0, 4.0):
        losses.add(torch.tensor(expected), {"feature": torch.full((2,), expected)}, BATCH)
        assert losses.means(losses.sums()) == {"loss": expected, "loss/feature": expected, "loss/feature/c": expected}


def test_sums_of_ranks_add_up_to_the_mean_over_all_images():
    """One rank saw three images of a data set, the other one none."""
    one, two = LossMeans(DATASETS), LossMeans(DATASETS)
    one.add(torch.tensor(2.0), {"labeled": torch.tensor([1.0, 2.0, 3.0])}, {"labeled": {"dataset": ["a"] * 3}})
    two.add(torch.tensor(4.0), {"labeled": torch.tensor([5.0, 7.0])}, {"labeled": {"dataset": ["b", "b"]}})
    means = one.means([a + b for a, b in zip(one.sums(), two.sums(), strict=True)])
    assert means == {"loss": 3.0, "loss/labeled": 18 / 5, "loss/labeled/a": 2.0, "loss/labeled/b": 6.0}


def test_stages_without_losses_per_image_have_the_loss_alone():
    losses = LossMeans(DATASETS)
    losses.add(torch.tensor(2.0), {}, {})
    assert losses.means(losses.sums()) == {"loss": 2.0}
    assert losses.means(losses.sums()) == {}


def test_curves_of_a_student_are_in_its_log(tiny_config, tmp_path):
    run(tiny_config("student", tmp_path, "trainer.log_every_n_steps=3"))
    rows = read_curves(tmp_path / "csv" / "metrics.csv")
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        parts = [row[f"loss/{part}"] for part in ("labeled", "unlabeled", "feature")]
        assert parts == [row[name] for name in ("loss/labeled/source", "loss/unlabeled/target", "loss/feature/target")]
        assert row["loss"] == pytest.approx(sum(parts) / 3, rel=1e-5)
