"""Your own data: folders, tables and columns; what is packed from each, and what is said of mistakes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from miniatures import SIZE, Packed, _read, rejected, write, write_image

from depthkit.data.manifest import load_manifest
from depthkit.data.pack import main

DEPTH = np.random.default_rng(0).uniform(0.5, 20, SIZE).astype(np.float32)
DEPTH[0, :5] = 0
MILLIMETRES = np.rint(DEPTH * 1000).astype(np.uint16)


def pack(path: Path, out: Path, *options: str) -> int:
    return main([str(path), "--out", str(out), "--workers", "1", *options])


def packed(path: Path, out: Path, *options: str) -> Packed:
    assert pack(path, out, *options) == 0
    (manifest,) = out.glob("*/manifest.json")
    return _read(manifest)


def write_pfm(path: Path, values: np.ndarray) -> Path:
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n-1.0\n".encode()
    return write(path, header + values[::-1].astype("<f4").tobytes())


def write_h5(path: Path, values: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as content:
        content["sensor/depth"] = values


def write_array(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.save if path.suffix == ".npy" else np.savez)(path, values)


def write_label(path: Path, values: np.ndarray) -> None:
    writers = {".npy": write_array, ".npz": write_array, ".pfm": write_pfm, ".h5": write_h5}
    writers.get(path.suffix, write)(path, values)


FORMS = {
    "depth/a/1.png": (MILLIMETRES, ["--scale", "1000"]),
    "depth/a/1.npy": (DEPTH, []),
    "depth/a/1.npz": (MILLIMETRES, ["--scale", "1000"]),
    "depth/a/1.pfm": (DEPTH, []),
    "depth/a/1.tiff": (DEPTH, []),
    "depth/a/1.exr": (DEPTH, []),
    "depth/a/1.h5": (DEPTH, ["--array", "sensor/depth"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_images_and_depth_folders(tmp_path: Path, name: str) -> None:
    values, options = FORMS[name]
    write_image(tmp_path / "mine/images/a/1.jpg")
    write_label(tmp_path / "mine" / name, values)
    result = packed(tmp_path / "mine", tmp_path / "out", *options)
    assert result.manifest.name == "mine"
    target = result.target("a/1")
    np.testing.assert_array_equal(np.isfinite(target), DEPTH > 0)
    np.testing.assert_allclose(target[DEPTH > 0], DEPTH[DEPTH > 0], atol=6e-4 if "1000" in options else 1e-6)


def test_a_folder_that_is_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README: `depthkit pack my_rooms --scale 1000 --hold-out 0.2 --out data`."""
    for number in range(5):
        write_image(tmp_path / "my_rooms" / "images" / f"{number}.jpg")
        write_label(tmp_path / "my_rooms" / "depth" / f"{number}.png", MILLIMETRES)
    monkeypatch.chdir(tmp_path)
    assert pack(Path("my_rooms"), Path("data"), "--scale", "1000", "--hold-out", "0.2") == 0
    sizes = {path.parent.name: load_manifest(path).num_samples for path in Path("data").glob("*/manifest.json")}
    assert sizes == {"my_rooms": 4, "my_rooms_val": 1}


def test_nothing_to_hold_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "photos" / "a.jpg")
    write_image(tmp_path / "photos" / "b.jpg")
    assert pack(tmp_path / "photos", tmp_path / "data", "--hold-out", "0.5") == 2
    assert "no train source has two labeled pairs" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_labels_are_read_as_the_command_line_says(tmp_path: Path) -> None:
    """Sparse inverse depth with a special value."""
    codes = np.zeros(SIZE, np.uint16)
    codes[3, 4], codes[5, 6] = 512, 65535
    write_image(tmp_path / "mine/images/1.png")
    write(tmp_path / "mine/depth/1.png", codes)
    options = ["--quantity", "inverse_depth", "--scale", "256", "--invalid", "65535", "--depth-range", "0.1,80"]
    result = packed(tmp_path / "mine", tmp_path / "out", *options)
    target = result.target("1")
    assert np.argwhere(np.isfinite(target)).tolist() == [[3, 4]]
    assert target[3, 4] == pytest.approx(0.5)
    assert result.manifest.target is not None
    assert result.manifest.target.depth_range == (0.1, 80)


