"""`depthkit import`: from a published file to a bundle that predicts, trains and is exported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_table import randomise

from depthkit.bundle import read_facts
from depthkit.formats.huggingface import write_huggingface
from depthkit.formats.official import published, read_checkpoint, write_checkpoint
from depthkit.importing import main
from depthkit.inference.loading import load
from depthkit.models import build_model

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    settings = replace(published(384), encoder_args={"img_size": 70, "depth": 4}, tap_layers=[0, 1, 2, 3])
    path = tmp_path / "depth_anything_v2_vits.pth"
    write_checkpoint(randomise(build_model(settings)), path)
    return path


def test_a_checkpoint_becomes_a_bundle(checkpoint, tmp_path, capsys):
    out = tmp_path / "bundles" / "vits"
    assert main([str(checkpoint), "--out", str(out), "--taps", "v1", "--licence", "Apache-2.0"]) == 0
    assert "vit_small_patch14_dinov2 with taps 0,1,2,3 (10.1 M parameters), disparity" in capsys.readouterr().out
    facts = read_facts(out)
    assert facts.provenance["source"] == "depth_anything_v2_vits.pth"
    assert facts.provenance["licence"] == "Apache-2.0"
    assert len(facts.provenance["source_sha256"]) == 64
    prediction = load(out, device="cpu").predict(IMAGE, short_side=70)
    assert prediction.values.shape == (60, 80)
    assert prediction.kind == "disparity"


def test_a_metric_checkpoint_predicts_metres(checkpoint, tmp_path, capsys):
    arguments = [str(checkpoint), "--out", str(tmp_path / "b"), "--taps", "0,1,2,3", "--max-depth", "20"]
    assert main(arguments) == 0
    assert "depth: metres, planar z" in capsys.readouterr().out
    prediction = load(tmp_path / "b", device="cpu").predict(IMAGE, short_side=70)
    assert prediction.unit == "metres, planar z"
    assert 0 < prediction.values.min() < prediction.values.max() < 20


def test_a_folder_becomes_a_bundle(checkpoint, tmp_path):
    model, facts = read_checkpoint(checkpoint, taps="v1")
    write_huggingface(model, facts, tmp_path / "Depth-Anything-V2-Small-hf", card="")
    assert main([str(tmp_path / "Depth-Anything-V2-Small-hf"), "--out", str(tmp_path / "b")]) == 0
    assert read_facts(tmp_path / "b").provenance["source"] == "Depth-Anything-V2-Small-hf"
    assert read_facts(tmp_path / "b").model == facts.model


def test_taps_of_a_folder_are_in_its_config(checkpoint, tmp_path, capsys):
    model, facts = read_checkpoint(checkpoint, taps="v1")
    write_huggingface(model, facts, tmp_path / "hf", card="")
    for option in (["--taps", "v2"], ["--max-depth", "20.0"]):
        assert main([str(tmp_path / "hf"), "--out", str(tmp_path / "b"), *option]) == 1
        assert f"{option[0]} {option[1]}: config.json says that itself; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_an_encoder_becomes_a_start_for_training(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)
    prefix = "pretrained."
    hub = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    torch.save(hub, tmp_path / "dinov2_vits14_pretrain.pth")
    assert main([str(tmp_path / "dinov2_vits14_pretrain.pth"), "--out", str(tmp_path / "b")]) == 0
    assert "an encoder alone (7.3 M parameters), for stage.encoder_weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "b" / "model.json").read_text())["content"] == "encoder"


def test_errors_are_one_message_and_leave_nothing(checkpoint, tmp_path, capsys):
    assert main([str(checkpoint), "--out", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().err.startswith(f"depthkit import: {checkpoint}: weights do not tell which blocks")
    assert main([str(tmp_path / "none.pth"), "--out", str(tmp_path / "b")]) == 1
    assert "none.pth: no such file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth_anything_v2_vits.pth"]
