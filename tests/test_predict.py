"""Predicting files: what is written can be read back, nothing is overwritten, what failed is named."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from depthkit import predict as module
from depthkit.predict import find_images, main, output_bases, predict_files
from depthkit.types import Kind, Prediction


class Stub:
    """Predicts a fixed map for every readable image."""

    sha256 = "cd" * 32

    def __init__(self, kind: Kind = "disparity", unit: str = "relative, larger = nearer") -> None:
        self.kind, self.unit = kind, unit
        self.values = np.random.default_rng(0).gamma(2.0, 3.0, (20, 30)).astype(np.float32)

    def predict(self, path: Path) -> Prediction:
        if cv2.imread(str(path)) is None:
            raise ValueError(f"{path}: damaged image")
        return Prediction(values=self.values, kind=self.kind, unit=self.unit)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.JPG", "c.png"):
        cv2.imwrite(str(folder / name.lower()), np.full((20, 30, 3), 99, np.uint8))
        (folder / name.lower()).rename(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize(("kind", "unit"), [("disparity", "relative, larger = nearer"), ("depth", "metres, planar z")])
def test_values_come_back_within_half_a_code(tmp_path: Path, photos: Path, kind: Kind, unit: str):
    stub = Stub(kind, unit)
    assert predict_files(stub, output_bases([photos / "a.jpg"], tmp_path / "out")) == {}
    facts = json.loads((tmp_path / "out" / "a.json").read_text())
    codes = cv2.imread(str(tmp_path / "out" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert codes.dtype == np.uint16
    assert list(codes.shape) == facts["size"] == [20, 30]
    restored = codes / 65535 * facts["scale"] + facts["offset"]
    assert np.abs(restored - stub.values).max() <= facts["scale"] / 65535 / 2 * 1.001
    assert (facts["kind"], facts["unit"], facts["model_sha256"]) == (kind, unit, "cd" * 32)
    assert cv2.imread(str(tmp_path / "out" / "a.color.png")) is not None


def test_inputs_are_a_file_a_folder_or_a_pattern(photos: Path):
    assert [path.name for path in find_images(str(photos))] == ["a.jpg", "b.JPG", "c.png"]
    assert find_images(str(photos / "a.jpg")) == [photos / "a.jpg"]
    assert [path.name for path in find_images(str(photos.parent / "**" / "*.png"))] == ["c.png"]
    with pytest.raises(FileNotFoundError, match="no image found"):
        find_images(str(photos / "*.tiff"))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["p/a/x.jpg", "p/b/x.jpg"], ["a/x", "b/x"]),
        (["p/x.jpg", "p/y.jpg"], ["x", "y"]),
        (["p/x.jpg", "p/x.png"], ["x.jpg", "x.png"]),
        (["p/x.jpg", "p/x.color.jpg"], ["x.jpg", "x.color.jpg"]),
        (["p/v1.2/x.jpg"], ["x"]),
    ],
)
def test_no_two_images_share_a_result(inputs: list[str], expected: list[str]):
    bases = output_bases([Path(path) for path in inputs], Path("out"))
    assert [str(base) for base in bases.values()] == [f"out/{name}" for name in expected]


def test_an_input_is_never_overwritten(photos: Path):
    with pytest.raises(ValueError, match=r"c\.png would be replaced"):
        output_bases([photos / "a.jpg", photos / "c.png"], photos)


def test_an_unreadable_file_is_named_and_the_others_are_done(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (photos / "aa_broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:30])
    monkeypatch.setattr(module, "load", lambda path, device: Stub())
    out = tmp_path / "out"
    assert main(["bundle", str(photos), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "aa_broken.jpg" in captured.err
    assert "3 of 4 images" in captured.out
    assert {path.name for path in out.glob("*.json")} == {"a.json", "b.json", "c.json"}
    assert len(list(out.iterdir())) == 3 * 3


def test_success_is_exit_code_zero(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "load", lambda path, device: Stub())
    assert main(["bundle", str(photos), "--out", str(tmp_path / "out")]) == 0


def test_a_missing_bundle_is_one_line(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path / "none"), str(photos), "--out", str(tmp_path / "out")]) == 1
    assert "none is not a bundle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