def test_relative_labels_need_no_scale(tmp_path: Path) -> None:
    write_image(tmp_path / "mine/images/1.png")
    write(tmp_path / "mine/depth/1.png", (MILLIMETRES // 256).astype(np.uint8))
    result = packed(tmp_path / "mine", tmp_path / "out", "--relative")
    assert result.manifest.target is not None
    assert (result.manifest.target.codec, result.manifest.target.metric) == ("png8", False)


def test_files_without_a_partner_are_listed(tmp_path: Path) -> None:
    for stem in ("both", "image"):
        write_image(tmp_path / f"mine/images/{stem}.jpg")
    for stem in ("both", "label"):
        write(tmp_path / f"mine/depth/{stem}.png", MILLIMETRES)
    assert pack(tmp_path / "mine", tmp_path / "out", "--scale", "1000") == 1
    assert _read(tmp_path / "out/mine/manifest.json").samples.keys() == {"both"}
    reasons = {row["id"]: row["reason"] for row in rejected(tmp_path / "out", "mine")}
    assert reasons.keys() == {"image", "label"}
    assert "depth/image.png" in reasons["image"]
    assert "images/label.jpg" in reasons["label"]


def bad_no_scale(folder: Path) -> tuple[Path, list[str], str]:
    write(folder / "depth/1.png", MILLIMETRES)
    return folder, [], "depth/1.png holds uint16 numbers up to"


def bad_no_scale_npy(folder: Path) -> tuple[Path, list[str], str]:
    write_array(folder / "depth/1.npy", MILLIMETRES)
    return folder, [], "state scale (--scale)"


def bad_no_array(folder: Path) -> tuple[Path, list[str], str]:
    write(folder / "depth/1.h5", b"")
    return folder, [], "(--array)"


def bad_names(folder: Path) -> tuple[Path, list[str], str]:
    write(folder / "depth/1_depth.png", MILLIMETRES)
    return folder, ["--scale", "1000"], "images/ holds 1.jpg, depth/ holds 1_depth.png"


def bad_kinds(folder: Path) -> tuple[Path, list[str], str]:
    write(folder / "depth/1.png", MILLIMETRES)
    write_array(folder / "depth/2.npy", DEPTH)
    return folder, ["--scale", "1000"], "several kinds (.npy, .png)"


def bad_twice(folder: Path) -> tuple[Path, list[str], str]:
    write_image(folder / "images/1.png")
    write(folder / "depth/1.png", MILLIMETRES)
    return folder, ["--scale", "1000"], "have the same name"


def bad_range(folder: Path) -> tuple[Path, list[str], str]:
    write(folder / "depth/1.png", MILLIMETRES)
    return folder, ["--scale", "1000", "--depth-range", "80"], "depth_range is [80.0]"


def bad_no_labels(folder: Path) -> tuple[Path, list[str], str]:
    return folder / "images", ["--scale", "1000"], "no depth/ beside images/"


def bad_metadata_column(folder: Path) -> tuple[Path, list[str], str]:
    return (
        write(folder / "images/metadata.csv", "file,depth_file_name\n1.jpg,1.png\n").parent,
        [],
        "line 2: column 'file_name'",
    )


def bad_metadata_label(folder: Path) -> tuple[Path, list[str], str]:
    return (
        write(folder / "images/metadata.csv", "file_name,depth_file_name\n1.jpg,1.mat\n").parent,
        [],
        "line 2: no depth is read from '1.mat'",
    )


@pytest.mark.parametrize("case", [value for name, value in globals().items() if name.startswith("bad_")])
def test_mistakes_in_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], case) -> None:
    write_image(tmp_path / "mine/images/1.jpg")
    path, options, message = case(tmp_path / "mine")
    assert pack(path, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


# --- tables ----------------------------------------------------------------------------------------------------------

HEADER = ["id", "source", "rgb", "label", "target", "codec", "scale", "metric", "K", "invalid_also", "frame", "sky"]
CELLS = ["s/1", "car", "1.jpg", "1.png", "depth", "png16", "1e3", "True", "40 41 16 12", "[65535]", "7", "sky.png"]


def write_csv(folder: Path, *rows: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / "1.jpg")
    write(folder / "1.png", MILLIMETRES)
    write(folder / "sky.png", np.eye(*SIZE, dtype=np.uint8))
    with (folder / "index.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return folder / "index.csv"


def test_csv_holds_what_an_index_holds(tmp_path: Path) -> None:
    from_csv = packed(write_csv(tmp_path / "csv", CELLS), tmp_path / "out")
    row = dict(zip(HEADER, CELLS, strict=True))
    row |= {"scale": 1000.0, "metric": True, "K": [40.0, 41.0, 16.0, 12.0], "invalid_also": [65535], "frame": 7}
    index = write(tmp_path / "csv/index.jsonl", json.dumps(row))
    from_index = packed(index, tmp_path / "out2")
    assert from_csv.manifest == from_index.manifest
    assert from_csv.facts("s/1")["intrinsics_px"] == [40, 41, 16, 12]
    np.testing.assert_array_equal(from_csv.target("s/1", "disparity") == 0, np.eye(*SIZE) * (DEPTH == 0) > 0)


def test_csv_without_labels(tmp_path: Path) -> None:
    index = write_csv(tmp_path / "csv", CELLS[:3] + [""] * 9, ["s/2", "car", "1.jpg"] + [" "] * 9)
    result = packed(index, tmp_path / "out")
    assert result.manifest.target is None
    assert result.samples.keys() == {"s/1", "s/2"}


BAD_CELLS = {
    "scale": ("1,000", "line 2: scale is '1,000', which is not a number"),
    "K": ("40;41;16;12", "line 2: K is '40;41;16;12', which is not a list of numbers"),
    "metric": ("yes", "line 2: metric is 'yes', which is not true or false"),
    "codec": ("png12", "line 2: codec is 'png12'; known are"),
    "rgb": ("", "line 2: field 'rgb' is missing"),
    "frame": ("7.5", "line 2: frame is 7.5, which has the wrong type"),
    "invalid_also": ('["a"]', "line 2: invalid_also is ['a'], which is not a list"),
}


@pytest.mark.parametrize("column", BAD_CELLS)
def test_bad_cells_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str) -> None:
    text, message = BAD_CELLS[column]
    cells = [text if name == column else cell for name, cell in zip(HEADER, CELLS, strict=True)]
    index = write_csv(tmp_path / "csv", cells)
    assert pack(index, tmp_path / "out") == 2
    assert f"{index}, {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_longer_than_the_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(write_csv(tmp_path / "csv", [*CELLS, "x"]), tmp_path / "out") == 2
    assert "line 2: ['x'] stand beyond the last column" in capsys.readouterr().err


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_image_folder_with_metadata(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "kitchen"
    write_image(folder / "a/1.jpg")
    write(folder / "depth/1.png", MILLIMETRES)
    if suffix == ".jsonl":
        row = {"file_name": "a/1.jpg", "depth_file_name": "depth/1.png", "text": "a kitchen", "scale": 1000}
        write(folder / "metadata.jsonl", json.dumps(row) + "\n")
    else:
        write(folder / "metadata.csv", "file_name,depth_file_name,text,scale\na/1.jpg,depth/1.png,a kitchen,1000\n")
    result = packed(folder, tmp_path / "out")
    assert result.manifest.name == "kitchen"
    np.testing.assert_allclose(result.target("a/1.jpg")[DEPTH > 0], DEPTH[DEPTH > 0], atol=6e-4)


def test_parquet_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "rooms"
    images = [write_image(folder / f"{i}.jpg", seed=i).read_bytes() for i in range(5)]
    depths = [write(tmp_path / f"{i}.png", MILLIMETRES + np.uint16(i)).read_bytes() for i in range(5)]
    image_cells = [{"bytes": data, "path": None} for data in images[:4]] + [{"bytes": None, "path": "4.jpg"}]
    table = {"image": image_cells, "depth_map": depths, "frame": list(range(5)), "caption": ["x"] * 5}
    parquet.write_table(pyarrow.table(table), folder / "train-00000-of-00001.parquet", row_group_size=2)
    result = packed(folder, tmp_path / "out", "--scale", "1000")
    for i in range(5):
        name = f"train-00000-of-00001/{i}"
        assert result.samples[name].members["jpg"] == images[i]
        assert result.facts(name)["frame"] == i
        expected = (MILLIMETRES + i) / 1000
        np.testing.assert_allclose(result.target(name)[5:], expected[5:], rtol=1e-6)


def test_parquet_without_an_image_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"pixels": [b"x"]}), tmp_path / "x.parquet")
    assert pack(tmp_path / "x.parquet", tmp_path / "out") == 2
    assert "no column image or rgb; there are pixels" in capsys.readouterr().err
    parquet.write_table(pyarrow.table({"image": [b"no image"]}), tmp_path / "x.parquet")
    assert pack(tmp_path / "x.parquet", tmp_path / "out") == 2
    assert "column 'image': no image begins with b'no image'" in capsys.readouterr().err


# --- images alone ----------------------------------------------------------------------------------------------------


def test_images_that_would_get_the_same_key(tmp_path: Path) -> None:
    for name in ("a/b.jpg", "a_b.jpg", "a_b.png", "c.jpg"):
        write_image(tmp_path / "photos" / name)
    result = packed(tmp_path / "photos", tmp_path / "out")
    keys = {name: sample.key for name, sample in result.samples.items()}
    assert keys["c.jpg"] == "c"
    assert len(set(keys.values())) == 4
    assert all(key.startswith("a_b_") for name, key in keys.items() if name != "c.jpg")


def test_label_options_mean_nothing_for_public_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["dataset=sa1b", f"root={tmp_path}", "--scale", "1000", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "leave out scale" in capsys.readouterr().err
