"""Hugging Face folders against `transformers` itself: same weights, same output."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from parity_table import randomise, relative_error
from torch.nn import functional as F

from depthkit.bundle import BundleError, BundleFacts, load_model, save_bundle
from depthkit.config import DPTConfig
from depthkit.formats.huggingface import read_huggingface, write_huggingface
from depthkit.formats.official import published, read_checkpoint, write_checkpoint
from depthkit.models import DepthModel, build_model
from depthkit.models.encoder import interpolate_position_embedding

transformers = pytest.importorskip("transformers", reason="comes with depthkit[dev]")

SMALL = {"img_size": 70, "embed_dim": 48, "depth": 4, "num_heads": 3}
"""Of an encoder whose parts are all there but small; 5 x 5 patches."""
GATED = SMALL | {"embed_dim": 72}


def config(encoder: str = "vit_small_patch14_dinov2", **changes: object) -> DPTConfig:
    settings = DPTConfig(
        encoder=encoder, encoder_args=SMALL, tap_layers=[0, 1, 2, 3], features=48, out_channels=[12, 24, 48, 48]
    )
    return replace(settings, **changes)


def facts(settings: DPTConfig) -> BundleFacts:
    kind = "disparity" if settings.max_depth is None else "depth"
    return BundleFacts(content="depth_model", model=settings, kind=kind, short_side=518)


def write(model: DepthModel, settings: DPTConfig, folder: Path) -> Path:
    write_huggingface(model, facts(settings), folder, card="# a model\n")
    return folder


def load_theirs(folder: Path) -> torch.nn.Module:
    """What `transformers` makes of the folder; it must want and find each key."""
    model, info = transformers.AutoModelForDepthEstimation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == "DepthAnythingForDepthEstimation"
    return model.eval()


@torch.inference_mode()
def both(model: DepthModel, theirs: torch.nn.Module, size: tuple[int, int], batch: int = 1) -> float:
    image = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    return relative_error(model(image).values, theirs(image).predicted_depth)


# --- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "depth"), [(384, 12), (768, 6), (1024, 4)], ids=["S", "B with 6 blocks", "L with 4 blocks"]
)
def test_published_shapes_at_518(width, depth, tmp_path):
    settings = published(width)
    settings = replace(settings, encoder_args={"img_size": 518, "depth": depth}, tap_layers=list(range(depth))[-4:])
    model = randomise(build_model(settings))
    assert both(model, load_theirs(write(model, settings, tmp_path / "hf")), (518, 518)) <= 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(tap_layers=[0, 1, 3, 4], encoder_args=SMALL | {"depth": 6}),
        config("vit_giant_patch14_dinov2", encoder_args=GATED),
        config("vit_tiny_patch16_224", encoder_args=SMALL | {"patch_size": 8, "img_size": 64, "init_values": 0.1}),
        config(encoder_args=SMALL | {"mlp_ratio": 2}),
        config(features=16),
        config(max_depth=20.0),
    ],
    ids=["relative", "other taps", "SwiGLU", "patch 8", "narrow MLP", "narrow head", "metric"],
)
def test_output_is_that_of_transformers(settings, tmp_path):
    model = randomise(build_model(settings))
    theirs = load_theirs(write(model, settings, tmp_path / "hf"))
    side = settings.encoder_args["img_size"]
    assert both(model, theirs, (side, side), batch=2) <= 1e-5
    assert theirs.config.depth_estimation_type == ("relative" if settings.max_depth is None else "metric")


def test_a_wrong_tap_would_be_seen(tmp_path):
    settings = config(encoder_args=SMALL | {"depth": 6})
    model = randomise(build_model(settings))
    folder = write(model, settings, tmp_path / "hf")
    content = json.loads((folder / "config.json").read_text())
    content["backbone_config"] |= {
        "out_indices": [1, 2, 3, 5],
        "out_features": None,
    }
    (folder / "config.json").write_text(json.dumps(content))
    assert both(model, load_theirs(folder), (70, 70)) > 1e-2


@pytest.mark.parametrize("size", [(70, 98), (42, 56), (112, 70)])
def test_other_sizes_differ_by_the_position_embedding_alone(size, tmp_path, monkeypatch):
    """DINOv2 and Depth Anything scale by (h + 0.1) / g, `transformers` to the size h; with ours in its place nothing is
    left of the difference."""
    settings = config()
    model = randomise(build_model(settings))
    theirs = load_theirs(write(model, settings, tmp_path / "hf"))
    assert both(model, theirs, size) > 1e-3
    embeddings = theirs.backbone.embeddings
    monkeypatch.setattr(
        embeddings,
        "interpolate_pos_encoding",
        lambda tokens, height, width: interpolate_position_embedding(
            embeddings.position_embeddings, (height // 14, width // 14), 1
        ),
    )
    assert both(model, theirs, size) <= 1e-5


def test_their_position_embedding_is_scaled_to_the_size():
    """What `transformers` does, so that a change there is seen here."""
    embedding = torch.randn(1, 26, 8)
    patches = embedding[:, 1:].reshape(1, 5, 5, 8).permute(0, 3, 1, 2)
    plain = F.interpolate(patches, size=(7, 4), mode="bicubic").flatten(2).transpose(1, 2)
    theirs = transformers.models.dinov2.modeling_dinov2.Dinov2Embeddings(
        transformers.Dinov2Config(hidden_size=8, image_size=70, patch_size=14)
    )
    theirs.position_embeddings.data = embedding
    found = theirs.interpolate_pos_encoding(torch.zeros(1, 1 + 28, 8), 98, 56)
    torch.testing.assert_close(found[:, 1:], plain)


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [config(), config(max_depth=80.0), config("vit_giant_patch14_dinov2", encoder_args=GATED)],
    ids=["relative", "metric", "SwiGLU"],
)
def test_bundle_to_folder_to_bundle_is_bit_for_bit(settings, tmp_path):
    model = randomise(build_model(settings))
    first, _ = load_model(save_bundle(tmp_path / "first", model, facts(settings)))
    read, read_facts = read_huggingface(write(first, settings, tmp_path / "hf"))
    second, second_facts = load_model(save_bundle(tmp_path / "second", read, read_facts))
    assert second_facts.model == settings
    assert (second_facts.kind, second_facts.short_side) == (facts(settings).kind, 518)
    assert (second_facts.mean, second_facts.std) == (facts(settings).mean, facts(settings).std)
    assert second.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("width", [384, 768, 1024])
def test_published_models_come_back_with_their_own_settings(width, tmp_path):
    """Settings alone; `transformers` writes and reads them once, as a folder from the hub went through it."""
    from depthkit.formats.huggingface import model_config, model_settings

    settings = published(width)
    with torch.device("meta"):
        model = build_model(settings)
    (tmp_path / "config.json").write_text(json.dumps(model_settings(model, facts(settings))))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "transformers_version" in content
    assert model_config(content, tmp_path / "config.json") == settings


def test_folder_of_the_hub_that_leaves_defaults_out(tmp_path):
    """The config of Depth-Anything-V2-Small-hf: it names neither the number of blocks nor the MLP."""
    from depthkit.formats.huggingface import model_config

    content = {
        "architectures": ["DepthAnythingForDepthEstimation"],
        "backbone": None,
        "backbone_config": {
            "architectures": ["Dinov2Model"],
            "hidden_size": 384,
            "image_size": 518,
            "model_type": "dinov2",
            "num_attention_heads": 6,
            "out_features": ["stage3", "stage6", "stage9", "stage12"],
            "out_indices": [3, 6, 9, 12],
            "patch_size": 14,
            "reshape_hidden_states": False,
        },
        "fusion_hidden_size": 64,
        "head_hidden_size": 32,
        "head_in_index": -1,
        "model_type": "depth_anything",
        "neck_hidden_sizes": [48, 96, 192, 384],
        "patch_size": 14,
        "reassemble_factors": [4, 2, 1, 0.5],
        "reassemble_hidden_size": 384,
    }
    assert model_config(content, tmp_path) == published(384)
    del content["backbone_config"]["out_indices"]
    assert model_config(content, tmp_path).tap_layers == [2, 5, 8, 11]


def test_folder_that_transformers_wrote(tmp_path):
    """Their own initialisation and their own `save_pretrained`, safetensors in several files or one."""
    backbone = transformers.Dinov2Config(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    theirs = randomise(
        transformers.DepthAnythingForDepthEstimation(
            transformers.DepthAnythingConfig(
                backbone_config=backbone,
                reassemble_hidden_size=48,
                neck_hidden_sizes=[12, 24, 48, 48],
                fusion_hidden_size=48,
                depth_estimation_type="metric",
                max_depth=20,
            )
        )
    )
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "one", tmp_path / "many"):
        model, found = read_huggingface(folder)
        assert both(model, theirs, (70, 70)) <= 1e-5
        assert (found.kind, found.model.max_depth) == ("depth", 20)


def test_pth_and_folder_of_one_model_are_one_model(tmp_path):
    settings = replace(published(384), encoder_args={"img_size": 70, "depth": 4}, tap_layers=[0, 1, 2, 3])
    model = randomise(build_model(settings))
    write_checkpoint(model, tmp_path / "model.pth")
    from_pth, _ = read_checkpoint(tmp_path / "model.pth", taps="v1")
    assert both(from_pth, load_theirs(write(model, settings, tmp_path / "hf")), (70, 70)) <= 1e-5


# --- image processor -------------------------------------------------------------------------------------------------


def test_processor_gives_the_size_that_we_predict_at(tmp_path):
    from depthkit.data.windows import inference_size

    settings = config()
    folder = write(randomise(build_model(settings)), settings, tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for size in ((600, 800), (1200, 900), (518, 518), (700, 2000)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert tuple(pixels.shape[-2:]) == inference_size(size, 518, 14)
        smooth = cv2.GaussianBlur(image, (0, 0), 9)
        pixels = processor(smooth, return_tensors="np")["pixel_values"][0]
        resized = cv2.resize(smooth / 255, pixels.shape[:0:-1], interpolation=cv2.INTER_CUBIC)
        expected = ((resized - facts(settings).mean) / facts(settings).std).transpose(2, 0, 1)
        assert np.abs(pixels - expected).max() < 0.1  # 8-bit rounding and another cubic filter


def test_pipeline_takes_the_folder(tmp_path):
    from PIL import Image

    settings = config()
    folder = write(randomise(build_model(settings)), settings, tmp_path / "hf")
    pipeline = transformers.pipeline("depth-estimation", model=str(folder), device="cpu")
    result = pipeline(Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)))
    assert result["depth"].size == (100, 80)
    assert np.isfinite(np.asarray(result["predicted_depth"])).all()


# --- what is refused, and what is written ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    settings = config()
    return write(randomise(build_model(settings)), settings, tmp_path / "hf")


def change(folder: Path, backbone: dict[str, object] | None = None, **values: object) -> None:
    content = json.loads((folder / "config.json").read_text()) | values
    content["backbone_config"] |= backbone or {}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("backbone", "values", "message"),
    [
        ({}, {"model_type": "dpt"}, r"model_type='dpt': only depth_anything can be read"),
        ({"model_type": "swin"}, {}, r"only a backbone of model_type dinov2"),
        ({}, {"head_hidden_size": 16}, r"head_hidden_size=16: this model has 32"),
        ({}, {"reassemble_factors": [4, 2, 1, 1]}, r"reassemble_factors=\[4, 2, 1, 1\]"),
        ({"hidden_act": "relu"}, {}, r"backbone_config\.hidden_act='relu': this model has 'gelu'"),
        ({"out_indices": None, "out_features": None}, {}, r"which blocks are tapped"),
        ({"num_hidden_layers": 5}, {}, r"missing: backbone\.encoder\.layer\.4\.attention\.attention\.key\.bias"),
        ({"num_hidden_layers": 4, "out_indices": [1, 2, 3, 5]}, {}, r"tap_layers=\[0, 1, 2, 4\]"),
        ({}, {"fusion_hidden_size": 32}, r"differences"),
    ],
)
def test_settings_that_our_model_cannot_follow(folder, backbone, values, message):
    change(folder, backbone, **values)
    with pytest.raises(ValueError, match=message) as error:
        read_huggingface(folder)
    assert str(folder) in str(error.value) or "tap_layers" in str(error.value)


def test_missing_and_damaged_files(folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BundleError, match=r"model\.safetensors is no checkpoint, or a damaged one"):
        read_huggingface(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors: no such file"):
        read_huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json is not JSON"):
        read_huggingface(folder)
    with pytest.raises(BundleError, match=r"config\.json: no such file"):
        read_huggingface(tmp_path / "none")


def test_folder_is_written_as_a_whole(tmp_path, monkeypatch):
    settings = config()
    model = build_model(settings)
    monkeypatch.setattr("depthkit.formats.huggingface.processor_settings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(model, settings, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_card_is_the_readme(folder):
    assert (folder / "README.md").read_text() == "# a model\n"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_a_range_that_is_no_whole_number(tmp_path):
    settings = config(max_depth=0.5)
    with pytest.raises(BundleError, match=r"model\.max_depth=0\.5: transformers knows whole metres only"):
        write(build_model(settings), settings, tmp_path / "hf")
