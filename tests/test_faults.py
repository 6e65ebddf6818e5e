"""Faults to survive: damaged files, killed processes, a full disk, shards that vanish or change."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
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
    write_samples,
)
from handmade import labeled_sample, unlabeled_sample, write_dataset

from depthkit.data.inspect import inspect
from depthkit.data.manifest import load_manifest
from depthkit.data.shards import ShardReader

# --- damaged files (test_fuzz.py has thousands) ----------------------------------------------------------------------


@pytest.mark.parametrize("form", labels())
def test_what_is_damaged_below_can_be_read_undamaged(tmp_path: Path, form: str) -> None:
    for image in IMAGES:
        assert read_all(write_samples(tmp_path / image, form, image, {})) == []


def test_damaged_files_are_read_around_or_refused_by_name(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 0, 5, [*DAMAGED_FILES, *IMAGES, *labels()], timeout=120) > 30


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
