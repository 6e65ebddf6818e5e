"""Streams: broken samples are replaced, reported and bounded; a position is one sample with one perturbation."""

import json
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from handmade import grey_levels, labeled_sample, png, write_dataset

from depthkit.config import AugmentConfig, DataConfig, DatasetConfig
from depthkit.data.datamodule import DepthDataModule
from depthkit.data.quarantine import QuarantineBudgetExceeded, SampleError
from depthkit.data.reader import DatasetReader
from depthkit.data.streams import MAX_ATTEMPTS, StepSampler, Stream, collate_streams
from depthkit.runtime.quarantine import QuarantineMonitor
from depthkit.types import Rejection, Sample

SIZE = (32, 40)
STRONG = AugmentConfig(color_jitter=0.8, grayscale=0.2, blur=0.5, cutmix=0.5)


def make_stream(manifest: Path, name: str = "labeled", **settings: Any) -> Stream:
    arguments = {"images_per_step": 4, "crop_size": (32, 32), "augment": AugmentConfig(), "seed": 0, "shuffle_block": 4}
    reader = DatasetReader("rooms", DatasetConfig(manifest=str(manifest)), "disparity")
    return Stream(name, [reader], [1.0], **(arguments | settings))


def good_samples(num: int) -> dict[str, dict[str, bytes]]:
    return {f"room_{i:02d}": labeled_sample(i, SIZE) for i in range(num)}


def same(a: Sample, b: Sample) -> bool:
    return a.key == b.key and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("image", "target", "valid_mask")
    )


# One position, one sample


def test_a_position_is_a_pure_function_of_seed_and_stream(tmp_path: Path):
    manifest = write_dataset(tmp_path, good_samples(16))
    stream = make_stream(manifest, augment=STRONG)
    forwards = [stream.load(position) for position in range(24)]
    copied = pickle.loads(pickle.dumps(make_stream(manifest, augment=STRONG)))
    for position in reversed(range(24)):
        sample, box = copied.load(position)
        assert same(sample, forwards[position][0])
        assert box == forwards[position][1]


def test_a_sample_looks_another_way_in_every_sweep(tmp_path: Path):
    stream = make_stream(write_dataset(tmp_path, good_samples(16)), augment=STRONG)
    first, second = ({s.key: s for s, _ in map(stream.load, range(start, start + 16))} for start in (0, 16))
    assert first.keys() == second.keys()
    assert sum(same(first[key], second[key]) for key in first) <= 1


@pytest.mark.parametrize("other", [{"name": "unlabeled"}, {"seed": 1}])
def test_streams_and_seeds_differ_in_order_and_in_random_numbers(tmp_path: Path, other: dict[str, Any]):
    manifest = write_dataset(tmp_path, good_samples(16))
    a, b = make_stream(manifest), make_stream(manifest, **other)
    assert [a.order.locate(i) for i in range(16)] != [b.order.locate(i) for i in range(16)]
    numbers = np.array([[stream.generator(i).random() for i in range(50)] for stream in (a, b)])
    assert len(np.unique(numbers)) == 100


def test_every_sample_comes_once_in_a_sweep(tmp_path: Path):
    stream = make_stream(write_dataset(tmp_path, good_samples(19)))
    for sweep in range(2):
        keys = [stream.load(19 * sweep + i)[0].key for i in range(19)]
        assert sorted(keys) == sorted(good_samples(19))


# Broken samples


def all_zero(sample: dict[str, bytes]) -> dict[str, bytes]:
    return sample | {"depth.png": png(np.zeros(SIZE, np.uint16))}


def cut_image(sample: dict[str, bytes]) -> dict[str, bytes]:
    return sample | {"jpg": sample["jpg"][:-40]}


def no_image(sample: dict[str, bytes]) -> dict[str, bytes]:
    return {"depth.png": sample["depth.png"]}


def no_label(sample: dict[str, bytes]) -> dict[str, bytes]:
    return {"jpg": sample["jpg"]}


def eight_bit_label(sample: dict[str, bytes]) -> dict[str, bytes]:
    return sample | {"depth.png": png(grey_levels(0, SIZE))}


def cut_label(sample: dict[str, bytes]) -> dict[str, bytes]:
    return sample | {"depth.png": sample["depth.png"][:-40]}


def small_label(sample: dict[str, bytes]) -> dict[str, bytes]:
    return sample | {"depth.png": png(np.full((8, 40), 5000, np.uint16))}


