"""The .pth files of Depth Anything and DINOv2: keys written out from their code, round trips, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_table import randomise
from torch import Tensor

from depthkit.bundle import BundleError, BundleFacts, load_model, save_bundle
from depthkit.config import ModelConfig
from depthkit.formats.official import parse_taps, read_checkpoint, recognise_encoder, write_checkpoint
from depthkit.models import build_model

WIDTHS = {"vits": 384, "vitb": 768, "vitl": 1024, "vitg": 1536}
DEPTHS = {"vits": 12, "vitb": 12, "vitl": 24, "vitg": 40}
PUBLISHED = {
    "vits": (239, 24_785_089),
    "vitb": (239, 97_470_785),
    "vitl": (407, 335_315_649),
    "vitg": (631, 1_258_132_225),
}
V2_TAPS = {"vits": [2, 5, 8, 11], "vitb": [2, 5, 8, 11], "vitl": [4, 11, 17, 23], "vitg": [9, 19, 29, 39]}


def dinov2_keys(depth: int, *, is_gated: bool = False) -> set[str]:
    """The names in DINOv2's checkpoints (dinov2/models/vision_transformer.py)."""
    pairs = ["patch_embed.proj", "norm"]
    for block in (f"blocks.{index}" for index in range(depth)):
        mlp = ("w12", "w3") if is_gated else ("fc1", "fc2")
        pairs += [f"{block}.{name}" for name in ("norm1", "norm2", "attn.qkv", "attn.proj")]
        pairs += [f"{block}.mlp.{name}" for name in mlp]
    keys = {f"{name}.{part}" for name in pairs for part in ("weight", "bias")}
    keys |= {f"blocks.{index}.{scale}.gamma" for index in range(depth) for scale in ("ls1", "ls2")}
    return keys | {"cls_token", "pos_embed", "mask_token"}


def depth_anything_keys(depth: int, *, is_gated: bool = False) -> set[str]:
    """The names in Depth Anything's checkpoints (depth_anything_v2/dpt.py, util/blocks.py)."""
    pairs = [f"projects.{level}" for level in range(4)] + [f"resize_layers.{level}" for level in (0, 1, 3)]
    for level in range(1, 5):
        pairs += [f"scratch.refinenet{level}.out_conv"]
        pairs += [f"scratch.refinenet{level}.resConfUnit{unit}.conv{conv}" for unit in (1, 2) for conv in (1, 2)]
    pairs += ["scratch.output_conv1", "scratch.output_conv2.0", "scratch.output_conv2.2"]
    head = {f"depth_head.{name}.{part}" for name in pairs for part in ("weight", "bias")}
    head |= {f"depth_head.scratch.layer{level}_rn.weight" for level in range(1, 5)}
    return head | {f"pretrained.{key}" for key in dinov2_keys(depth, is_gated=is_gated)}


Config = Callable[..., ModelConfig]


@pytest.fixture(scope="module")
def config(compose) -> Config:
    """`config("vits", depth=4)`: the published model, with fewer blocks and smaller images to be fast."""

    def smaller(name: str, *, depth: int = 4, taps: tuple[int, ...] = (0, 1, 2, 3), **changes: object) -> ModelConfig:
        full: ModelConfig = compose("data=tiny_teacher", f"model={name}").model
        return replace(full, encoder_args={"img_size": 70, "depth": depth}, tap_layers=list(taps), **changes)

    return smaller


@pytest.fixture
def checkpoint(config, tmp_path) -> Path:
    path = tmp_path / "depth_anything_v2_vits.pth"
    write_checkpoint(randomise(build_model(config("vits"))), path)
    return path


