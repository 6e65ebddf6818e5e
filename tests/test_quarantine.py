"""What is written about bad samples, and when they are too many."""

import json
from types import SimpleNamespace

import pytest

from depthkit.data.quarantine import Quarantine, QuarantineBudgetExceeded, SampleError
from depthkit.runtime.quarantine import QuarantineMonitor
from depthkit.types import Rejection


def rejection(key, *, dataset="hypersim", reason="truncated JPEG"):
    return Rejection(dataset=dataset, shard="hypersim-000003.tar", key=key, reason=reason)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "quarantine.jsonl"


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_rejection_is_one_json_line(path):
    quarantine = Quarantine(path, max_fraction=1.0)
    quarantine.record(4, [rejection("a"), rejection("b", reason='no "depth" member\nin the tar, größer 0')])
    quarantine.record(4, [rejection("c")])
    assert [entry["key"] for entry in written(path)] == ["a", "b", "c"]
    assert written(path)[0] == {
        "dataset": "hypersim",
        "shard": "hypersim-000003.tar",
        "key": "a",
        "reason": "truncated JPEG",
    }
    assert written(path)[1]["reason"] == 'no "depth" member\nin the tar, größer 0'


def test_nothing_is_written_for_good_batches(path):
    quarantine = Quarantine(path, max_fraction=0.0, min_samples=1)
    quarantine.record(1000, [])
    assert not path.exists()
    assert (quarantine.num_seen, quarantine.num_rejected) == (1000, 0)


def test_a_restarted_run_appends(path):
    Quarantine(path, max_fraction=1.0).record(1, [rejection("a")])
    Quarantine(path, max_fraction=1.0).record(1, [rejection("b")])
    assert [entry["key"] for entry in written(path)] == ["a", "b"]


def test_rejections_are_read_once_and_counted(path):
    quarantine = Quarantine(path, max_fraction=1.0)
    quarantine.record(6, (rejection(key) for key in "ab"))
    assert (quarantine.num_seen, quarantine.num_rejected) == (8, 2)
    assert len(written(path)) == 2


def test_the_budget_is_a_share_of_all_samples_seen(path):
    """Five of a hundred are within a budget of 5 percent; the sixth is not."""
    quarantine = Quarantine(path, max_fraction=0.05, min_samples=10)
    quarantine.record(95, [rejection(str(i)) for i in range(5)])
    with pytest.raises(QuarantineBudgetExceeded):
        quarantine.record(0, [rejection("one too many")])
    assert written(path)[-1]["key"] == "one too many", "the last rejection is on disk before the run stops"


def test_the_budget_is_not_judged_on_the_first_samples(path):
    quarantine = Quarantine(path, max_fraction=0.01, min_samples=50)
    quarantine.record(0, [rejection("first")])
    quarantine.record(47, [rejection("second")])
    with pytest.raises(QuarantineBudgetExceeded):
        quarantine.record(0, [rejection("fiftieth")])


def test_no_budget_means_the_first_rejection_stops(path):
    with pytest.raises(QuarantineBudgetExceeded):
        Quarantine(path, max_fraction=0.0, min_samples=1).record(7, [rejection("a")])


def test_the_summary_names_counts_datasets_reasons_and_the_list(path):
    quarantine = Quarantine(path, max_fraction=0.1, min_samples=20)
    with pytest.raises(QuarantineBudgetExceeded) as caught:
        quarantine.record(
            15,
            [rejection("a"), rejection("b"), rejection("c", dataset="irs", reason="label is 0 everywhere")]
            + [rejection(str(i), dataset="irs", reason=f"rare {i}") for i in range(5)],
        )
    summary = str(caught.value)
    for part in ["8 of 23", "10.00%", "2 x hypersim: truncated JPEG", "1 x irs: label is 0 everywhere", str(path)]:
        assert part in summary
    assert summary.index("hypersim") < summary.index("irs"), "most frequent first"
    assert "rare 4" not in summary, "only the most frequent reasons"


def test_a_sample_error_is_a_value_error():
    with pytest.raises(ValueError, match="truncated"):
        raise SampleError("truncated")


def test_counts_of_each_data_set_are_logged(tmp_path):
    logged = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    trainer = SimpleNamespace(global_rank=0, log_every_n_steps=2, loggers=[logger], global_step=7)
    monitor = QuarantineMonitor(tmp_path, max_fraction=0.5)
    monitor.setup(trainer, None, "fit")
    rejections = [Rejection(dataset=name, shard="s", key="k", reason="cut off") for name in ("a", "b", "a")]
    for index, part in enumerate((rejections[:1], rejections[1:])):
        batch = {"labeled": {"key": ["x"] * 4, "rejections": part}}
        monitor.on_train_batch_start(trainer, None, batch, index)
        monitor.on_train_batch_end(trainer, None, None, batch, index)
    assert logged == [(7, {"quarantine/a": 2.0, "quarantine/b": 1.0})]
