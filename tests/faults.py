"""Damage to data sets: files with flipped bits and cut ends, JSON with values that do not belong there; and commands
that are killed.

As a program it reads many damaged data sets and prints what went wrong in a way that no reader may: so a crash or a
hang of the reader is seen by whoever started it.
"""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from handmade import grey_levels, write_dataset
from test_codecs import bit_rotated, exr, npy, npz, save

from depthkit.config import AugmentConfig, DatasetConfig
from depthkit.data.index import index_path
from depthkit.data.manifest import TargetSpec, load_manifest, save_manifest
from depthkit.data.reader import DatasetReader
from depthkit.data.streams import Stream

SIZE = (24, 32)
FACTS = {"intrinsics_px": [40.0, 41.0, 16.0, 12.0], "baseline_m": 0.2, "doffs_px": 1.5, "scale": 3.0, "offset": 0.5}
IMAGES = {"jpg": ".jpg", "png": ".png", "webp": ".webp"}
NUM_SAMPLES = 3
MAX_BYTES = 2**30
ODD_VALUES: list[Any] = [None, True, "x", "", [], {}, [1], {"x": 1}, -1, 0, 1.5, 2**40, 10**400, float("nan"), [[1, 2]]]


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with its end cut, some bits flipped (often near the start, where headers are), or a stretch of zeros."""
    kind = rng.integers(4)
    if kind == 0:
        return data[: rng.integers(len(data))]
    damaged = bytearray(data)
    if kind == 1:
        start = rng.integers(len(data))
        end = min(len(data), start + rng.integers(1, 600))
        damaged[start:end] = bytes(end - start)
    else:
        for place in rng.integers(0, len(data) if kind == 2 else min(len(data), 128), rng.integers(1, 9)):
            damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def damage_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Damaged like any file, or still JSON but with a value exchanged, removed or added somewhere."""
    if rng.integers(3) == 0:
        return damage(data, rng)
    content = json.loads(data)
    node = content
    while True:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        place = places[rng.integers(len(places))]
        if not (isinstance(node[place], dict | list) and node[place]) or rng.integers(4) == 0:
            break
        node = node[place]
    kind = rng.integers(8)
    if kind == 0:
        del node[place]
    elif kind == 1 and isinstance(node, dict):
        node[f"{place}x"] = node.pop(place)
    else:
        node[place] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    return json.dumps(content if rng.integers(20) else [content]).encode()


DAMAGED_FILES = ("tar", "index", "manifest", "facts")


