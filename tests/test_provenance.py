"""What a bundle says about its origin."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from depthkit.bundle import WEIGHTS, read_facts
from depthkit.data.manifest import load_manifest, save_manifest
from depthkit.licences import derived_licence, stated_licences
from depthkit.provenance import provenance_of_data, provenance_of_encoder
from depthkit.train import run


@pytest.fixture(scope="module")
def student(tiny_config, tmp_path_factory) -> Path:
    """The bundle of a student."""
    run_dir = tmp_path_factory.mktemp("student")
    run(tiny_config("student", run_dir))
    return run_dir / "bundle"


def test_bundle_says_where_it_comes_from(student, tiny_world, tiny_labels, tiny_teacher):
    facts = read_facts(student)
    assert (facts.content, facts.kind, facts.short_side) == ("depth_model", "disparity", 32)
    origin = facts.provenance
    assert (origin["stage"], origin["seed"], origin["steps"]) == ("student", 0, 6)
    assert origin["num_parameters"] == sum(tensor.numel() for tensor in load_file(student / WEIGHTS).values())
    images = load_manifest(tiny_world / "target_train" / "manifest.json")
    labels = load_manifest(tiny_labels)
    teacher = read_facts(tiny_teacher).sha256
    assert origin["data"]["unlabeled.target"] == {
        "name": "procedural_target",
        "split": "train",
        "num_images": 24,
        "source": "depthkit.data.procedural",
        "digest": images.digest(),
        "licence": "Apache-2.0 (generated)",
        "labels_digest": labels.digest(),
        "labels_licence": "Apache-2.0 (generated)",
        "teacher_sha256": teacher,
    }
    assert origin["teachers"].keys() == {teacher}
    source = load_manifest(tiny_world / "source_train" / "manifest.json")
    assert origin["data"]["labeled.source"]["digest"] == source.digest()
    assert origin["data"].keys() == {"labeled.source", "unlabeled.target"}
    assert origin["validation"]["val.source"]["split"] == "val"
    assert origin["encoder_weights"] is None
    assert origin["versions"]["torch"] == torch.__version__.split("+")[0]


def test_bundle_says_how_it_was_trained(student):
    settings = read_facts(student).provenance["hyperparameters"]
    assert settings["stage"]["loss"] == "affine_invariant"
    assert settings["optim"]["encoder_lr"] == 1e-3
    assert settings["batch"]["images"] == {"labeled": 2, "unlabeled": 4}
    assert settings["batch"]["crop_size"] == [32, 32]
    assert settings["numerics"]["precision"] == "32-true"


def test_licences_of_a_teacher_pass_through_its_labels(tiny_config, tiny_labels, tmp_path):
    labels = load_manifest(tiny_labels)
    assert labels.labels_of is not None
    stated = {"streets/train": "CC BY-NC 4.0"}
    save_manifest(replace(labels, labels_of=replace(labels.labels_of, teacher_licences=stated)), tmp_path / "new.json")
    config = tiny_config("student", tmp_path, f"data.unlabeled.target.labels={tmp_path / 'new.json'}")
    rows, teachers = provenance_of_data(config, ("labeled", "unlabeled"))
    assert teachers == {labels.labels_of.teacher_sha256: stated}
    assert derived_licence({"data": rows, "teachers": teachers, "encoder_weights": None}).id == "cc-by-nc-4.0"


def test_labels_that_name_no_licence_of_their_teacher_are_read_and_unknown(tiny_config, tiny_labels, tmp_path):
    """A label set from before the field: it reads, its digest is that of one without a value, nothing is assumed."""
    content = json.loads(tiny_labels.read_text())
    content["labels_of"].pop("teacher_licences", None)
    (tmp_path / "old.json").write_text(json.dumps(content))
    content["labels_of"]["teacher_licences"] = None
    (tmp_path / "empty.json").write_text(json.dumps(content))
    assert load_manifest(tmp_path / "old.json").digest() == load_manifest(tmp_path / "empty.json").digest()
    assert load_manifest(tmp_path / "old.json").digest() != load_manifest(tiny_labels).digest()
    config = tiny_config("student", tmp_path, f"data.unlabeled.target.labels={tmp_path / 'old.json'}")
    rows, teachers = provenance_of_data(config, ("labeled", "unlabeled"))
    assert teachers == {content["labels_of"]["teacher_sha256"]: {}}
    derived = derived_licence({"data": rows, "teachers": teachers, "encoder_weights": None})
    assert derived.id == "unknown"
    assert f"teacher {content['labels_of']['teacher_sha256'][:12]}" in derived.summary


@pytest.mark.parametrize("licences", [3, ["MIT"], {"streets": None}])
def test_licences_of_a_teacher_of_another_type_are_refused(tiny_labels, tmp_path, licences):
    content = json.loads(tiny_labels.read_text())
    content["labels_of"]["teacher_licences"] = licences
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json: labels_of\.teacher_licences"):
        load_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("encoder", "name", "licence"),
    [
        ("vit_small_patch14_dinov2", "timm vit_small_patch14_dinov2.lvd142m", "apache-2.0"),
        ("vit_base_patch16_224.mae", "timm vit_base_patch16_224.mae", "cc-by-nc-4.0"),
    ],
)
def test_origin_of_published_encoder_weights(tiny_config, tmp_path, encoder, name, licence):
    config = tiny_config("teacher", tmp_path, "stage.encoder_weights=timm", f"model.encoder={encoder}")
    assert provenance_of_encoder(config) == {"name": name, "sha256": "", "sources": {name: licence}}


def test_origin_of_the_encoder_of_a_bundle(student, tiny_config, tmp_path):
    facts = read_facts(student)
    origin = provenance_of_encoder(tiny_config("student", tmp_path, f"stage.encoder_weights={student}"))
    assert origin is not None
    assert (origin["name"], origin["sha256"]) == (facts.provenance["run_name"], facts.sha256)
    assert origin["sources"] == stated_licences(facts.provenance)
    assert "Apache-2.0 (generated)" in origin["sources"].values()
