"""Each contradiction has a data set that shows it, and a healthy one beside it that does not."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from handmade import DEPTH, jpeg, labeled_sample, png, pseudo_labels, unlabeled_sample, write_dataset

from depthkit.data.inspect import inspect
from depthkit.data.inspection.findings import Findings, facts
from depthkit.data.manifest import TargetSpec, load_manifest, save_manifest
from depthkit.data.procedural import render_clip

Samples = dict[str, dict[str, bytes]]
FLOAT = TargetSpec(quantity="depth", codec="npy", extension="depth.npy")


def look(*paths: Path) -> Findings:
    """What was found in the first of the data sets."""
    return inspect(paths, num_samples=20).findings[0]


def only(found: list[str]) -> str:
    (text,) = found
    return text


def npy(values: np.ndarray, folder: Path) -> bytes:
    np.save(folder / "array.npy", values.astype(np.float32))
    return (folder / "array.npy").read_bytes()


@pytest.fixture(scope="module")
def rooms() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]]:
    """Image, exact depth, ray length per unit of depth and intrinsics of views of the procedural world."""
    views = []
    for index in range(8):
        (frame,) = render_clip(domain="source", split="train", index=index, seed=0, size=(60, 80))
        fx, fy, cx, cy = frame.intrinsics_px
        v, u = np.indices(frame.depth.shape) + 0.5
        ray_length = np.linalg.norm(np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)]), axis=0)
        views.append((frame.image, frame.depth, ray_length, [fx, fy, cx, cy]))
    return views


def write_rooms(folder: Path, rooms: list, stored: Callable[[np.ndarray, np.ndarray], np.ndarray], **target) -> Path:
    """The rooms with labels `stored(depth, ray_length)` under a statement; 0 stays 0."""
    samples = {}
    for number, (image, depth, ray_length, intrinsics) in enumerate(rooms):
        label = np.where(depth > 0, stored(np.where(depth > 0, depth, 1), ray_length), 0)
        members = {"jpg": jpeg(image[..., ::-1]), "depth.npy": npy(label, folder.parent)}
        samples[f"room{number}"] = members | {"json": json.dumps({"intrinsics_px": intrinsics}).encode()}
    return write_dataset(folder, samples, replace(FLOAT, **target))


STORED = {
    "depth": lambda depth, ray_length: depth,
    "ray_distance": lambda depth, ray_length: depth * ray_length,
    "inverse_depth": lambda depth, ray_length: 1 / depth,
}


@pytest.mark.parametrize("truth", STORED)
@pytest.mark.parametrize("stated", STORED)
def test_flat_surfaces_tell_the_quantity(tmp_path: Path, rooms: list, truth: str, stated: str) -> None:
    problems = look(write_rooms(tmp_path / "set", rooms, STORED[truth], quantity=stated)).problems
    if truth == stated:
        assert problems == []
    elif {truth, stated} == {"ray_distance", "inverse_depth"}:
        pass  # not told apart: neither makes the surfaces flat exactly
    else:
        name = "disparity" if truth == "inverse_depth" else truth
        assert f"are {name}, not {stated}" in only(problems)
        assert "room" in only(problems)


def test_flat_surfaces_with_the_noise_of_a_sensor(tmp_path: Path, rooms: list) -> None:
    rng = np.random.default_rng(0)
    path = write_rooms(tmp_path / "set", rooms, lambda depth, _: depth * rng.normal(1, 0.02, depth.shape))
    assert look(path).problems == []


def test_scale(tmp_path: Path) -> None:
    samples = {f"s{n}": with_label(5 * slope(32, 40)) for n in range(4)}  # 5 to 20 m in millimetres

    def problems(scale: float) -> list[str]:
        target = replace(DEPTH, scale=scale, depth_range=(4.0, 25.0))
        return look(write_dataset(tmp_path / str(scale), samples, target)).problems

    assert problems(1000) == []
    assert "set target.scale = 1000" in only(problems(256))
    assert "depth times 0.256 would fit" in only(problems(256))
    assert "set target.scale = 1000" in only(problems(10000))
    assert re.search(r"farthest off: s\d", only(problems(256)))


def test_a_scale_that_leaves_most_of_the_range_empty_is_a_warning(tmp_path: Path) -> None:
    samples = {f"s{n}": with_label(5 * slope(32, 40)) for n in range(4)}
    target = replace(DEPTH, scale=1000, depth_range=(0.1, 80.0))
    assert "target.scale = 256 in place of 1000" in only(look(write_dataset(tmp_path / "a", samples, target)).warnings)
    assert look(write_dataset(tmp_path / "b", samples, replace(target, scale=256))).warnings == []


def with_label(label: np.ndarray, image_size: tuple[int, int] = (32, 40), **facts: object) -> dict[str, bytes]:
    members = {"jpg": jpeg(np.full((*image_size, 3), 90, np.uint8)), "depth.png": png(label.astype(np.uint16))}
    return members | ({"json": json.dumps(facts).encode()} if facts else {})


def slope(height: int, width: int) -> np.ndarray:
    """Millimetres of a floor: inverse depth falls evenly from 1 to 1/4."""
    return np.tile(1000 / np.linspace(1, 0.25, height)[:, None], width)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (np.zeros((32, 40)), "no valid pixel"),
        (np.full((32, 40), 700), "constant: all 1280 measured pixels hold 0.7"),
        (slope(64, 80), "label (80x64 pixels) is larger than the image (40x32)"),
        (slope(32, 32), "has another aspect"),
        (slope(40, 32).T[:16], "has another aspect"),
    ],
)
def test_broken_labels_are_named(tmp_path: Path, label: np.ndarray, reason: str) -> None:
    samples = {"good": with_label(slope(32, 40)), "small": with_label(slope(16, 20)), "bad": with_label(label)}
    problem = only(look(write_dataset(tmp_path / "set", samples)).problems)
    assert reason in problem
    assert "train-000000.tar, bad" in problem


def test_the_same_problem_of_many_samples_is_one_line(tmp_path: Path) -> None:
    samples = {f"bad{n}": with_label(np.zeros((32, 40))) for n in range(9)}
    problem = only(look(write_dataset(tmp_path / "set", samples)).problems)
    assert "bad0" in problem
    assert "and 6 more" in problem


@pytest.mark.parametrize(
    ("quantity", "fact"), [("ray_distance", "intrinsics_px"), ("stereo_disparity_px", "baseline_m")]
)
def test_missing_intrinsics(tmp_path: Path, quantity: str, fact: str) -> None:
    target = replace(DEPTH, quantity=quantity, scale=256)
    good = with_label(slope(32, 40), intrinsics_px=[40, 40, 20, 16], baseline_m=0.1)
    assert look(write_dataset(tmp_path / "good", {"a": good}, target)).problems == []
    problem = only(look(write_dataset(tmp_path / "bad", {"a": with_label(slope(32, 40))}, target)).problems)
    assert fact in problem
    assert "train-000000.tar, a" in problem


def test_a_code_that_is_read_as_a_measurement(tmp_path: Path) -> None:
    samples = {}
    for number in range(4):
        label = slope(32, 40) + number
        label[:4] = 65535
        samples[f"s{number}"] = with_label(label)
    problem = only(look(write_dataset(tmp_path / "bad", samples)).problems)
    assert "stored: 65535" in problem
    assert "s0" in problem
    for listed in ("invalid_values", "sky_values"):
        target = replace(DEPTH, **{listed: (65535.0,)})
        found = look(write_dataset(tmp_path / listed, samples, target))
        assert found.problems == []
        assert found.valid_shares == [0.875] * 4
        assert found.sky_shares == [0.125 if listed == "sky_values" else 0] * 4


def test_all_pixels_valid_though_invalid_values_are_listed(tmp_path: Path) -> None:
    target = replace(DEPTH, invalid_values=(65535.0,))
    full, holes = slope(32, 40), slope(32, 40)
    holes[3, 4] = 65535
    assert "were the holes filled" in only(
        look(write_dataset(tmp_path / "a", {"s": with_label(full)}, target)).warnings
    )
    assert look(write_dataset(tmp_path / "b", {"s": with_label(holes)}, target)).warnings == []


@pytest.mark.parametrize(
    ("keep", "layout"),
    [
        (np.s_[:, :], "dense"),
        (np.s_[::6, :], "sparse, in lines"),
        (np.s_[::7, ::7], "sparse, scattered"),
        (np.s_[4:12, 4:20], "sparse, in clusters"),
        (np.s_[2:, 2:], "dense with holes"),
    ],
)
def test_layout_of_the_valid_pixels(tmp_path: Path, keep: tuple, layout: str) -> None:
    label = np.zeros((32, 40))
    label[keep] = slope(32, 40)[keep]
    assert facts(look(write_dataset(tmp_path / "set", {"s": with_label(label)})))["layout"] == layout


def test_pseudo_labels_with_and_without_their_images(tmp_path: Path) -> None:
    keys = ["a", "b", "c"]
    images = write_dataset(tmp_path / "images", {key: unlabeled_sample(n) for n, key in enumerate(keys)}, None)
    labels = pseudo_labels(tmp_path / "labels", images, keys, size=(64, 80))  # a teacher sees images larger
    together = look(labels, images)
    assert (together.problems, together.sizes) == ([], [(32, 40)] * 3)
    alone = look(labels)
    assert (alone.problems, alone.sizes, len(alone.valid_shares)) == ([], [], 3)
    assert "give the manifest of their images" in only(alone.warnings)


def test_pseudo_labels_of_other_images(tmp_path: Path) -> None:
    images = write_dataset(tmp_path / "images", {"a": unlabeled_sample(0)}, None)
    swapped = pseudo_labels(tmp_path / "swapped", images, ["b"])
    assert "train-000000.tar, b" in only(look(swapped, images).problems)
    turned = pseudo_labels(tmp_path / "turned", images, ["a"], size=(40, 32))
    assert "another aspect" in only(look(turned, images).problems)
    labels = pseudo_labels(tmp_path / "labels", images, ["a"])
    save_manifest(replace(load_manifest(images), licence="another"), images)
    assert "label these images" in only(look(labels, images).problems)


def test_an_image_rejected_while_labelling_is_a_warning(tmp_path: Path) -> None:
    images = write_dataset(tmp_path / "images", {"a": unlabeled_sample(0), "b": unlabeled_sample(1)}, None)
    labels = pseudo_labels(tmp_path / "labels", images, ["a", "b"])
    origin, target = load_manifest(labels).labels_of, load_manifest(labels).target
    rejected = {"a": {"json": b'{"rejected": "cut off"}'}, "b": labeled_sample(1)}
    path = write_dataset(tmp_path / "rejected", {"a": rejected["a"]}, target, labels_of=origin)
    found = look(path)
    assert found.problems == []
    assert any("train-000000.tar, a" in warning and "rejected" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": b"no image"}, "image"),
        ({"depth.png": b"no label"}, "PNG"),
        ({"json": b"{"}, "Expecting property name"),
        ({"json": b"[1]"}, "not an object"),
        ({"json": b'{"intrinsics_px": "wide"}'}, "intrinsics"),
        ({"sky.png": b"?"}, "PNG"),
    ],
)
def test_whatever_is_broken_is_named(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    samples = {"good": with_label(slope(32, 40)), "bad": with_label(slope(32, 40)) | members}
    found = look(write_dataset(tmp_path / "set", samples))
    assert "bad" in only(found.problems)
    assert reason in only(found.problems)
    assert len(found.looks) == 2


def test_a_tar_that_is_no_tar(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "set", {f"s{n}": with_label(slope(32, 40)) for n in range(2)}, samples_per_shard=1)
    tar = tmp_path / "set/train-000000.tar"
    data = b"?" * tar.stat().st_size
    tar.write_bytes(data)
    (tmp_path / "set/train-000000.tar.index.json").unlink()
    found = look(path)
    assert "train-000000.tar" in only(found.problems)
    assert [look.key for look in found.looks] == ["s1"]


def test_no_false_alarm_on_real_samples(samples_dir: Path, tmp_path: Path) -> None:
    from depthkit.data.pack import main as pack

    assert pack([str(samples_dir / "index.jsonl"), "--out", str(tmp_path), "--workers", "1"]) == 0
    cv2.setNumThreads(1)
    inspection = inspect(sorted(tmp_path.glob("*/manifest.json")), num_samples=6)
    assert len(inspection.findings) >= 20
    assert [problem for found in inspection.findings for problem in found.problems] == []
