"""Encoder weights as torch.hub and timm ship them."""

from dataclasses import replace

import pytest
import torch
from test_official import WIDTHS, Config, dinov2_keys
from torch import Tensor

from depthkit.bundle import load_encoder_weights, save_bundle
from depthkit.config import ModelConfig
from depthkit.formats.official import read_checkpoint
from depthkit.models import PlainEncoder
from depthkit.models.encoder import IntermediatesEncoder, create_encoder


@pytest.fixture(scope="module")
def config(compose) -> Config:
    """`config("vits", depth=4)`: the published model, with fewer blocks and smaller images to be fast."""

    def smaller(name: str, *, depth: int = 4, taps: tuple[int, ...] = (0, 1, 2, 3), **changes: object) -> ModelConfig:
        full: ModelConfig = compose("data=tiny_teacher", f"model={name}").model
        return replace(full, encoder_args={"img_size": 70, "depth": depth}, tap_layers=list(taps), **changes)

    return smaller


def hub_state(name: str, *, depth: int = 4, registers: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """A file as DINOv2's hub has it: random values under its names and shapes."""
    width, is_gated = WIDTHS[name], name == "vitg"
    hidden = {"w12": 8192, "w3": 4096} if is_gated else {"fc1": 4 * width, "fc2": 4 * width}
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 26, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
    }
    for key in dinov2_keys(depth, is_gated=is_gated) - shapes.keys():
        layer, _, part = key.rpartition(".")
        outputs = {"qkv": 3 * width, "fc1": hidden.get("fc1"), "w12": hidden.get("w12")}.get(layer.split(".")[-1])
        inputs = {"fc2": hidden.get("fc2"), "w3": hidden.get("w3")}.get(layer.split(".")[-1], width)
        is_matrix = part == "weight" and layer.split(".")[-1] in ("qkv", "proj", "fc1", "fc2", "w12", "w3")
        shapes[key] = (outputs or width, inputs or width) if is_matrix else (outputs or width,)
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes.items()}


@pytest.mark.parametrize("name", ["vits", "vitb", "vitg"])
def test_encoder_of_the_hub(name, tmp_path):
    state = hub_state(name)
    torch.save(state, tmp_path / "dinov2_pretrain.pth")
    encoder, facts = read_checkpoint(tmp_path / "dinov2_pretrain.pth")
    assert isinstance(encoder, PlainEncoder)
    assert facts.content == "encoder"
    gate, out = ("w12", "w3") if name == "vitg" else ("fc1", "fc2")
    assert torch.equal(encoder.vit.blocks[1].mlp.fc1.weight, state[f"blocks.1.mlp.{gate}.weight"])
    assert torch.equal(encoder.vit.blocks[3].mlp.fc2.bias, state[f"blocks.3.mlp.{out}.bias"])
    assert torch.equal(encoder.mask_token, state["mask_token"])
    assert torch.equal(encoder.vit.pos_embed, state["pos_embed"])


def test_encoder_of_timm_has_no_mask_token(tmp_path):
    state = hub_state("vits")
    del state["mask_token"]
    torch.save(state, tmp_path / "vit_small_patch14_dinov2.pth")
    encoder, _ = read_checkpoint(tmp_path / "vit_small_patch14_dinov2.pth")
    assert torch.equal(encoder.mask_token, torch.zeros(1, 384))
    assert torch.equal(encoder.vit.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


def test_encoder_with_registers(tmp_path):
    """The hub adds a position to the class token and none to the registers; timm stores their sum."""
    state = hub_state("vits", registers=4)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    encoder, facts = read_checkpoint(tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    assert isinstance(encoder, IntermediatesEncoder)
    assert facts.model.encoder == "vit_small_patch14_reg4_dinov2"
    assert torch.equal(encoder.net.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(encoder.net.pos_embed, state["pos_embed"][:, 1:])
    assert torch.equal(encoder.net.reg_token, state["register_tokens"])
    # The same weights under timm's names, read as a file of timm.
    timm_state = {key.removeprefix("net."): tensor for key, tensor in encoder.state_dict().items()}
    torch.save(timm_state, tmp_path / "timm.pth")
    again, _ = read_checkpoint(tmp_path / "timm.pth")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in encoder.state_dict().items())


def test_encoder_goes_into_a_model(tmp_path, config):
    torch.save(hub_state("vits"), tmp_path / "dinov2.pth")
    bundle = save_bundle(tmp_path / "bundle", *read_checkpoint(tmp_path / "dinov2.pth"))
    settings = config("vits")
    encoder = create_encoder(settings.encoder, tap_layers=[0, 1, 2, 3], **settings.encoder_args)
    load_encoder_weights(encoder, bundle)
    assert torch.equal(encoder.vit.norm.weight, hub_state("vits")["norm.weight"])
