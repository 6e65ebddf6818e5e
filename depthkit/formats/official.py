"""The .pth files of Depth Anything V1 and V2 and of DINOv2.

Relative and metric models of V1 and V2 have the same keys and shapes: which blocks are tapped, and how far a metric
model reaches, cannot be read from the weights (Depth-Anything issue 81, Depth-Anything-V2 issue 309).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from depthkit.bundle import BundleError, BundleFacts, load_strict, sha256
from depthkit.config import CONF_DIR, DPTConfig, ModelConfig
from depthkit.files import atomic_write
from depthkit.formats.layout import Layout, describe, read_layout, read_tensors, write_layout
from depthkit.models import DepthModel, Encoder, PlainEncoder, build_encoder, build_model
from depthkit.models.dpt import DPTDecoder
from depthkit.models.encoder import ConvStem

PUBLISHED = {384: "vits", 768: "vitb", 1024: "vitl", 1536: "vitg"}
"""Width of the encoder -> its file in `conf/model`."""
SHORT_SIDE = 518
"""Pixels; the size that all of them were trained at."""

RENAMES = (
    (r"^encoder\.vit\.", "pretrained."),
    (r"^encoder\.mask_token$", "pretrained.mask_token"),
    (r"^decoder\.resizes\.", "depth_head.resize_layers."),
    (r"^decoder\.to_features\.(\d)\.", lambda found: f"depth_head.scratch.layer{int(found[1]) + 1}_rn."),
    (r"^decoder\.fusions\.(\d)\.", lambda found: f"depth_head.scratch.refinenet{int(found[1]) + 1}."),
    (r"(refinenet\d)\.merge\.", r"\1.resConfUnit1."),
    (r"(refinenet\d)\.refine\.", r"\1.resConfUnit2."),
    (r"(refinenet\d)\.project\.", r"\1.out_conv."),
    (r"^decoder\.head_in\.", "depth_head.scratch.output_conv1."),
    (r"^decoder\.head_out\.", "depth_head.scratch.output_conv2."),
    (r"^decoder\.", "depth_head."),
)
GATED_RENAMES = ((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
"""DINOv2's names for the packed SwiGLU of ViT-G."""


def official_layout(*, is_gated: bool) -> Layout:
    """The names of Depth Anything's checkpoints; `is_gated` for an encoder with SwiGLU."""
    renames = RENAMES + GATED_RENAMES if is_gated else RENAMES

    def layout(key: str) -> list[str]:
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        return [key]

    return layout


