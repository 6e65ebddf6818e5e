"""Miniatures of the image sets without depth, in the containers that their authors ship."""

import tarfile
import tracemalloc
import zipfile
from concurrent.futures import Future
from pathlib import Path

import cv2
import numpy as np
import pytest
from miniatures import Packed, pack_dataset, rejected, write, write_image

from depthkit.data.datasets import read_dataset
from depthkit.data.pack import _packed, main
from depthkit.data.pairs import PairStream
from depthkit.data.shards import image_member


def write_tar(path: Path, names: list[str], mode: str = "w") -> dict[str, bytes]:
    """A tar of small random JPEGs, and their bytes by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = {}
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for seed, name in enumerate(names):
            member = write_image(path.parent.parent / "scratch" / Path(name).name, seed=seed)
            tar.add(member, name)
            images[name] = member.read_bytes()
    return images


def only(packed: dict[str, Packed], name: str) -> Packed:
    assert packed.keys() == {name}
    return packed[name]


def keys(packed: Packed) -> set[str]:
    return {sample.key for sample in packed.samples.values()}


def test_sa1b_tars_and_folders(tmp_path: Path) -> None:
    root = tmp_path / "sa1b"
    images = write_tar(root / "sa_000000.tar", ["./sa_1.jpg", "./sa_2.jpg"])
    with tarfile.open(root / "sa_000000.tar", "a") as tar:
        tar.add(write(tmp_path / "sa_1.json", "{}"), "./sa_1.json")
    write_image(root / "sa_000001/sa_3.jpg")
    write(root / "sa_000001/sa_3.json", "{}")
    packed = only(pack_dataset("sa1b", root, tmp_path / "out"), "sa1b")
    assert packed.manifest.target is None
    assert packed.samples.keys() == {"sa_000000/sa_1.jpg", "sa_000000/sa_2.jpg", "sa_000001/sa_3.jpg"}
    assert keys(packed) == {"sa_1", "sa_2", "sa_3"}
    assert image_member(packed.samples["sa_000000/sa_2.jpg"].members) == images["./sa_2.jpg"]


def test_a_tar_that_is_unpacked_beside_itself_is_not_read_twice(tmp_path: Path) -> None:
    """Also where the unpacking was interrupted; in a folder of its name, or where the tar is."""
    root = tmp_path / "root"
    write_tar(root / "n01.tar", ["n01_1.JPEG", "n01_2.JPEG", "n01_3.JPEG"])
    write_image(root / "n01/n01_1.JPEG")
    write_image(root / "n01/n01_2.JPEG")
    write_tar(root / "n02.tar", ["n02_1.JPEG"])
    packed = only(pack_dataset("imagenet21k", root, tmp_path / "out"), "imagenet21k")
    assert sorted(packed.samples) == ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n01/n01_3.JPEG", "n02/n02_1.JPEG"]

    landmarks = tmp_path / "landmarks"
    write_tar(landmarks / "train/images_000.tar", ["0/0/0/000a.jpg", "0/0/1/001a.jpg"])
    write_image(landmarks / "train/0/0/0/000a.jpg")
    write_image(landmarks / "train/0/0/1/001a.jpg")
    write_image(landmarks / "index/0/0/0/000b.jpg")
    packed = only(pack_dataset("google_landmarks", landmarks, tmp_path / "out2"), "google_landmarks")
    assert keys(packed) == {"000a", "001a"}


def test_compressed_tars_are_refused_unless_they_are_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_tar(root / "train_0.tar.gz", ["train_0/a.jpg"], "w:gz")
    write_image(root / "train_0/a.jpg")
    write_tar(root / "train_1.tar.gz", ["train_1/b.jpg"], "w:gz")
    write_tar(root / "annotations.tar.gz", [], "w:gz")
    write(root / "classes.csv.gz", "not a tar")
    write_image(root / "validation/c.jpg")
    write_tar(root / "test.tar", ["test/d.jpg"])
    packed = only(pack_dataset("open_images", root, tmp_path / "out", exit_code=1), "open_images")
    assert keys(packed) == {"a"}
    (row,) = rejected(tmp_path / "out", "open_images")
    assert "train_1.tar.gz" in row["path"]
    assert "unpack it" in row["reason"]


def test_objects365_zips_and_damaged_archives(tmp_path: Path) -> None:
    root = tmp_path / "root"
    image = write_image(root / "train/patch0/objects365_v1_00000001.jpg")
    with zipfile.ZipFile(root / "train/patch1.zip", "w") as archive:
        archive.write(image, "patch1/objects365_v1_00000002.jpg")
        archive.write(image, "__MACOSX/patch1/._objects365_v1_00000002.jpg")
    write_tar(root / "train/patch2.tar", ["a.jpg", "b.jpg"])
    whole = (root / "train/patch2.tar").read_bytes()
    (root / "train/patch2.tar").write_bytes(whole[:1100])  # ends inside a.jpg
    write(root / "train/patch3.zip", "PK, but no zip")
    write_image(root / "val/patch0/objects365_v1_9.jpg")
    packed = only(pack_dataset("objects365", root, tmp_path / "out", exit_code=1), "objects365")
    assert keys(packed) == {"objects365_v1_00000001", "objects365_v1_00000002"}
    reasons = {Path(row["path"].split(" (")[0]).name: row["reason"] for row in rejected(tmp_path / "out", "objects365")}
    assert reasons.keys() == {"patch2.tar", "patch3.zip"}
    assert "fetch it again" in reasons["patch3.zip"]


def test_places365_takes_the_large_images_and_no_other_split(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("data_256/a/airfield", "data_large/a/airfield", "data_large/a/apartment_building/outdoor"):
        write_image(root / name / "00000001.jpg")
    write_image(root / "val_large/Places365_val_00000001.jpg")
    packed = only(pack_dataset("places365", root, tmp_path / "out"), "places365")
    assert keys(packed) == {"a-airfield-00000001", "a-apartment_building-outdoor-00000001"}

    write_tar(tmp_path / "tars/train_256_places365standard.tar", ["data_256/a/airfield/00000001.jpg"])
    packed = only(pack_dataset("places365", tmp_path / "tars", tmp_path / "out2"), "places365")
    assert keys(packed) == {"a-airfield-00000001"}


def test_lsun_values_of_lmdb_and_exported_files(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    root = tmp_path / "root"
    values = {}
    for category, suffix in (("bedroom_train", ".webp"), ("tower_train", ".jpg"), ("bedroom_val", ".webp")):
        folder = root / f"{category}_lmdb"
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 20) as database, database.begin(write=True) as transaction:
            for key in ("0a1b", "2c3d"):
                values[f"{category}/{key}{suffix}"] = data = write_image(tmp_path / f"x{suffix}").read_bytes()
                transaction.put(key.encode(), data)
    write_image(root / "kitchen_train/a/b/abc.webp")
    packed = only(pack_dataset("lsun", root, tmp_path / "out"), "lsun")
    names = [
        f"{c}/{k}" for c, s in (("bedroom_train", ".webp"), ("tower_train", ".jpg")) for k in (f"0a1b{s}", f"2c3d{s}")
    ]
    assert packed.samples.keys() == {*names, "kitchen_train/a/b/abc.webp"}
    for name in names:
        assert packed.samples[name].members[name.rpartition(".")[2]] == values[name]


def write_video(path: Path, num_frames: int) -> None:
    """Frame i is grey of level 10 * i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 30, (64, 48))
    for i in range(num_frames):
        video.write(np.full((48, 64, 3), 10 * i, np.uint8))
    video.release()


