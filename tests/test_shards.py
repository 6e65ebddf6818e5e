"""Shards: what the writer packs comes back sample by sample, in WebDataset too, and damage is named."""

import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from depthkit.data import shards as shards_module
from depthkit.data.index import index_path, load_index, scan_tar
from depthkit.data.manifest import Manifest, Shard, TargetSpec
from depthkit.data.quarantine import SampleError
from depthkit.data.shards import ShardReader, image_member, verify_shard
from depthkit.data.writer import ShardWriter


def make_samples(num_samples: int, seed: int = 0) -> dict[str, dict[str, bytes]]:
    """Members of many sizes, among them empty ones and ones of whole tar blocks."""
    rng = random.Random(seed)
    sizes = [0, 1, 511, 512, 513, 1024, 5000]
    return {
        f"room_{seed}/frame {i:03d}": {
            "jpg": rng.randbytes(sizes[i % len(sizes)]),
            "depth.png": rng.randbytes(sizes[(i + 3) % len(sizes)]),
            "json": b'{"source_id": "%d"}' % i,
        }
        for i in range(num_samples)
    }


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Shard:
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.add(key, members)
    return writer.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_manifest(*shards: Shard) -> Manifest:
    target = TargetSpec(quantity="depth", codec="png16", extension="depth.png", scale=1000)
    return Manifest(name="rooms", split="train", target=target, shards=shards, licence="", source="")


def read_all(reader: ShardReader, shard_index: int = 0) -> dict[str, dict[str, bytes]]:
    num_samples = reader.manifest.shards[shard_index].num_samples
    return dict(reader.read(shard_index, i) for i in range(num_samples))


# The writer