# --- reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(
    path: Path, *, taps: str | None = None, max_depth: float | None = None
) -> tuple[DepthModel | Encoder, BundleFacts]:
    """A published file as our model, in eval mode on the CPU: Depth Anything V1 or V2, or an encoder of DINOv2.

    `taps` is "v1", "v2" or four block numbers ("2,5,8,11"); `max_depth` is the range of a metric model in metres.
    BundleError lists missing and unexpected keys and says what the file looks like.
    """
    state = read_tensors(path)
    if any(key.startswith("depth_head.") for key in state):
        return read_depth_anything(state, path, taps=taps, max_depth=max_depth)
    if {"pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return read_dinov2(state, path)
    raise BundleError(
        f"{path} looks like {describe(state)}; expected Depth Anything V1 or V2 (keys pretrained.* and depth_head.*) "
        "or an encoder of DINOv2 (keys blocks.*)"
    )


def read_depth_anything(
    state: Mapping[str, Tensor], path: Path, *, taps: str | None, max_depth: float | None
) -> tuple[DepthModel, BundleFacts]:
    """A relative or metric model of Depth Anything V1 or V2."""
    config = recognise_encoder(state, "pretrained.", path)
    config = replace(config, tap_layers=parse_taps(taps, config, path), max_depth=checked_range(max_depth, path))
    with torch.device("meta"):
        model = build_model(config)
    weights = read_layout(state, model.state_dict(), official_layout(is_gated=has_gates(state)), path)
    load_strict(model, weights, path, assign=True)
    return model.eval(), imported_facts("depth_model", config, path)


def read_dinov2(state: Mapping[str, Tensor], path: Path) -> tuple[Encoder, BundleFacts]:
    """An encoder alone, in the names of DINOv2's hub or of timm, with or without registers."""
    state = timm_registers(state)
    config = recognise_encoder(state, "", path)
    if "reg_token" in state:
        config = replace(config, encoder=config.encoder.replace("patch14_", "patch14_reg4_"))
    with torch.device("meta"):
        encoder = build_encoder(config)
    official = official_layout(is_gated=has_gates(state))

    def layout(key: str) -> list[str]:
        (name,) = official(f"encoder.{key}")
        return [name.removeprefix("pretrained.").removeprefix("encoder.net.")]

    weights = read_layout(state, encoder.state_dict(), layout, path, optional=["mask_token"])
    if isinstance(encoder, PlainEncoder) and "mask_token" not in weights:
        weights["mask_token"] = torch.zeros(1, encoder.width)  # timm leaves it out
    load_strict(encoder, weights, path, assign=True)
    return encoder.eval(), imported_facts("encoder", config, path)


def timm_registers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's registers under timm's names, where the class token holds its own position and no mask token is kept."""
    state = dict(state)
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
        state.pop("mask_token", None)
    return state


def has_gates(state: Mapping[str, Tensor]) -> bool:
    return any(".mlp.w12." in key for key in state)


# --- what the weights tell, and what they do not ----------------------------------------------------------------------


def recognise_encoder(state: Mapping[str, Tensor], prefix: str, path: Path) -> DPTConfig:
    """The published model with an encoder of this width. Number of blocks, image size and decoder as in the weights."""
    try:
        _, tokens, width = state[f"{prefix}pos_embed"].shape
        patch_size = state[f"{prefix}patch_embed.proj.weight"].shape[-1]
        blocks = {int(found[1]) for key in state if (found := re.match(rf"{prefix}blocks\.(\d+)\.", key))}
        config = published(width)
    except KeyError as error:
        known = ", ".join(f"{name} {size}" for size, name in PUBLISHED.items())
        raise BundleError(
            f"{path} looks like {describe(state)}, but none of the published sizes fits ({error}; widths: {known})"
        ) from error
    encoder_args: dict[str, Any] = {"img_size": int(tokens**0.5) * patch_size}
    if len(blocks) != num_blocks(config):
        encoder_args["depth"] = len(blocks)
    if patch_size != 14:
        encoder_args["patch_size"] = patch_size
    taps = config.tap_layers if "depth" not in encoder_args else last_four(len(blocks))
    config = replace(config, encoder_args=encoder_args, tap_layers=taps)
    to_features, projects = "depth_head.scratch.layer1_rn.weight", "depth_head.projects.{}.weight"
    if to_features in state:
        channels = [len(state[projects.format(i)]) for i in range(4) if projects.format(i) in state]
        # With a level missing the published widths stand, and the error lists what is not there.
        channels = channels if len(channels) == 4 else config.out_channels
        config = replace(config, features=len(state[to_features]), out_channels=channels)
    return config


def published(width: int) -> DPTConfig:
    """The model of `conf/model` with an encoder of this width; its taps are those of V2. KeyError if there is none."""
    settings = OmegaConf.load(CONF_DIR / "model" / f"{PUBLISHED[width]}.yaml")
    values: dict[str, Any] = OmegaConf.to_container(settings)  # type: ignore[assignment]
    del values["defaults"]
    return DPTConfig(**values)


def is_published(config: ModelConfig) -> bool:
    """Whether the original repositories build this network; taps and range are arguments there."""
    if type(config) is not DPTConfig:
        return False
    networks = [replace(published(width), tap_layers=config.tap_layers) for width in PUBLISHED]
    return replace(config, max_depth=None) in networks


def num_blocks(config: DPTConfig) -> int:
    """Blocks of an encoder whose last one is tapped, as in all published models."""
    return config.tap_layers[-1] + 1


def last_four(depth: int) -> list[int]:
    """The taps of V1, which calls DINOv2's `get_intermediate_layers(x, 4)`."""
    return list(range(depth - 4, depth))


def parse_taps(taps: str | None, config: DPTConfig, path: Path) -> list[int]:
    """The tapped blocks that `taps` means for this encoder."""
    depth = config.encoder_args.get("depth", num_blocks(config))
    if taps is None:
        version = "v2" if "v2" in path.stem else "v1"
        raise BundleError(
            f"{path}: weights do not tell which blocks are tapped; give --taps v1 (the last four), --taps v2, or four "
            f"block numbers such as 2,5,8,11 (the name of the file suggests {version})"
        )
    if taps == "v1":
        return last_four(depth)
    if taps == "v2" and "depth" not in config.encoder_args:
        return config.tap_layers
    numbers = [int(number) for number in taps.split(",") if number.strip().isdigit()]
    if len(numbers) != 4 or max(numbers) >= depth or numbers != sorted(set(numbers)):
        raise BundleError(f"--taps {taps}: expected v1, v2 or four increasing block numbers below {depth}")
    return numbers


def checked_range(max_depth: float | None, path: Path) -> float | None:
    """`max_depth` itself; BundleError if the name of the file says that it is metric and no range is given."""
    if max_depth is None and "metric" in path.stem:
        raise BundleError(
            f"{path} is metric by its name: give --max-depth in metres (20 for the models trained on Hypersim, 80 for "
            "Virtual KITTI); it is part of the trained model and not in the weights"
        )
    return max_depth


def imported_facts(content: Any, config: ModelConfig, path: Path) -> BundleFacts:
    """The facts of a model that somebody else trained."""
    return BundleFacts(
        content=content,
        model=config,
        kind=config.kind,
        short_side=SHORT_SIDE,
        sha256=sha256(path),
        provenance={"stage": "imported", "source": path.name, "source_sha256": sha256(path), "licence": None},
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_checkpoint(model: DepthModel, path: Path) -> None:
    """A flat state_dict with the keys of Depth Anything. BundleError if no such file can hold the model."""
    vit = dinov2_of(model)
    layout = official_layout(is_gated=isinstance(vit.blocks[0].mlp, GluMlp))
    with atomic_write(path) as file:
        torch.save(write_layout({key: tensor.cpu() for key, tensor in model.state_dict().items()}, layout), file)


def dinov2_of(model: DepthModel) -> VisionTransformer:
    """The transformer of a model that is built as Depth Anything is; BundleError says what differs from it."""
    if not isinstance(model.encoder, PlainEncoder):
        raise BundleError("the encoder is not built as DINOv2's; export it as ONNX, which holds any network")
    if not isinstance(model.decoder, DPTDecoder):
        raise BundleError("the decoder is not DPT's; export it as ONNX, which holds any network")
    vit = model.encoder.vit
    block = vit.blocks[0]
    is_mlp = isinstance(block.mlp, Mlp) and isinstance(block.mlp.act, nn.GELU)
    is_gated = isinstance(block.mlp, GluMlp) and isinstance(block.mlp.act, nn.SiLU) and not block.mlp.gate_last
    differences = {
        "a convolutional stem (model.conv_stem=false trains without)": isinstance(vit.patch_embed, ConvStem),
        "register tokens": vit.reg_token is not None,
        "a norm before the first block": not isinstance(vit.norm_pre, nn.Identity),
        "no layer scale (model.encoder_args.init_values sets it)": not hasattr(block.ls1, "gamma"),
        "norms of queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
        "no bias on queries, keys and values": block.attn.qkv.bias is None,
        "another feed-forward layer": not (is_mlp or is_gated),
    }
    found = [difference for difference, is_there in differences.items() if is_there]
    if found:
        has = ", ".join(found)
        raise BundleError(
            f"the encoder is not built as DINOv2's, it has {has}; export it as ONNX, which holds any network"
        )
    return vit