def labels() -> dict[str, tuple[TargetSpec, bytes]]:
    """A label of `SIZE` in every stored form: how it is to be read, and the file."""
    codes = grey_levels(0, SIZE).astype(np.uint16) * 100
    metres = codes.astype(np.float32) / 1000
    kinect = (codes // 30).astype("<u2")
    head = f"{SIZE[1]} {SIZE[0]}".encode()

    def spec(codec: Any, suffix: str, **fields: Any) -> TargetSpec:
        return TargetSpec(**{"quantity": "depth", "codec": codec, "extension": f"depth.{suffix}", **fields})

    return {
        "png16": (spec("png16", "png", scale=1000, sky_values=(65535,)), save(codes, "PNG")),
        "png8": (spec("png8", "png", scale=10, invalid_values=(255,)), save(grey_levels(0, SIZE), "PNG")),
        "png16_sunrgbd": (spec("png16_sunrgbd", "png", scale=1000), save(bit_rotated(codes), "PNG")),
        "pgm16": (spec("pgm16", "pgm", scale=1000), b"P5\n" + head + b"\n65535\n" + codes.astype(">u2").tobytes()),
        "pgm16_nyu_raw": (spec("pgm16_nyu_raw", "pgm"), b"P5 " + head + b" 65535\n" + kinect.tobytes()),
        "npy": (spec("npy", "npy", quantity="ray_distance"), npy(metres)),
        "npz": (spec("npz", "npz", quantity="inverse_depth"), npz(metres)),
        "exr": (spec("exr", "exr"), exr(metres)),
        "pfm": (spec("pfm", "pfm", quantity="stereo_disparity_px"), b"Pf\n" + head + b"\n-1.0\n" + metres.tobytes()),
        "tiff32f": (spec("tiff32f", "tiff"), save(metres, "TIFF")),
        "pseudo": (spec("png16", "png", quantity="disparity", metric=False), save(codes, "PNG")),
    }


def write_samples(folder: Path, form: str, image: str, changed: dict[str, Callable[[bytes], bytes]]) -> Path:
    """One shard of three samples; `changed` maps extensions to what happens to that member of the second one."""
    spec, label = labels()[form]
    picture = np.stack([grey_levels(seed, SIZE) for seed in range(3)], axis=-1)
    members = {image: cv2.imencode(IMAGES[image], picture)[1].tobytes(), spec.extension: label}
    members["json"] = json.dumps(FACTS).encode()
    broken = {extension: changed.get(extension, bytes)(data) for extension, data in members.items()}
    return write_dataset(folder, {"a": members, "b": broken, "c": members}, spec)


def write_damaged(folder: Path, what: str, rng: np.random.Generator) -> tuple[Path, str]:
    """A data set with one damaged thing, and the form of its labels."""
    form = what if what in labels() else str(rng.choice(list(labels())))
    image = what if what in IMAGES else "jpg"
    extension = {"facts": "json", form: labels()[form][0].extension}.get(what, what)
    change = damage_json if what == "facts" else damage
    path = write_samples(folder, form, image, {extension: lambda data: change(data, rng)})
    tar = folder / "train-000000.tar"
    if what == "index":
        index_path(tar).write_bytes(damage_json(index_path(tar).read_bytes(), rng))
    if what == "manifest":
        path.write_bytes(damage_json(path.read_bytes(), rng))
    if what == "tar":
        tar.write_bytes(damage(tar.read_bytes(), rng))
        if rng.integers(2):
            index_path(tar).unlink()
        manifest = load_manifest(path)  # of the damaged tar, as a tool that looks at the size alone would write it
        save_manifest(replace(manifest, shards=(replace(manifest.shards[0], num_bytes=tar.stat().st_size),)), path)
    return path, form


def stream(reader: DatasetReader) -> Stream:
    """Crops of 16 x 16, one a step."""
    return Stream(
        "labeled",
        [reader],
        [1.0],
        images_per_step=1,
        crop_size=(16, 16),
        augment=AugmentConfig(),
        seed=0,
        shuffle_block=4,
    )


def read_all(path: Path) -> list[str]:
    """Read a data set in every way that training and validation do. Problems of samples in their lists, as users get
    them; ValueError or FileNotFoundError when the data set as a whole cannot be used."""
    reader = DatasetReader("x", DatasetConfig(manifest=str(path)), "disparity")
    count = min(reader.shard_sizes[0], NUM_SAMPLES)
    problems = []
    for index in range(count):
        try:
            reader.read_whole(0, index, short_side=16, multiple=8)
        except ValueError as error:
            rejection = reader.rejection(0, index, error)  # type: ignore[arg-type]
            problems.append(f"{rejection.shard} {rejection.key}: {rejection.reason}")
    loader = stream(reader)
    for position in range(count):
        sample, _ = loader.load(position)
        assert sample.image.shape == (16, 16, 3)
        assert np.isfinite(sample.target).all()
        problems += [f"{r.shard} {r.key}: {r.reason}" for r in sample.rejections]
    return problems


def virtual_peak() -> int:
    """Most address space this process ever had, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak")]
    return int(line.split()[1]) * 1024


def read_damaged(folder: Path, what: str, seed: int) -> tuple[str, bool]:
    """What no reader may do ("" when all is well), and whether anything was refused."""
    peak = virtual_peak()
    try:
        path, _ = write_damaged(folder, what, np.random.default_rng(seed))
        problems = read_all(path)
    except (ValueError, FileNotFoundError) as error:
        problems = [str(error)]
    except Exception as error:
        return f"{type(error).__name__}: {error}", True
    unnamed = [problem for problem in problems if str(folder) not in problem]
    if unnamed:
        return f"does not name the file: {unnamed[0]}", True
    if virtual_peak() - peak > MAX_BYTES:
        return f"{(virtual_peak() - peak) / 1e9:.1f} GB of memory", bool(problems)
    return "", bool(problems)


def main(folder: Path, first: int, last: int, kinds: list[str]) -> None:
    """Print, for the seeds from `first` to below `last` of every kind of damage, how many data sets were refused and
    what must not be."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    cv2.setNumThreads(1)
    failures, num_refused = {}, 0
    read_all(write_samples(folder, "png16", "jpg", {}))  # all that is allocated once
    for kind in kinds:
        for seed in range(first, last):
            print(kind, seed, file=sys.stderr, flush=True)
            failure, is_refused = read_damaged(folder, kind, seed)
            num_refused += is_refused
            if failure:
                failures[f"{kind} {seed}"] = failure
    print(json.dumps({"refused": num_refused, "failures": failures}))


def fuzz(folder: Path, first: int, last: int, kinds: list[str], *, timeout: float) -> int:
    """Read damaged data sets in a process of its own, which must neither die nor hang; returns how many it refused."""
    command = [sys.executable, __file__, str(folder), str(first), str(last), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == {}
    return int(found["refused"])


# --- commands that are killed ----------------------------------------------------------------------------------------

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["depthkit.train", "depthkit.label", "depthkit.data.pack"])
Command = tuple[str, list[str]]
"""Module and arguments of a verb."""


def start(command: Command, log: Path) -> BaseProcess:
    """Run a command in a process of its own, in the folder of `log`, where its output goes."""
    process = FORKSERVER.Process(target=_run, args=(command, log))
    process.start()
    return process


def _run(command: Command, log: Path) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(log.parent)
    multiprocessing.set_start_method("fork", force=True)  # as in a shell; here it would be the fork server
    torch.set_num_threads(1)  # the last bits of a result depend on it
    sys.exit(import_module(command[0]).main(command[1]))


def run_alone(command: Command, log: Path) -> tuple[int | None, float]:
    """Exit code and seconds."""
    begin = time.monotonic()
    process = start(command, log)
    process.join()
    return process.exitcode, time.monotonic() - begin


def run_with_kills(
    command: Command,
    log: Path,
    *,
    duration: float,
    kills: int,
    seed: int,
    num_processes: int = 1,
    exit_code: int = 0,
) -> None:
    """Run a command in several processes, kill one of them, or all, `kills` times at a random moment of the `duration`
    that it takes undisturbed, start those again, and wait for the end."""
    rng = np.random.default_rng(seed)
    processes = [start(command, log) for _ in range(num_processes)]
    for _ in range(kills):
        time.sleep(rng.uniform(0, duration))
        victims = range(num_processes) if rng.integers(3) == 0 else [rng.integers(num_processes)]
        for victim in victims:
            processes[victim].kill()
        for victim in victims:
            processes[victim].join()
            processes[victim] = start(command, log)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [exit_code] * num_processes, log.read_text()[-3000:]


class Phases(L.Callback):
    """Writes down what a training process is at, `step`, `validation` or `write` of a checkpoint, and slows the latter
    two, so that it can be killed there."""

    def __init__(self, path: str) -> None:
        self.path = path

    def mark(self, phase: str) -> None:
        with Path(self.path).open("a") as file:
            file.write(f"{phase}\n")

    def setup(self, *_: Any, **__: Any) -> None:
        self.mark("start")
        torch.save = self.save  # type: ignore[assignment]

    def save(self, content: Any, file: Any) -> None:
        whole = io.BytesIO()
        SAVE(content, whole)
        self.mark("write")
        for part in np.array_split(np.frombuffer(whole.getvalue(), np.uint8), 10):
            file.write(part)
            file.flush()
            time.sleep(0.02)
        self.mark("written")

    def on_train_batch_start(self, *_: Any) -> None:
        self.mark("step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.mark("stepped")

    def on_validation_start(self, *_: Any) -> None:
        self.mark("validation")

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        time.sleep(0.02)

    def on_validation_end(self, *_: Any) -> None:
        self.mark("validated")


SAVE = torch.save


def kill_in(command: Command, log: Path, marks: Path, phase: str, *, number: int, delay: float) -> str:
    """Run a command that has `Phases(marks)`, kill it `delay` seconds after the start of its `number`-th `phase`, and
    return the phase in which it died; `end` if it came to its end before."""
    marks.write_text("")
    process = start(command, log)
    while marks.read_text().split().count(phase) < number and process.is_alive():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return "end" if process.exitcode == 0 else marks.read_text().split()[-1]


def finished_files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but what a killed process may leave, whose names say so."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