def test_same_samples_give_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a.tar", make_samples(9))
    second = write(tmp_path / "b.tar", make_samples(9))
    assert first == replace(second, path="a.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert write(tmp_path / "c.tar", make_samples(9, seed=1)).sha256 != first.sha256


def test_any_tar_reader_finds_the_members(tmp_path: Path) -> None:
    samples = make_samples(9)
    shard = write(tmp_path / "a.tar", samples)
    with tarfile.open(tmp_path / "a.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert found == {f"{key}.{ext}": data for key, members in samples.items() for ext, data in members.items()}
    assert (shard.path, shard.num_samples, shard.num_bytes) == ("a.tar", 9, (tmp_path / "a.tar").stat().st_size)


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    samples = make_samples(9)
    write(tmp_path / "a.tar", samples)
    found = {}
    for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False):
        found[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    assert found == samples


@pytest.mark.parametrize(
    ("key", "members", "reason"),
    [
        ("a", {"jpg": b""}, "already added"),
        ("b.c", {"jpg": b""}, "dot"),
        ("", {"jpg": b""}, "empty"),
        ("/b", {"jpg": b""}, "slash"),
        ("b", {}, "no members"),
        ("b", {".jpg": b""}, "extension '.jpg'"),
        ("b", {"JPG": b""}, "extension 'JPG'"),
        ("b" * 101, {"jpg": b""}, "shorter key"),
    ],
)
def test_bad_samples_are_refused_and_leave_no_file(
    tmp_path: Path, key: str, members: dict[str, bytes], reason: str
) -> None:
    def write_both() -> None:
        with ShardWriter(tmp_path / "a.tar") as writer:
            writer.add("a", {"jpg": b"x"})
            writer.add(key, members)

    with pytest.raises(ValueError, match=reason) as error:
        write_both()
    assert str(tmp_path / "a.tar") in str(error.value)
    assert names(tmp_path) == []


def test_a_shard_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one sample"), ShardWriter(tmp_path / "a.tar"):
        pass
    assert names(tmp_path) == []


def test_a_failed_rewrite_keeps_the_old_shard(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", make_samples(3))

    def write_and_stop() -> None:
        with ShardWriter(tmp_path / "a.tar") as writer:
            writer.add("a", {"jpg": b"x"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    verify_shard(tmp_path, shard)
    assert names(tmp_path) == ["a.tar", "a.tar.index.json"]


def test_a_killed_writer_leaves_no_final_name(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; from depthkit.data.writer import ShardWriter\n"
        "with ShardWriter(pathlib.Path(sys.argv[1])) as writer:\n"
        "    for i in range(5): writer.add(str(i), {'jpg': bytes(100_000)})\n"
        "    os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.tar")], check=False)
    assert done.returncode == 9
    assert list(tmp_path.glob("*.tar")) == list(tmp_path.glob("*.json")) == []


# The reader


def test_read_back_in_any_order(tmp_path: Path) -> None:
    contents = [make_samples(20, seed) for seed in range(3)]
    manifest = make_manifest(*(write(tmp_path / f"{i}.tar", samples) for i, samples in enumerate(contents)))
    reader = ShardReader(manifest, tmp_path)
    assert reader.keys(1) == list(contents[1])
    places = [(shard, sample) for shard in range(3) for sample in range(20)]
    random.Random(0).shuffle(places)
    for shard, sample in places:
        key, members = reader.read(shard, sample)
        assert key == list(contents[shard])[sample]
        assert members == contents[shard][key]


def test_a_pickled_reader_carries_no_open_file(tmp_path: Path) -> None:
    samples = make_samples(5)
    reader = ShardReader(make_manifest(write(tmp_path / "a.tar", samples)), tmp_path)
    assert read_all(reader) == samples
    assert read_all(pickle.loads(pickle.dumps(reader))) == samples
    assert read_all(reader) == samples


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)
    contents = [make_samples(2, seed) for seed in range(5)]
    manifest = make_manifest(*(write(tmp_path / f"{i}.tar", samples) for i, samples in enumerate(contents)))
    reader = ShardReader(manifest, tmp_path)
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("counts open files in /proc")
    before = len(names(open_files))
    for shard in (0, 1, 2, 3, 4, 0, 3):
        assert read_all(reader, shard) == contents[shard]
    assert len(names(open_files)) <= before + 2


def test_index_from_writer_and_from_scan_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", make_samples(9))
    written = load_index(tmp_path / "a.tar")
    index_path(tmp_path / "a.tar").unlink()
    assert load_index(tmp_path / "a.tar") == written == scan_tar(tmp_path / "a.tar")
    assert index_path(tmp_path / "a.tar").is_file()


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_tools(tmp_path: Path, style: int) -> None:
    """Folders, stray files, long names and capital extensions are what `tar` and WebDataset writers leave."""
    long_name = "x" * 90 + "/" + "y" * 85
    with tarfile.open(tmp_path / "a.tar", "w", format=style) as archive:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in [("folder.d/README", b"?"), (f"{long_name}.JPG", b"image"), (f"{long_name}.depth.png", b"z")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    size = (tmp_path / "a.tar").stat().st_size
    reader = ShardReader(make_manifest(Shard(path="a.tar", num_samples=1, num_bytes=size, sha256="0" * 64)), tmp_path)
    assert reader.read(0, 0) == (long_name, {"jpg": b"image", "depth.png": b"z"})


def test_a_stale_index_is_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, make_samples(3))
    old = index_path(path).read_bytes()
    samples = make_samples(3, seed=1)
    shard = write(path, samples)
    index_path(path).write_bytes(old)
    os.utime(index_path(path), ns=(0, path.stat().st_mtime_ns - 1))
    assert read_all(ShardReader(make_manifest(shard), tmp_path)) == samples
    shard = write(path, make_samples(30))
    index_path(path).write_bytes(old)  # newer than the tar, of another size
    assert read_all(ShardReader(make_manifest(shard), tmp_path)) == make_samples(30)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"num_bytes": 1}'])
def test_a_broken_index_is_rebuilt(tmp_path: Path, text: str) -> None:
    shard = write(tmp_path / "a.tar", make_samples(3))
    index_path(tmp_path / "a.tar").write_text(text)
    assert read_all(ShardReader(make_manifest(shard), tmp_path)) == make_samples(3)
    assert index_path(tmp_path / "a.tar").read_text() != text


def test_a_folder_that_cannot_be_written_needs_no_index_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path / "a.tar", make_samples(3))
    index_path(tmp_path / "a.tar").unlink()

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("depthkit.data.index.atomic_write", refuse)
    assert read_all(ShardReader(make_manifest(shard), tmp_path)) == make_samples(3)
    assert names(tmp_path) == ["a.tar"]