def load(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state


# --- keys and round trips --------------------------------------------------------------------------------------------


def keys_and_shapes(settings: ModelConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What would be written for a model, without memory for its weights."""
    written: dict[str, Tensor] = {}
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "save", lambda state, file: written.update(state))
        patch.setattr(Tensor, "cpu", lambda tensor: tensor)
        write_checkpoint(build_model(settings), folder / "x.pth")
    return written


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_are_those_of_the_original(compose, name, tmp_path, monkeypatch):
    settings = compose("data=tiny_teacher", f"model={name}").model
    written = keys_and_shapes(settings, tmp_path, monkeypatch)
    assert written.keys() == depth_anything_keys(DEPTHS[name], is_gated=name == "vitg")
    num_keys, num_parameters = PUBLISHED[name]
    assert len(written) == num_keys
    assert sum(tensor.numel() for tensor in written.values()) == num_parameters
    assert written["pretrained.pos_embed"].shape == (1, 1370, WIDTHS[name])
    assert written["pretrained.mask_token"].shape == (1, WIDTHS[name])


@pytest.mark.parametrize("name", ["vits", "vitb"])
def test_bundle_to_pth_to_bundle_is_bit_for_bit(config, name, tmp_path):
    settings = config(name)
    model = randomise(build_model(settings))
    facts = BundleFacts(content="depth_model", model=settings, kind="disparity", short_side=518)
    first, _ = load_model(save_bundle(tmp_path / "first", model, facts))
    write_checkpoint(first, tmp_path / "model.pth")
    read, read_facts = read_checkpoint(tmp_path / "model.pth", taps="0,1,2,3")
    second, second_facts = load_model(save_bundle(tmp_path / "second", read, read_facts))
    assert second_facts.model == settings
    assert second.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in model.state_dict().items())
    image = torch.randn(1, 3, 42, 56)
    with torch.no_grad():
        assert torch.equal(model(image).values, second(image).values)


def test_file_is_flat_and_holds_no_python_objects(checkpoint):
    state = load(checkpoint)
    assert all(type(tensor) is Tensor for tensor in state.values())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3, "previous_best": {"d1": 0.9}, "optimizer": {"state": {}}},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
        lambda state: {"state_dict": state},
        lambda state: {key: tensor.half() for key, tensor in state.items()},
    ],
    ids=["model", "module.", "model of module.", "state_dict", "half precision"],
)
def test_wrapped_files(checkpoint, wrap, tmp_path):
    expected, _ = read_checkpoint(checkpoint, taps="0,1,2,3")
    torch.save(wrap(load(checkpoint)), tmp_path / "wrapped.pth")
    found, _ = read_checkpoint(tmp_path / "wrapped.pth", taps="0,1,2,3")
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], tensor, rtol=1e-3, atol=1e-3)
        assert found.state_dict()[key].dtype == torch.float32


def test_parts_lie_where_the_original_has_them(checkpoint):
    """A few weights by hand: a name that is mapped to its neighbour would still make a round trip."""
    state = load(checkpoint)
    model, _ = read_checkpoint(checkpoint, taps="0,1,2,3")
    pairs = {
        "pretrained.blocks.2.ls1.gamma": model.encoder.vit.blocks[2].ls1.gamma,
        "pretrained.blocks.1.mlp.fc2.bias": model.encoder.vit.blocks[1].mlp.fc2.bias,
        "depth_head.projects.1.weight": model.decoder.projects[1].weight,
        "depth_head.resize_layers.3.bias": model.decoder.resizes[3].bias,
        "depth_head.scratch.layer1_rn.weight": model.decoder.to_features[0].weight,
        "depth_head.scratch.refinenet4.resConfUnit2.conv1.weight": model.decoder.fusions[3].refine.conv1.weight,
        "depth_head.scratch.refinenet1.resConfUnit1.conv2.bias": model.decoder.fusions[0].merge.conv2.bias,
        "depth_head.scratch.refinenet2.out_conv.bias": model.decoder.fusions[1].project.bias,
        "depth_head.scratch.output_conv1.bias": model.decoder.head_in.bias,
        "depth_head.scratch.output_conv2.2.weight": model.decoder.head_out[2].weight,
    }
    for name, weight in pairs.items():
        assert torch.equal(state[name], weight), name


# --- what weights do not tell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_taps_of_the_versions(compose, name, tmp_path, monkeypatch):
    settings = compose("data=tiny_teacher", f"model={name}").model
    found = recognise_encoder(keys_and_shapes(settings, tmp_path, monkeypatch), "pretrained.", tmp_path)
    assert found == settings
    assert parse_taps("v2", found, tmp_path) == V2_TAPS[name]
    assert parse_taps("v1", found, tmp_path) == list(range(DEPTHS[name]))[-4:]


def test_taps_are_asked_for(checkpoint):
    with pytest.raises(BundleError, match=r"weights do not tell which blocks are tapped; give --taps v1 .*suggests v2"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("taps", ["v3", "1,2,3", "0,1,2,4", "3,2,1,0", "1,1,2,3", "v2", ""])
def test_taps_that_cannot_be(checkpoint, taps):
    """The file has four blocks, so that V2's blocks are none of its."""
    with pytest.raises(BundleError, match=r"expected v1, v2 or four increasing block numbers below 4"):
        read_checkpoint(checkpoint, taps=taps)


def test_metric_model(checkpoint):
    model, facts = read_checkpoint(checkpoint, taps="v1", max_depth=80)
    relative, _ = read_checkpoint(checkpoint, taps="v1")
    assert (facts.kind, facts.model.max_depth) == ("depth", 80)
    logits = {}
    relative.decoder.head_out[2].register_forward_hook(lambda _, __, output: logits.update(values=output[:, 0]))
    image = torch.randn(1, 3, 42, 56)
    with torch.no_grad():
        relative(image)
        torch.testing.assert_close(model(image).values, 80 * logits["values"].sigmoid())


def test_range_is_asked_for_where_the_name_says_metric(checkpoint):
    path = checkpoint.rename(checkpoint.with_name("depth_anything_v2_metric_vkitti_vits.pth"))
    with pytest.raises(BundleError, match=r"is metric by its name: give --max-depth"):
        read_checkpoint(path, taps="v1")
    assert read_checkpoint(path, taps="v1", max_depth=80)[1].kind == "depth"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_listed(checkpoint):
    state = load(checkpoint)
    del state["depth_head.projects.2.bias"], state["pretrained.blocks.3.ls1.gamma"]
    state["depth_head.scratch.output_conv3.weight"] = torch.zeros(1)
    torch.save(state, checkpoint)
    with pytest.raises(BundleError, match="looks like a Depth Anything checkpoint, but does not fit it") as error:
        read_checkpoint(checkpoint, taps="v1")
    assert str(error.value).splitlines()[1:] == [
        "  missing: depth_head.projects.2.bias",
        "  missing: pretrained.blocks.3.ls1.gamma",
        "  unexpected: depth_head.scratch.output_conv3.weight",
    ]


def test_a_shape_that_does_not_fit_is_named(checkpoint):
    state = load(checkpoint)
    state["depth_head.scratch.output_conv1.bias"] = torch.zeros(5)
    torch.save(state, checkpoint)
    with pytest.raises(BundleError, match=r"head_in\.bias is \(5,\), the model has \(32,\)"):
        read_checkpoint(checkpoint, taps="v1")


@pytest.mark.parametrize(
    ("state", "description"),
    [
        ({"core.core.pretrained.cls_token": 0, "seed_bin_regressor.x": 0}, "a ZoeDepth checkpoint"),
        ({"pretrained.model.blocks.0.x": 0, "scratch.x": 0}, "a MiDaS or DPT checkpoint"),
        ({"layer1.0.conv1.weight": 0, "fc.weight": 0}, "a ResNet"),
        ({"backbone.embeddings.cls_token": 0}, "a Hugging Face DepthAnythingForDepthEstimation"),
        ({"something": 0, "else": 0}, r"no model that is known here \(2 entries: else, something"),
    ],
)
def test_other_files_are_described(tmp_path, state, description):
    torch.save({key: torch.zeros(1) for key in state}, tmp_path / "x.pth")
    with pytest.raises(BundleError, match=rf"x\.pth looks like .*{description}"):
        read_checkpoint(tmp_path / "x.pth", taps="v1")


def test_another_width_is_none_of_the_published(checkpoint):
    state = load(checkpoint)
    state["pretrained.pos_embed"] = torch.zeros(1, 26, 400)
    torch.save(state, checkpoint)
    with pytest.raises(BundleError, match=r"none of the published sizes fits \(400; widths: vits 384, vitb 768"):
        read_checkpoint(checkpoint, taps="v1")


class Opaque:
    pass


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "is no checkpoint, or a damaged one"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is no checkpoint"),
        (lambda path: torch.save(torch.zeros(3), path), "looks like an empty file; expected a state_dict"),
        (lambda path: torch.save({"model": Opaque()}, path), "holds Python objects, which are not loaded"),
        (lambda path: torch.save({"weights": np.zeros(3)}, path), "holds Python objects, which are not loaded"),
    ],
    ids=["missing", "empty", "a pointer of git-lfs", "a tensor", "an object", "numpy"],
)
def test_files_that_are_no_checkpoint(tmp_path, write, message):
    path = tmp_path / "x.pth"
    write(path)
    with pytest.raises(BundleError, match=message) as error:
        read_checkpoint(path, taps="v1")
    assert str(path) in str(error.value)


def test_a_cut_file_is_damaged(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(BundleError, match="is no checkpoint, or a damaged one"):
        read_checkpoint(checkpoint, taps="v1")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"conv_stem": True, "encoder": "vit_tiny_patch16_224"}, "a convolutional stem"),
        ({"encoder": "vit_tiny_patch16_224"}, "no layer scale"),
        ({"encoder": "vit_base_patch16_clip_224"}, "a norm before the first block"),
        ({"encoder": "vit_small_patch14_reg4_dinov2"}, "not built as DINOv2's; export it as ONNX"),
        ({"encoder": "vit_small_patch16_dinov3"}, "not built as DINOv2's; export it as ONNX"),
    ],
)
def test_models_that_the_original_cannot_hold(config, tmp_path, changes, difference):
    settings = replace(config("vits"), **changes)
    settings.encoder_args |= {"embed_dim": 32, "num_heads": 2, "img_size": 64, "patch_size": 16}
    with pytest.raises(BundleError, match=difference):
        write_checkpoint(build_model(settings), tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []
