"""Batches are a pure function of (seed, step): whatever the workers, the ranks, and the step a run starts from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from handmade import labeled_sample, pseudo_labels, unlabeled_sample, write_dataset

from depthkit.config import AugmentConfig, DataConfig, DatasetConfig, WorldConfig
from depthkit.data.datamodule import DepthDataModule, WholeImages, spread
from depthkit.data.reader import DatasetReader
from depthkit.data.windows import normalize
from depthkit.types import Batch, Rejection

STRONG = AugmentConfig(color_jitter=0.8, grayscale=0.2, blur=0.5, cutmix=0.5)
NUM_UNLABELED = 40

Batches = list[dict[str, Batch]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """12 images a step: 4 labeled from two data sets (24 + 8), 8 unlabeled with pseudo-labels, all perturbations on."""
    root = tmp_path_factory.mktemp("data")
    images = write_dataset(root / "images", {f"u{i:02d}": unlabeled_sample(i) for i in range(NUM_UNLABELED)}, None)
    labels = pseudo_labels(root / "labels", images, [f"u{i:02d}" for i in range(NUM_UNLABELED)])
    rooms = write_dataset(root / "rooms", {f"r{i:02d}": labeled_sample(i) for i in range(24)})
    streets = write_dataset(root / "streets", {f"s{i:02d}": labeled_sample(50 + i, (40, 64)) for i in range(8)})
    return DataConfig(
        labeled={"rooms": DatasetConfig(manifest=str(rooms)), "streets": DatasetConfig(manifest=str(streets))},
        unlabeled={"target": DatasetConfig(manifest=str(images), labels=str(labels))},
        val={"streets": DatasetConfig(manifest=str(streets))},
        crop_size=[32, 32],
        batch_size=12,
        shuffle_block=8,
        num_workers=0,
        augment=STRONG,
    )


def load(config: DataConfig, *, seed: int = 0, num_steps: int = 6, **position: int) -> Batches:
    module = DepthDataModule(config, seed=seed, num_steps=num_steps, multiple=8)
    return list(module.train_loader(**position))


def assert_same(a: Batches, b: Batches) -> None:
    assert len(a) == len(b)
    for step, (left, right) in enumerate(zip(a, b, strict=True)):
        assert list(left) == list(right) == ["labeled", "unlabeled"]
        for name in left:
            assert left[name].keys() == right[name].keys()
            for field, value in left[name].items():
                other = right[name][field]  # type: ignore[literal-required]
                if field == "shard":  # remote ones have URLs
                    value, other = [Path(shard).name for shard in value], [Path(shard).name for shard in other]
                if field == "intrinsics_px":  # NaN where unknown
                    value, other = value.nan_to_num(-1), other.nan_to_num(-1)
                equal = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
                assert equal, (step, name, field)


def join(ranks: Sequence[Batches]) -> Batches:
    """The batches of all ranks, joined step by step in the order of the ranks."""

    def join_field(parts: list[Any]) -> Any:
        return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else list(chain(*parts))

    return [
        {
            name: {field: join_field([part[name][field] for part in parts]) for field in parts[0][name]}
            for name in parts[0]
        }
        for parts in zip(*ranks, strict=True)
    ]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def reference(config: DataConfig) -> Batches:
    return load(config)


def test_the_reference_has_something_to_tell(reference: Batches):
    """Otherwise the comparisons below would hold for constant batches."""
    boxes = torch.cat([batch["unlabeled"]["cutmix_box"] for batch in reference])
    assert 0.2 < (boxes[:, 2] > 0).float().mean() < 0.8
    images = torch.cat([batch["unlabeled"]["image"] for batch in reference])
    assert len({image.numpy().tobytes() for image in images}) == len(images)
    assert {name for batch in reference for name in batch["labeled"]["dataset"]} == {"rooms", "streets"}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(config: DataConfig, reference: Batches, num_workers: int):
    assert_same(load(replace(config, num_workers=num_workers)), reference)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_read_the_same_sequence(config: DataConfig, reference: Batches, world_size: int):
    ranks = [load(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same(join(ranks), reference)
    for batches in ranks:
        for batch in batches:
            assert 2 * len(batch["labeled"]["key"]) == len(batch["unlabeled"]["key"]) == 8 // world_size


@pytest.mark.parametrize("start_step", [1, 4, 6])
def test_a_later_start_gives_the_batches_of_an_uninterrupted_run(
    config: DataConfig, reference: Batches, start_step: int
):
    assert_same(load(config, start_step=start_step), reference[start_step:])


def test_a_later_start_on_another_number_of_ranks_and_workers(config: DataConfig, reference: Batches):
    several = replace(config, num_workers=1)
    ranks = [load(several, start_step=4, rank=rank, world_size=2) for rank in range(2)]
    assert_same(join(ranks), reference[4:])


def test_the_global_random_state_changes_nothing(config: DataConfig, reference: Batches):
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    assert_same(load(config), reference)


def test_another_seed_is_another_run(config: DataConfig, reference: Batches):
    other = load(config, seed=1)
    same = [a["unlabeled"]["key"] == b["unlabeled"]["key"] for a, b in zip(other, reference, strict=True)]
    assert not any(same)


def test_labeled_to_unlabeled_is_one_to_two_and_each_comes_once_in_a_sweep(config: DataConfig):
    """Ten steps are two sweeps of the 40 unlabeled images; eight are one of the 32 labeled ones."""
    batches = load(config, num_steps=10)
    for batch in batches:
        assert len(batch["labeled"]["key"]) == 4
        assert len(batch["unlabeled"]["key"]) == 8
    for sweep in (batches[:5], batches[5:]):
        keys = Counter(key for batch in sweep for key in batch["unlabeled"]["key"])
        assert keys == dict.fromkeys((f"u{i:02d}" for i in range(NUM_UNLABELED)), 1)
    assert len({key for batch in batches[:8] for key in batch["labeled"]["key"]}) == 32


def test_labeled_images_are_flipped_and_nothing_else(config: DataConfig):
    """With strong perturbations on, labeled pixels are still those of the plain crop."""
    plain = load(replace(config, augment=AugmentConfig()))
    strong = load(config)
    for a, b in zip(plain, strong, strict=True):
        assert torch.equal(a["labeled"]["image"], b["labeled"]["image"])
        assert not b["labeled"]["cutmix_box"].any()
        assert torch.equal(a["unlabeled"]["target"], b["unlabeled"]["target"])
        assert not torch.equal(a["unlabeled"]["image"], b["unlabeled"]["image"])


def test_without_unlabeled_data_the_whole_batch_is_labeled(config: DataConfig):
    (batch, *_) = load(replace(config, unlabeled={}))
    assert list(batch) == ["labeled"]
    assert len(batch["labeled"]["key"]) == 12


# On the device


def test_batches_are_normalised_and_mixed_after_the_transfer(config: DataConfig, reference: Batches):
    module = DepthDataModule(config, seed=0, num_steps=6, multiple=8)
    raw = reference[0]["unlabeled"]
    assert raw["cutmix_box"][:, 2].any()
    batch = module.transfer_batch_to_device(reference[0], torch.device("cpu"), 0)
    result = module.on_after_batch_transfer({name: dict(part) for name, part in batch.items()}, 0)
    assert torch.equal(result["labeled"]["image"], normalize(reference[0]["labeled"]["image"]))
    assert "cutmix_region" not in result["labeled"]
    region = result["unlabeled"]["cutmix_region"]
    plain = normalize(raw["image"])
    for i in range(8):
        for name, clean in (("image", plain), ("target", raw["target"])):
            expected = torch.where(region[i], clean[i ^ 1], clean[i])
            assert torch.equal(result["unlabeled"][name][i], expected)
    areas = raw["cutmix_box"][:, 2] * raw["cutmix_box"][:, 3]
    assert region.sum(dim=(1, 2)).tolist() == areas.tolist()


def test_a_rejection_passes_through(config: DataConfig):
    module = DepthDataModule(config, seed=0, num_steps=1, multiple=8)
    rejection = Rejection(dataset="d", shard="s", key="k", reason="r")
    moved = module.transfer_batch_to_device(rejection, torch.device("cpu"), 0)
    assert module.on_after_batch_transfer(moved, 0) is rejection


# Validation


def val_keys(config: DataConfig, *, world_size: int, limit: int | None = None) -> list[list[str]]:
    keys = []
    for rank in range(world_size):
        module = DepthDataModule(config, seed=0, num_steps=1, multiple=8, limit_val=limit)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
        keys.append([key for batch in module.val_dataloader() for key in batch["key"]])
    return keys


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_validation_image_is_seen_once_by_one_rank(config: DataConfig, num_workers: int):
    config = replace(config, num_workers=num_workers)
    assert val_keys(config, world_size=1) == [[f"s{i:02d}" for i in range(8)]]
    ranks = val_keys(config, world_size=3)
    assert sorted(chain(*ranks)) == [f"s{i:02d}" for i in range(8)]


def test_a_limit_takes_images_spread_over_the_data_set(config: DataConfig):
    assert val_keys(config, world_size=1, limit=4) == [["s00", "s02", "s04", "s06"]]
    places = [(0, 0, i) for i in range(10)]
    assert spread(places, None) == spread(places, 10) == spread(places, 99) == places
    assert [place[2] for place in spread(places, 3)] == [0, 3, 6]


def test_validation_sees_whole_images_and_depth_in_metres(config: DataConfig):
    reader = DatasetReader("streets", config.val["streets"], "depth")
    images = WholeImages([reader], short_side=32, multiple=8)
    batch = images[3]
    assert not isinstance(batch, Rejection)
    assert batch["image"].shape == (1, 3, 32, 48)  # 40 x 64 to 32 x 51.2, to a multiple of 8
    assert batch["target"].shape == (1, 40, 64)
    assert 2 <= batch["target"].min() <= batch["target"].max() <= 22


def test_a_broken_validation_image_is_a_named_rejection(tmp_path: Path):
    samples = {f"k{i}": labeled_sample(i) for i in range(3)}
    samples["k1"]["depth.png"] = samples["k1"]["depth.png"][:50]
    manifest = write_dataset(tmp_path, samples)
    reader = DatasetReader("rooms", DatasetConfig(manifest=str(manifest)), "depth")
    images = WholeImages([reader], short_side=32, multiple=8)
    found = [images[i] for i in range(len(images))]
    assert [isinstance(item, Rejection) for item in found] == [False, True, False]
    assert isinstance(found[1], Rejection)
    assert (found[1].dataset, found[1].key) == ("rooms", "k1")


def test_missing_worlds_are_rendered_once(tmp_path: Path):
    manifest = tmp_path / "world" / "manifest.json"
    world = WorldConfig(domain="source", split="train", num_images=2, size=[16, 24])
    config = DataConfig(
        labeled={"world": DatasetConfig(manifest=str(manifest), world=world)},
        crop_size=[16, 16],
        batch_size=2,
        num_workers=0,
    )
    module = DepthDataModule(config, seed=0, num_steps=1, multiple=8)
    module.prepare_data()
    (tar,) = manifest.parent.glob("*.tar")
    written = tar.stat().st_mtime_ns
    module.prepare_data()
    assert tar.stat().st_mtime_ns == written
    (batch,) = module.train_loader()
    assert batch["labeled"]["image"].shape == (2, 3, 16, 16)
