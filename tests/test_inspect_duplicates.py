from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from handmade import jpeg, write_dataset

from depthkit.data.inspect import inspect, main
from depthkit.data.inspection.duplicates import MAX_DISTANCE, hamming, near_pairs, perceptual_hash
from depthkit.data.manifest import load_manifest, save_manifest
from depthkit.data.procedural import render_clip


def brute_force(hashes: np.ndarray, max_distance: int) -> dict[tuple[int, int], int]:
    found = {}
    for i in range(len(hashes)):
        distance = np.bitwise_count(hashes[i + 1 :] ^ hashes[i])
        found |= {(i, i + 1 + int(j)): int(distance[j]) for j in np.flatnonzero(distance <= max_distance)}
    return found


def hashes_with_neighbours(num_random: int, num_centres: int) -> np.ndarray:
    """Random hashes, and around some of them others with 1 to 9 bits turned over."""
    rng = np.random.default_rng(num_random)
    hashes = rng.integers(0, 2**64, num_random, dtype=np.uint64)
    near = [
        hashes[centre] ^ np.bitwise_or.reduce(np.uint64(1) << rng.choice(64, num_bits, replace=False).astype(np.uint64))
        for centre in range(num_centres)
        for num_bits in range(1, 10)
    ]
    return rng.permutation(np.unique(np.concatenate([hashes, near]).astype(np.uint64)))


@pytest.mark.parametrize(("num_random", "max_distance"), [(1, 6), (300, 0), (900, 6), (900, 9), (6000, 6), (6000, 3)])
def test_the_search_finds_what_brute_force_finds(num_random: int, max_distance: int) -> None:
    hashes = hashes_with_neighbours(num_random, 1 if num_random == 1 else 100)
    found = {}
    for left, right, distance in near_pairs(hashes, max_distance):
        pairs = zip(left.tolist(), right.tolist(), distance.tolist(), strict=True)
        found |= {(min(i, j), max(i, j)): d for i, j, d in pairs}
    assert found == brute_force(hashes, max_distance)
    if max_distance:
        assert len(found) >= (max_distance if num_random == 1 else 100 * max_distance)


def test_search_among_none() -> None:
    assert list(near_pairs(np.empty(0, np.uint64))) == []


def view(index: int, size: tuple[int, int] = (120, 160)) -> np.ndarray:
    return render_clip(domain="target", split="train", index=index, seed=1, size=size)[0].image


def distance(first: np.ndarray, second: np.ndarray) -> int:
    hashes = np.array([perceptual_hash(first), perceptual_hash(second)], np.uint64)
    return int(hamming(hashes[:1], hashes[1:])[0])


COPIES = {
    "quality 40": lambda image: cv2.imdecode(np.frombuffer(jpeg(image, 40), np.uint8), cv2.IMREAD_COLOR),
    "half": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "squashed": lambda image: cv2.resize(image, (100, 100), interpolation=cv2.INTER_AREA),
    "grey": lambda image: cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
}


@pytest.mark.parametrize("change", COPIES)
def test_copies_are_near_and_other_pictures_are_not(change: str) -> None:
    images = [view(index) for index in range(6)]
    copies = [COPIES[change](image) for image in images]
    for i, image in enumerate(images):
        for j, copy in enumerate(copies):
            assert (distance(image, copy) <= MAX_DISTANCE) == (i == j)


def test_a_picture_without_contrast_has_no_hash() -> None:
    assert perceptual_hash(np.full((40, 60, 3), 128, np.uint8)) is None


def write_images(folder: Path, images: dict[str, np.ndarray], split: str, **options: int) -> Path:
    samples = {key: {"jpg": jpeg(image[..., ::-1])} for key, image in images.items()}
    path = write_dataset(folder, samples, None, **options)
    save_manifest(replace(load_manifest(path), split=split), path)
    return path


def test_an_evaluation_image_in_training_is_leakage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_images(tmp_path / "train", {f"t{n}": view(n) for n in range(4)}, "train")
    clean = write_images(tmp_path / "clean", {f"e{n}": view(n) for n in (5, 6)}, "test")
    leaky = write_images(tmp_path / "leaky", {"e7": view(7), "e2": COPIES["half"](view(2))}, "val")
    assert main([str(train), str(clean)]) == 0
    capsys.readouterr()
    assert main([str(train), str(clean), str(leaky)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{leaky}: LEAKAGE: e2 looks ")
    assert f"{train}: t2 (distance " in line


def test_the_nearest_training_image_is_named(tmp_path: Path) -> None:
    train = write_images(tmp_path / "a", {"half": COPIES["quality 40"](view(2)), "other": view(1)}, "train")
    same = write_images(tmp_path / "b", {"same": view(2)}, "train")
    test = write_images(tmp_path / "c", {"e": view(2)}, "test")
    inspection = inspect([train, same, test], num_samples=9)
    (leak,) = inspection.duplicates.leaks
    assert (leak.distance, inspection.key(*leak.first), inspection.key(*leak.second)) == (0, "same", "e")


def test_doubles_within_one_side_are_counted_as_warnings(tmp_path: Path) -> None:
    first = write_images(tmp_path / "a", {"a": view(0), "a2": view(0), "b": view(1)}, "train")
    second = write_images(tmp_path / "b", {"c": COPIES["half"](view(1)), "d": view(3)}, "train")
    inspection = inspect([first, second], num_samples=9)
    assert [found.problems for found in inspection.findings] == [[], []]
    in_first, in_second = ([*found.warnings] for found in inspection.findings)
    assert "3 of 3 images have a double" in in_first[0]
    assert "a2 looks the same as a " in in_first[0]
    assert "a looks the same as a2 " in in_first[0]
    assert "1 of 2 images have a double" in in_second[0]
    assert f"{first}: b" in in_second[0]


def test_one_manifest_named_twice_is_no_duplicate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_images(tmp_path / "a", {"a": view(0), "b": view(1)}, "train")
    assert main([str(path), str(tmp_path / "a" / ".." / "a" / "manifest.json")]) == 0
    assert "double" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_all_images_are_compared_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    images = {f"t{n}": view(n, (300, 400)) for n in range(7)}
    train = write_images(tmp_path / "train", images, "train", samples_per_shard=3)
    test = write_images(tmp_path / "test", {"e0": view(8), "e1": view(4, (300, 400)), "e2": view(9)}, "test")
    arguments = [str(train), str(test), "--samples", "2", "--workers", workers]
    assert main(arguments) == 0
    assert main([*arguments, "--all"]) == 1
    assert "t4" in capsys.readouterr().err


def test_a_broken_image_found_by_all_is_named(tmp_path: Path) -> None:
    samples = {f"s{n}": {"jpg": jpeg(view(n))} for n in range(5)}
    samples["s2"] = {"jpg": samples["s2"]["jpg"][:900]}
    (found,) = inspect([write_dataset(tmp_path, samples, None)], num_samples=2, hash_all=True).findings
    (problem,) = found.problems
    assert "train-000000.tar, s2: " in problem
    assert len(found.pictures.hashes) == 4
