"""Faults to survive: damaged files, killed processes, a full disk, shards that vanish or change."""

import json
import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from faults import (
    DAMAGED_FILES,
    IMAGES,
    Command,
    finished_files,
    fuzz,
    labels,
    read_all,
    run_alone,
    run_with_kills,
    start,
    stream,
    write_samples,
)
from handmade import labeled_sample, unlabeled_sample, write_dataset

from depthkit.bundle import load_model, read_facts, save_bundle
from depthkit.config import DatasetConfig
from depthkit.data.index import index_path, scan_tar
from depthkit.data.inspect import inspect
from depthkit.data.manifest import load_manifest
from depthkit.data.reader import DatasetReader
from depthkit.data.selection import Selection, save_selection
from depthkit.data.shards import ShardReader
from depthkit.data.streams import Stream
from depthkit.inference.predict import main as predict

# --- damaged files (test_fuzz.py has thousands) ----------------------------------------------------------------------


@pytest.mark.parametrize("form", labels())
def test_what_is_damaged_below_can_be_read_undamaged(tmp_path: Path, form: str) -> None:
    for image in IMAGES:
        assert read_all(write_samples(tmp_path / image, form, image, {})) == []


def test_damaged_files_are_read_around_or_refused_by_name(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 0, 5, [*DAMAGED_FILES, *IMAGES, *labels()], timeout=120) > 30


def test_a_number_in_a_manifest_that_no_float_holds(tmp_path: Path) -> None:
    manifest = write_samples(tmp_path, "png16", "jpg", {})
    manifest.write_text(manifest.read_text().replace('"scale": 1000.0', f'"scale": {10**400}'))
    with pytest.raises(ValueError, match=rf"{manifest}: target.scale"):
        read_all(manifest)


def test_inspect_finds_a_flipped_bit_that_still_decodes(tmp_path: Path) -> None:
    manifest = write_samples(tmp_path, "png16", "jpg", {})
    tar = tmp_path / "train-000000.tar"
    (found,) = inspect([manifest], num_samples=3).findings
    assert not any("sha256" in problem for problem in found.problems)
    data = bytearray(tar.read_bytes())
    whole = ShardReader(load_manifest(manifest), tmp_path).read(0, 1).members["jpg"]
    data[data.index(whole) + len(whole) // 2] ^= 1
    tar.write_bytes(data)
    assert read_all(manifest) == []
    (found,) = inspect([manifest], num_samples=3).findings
    assert any(str(tar) in problem and "sha256" in problem for problem in found.problems)


# --- killed processes ------------------------------------------------------------------------------------------------

FEW_AND_MANY = [pytest.param(2, id="few"), pytest.param(25, id="many", marks=pytest.mark.slow)]


def pack_command(folder: Path, out: Path, num_pairs: int = 40) -> Command:
    """Pairs in an index, one of them without its image."""
    folder.mkdir()
    rows = []
    for number in range(num_pairs):
        members = labeled_sample(number)
        (folder / f"{number}.jpg").write_bytes(members["jpg"])
        (folder / f"{number}.png").write_bytes(members["depth.png"])
        row = {"id": f"{number:04d}", "source": "room", "rgb": f"{number}.jpg", "label": f"{number}.png"}
        rows.append(row | {"target": "depth", "codec": "png16", "scale": 1000})
    (folder / "7.jpg").unlink()
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(folder / "index.jsonl"), "--out", str(out), "--samples-per-shard", "4", "--workers", "2"]
    return "depthkit.data.pack", arguments


@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_killed_packer(tmp_path: Path, kills: int) -> None:
    module, arguments = pack_command(tmp_path / "data", tmp_path / "whole")
    whole, duration = run_alone((module, arguments), tmp_path / "log")
    assert whole == 1  # some pairs rejected
    arguments = [str(tmp_path / "cut") if item == str(tmp_path / "whole") else item for item in arguments]
    run_with_kills((module, arguments), tmp_path / "log", duration=duration, kills=kills, seed=1, exit_code=1)
    assert finished_files(tmp_path / "cut") == finished_files(tmp_path / "whole")
    assert "7.jpg" in (tmp_path / "cut/room/rejected.jsonl").read_text()


@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_killed_labellers(tmp_path: Path, tiny_teacher: Path, kills: int) -> None:
    samples = {f"{number:03d}": unlabeled_sample(number) for number in range(60)}
    samples["050"]["jpg"] = samples["050"]["jpg"][:-40]
    images = write_dataset(tmp_path / "images", samples, None, samples_per_shard=4)

    def command(out: str) -> Command:
        settings = [f"bundle={tiny_teacher}", f"images={images}", f"out={tmp_path / out}", "stage.batch_size=3"]
        settings += ["stage.num_workers=0", "trainer.enable_progress_bar=false", "data.quarantine_budget=0.5"]
        return "depthkit.label", settings

    whole, duration = run_alone(command("whole"), tmp_path / "log")
    assert whole == 0, (tmp_path / "log").read_text()
    run_with_kills(command("cut"), tmp_path / "log", duration=duration, kills=kills, seed=2, num_processes=2)
    assert finished_files(tmp_path / "cut") == finished_files(tmp_path / "whole")
    assert json.loads((tmp_path / "cut/rejected.jsonl").read_text())["key"] == "050"