DAMAGE = {
    all_zero: "no valid pixel",
    cut_image: "damaged or cut off image",
    no_image: "expected one image member",
    no_label: "no member 'depth.png'",
    eight_bit_label: "bit",
    cut_label: "PNG",
    small_label: "8x40",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_broken_sample_gives_way_to_the_next_of_its_lane(tmp_path: Path, damage: Any):
    samples = good_samples(16)
    whole = make_stream(write_dataset(tmp_path / "whole", samples))
    keys = [whole.load(position)[0].key for position in range(16)]
    bad = keys[5]
    broken = make_stream(write_dataset(tmp_path / "broken", samples | {bad: damage(samples[bad])}))
    for position in range(16):
        sample, _ = broken.load(position)
        if position != 5:
            assert sample.key == keys[position]
            assert sample.rejections == []
            continue
        assert sample.key == keys[5 + 4]
        (rejection,) = sample.rejections
        assert (rejection.dataset, rejection.key) == ("rooms", bad)
        assert rejection.shard == str(tmp_path / "broken" / f"train-{int(bad[-2:]) // 8:06d}.tar")
        assert DAMAGE[damage] in rejection.reason
    again = make_stream(tmp_path / "broken" / "manifest.json").load(5)[0]
    assert same(again, broken.load(5)[0])


def test_a_truncated_shard_is_replaced_by_the_others_and_named(tmp_path: Path):
    manifest = write_dataset(tmp_path, good_samples(32))
    tar = tmp_path / "train-000001.tar"
    num_bytes = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[: num_bytes // 2])
    # One lane through all shards, mixed in blocks of the size of the set.
    stream = make_stream(manifest, images_per_step=1, shuffle_block=32)
    loaded = [stream.load(position)[0] for position in range(32)]
    in_broken = {f"room_{i:02d}" for i in range(8, 16)}
    assert not in_broken & {sample.key for sample in loaded}
    rejections = [rejection for sample in loaded for rejection in sample.rejections]
    assert rejections
    for rejection in rejections:
        assert rejection.shard == str(tar)
        assert f"{num_bytes // 2} bytes, the manifest says {num_bytes}" in rejection.reason


def test_too_many_broken_samples_in_a_row_are_an_error(tmp_path: Path):
    samples = {key: all_zero(sample) for key, sample in good_samples(20).items()}
    stream = make_stream(write_dataset(tmp_path, samples), images_per_step=1)
    with pytest.raises(SampleError, match=f"{MAX_ATTEMPTS} samples in a row") as error:
        stream.load(0)
    assert str(error.value).count("no valid pixel") == 1
    assert f" and {MAX_ATTEMPTS - 1} more: no valid pixel" in str(error.value)
    assert str(tmp_path / "train-000000.tar") in str(error.value)


def test_a_missing_shard_stops_the_run(tmp_path: Path):
    """A path that is wrong as a whole is no broken sample."""
    stream = make_stream(write_dataset(tmp_path, good_samples(8)))
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000000\.tar"):
        stream.load(0)


# Batches


def test_a_batch_keeps_the_order_of_its_slots_and_all_rejections():
    def loaded(name: str, level: int, *reasons: str) -> tuple[str, Sample, tuple[int, int, int, int]]:
        sample = Sample(
            image=np.full((4, 5, 3), level, np.uint8),
            target=np.full((4, 5), level, np.float32),
            valid_mask=np.full((4, 5), level % 2 == 0),
            key=str(level),
            dataset=f"set_{level}",
            rejections=[Rejection(dataset="d", shard="s", key="k", reason=reason) for reason in reasons],
        )
        return name, sample, (level, 0, 0, 0)

    batches = collate_streams([loaded("b", 1, "x"), loaded("a", 2), loaded("b", 3, "y", "z")])
    assert list(batches) == ["b", "a"]
    batch = batches["b"]
    assert batch["key"] == ["1", "3"]
    assert batch["dataset"] == ["set_1", "set_3"]
    assert [rejection.reason for rejection in batch["rejections"]] == ["x", "y", "z"]
    assert batch["image"].shape == (2, 3, 4, 5)
    assert batch["image"].dtype == torch.uint8
    assert batch["target"][:, 0, 0].tolist() == [1, 3]
    assert batch["valid_mask"].dtype == torch.bool
    assert batch["cutmix_box"].tolist() == [[1, 0, 0, 0], [3, 0, 0, 0]]
    assert batches["a"]["valid_mask"].all()


def test_the_sampler_starts_at_its_step_and_counts_from_zero():
    whole = list(StepSampler({"labeled": 2, "unlabeled": 4}, num_steps=7))
    assert len(whole) == 7
    late = StepSampler({"labeled": 2, "unlabeled": 4}, num_steps=7, start_step=3)
    assert list(late) == whole[3:]
    assert len(late) == 7
    positions = Counter(slot for step in whole for slot in step)
    assert positions == Counter([("labeled", i) for i in range(14)] + [("unlabeled", i) for i in range(28)])


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_share_a_step_stream_by_stream(world_size: int):
    counts = {"labeled": 2, "unlabeled": 4}
    ranks = [list(StepSampler(counts, num_steps=3, rank=r, world_size=world_size)) for r in range(world_size)]
    for step in range(3):
        for name, count in counts.items():
            slots = [slot.position for rank in ranks for slot in rank[step] if slot.stream == name]
            assert slots == list(range(step * count, (step + 1) * count))
            assert {sum(slot.stream == name for slot in rank[step]) for rank in ranks} == {count // world_size}


# The monitor


def batch_of(num: int, *reasons: str) -> dict[str, Any]:
    rejections = [Rejection(dataset="rooms", shard="a.tar", key=f"k{i}", reason=r) for i, r in enumerate(reasons)]
    return {"labeled": {"key": ["x"] * num, "rejections": rejections}}


@pytest.mark.filterwarnings("ignore:2 of:UserWarning")
def test_the_monitor_writes_every_rejection_and_stops_beyond_the_budget(tmp_path: Path):
    monitor = QuarantineMonitor(tmp_path / "quarantine", max_fraction=0.01)
    trainer: Any = SimpleNamespace(global_rank=3)
    module: Any = None
    monitor.setup(trainer, module, "fit")
    monitor.on_train_batch_start(trainer, module, batch_of(150), 0)
    monitor.on_train_batch_start(trainer, module, batch_of(150, "no valid pixel"), 1)
    path = tmp_path / "quarantine" / "rank-00003.jsonl"
    with pytest.raises(QuarantineBudgetExceeded, match=r"4 of 308 samples") as error:
        monitor.on_train_batch_start(trainer, module, batch_of(4, "cut", "cut", "no valid pixel"), 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["reason"] for row in rows] == ["no valid pixel", "cut", "cut", "no valid pixel"]
    assert set(rows[0]) == {"dataset", "shard", "key", "reason"}
    assert "2 x rooms: cut" in str(error.value)
    assert str(path) in str(error.value)
    assert "data.quarantine_budget" in str(error.value)


def test_broken_validation_images_are_written_down_too(tmp_path: Path):
    monitor = QuarantineMonitor(tmp_path / "quarantine", max_fraction=0.01)
    trainer: Any = SimpleNamespace(global_rank=0)
    module: Any = None
    for stage in ("fit", "validate"):
        monitor.setup(trainer, module, stage)
        monitor.on_validation_batch_start(
            trainer, module, Rejection(dataset="d", shard="s", key=stage, reason="r"), 0, 0
        )
    monitor.on_validation_batch_start(trainer, module, batch_of(1)["labeled"], 1, 0)
    rows = (tmp_path / "quarantine" / "rank-00000.jsonl").read_text().splitlines()
    assert [json.loads(row)["key"] for row in rows] == ["fit", "validate"]
    assert monitor.quarantine is not None
    assert (monitor.quarantine.num_seen, monitor.quarantine.num_rejected) == (3, 2)


class CountSteps(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.num_steps = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.num_steps += 1
        return self.weight * 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*val_dataloader:UserWarning")
@pytest.mark.parametrize(("budget", "stops"), [(0.5, False), (0.1, True)])
def test_a_run_over_broken_data_ends_with_the_summary(tmp_path: Path, budget: float, stops: bool):
    """Every fourth sample is broken; the budget is judged after a hundred."""
    samples = {key: all_zero(s) if int(key[-2:]) % 4 == 0 else s for key, s in good_samples(48).items()}
    manifest = write_dataset(tmp_path / "data", samples)
    labeled = {"rooms": DatasetConfig(manifest=str(manifest))}
    config = DataConfig(labeled=labeled, crop_size=[32, 32], batch_size=12, num_workers=0)
    data = DepthDataModule(config, seed=0, num_steps=16, multiple=8)
    monitor = QuarantineMonitor(tmp_path / "quarantine", max_fraction=budget)
    module = CountSteps()
    trainer = L.Trainer(
        max_steps=16,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if stops:
        with pytest.raises(QuarantineBudgetExceeded, match=r"rooms: .*no valid pixel"):
            trainer.fit(module, data)
        assert 5 <= module.num_steps <= 9  # just over a hundred samples
    else:
        with pytest.warns(UserWarning, match=r"samples were rejected"):
            trainer.fit(module, data)
        assert module.num_steps == 16
    rows = [json.loads(line) for line in (tmp_path / "quarantine" / "rank-00000.jsonl").read_text().splitlines()]
    assert {int(row["key"][-2:]) % 4 for row in rows} == {0}
