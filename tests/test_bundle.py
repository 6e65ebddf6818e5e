"""The hand-over format: nothing is lost, nothing wrong is accepted, and what comes out says what it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import depthkit
from depthkit import bundle as bundle_module
from depthkit.bundle import (
    FACTS,
    WEIGHTS,
    BundleError,
    BundleFacts,
    load_encoder_weights,
    load_model,
    read_facts,
    save_bundle,
    sha256,
)
from depthkit.config import DPTConfig
from depthkit.inference.loading import load
from depthkit.models import DepthModel, build_encoder, build_model

MODEL = DPTConfig(
    encoder="vit_tiny_patch16_224",
    encoder_args={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    conv_stem=True,
    tap_layers=[0, 1, 2, 3],
    features=16,
    out_channels=[8, 8, 16, 16],
)


def facts(**changes: object) -> BundleFacts:
    settings = {"content": "depth_model", "model": MODEL, "kind": "disparity", "short_side": 32}
    return BundleFacts(**{**settings, **changes})


def model(seed: int = 0) -> DepthModel:
    torch.manual_seed(seed)
    return build_model(MODEL)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_bundle(tmp_path / "bundle", model(), facts(provenance={"seed": 3}))


def change(folder: Path, **values: object) -> None:
    """Overwrite facts; None removes one."""
    text = json.loads((folder / FACTS).read_text()) | values
    (folder / FACTS).write_text(json.dumps({key: value for key, value in text.items() if value is not None}))


def change_weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Other weights, with their true sha256."""
    save_file(state, folder / WEIGHTS)
    change(folder, sha256=sha256(folder / WEIGHTS))


# --- round trip ------------------------------------------------------------------------------------------------------


def test_round_trip_bit_for_bit(folder):
    saved = model()
    loaded, read = load_model(folder)
    assert not loaded.training
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())
    image = torch.randn(1, 3, 40, 24)
    assert torch.equal(loaded(image).values, saved.eval()(image).values)
    assert read.model == MODEL
    assert read.provenance == {"seed": 3}
    assert read.sha256 == sha256(folder / WEIGHTS)


def test_folder_holds_two_files_and_says_its_version(folder):
    assert sorted(path.name for path in folder.iterdir()) == [FACTS, WEIGHTS]
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
    text = json.loads((folder / FACTS).read_text())
    assert (text["format"], text["depthkit"], text["kind"]) == (1, depthkit.__version__, "disparity")


def test_saving_again_replaces_the_whole(folder):
    save_bundle(folder, model(seed=1), facts(short_side=64))
    loaded, read = load_model(folder)
    assert read.short_side == 64
    assert torch.equal(
        loaded.state_dict()["decoder.head_in.weight"], model(seed=1).state_dict()["decoder.head_in.weight"]
    )
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_same_model_gives_the_same_sha256(folder, tmp_path):
    again = save_bundle(tmp_path / "again", model(), facts(provenance={"other": 1}))
    assert read_facts(again).sha256 == read_facts(folder).sha256
    other = save_bundle(tmp_path / "other", model(seed=1), facts())
    assert read_facts(other).sha256 != read_facts(folder).sha256


# --- the process dies while writing ----------------------------------------------------------------------------------


def die(*_: object, **__: object) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize("step", ["save_file", "sync_to_disk", "sha256"])
def test_failure_while_writing_leaves_the_old_bundle(folder, monkeypatch, step):
    monkeypatch.setattr(bundle_module, step, die)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(folder, model(seed=1), facts())
    monkeypatch.undo()
    assert read_facts(folder).provenance == {"seed": 3}
    load_model(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("number", [0, 1])
def test_failure_of_a_rename_leaves_the_old_bundle(folder, monkeypatch, number):
    """Of the two renames that put the new bundle in the place of the old one, either may fail."""
    rename, calls = Path.rename, []

    def fail_once(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == number + 1:
            die()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(folder, model(seed=1), facts())
    assert read_facts(folder).provenance == {"seed": 3}
    load_model(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_first_bundle_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "save_file", die)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(tmp_path / "bundle", model(), facts())
    assert list(tmp_path.iterdir()) == []


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_files(folder, tmp_path):
    with pytest.raises(BundleError, match=r"none is not a bundle: it holds no model\.json"):
        load(tmp_path / "none")
    (folder / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"holds no model\.safetensors"):
        load(folder)


def test_wrong_sha256(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{WEIGHTS}: sha256 is [0-9a-f]{{64}}, model\.json says [0-9a-f]{{64}}"):
        load(folder)
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match="sha256"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "reads format 1"),
        ({"format": None}, "reads format 1"),
        ({"kind": None}, "kind"),
        ({"colour": "blue"}, "colour"),
        ({"model": {"encoder": "vit", "depth": 3}}, "depth"),
        ({"model": None}, "model"),
        ({"kind": "normals"}, "kind='normals'"),
        ({"content": "pose"}, "content='pose'"),
    ],
)
def test_facts_that_cannot_be(folder, values, message):
    change(folder, **values)
    with pytest.raises(BundleError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_facts_that_are_no_json(folder):
    (folder / FACTS).write_text("{")
    with pytest.raises(BundleError, match=r"model\.json is not JSON"):
        load(folder)
    (folder / FACTS).write_text("[]")
    with pytest.raises(BundleError, match=r"model\.json"):
        load(folder)


def test_weights_that_do_not_fit_are_listed(folder):
    state = load_file(folder / WEIGHTS)
    del state["decoder.head_in.bias"]
    state["decoder.extra"] = torch.zeros(1)
    state["encoder.mask_token"] = torch.zeros(1, 7)
    change_weights(folder, state)
    with pytest.raises(BundleError, match=r"does not fit the model \(3 differences\)") as error:
        load(folder)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  missing: decoder.head_in.bias",
        "  shape: encoder.mask_token is (1, 7), the model has (1, 32)",
        "  unexpected: decoder.extra",
    ]


def test_encoder_alone_cannot_predict(tmp_path):
    folder = save_bundle(tmp_path / "encoder", model().encoder, facts(content="encoder"))
    with pytest.raises(
        BundleError, match=r"holds an encoder alone: it cannot predict; use it as stage\.encoder_weights"
    ):
        load(folder)


@pytest.mark.parametrize("content", ["encoder", "depth_model"])
def test_encoder_weights_of_either_bundle(tmp_path, content):
    source = model()
    folder = save_bundle(tmp_path / "b", source if content == "depth_model" else source.encoder, facts(content=content))
    torch.manual_seed(1)
    encoder = build_encoder(MODEL)
    load_encoder_weights(encoder, folder)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in source.encoder.state_dict().items())


def test_encoder_weights_of_another_architecture(folder):
    other = DPTConfig(**{**vars(MODEL), "encoder_args": {**MODEL.encoder_args, "embed_dim": 64}})
    with pytest.raises(BundleError, match="shape: vit"):
        load_encoder_weights(build_encoder(other), folder)
