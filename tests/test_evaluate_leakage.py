"""An evaluation on images that a model was trained on is refused, or says so everywhere."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_evaluate import DEPTH, Stub, npy, write_dataset

from depthkit.bundle import FACTS
from depthkit.data.manifest import load_manifest
from depthkit.evaluation.evaluate import main
from depthkit.evaluation.ground_truth import EvaluationSet
from depthkit.evaluation.leakage import Leakage, find_leakage, manifests_of_run
from depthkit.evaluation.models import provenance_of
from depthkit.inference.loading import load
from depthkit.inference.predictor import Predictor


def picture(seed: int) -> np.ndarray:
    """A picture with structure of its own, which survives scaling and compression."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)


def sample(image: np.ndarray, extension: str = "png", *options: int) -> dict[str, bytes]:
    data = cv2.imencode(f".{extension}", image, options)[1].tobytes()
    return {extension: data, "depth.npy": npy(np.full(image.shape[:2], 2.0, np.float32) + np.arange(image.shape[1]))}


def dataset(folder: Path, seeds: range, name: str) -> Path:
    return write_dataset(folder, [sample(picture(seed)) for seed in seeds], DEPTH, name)


def row_of(manifest: Path) -> dict[str, str]:
    """What a bundle records of a training set."""
    content = load_manifest(manifest)
    return {"name": content.name, "split": content.split, "digest": content.digest(), "licence": "MIT"}


def trained(bundle: Path, **provenance: object) -> Predictor:
    """The model of a bundle that records this of its training."""
    facts = json.loads((bundle / FACTS).read_text())
    recorded = {"data": {}, "encoder_weights": None, **provenance}
    (bundle / FACTS).write_text(json.dumps(facts | {"provenance": recorded}))
    return load(bundle, "cpu")


@pytest.fixture
def bundle(tiny_teacher: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_teacher, tmp_path / "run" / "bundle")


def leakage_of(model: Predictor, test: Path, *training: Path) -> Leakage:
    return find_leakage({"student": model}, [EvaluationSet(test)], [str(path) for path in training], num_workers=2)


def test_a_manifest_that_was_trained_on_is_found(bundle, tmp_path):
    test, other = dataset(tmp_path / "test", range(3), "seen"), dataset(tmp_path / "other", range(3, 6), "other")
    model = trained(bundle, data={"labeled.x": row_of(test)})
    assert leakage_of(model, other).found == []
    (sentence,) = leakage_of(model, test).found
    assert sentence.startswith("student was trained on seen/test itself (training data, ")
    repacked = dataset(tmp_path / "again", range(4), "seen")
    (sentence,) = leakage_of(model, repacked).found
    assert sentence.startswith("student was trained on another packing of seen/test")


def test_what_teacher_and_encoder_were_trained_on_counts(bundle, tmp_path):
    test = dataset(tmp_path / "test", range(3), "seen")
    source = {f"seen/test ({row_of(test)['digest'][:8]})": "MIT"}
    unlabeled = {"name": "photos", "split": "train", "digest": "12" * 32, "licence": "MIT", "teacher_sha256": "f" * 64}
    taught = trained(bundle, data={"unlabeled.x": unlabeled}, teachers={"f" * 64: source})
    (sentence,) = leakage_of(taught, test).found
    assert "(teacher ffffffffffff, manifest" in sentence
    encoder = {"name": "pretrained", "sha256": "e" * 64, "sources": source}
    started = trained(bundle, data={"labeled.x": unlabeled}, encoder_weights=encoder)
    assert "(initial encoder pretrained, manifest" in leakage_of(started, test).found[0]


def test_copies_of_training_images_under_other_names_are_found(bundle, tmp_path):
    """Half the size, as a JPEG of bad quality, in a data set of another name."""
    training = dataset(tmp_path / "train", range(5), "photos")
    copy = cv2.resize(picture(2), (80, 60), interpolation=cv2.INTER_AREA)
    samples = [sample(picture(10)), sample(copy, "jpg", cv2.IMWRITE_JPEG_QUALITY, 30), sample(picture(11))]
    test = write_dataset(tmp_path / "test", samples, DEPTH, "benchmark")
    model = trained(bundle, data={"labeled.x": row_of(training)})
    unread = leakage_of(model, test)
    assert unread.found == []
    assert "not by image, for photos/test" in unread.notes[0]
    read = leakage_of(model, test, training)
    assert read.notes == []
    (sentence,) = read.found
    assert sentence.startswith("1 of 3 images of benchmark/test look like images of photos/test")
    assert "image_1 looks like image_2" in sentence
    clean = dataset(tmp_path / "clean", range(20, 24), "clean")
    assert leakage_of(model, clean, training).found == []


def test_the_folder_of_the_run_leads_to_the_training_images(bundle, tmp_path):
    training, test = dataset(tmp_path / "train", range(5), "photos"), dataset(tmp_path / "test", range(4, 8), "other")
    settings = {"data": {"labeled": {"x": {"manifest": str(training)}, "gone": {"manifest": "nowhere/manifest.json"}}}}
    (bundle.parent / "config.yaml").write_text(json.dumps(settings | {"stage": {"encoder_weights": None}}))
    assert list(manifests_of_run(bundle)) == [str(training)]
    model = trained(bundle, data={"labeled.x": row_of(training)})
    (sentence,) = leakage_of(model, test).found
    assert "1 of 4 images of other/test" in sentence
    other = trained(bundle, data={"labeled.x": row_of(test) | {"name": "unlike"}})
    assert "look like" not in " ".join(leakage_of(other, dataset(tmp_path / "third", range(1), "third")).found), (
        "a manifest that the bundle does not record is not what it was trained on"
    )