# Damage


def test_a_truncated_tar_names_the_file_and_counts_whole_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    shard = write(path, make_samples(10))
    place = load_index(path).samples[list(make_samples(10))[6]]["depth.png"]
    data = path.read_bytes()
    for cut in (place[0] + 100, place[0] - 300, place[0] - 512):  # in the content, in its header, between members
        path.write_bytes(data[:cut])
        with pytest.raises(SampleError, match=r"a\.tar.* first 6 samples are whole"):
            scan_tar(path)
    with pytest.raises(SampleError, match=rf"a\.tar: {cut} bytes, the manifest says {shard.num_bytes}"):
        ShardReader(make_manifest(shard), tmp_path).read(0, 0)
    with pytest.raises(SampleError, match=str(shard.num_bytes)):
        verify_shard(tmp_path, shard)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, make_samples(10))
    data = bytearray(path.read_bytes())
    offset = load_index(path).samples[list(make_samples(10))[4]]["jpg"][0]
    data[offset - 512 : offset - 500] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"a\.tar.* first 3 samples are whole"):
        scan_tar(path)


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(SampleError, match=r"a\.tar: not a whole tar"):
        scan_tar(tmp_path / "a.tar")


def test_a_member_that_occurs_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(SampleError, match=r"a\.tar: member a\.jpg occurs twice"):
        scan_tar(tmp_path / "a.tar")


def test_a_tar_cut_while_it_is_open(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", make_samples(10))
    reader = ShardReader(make_manifest(shard), tmp_path)
    reader.read(0, 0)
    os.truncate(tmp_path / "a.tar", 4096)
    with pytest.raises(SampleError, match=r"a\.tar: the file ends inside room_0/frame 009"):
        reader.read(0, 9)


def test_another_number_of_samples(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", make_samples(10))
    with pytest.raises(SampleError, match=r"a\.tar: the tar holds 10 samples, the manifest says 9"):
        ShardReader(make_manifest(replace(shard, num_samples=9)), tmp_path).keys(0)


def test_a_missing_label_names_the_sample(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"a": {"jpg": b"x", "depth.png": b"y"}, "b": {"jpg": b"x", "json": b"{}"}})
    reader = ShardReader(make_manifest(shard), tmp_path)
    assert reader.read(0, 0).key == "a"
    with pytest.raises(SampleError, match=r"a\.tar: sample 'b' has no member 'depth\.png', only jpg, json"):
        reader.read(0, 1)
    assert ShardReader(replace(make_manifest(shard), target=None), tmp_path).read(0, 1).key == "b"


def test_a_missing_tar(tmp_path: Path) -> None:
    manifest = make_manifest(Shard(path="gone.tar", num_samples=1, num_bytes=1, sha256="0" * 64))
    with pytest.raises(FileNotFoundError, match=r"gone\.tar: the manifest lists"):
        ShardReader(manifest, tmp_path).read(0, 0)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", make_samples(10))
    verify_shard(tmp_path, shard)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(SampleError, match=rf"a\.tar: sha256 is [0-9a-f]+, the manifest says {shard.sha256}"):
        verify_shard(tmp_path, shard)


def test_image_member() -> None:
    assert image_member({"json": b"", "webp": b"image", "depth.png": b""}) == b"image"
    with pytest.raises(SampleError, match=r"found none among depth\.png"):
        image_member({"depth.png": b""})
    with pytest.raises(SampleError, match="found jpg, png"):
        image_member({"jpg": b"", "png": b""})
