"""Predicting: what comes out has the size of the image and says what it is; what is no image is named."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import depthkit
from depthkit.bundle import FACTS, WEIGHTS, sha256
from depthkit.data.quarantine import SampleError
from depthkit.inference import Predictor, load


@pytest.fixture(scope="module")
def predictor(tiny_teacher) -> Predictor:
    return load(tiny_teacher, device="cpu")


@pytest.fixture
def folder(tiny_teacher, tmp_path) -> Path:
    return shutil.copytree(tiny_teacher, tmp_path / "bundle")


def change(folder: Path, **values: object) -> None:
    text = json.loads((folder / FACTS).read_text()) | values
    (folder / FACTS).write_text(json.dumps(text))


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (50, 33), (7, 90), (1, 1)])
def test_prediction_has_the_size_of_the_image(predictor, size):
    prediction = predictor.predict(np.zeros((*size, 3), np.uint8))
    assert prediction.values.shape == size
    assert prediction.values.dtype == np.float32
    assert np.isfinite(prediction.values).all()
    assert prediction.values.min() >= 0


def test_prediction_at_the_size_of_the_model_is_the_models_output(predictor):
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    tensor = torch.from_numpy(((image / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        expected = predictor.model(tensor).values[0].numpy()
    np.testing.assert_allclose(predictor.predict(image).values, expected, rtol=1e-4, atol=1e-5)


def test_array_path_and_list_agree(predictor, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), image[..., ::-1])
    one = predictor.predict(image).values
    many = predictor.predict([image, tmp_path / "image.png", str(tmp_path / "image.png")])
    assert len(many) == 3
    assert all(np.array_equal(prediction.values, one) for prediction in many)
    assert predictor.predict([]) == []


def test_short_side_changes_the_resolution_of_the_model(predictor):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    coarse, fine = predictor.predict(image), predictor.predict(image, short_side=64)
    assert coarse.values.shape == fine.values.shape
    assert not np.allclose(coarse.values, fine.values)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((32, 40), np.uint8), r"shape \(32, 40\), uint8"),
        (np.zeros((32, 40, 4), np.uint8), r"shape \(32, 40, 4\), uint8"),
        (np.zeros((3, 32, 40), np.uint8), r"shape \(3, 32, 40\), uint8"),
        (np.zeros((32, 40, 3), np.float32), r"shape \(32, 40, 3\), float32"),
        (np.zeros((0, 40, 3), np.uint8), r"shape \(0, 40, 3\), uint8"),
    ],
)
def test_arrays_that_are_no_image(predictor, image, message):
    with pytest.raises(ValueError, match=r"expected an \(H, W, 3\) uint8 RGB image, got " + message):
        predictor.predict(image)


def test_other_objects_are_no_image(predictor):
    with pytest.raises(ValueError, match=r"image or a path, got Tensor"):
        predictor.predict(torch.zeros(3, 8, 8))


def test_files_that_are_no_image(predictor, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SampleError, match=r"notes\.txt"):
        predictor.predict(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        predictor.predict(tmp_path / "none.jpg")


def test_public_entry_carries_kind_unit_and_hash(folder):
    loaded = depthkit.load(str(folder), device="cpu")
    prediction = loaded.predict(np.zeros((8, 8, 3), np.uint8))
    assert (prediction.kind, prediction.unit) == ("disparity", "relative, larger = nearer")
    assert (loaded.kind, loaded.unit) == ("disparity", "relative, larger = nearer")
    assert loaded.sha256 == sha256(folder / WEIGHTS)
    change(folder, kind="depth")
    assert depthkit.load(str(folder), device="cpu").predict(np.zeros((8, 8, 3), np.uint8)).unit == "metres, planar z"


def test_a_copied_bundle_is_the_same_bundle(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert load(copy, device="cpu").sha256 == load(folder, device="cpu").sha256