def test_the_run_of_the_initial_encoder_leads_to_its_images_too(bundle, tmp_path):
    images = dataset(tmp_path / "train", range(5), "photos")
    encoder = tmp_path / "pretrained" / "bundle"
    encoder.mkdir(parents=True)
    (encoder.parent / "config.yaml").write_text(json.dumps({"data": {"unlabeled": {"x": {"manifest": str(images)}}}}))
    (bundle.parent / "config.yaml").write_text(json.dumps({"stage": {"encoder_weights": str(encoder)}}))
    assert list(manifests_of_run(bundle)) == [str(images)]


def test_many_images_are_compared_only_when_asked_for(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("depthkit.evaluation.leakage.MAX_HASHED", 4)
    training, test = dataset(tmp_path / "train", range(5), "photos"), dataset(tmp_path / "test", range(4, 8), "other")
    (bundle.parent / "config.yaml").write_text(json.dumps({"data": {"labeled": {"x": {"manifest": str(training)}}}}))
    model = trained(bundle, data={"labeled.x": row_of(training)})
    unasked = leakage_of(model, test)
    assert unasked.found == []
    assert "not by image, for photos/test" in unasked.notes[0]
    asked = leakage_of(model, test, training)
    assert asked.notes == []
    assert "1 of 4 images of other/test" in asked.found[0]


def test_a_set_that_is_evaluated_and_trained_on_is_named_once(bundle, tmp_path):
    test = dataset(tmp_path / "test", range(3), "seen")
    (sentence,) = leakage_of(trained(bundle, data={"labeled.x": row_of(test)}), test, test).found
    assert "trained on seen/test itself" in sentence
    (sentence,) = leakage_of(trained(bundle), test, test).found
    assert "3 of 3 images of seen/test look like images of seen/test" in sentence, "given for a model without a record"


def test_what_cannot_be_checked_is_said(bundle, tmp_path):
    test = dataset(tmp_path / "test", range(3), "seen")
    (note,) = leakage_of(trained(bundle), test).notes
    assert note == "student: leakage could not be checked for training data that are not recorded"
    stub = find_leakage({"disk": Stub(lambda depth: depth)}, [EvaluationSet(test)], [], 1)
    assert "training data that are not recorded" in stub.notes[0]
    assert provenance_of(Stub(lambda depth: depth)) == {}


def test_training_images_that_cannot_be_read_are_counted(bundle, tmp_path):
    training, test = dataset(tmp_path / "train", range(5), "photos"), dataset(tmp_path / "test", range(4, 8), "other")
    settings = {"data": {"labeled": {"x": {"manifest": str(training)}}}}
    (bundle.parent / "config.yaml").write_text(json.dumps(settings))
    model = trained(bundle, data={"labeled.x": row_of(training)})
    tar = training.parent / "test-000000.tar"
    whole = tar.read_bytes()
    for change in (lambda: tar.write_bytes(whole[:-512]), tar.unlink):
        change()
        leakage = leakage_of(model, test)
        assert leakage.found == []
        assert leakage.notes[0].startswith("leakage could not be checked for 5 of the 5 images of photos/test")
    training.write_text("{}")
    (note,) = leakage_of(model, test).notes
    assert "not by image, for photos/test" in note


def test_a_set_with_labels_of_another_licence_is_named_once(bundle, tmp_path):
    test = dataset(tmp_path / "test", range(3), "seen")
    row = row_of(test) | {"labels_licence": "Apache-2.0"}
    assert len(leakage_of(trained(bundle, data={"labeled.x": row}), test).found) == 1


def test_validation_data_of_a_model_are_said_to_be_that(bundle, tmp_path):
    test = dataset(tmp_path / "test", range(3), "seen")
    model = trained(bundle, data={"labeled.x": row_of(test) | {"name": "x", "digest": "0" * 64}},
                    validation={"val.x": row_of(test)})  # fmt: skip
    found = leakage_of(model, test)
    assert found.found == []
    assert any("seen/test is validation data of student" in note for note in found.notes)


def test_the_command_refuses_leakage_unless_allowed(bundle, tmp_path, capsys):
    test, other = dataset(tmp_path / "test", range(3), "seen"), dataset(tmp_path / "other", range(3, 6), "other")
    trained(bundle, data={"labeled.x": row_of(test), "labeled.y": row_of(other)})
    out = tmp_path / "out"
    command = [f"model={bundle}", f"dataset={test}", f"out={out}", "num_pictures=1"]
    with pytest.raises(SystemExit):
        main(command)
    error = capsys.readouterr().err
    assert "run was trained on seen/test itself" in error
    assert "allow_leakage=true" in error
    assert not (out / "results.json").exists()
    assert main([*command, "allow_leakage=true"]) == 0
    warning = "LEAKAGE: run was trained on seen/test itself"
    assert warning in capsys.readouterr().out
    stored = json.loads((out / "results.json").read_text())
    assert stored["warnings"][0].startswith(warning)
    (note,) = stored["notes"]
    assert "not by image, for other/test" in note
    assert note in (out / "report.html").read_text()
    for name in ("results.tex", "report.html"):
        assert warning in (out / name).read_text(), name