@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_killed_trainer(tmp_path: Path, tiny_settings: Callable[[str, Path], list[str]], kills: int) -> None:
    def command(run_dir: str) -> Command:
        settings = ["trainer.max_steps=12", "callbacks.checkpoint.every_n_train_steps=1"]
        return "depthkit.train", [*tiny_settings("teacher", tmp_path / run_dir), *settings]

    whole, duration = run_alone(command("whole"), tmp_path / "log")
    assert whole == 0, (tmp_path / "log").read_text()
    run_with_kills(command("cut"), tmp_path / "log", duration=duration, kills=kills, seed=3)
    weights = [tmp_path / run_dir / "bundle" / "model.safetensors" for run_dir in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# --- a full disk -----------------------------------------------------------------------------------------------------

Disk = Callable[[int], Path]


def mount(*arguments: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """`disk(num_kb)`: an empty disk of that size; a second call changes the size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(num_kb: int) -> Path:
        mount("-o", f"size={num_kb}k" + (",remount" if folder.is_mount() else ""), "tmpfs", str(folder))
        return folder

    try:
        sized(64)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small tmpfs cannot be mounted here: {error}")
    yield sized
    subprocess.run(["umount", "-l", str(folder)], check=True)


def whole_tars(folder: Path) -> list[str]:
    """Names of the tars, which are whole."""
    tars = sorted(path for path in folder.rglob("*.tar") if not path.name.startswith("."))
    for tar in tars:
        assert scan_tar(tar).num_bytes == tar.stat().st_size
    return [tar.name for tar in tars]


def test_disk_full_while_packing(tmp_path: Path, disk: Disk) -> None:
    out = disk(100) / "packed"
    command = pack_command(tmp_path / "data", out)
    assert run_alone(command, tmp_path / "log")[0] == 2
    assert "No space left on device" in (tmp_path / "log").read_text()
    assert len(whole_tars(out)) < 10
    assert not (out / "room/manifest.json").exists()
    disk(10_000)
    assert run_alone(command, tmp_path / "log")[0] == 1
    module, arguments = command
    run_alone((module, [item.replace(str(out), str(tmp_path / "whole")) for item in arguments]), tmp_path / "log")
    assert finished_files(out) == finished_files(tmp_path / "whole")


def test_disk_full_while_labelling(tmp_path: Path, disk: Disk, tiny_teacher: Path) -> None:
    samples = {f"{number:03d}": unlabeled_sample(number) for number in range(24)}
    images = write_dataset(tmp_path / "images", samples, None, samples_per_shard=4)

    def run(out: Path) -> int | None:
        settings = [f"bundle={tiny_teacher}", f"images={images}", f"out={out}", "stage.batch_size=3"]
        settings += ["stage.num_workers=0", "trainer.enable_progress_bar=false"]
        return run_alone(("depthkit.label", settings), tmp_path / "log")[0]

    out = disk(64) / "labels"
    assert run(out) == 1
    assert "No space left on device" in (tmp_path / "log").read_text()
    assert len(whole_tars(out)) < 6
    assert not (out / "manifest.json").exists()
    disk(10_000)
    assert run(out) == run(tmp_path / "whole") == 0, (tmp_path / "log").read_text()
    assert finished_files(out) == finished_files(tmp_path / "whole")


def test_disk_full_while_training(tmp_path: Path, disk: Disk, tiny_settings: Callable[[str, Path], list[str]]) -> None:
    def run(run_dir: Path) -> int | None:
        settings = [*tiny_settings("teacher", run_dir), "callbacks.checkpoint.every_n_train_steps=2"]
        return run_alone(("depthkit.train", settings), tmp_path / "log")[0]

    assert run(tmp_path / "whole") == 0
    size = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*.ckpt"))
    run_dir = disk(int(1.5 * size / 1024)) / "run"
    assert run(run_dir) != 0
    said = (tmp_path / "log").read_text()
    assert "could not be written: [Errno 28] No space left on device. The checkpoints before it are whole" in said
    assert "Traceback" not in said.split("could not be written")[1]
    checkpoints = list(run_dir.rglob("*.ckpt"))
    assert all(torch.load(path, weights_only=False)["global_step"] == 2 for path in checkpoints)
    disk(100_000)
    assert run(run_dir) == 0
    weights = [folder / "bundle" / "model.safetensors" for folder in (run_dir, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_disk_full_while_saving_a_bundle(disk: Disk, tiny_teacher: Path) -> None:
    model, facts = load_model(tiny_teacher)
    folder = disk(32) / "bundle"
    with pytest.raises(Exception, match=r"No space left|os error 28"):
        save_bundle(folder, model, facts)
    assert list(folder.parent.iterdir()) == []
    disk(100_000)
    save_bundle(folder, model, facts)
    assert read_facts(folder).sha256 == facts.sha256


def test_disk_full_while_selecting(disk: Disk) -> None:
    path = disk(64) / "selection.json"
    selection = Selection(images_digest="a", labels_digest="b", rule="all", samples={"a.tar": list(range(50_000))})
    with pytest.raises(OSError, match="No space left"):
        save_selection(selection, path)
    assert list(path.parent.iterdir()) == []


def test_disk_full_while_predicting(
    tmp_path: Path, disk: Disk, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / f"photos/{number:02d}.jpg").write_bytes(labeled_sample(number, (128, 160))["jpg"])
    out = disk(200)
    arguments = [str(tiny_teacher), str(tmp_path / "photos"), "--out", str(out)]
    assert predict(arguments) == 1
    said = capsys.readouterr().err
    done = sorted(path.stem for path in out.glob("*.json"))
    assert len(done) < 12
    for number in range(12):
        assert (f"photos/{number:02d}.jpg: " in said) != (f"{number:02d}" in done)
    assert "No space left" in said
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for name in done:
        assert cv2.imread(str(out / f"{name}.png"), cv2.IMREAD_UNCHANGED) is not None
    disk(10_000)
    assert predict(arguments) == 0
    assert len(list(out.glob("*.json"))) == 12


# --- folders and shards that change ----------------------------------------------------------------------------------


def test_a_read_only_folder_can_be_read_and_says_that_it_cannot_be_written(tmp_path: Path, disk: Disk) -> None:
    folder = disk(1000)
    manifest = write_samples(folder, "png16", "jpg", {})
    index_path(folder / "train-000000.tar").unlink()
    mount("-o", "remount,ro", "tmpfs", str(folder))
    assert read_all(manifest) == []
    command = pack_command(tmp_path / "data", folder / "out")
    assert run_alone(command, tmp_path / "log")[0] == 2
    assert f"Read-only file system: '{folder}" in (tmp_path / "log").read_text()


def stream_of_two_shards(folder: Path) -> tuple[Stream, list[Path]]:
    samples = {f"{number:03d}": labeled_sample(number) for number in range(16)}
    manifest = write_dataset(folder, samples)
    return stream(DatasetReader("x", DatasetConfig(manifest=str(manifest)), "disparity")), sorted(folder.glob("*.tar"))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shard_that_is_replaced_during_training(tmp_path: Path, in_place: bool) -> None:
    """Overwritten in place, its samples are rejected by name; one that is put there by renaming is not seen until the
    shard is opened again, and is rejected then."""
    loader, tars = stream_of_two_shards(tmp_path)
    before = [loader.load(position)[0] for position in range(16)]
    assert {sample.key for sample in before} == {f"{number:03d}" for number in range(16)}
    other = bytes(np.random.default_rng(0).integers(0, 256, tars[0].stat().st_size, np.uint8))
    if in_place:
        tars[0].write_bytes(other)
    else:
        (tmp_path / "new").write_bytes(other[512:])
        (tmp_path / "new").rename(tars[0])
        again = [loader.load(position)[0] for position in range(16)]
        assert [sample.key for sample in again] == [sample.key for sample in before]
        loader = pickle.loads(pickle.dumps(loader))
    after = [loader.load(position)[0] for position in range(16)]
    assert {sample.key for sample in after} == {f"{number:03d}" for number in range(8, 16)}
    rejections = [rejection for sample in after for rejection in sample.rejections]
    assert {rejection.shard for rejection in rejections} == {str(tars[0])}
    assert all(rejection.reason for rejection in rejections)


def test_a_shard_that_vanishes_during_training(tmp_path: Path) -> None:
    """One that is open stays readable; without it a run cannot go on, since a mix without a shard is another one."""
    loader, tars = stream_of_two_shards(tmp_path)
    before = [loader.load(position)[0].key for position in range(16)]
    tars[0].unlink()
    assert [loader.load(position)[0].key for position in range(16)] == before
    fresh = pickle.loads(pickle.dumps(loader))
    with pytest.raises(FileNotFoundError, match=rf"{tars[0].name}: the manifest lists"):
        [fresh.load(position) for position in range(16)]


def test_two_packers_on_one_folder(tmp_path: Path) -> None:
    """Whatever they do to each other, the next run makes it whole."""
    module, arguments = pack_command(tmp_path / "data", tmp_path / "out")
    processes = [start((module, arguments), tmp_path / "log") for _ in range(2)]
    for process in processes:
        process.join()
    whole_tars(tmp_path / "out")
    assert run_alone((module, arguments), tmp_path / "log")[0] == 1
    whole = [item.replace(str(tmp_path / "out"), str(tmp_path / "whole")) for item in arguments]
    assert run_alone((module, whole), tmp_path / "log")[0] == 1
    assert finished_files(tmp_path / "out") == finished_files(tmp_path / "whole")