def test_bdd100k_one_frame_in_ten(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_video(root / "videos/train/0000f77c-6257be58.mov", 21)
    write(root / "videos/train/broken.mov", "not a video")
    write_video(root / "videos/val/b1.mov", 11)
    for i in range(12):
        write_image(root / f"frames/c2d3-00/{i + 1:05d}.jpg", seed=i)
    packed = only(pack_dataset("bdd100k", root, tmp_path / "out", exit_code=1), "bdd100k")
    levels = {f"0000f77c-6257be58/{i}.jpg": 10 * i for i in (0, 10, 20)}
    assert packed.samples.keys() == {*levels, "c2d3-00/00001.jpg", "c2d3-00/00011.jpg"}
    for name, level in levels.items():
        assert abs(packed.image(name).mean() - level) < 4
    assert [Path(row["path"].split(" (")[0]).name for row in rejected(tmp_path / "out", "bdd100k")] == ["broken.mov"]


def test_bdd100k_images_are_not_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "images/100k/train/a.jpg")
    assert main(["dataset=bdd100k", f"root={tmp_path}", "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "70,000 training videos" in capsys.readouterr().err


def test_pairs_come_one_by_one_and_shards_are_kept(tmp_path: Path) -> None:
    """A stream is never turned into a list, and a second run packs nothing again."""
    root = tmp_path / "root"
    write_tar(root / "sa_000000.tar", [f"sa_{i}.jpg" for i in range(25)])
    (pair_set,) = read_dataset("sa1b", root)
    assert isinstance(pair_set.pairs, PairStream)
    assert [pair.key for pair in pair_set.pairs] == [pair.key for pair in pair_set.pairs]
    arguments = ["dataset=sa1b", f"root={root}", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--samples-per-shard", "10"]) == 0
    tars = sorted((tmp_path / "out/sa1b").glob("*.tar"))
    assert [tar.name for tar in tars] == [f"sa1b-{i:06d}.tar" for i in range(3)]
    before = [tar.stat().st_mtime_ns for tar in tars]
    assert main([*arguments, "--samples-per-shard", "10"]) == 0
    assert [tar.stat().st_mtime_ns for tar in tars] == before


def test_memory_does_not_grow_with_the_images_of_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "sa_000000.tar", "w") as tar:
        for i in range(10_000):
            tar.addfile(tarfile.TarInfo(f"sa_{i}.jpg"))
    (pair_set,) = read_dataset("sa1b", tmp_path)
    tracemalloc.start()
    assert sum(1 for _ in pair_set.pairs) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000  # the headers of all take 5 MB


def test_shards_are_planned_while_others_are_packed() -> None:
    """No more than a few tasks wait, however many there are."""
    planned: list[int] = []

    class Pool:
        def submit(self, work: object, task: int) -> Future:
            future: Future = Future()
            future.set_result(-task)
            return future

    tasks = (planned.append(i) or i for i in range(100))  # type: ignore[func-returns-value]
    results = []
    for task, record in _packed(Pool(), tasks, waiting=4):  # type: ignore[arg-type]
        results.append((task, record))
        assert len(planned) <= len(results) + 4
    assert sorted(results) == [(i, -i) for i in range(100)]


def test_the_same_key_twice_in_a_shard_is_rejected(tmp_path: Path) -> None:
    write_image(tmp_path / "root/one/sa_1.jpg")
    write_image(tmp_path / "root/two/sa_1.jpg")
    packed = only(pack_dataset("sa1b", tmp_path / "root", tmp_path / "out", exit_code=1), "sa1b")
    assert packed.samples.keys() == {"one/sa_1.jpg"}
    assert "twice" in rejected(tmp_path / "out", "sa1b")[0]["reason"]


def test_the_same_key_in_two_shards_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one/sa_1", "one/sa_2", "two/sa_1", "two/sa_3"):
        write_image(tmp_path / f"root/{name}.jpg")
    arguments = ["dataset=sa1b", f"root={tmp_path / 'root'}", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--samples-per-shard", "2"]) == 1
    printed = capsys.readouterr().err
    assert "sa1b: keys that lie in more than one shard: 'sa_1' in sa1b-000000.tar and sa1b-000001.tar. " in printed
    assert main([*arguments, "--samples-per-shard", "1"]) == 1
    (tmp_path / "root/two/sa_1.jpg").unlink()
    assert main([*arguments, "--samples-per-shard", "1"]) == 0
