"""Folders of Hugging Face `transformers`: `DepthAnythingForDepthEstimation` with its image processor.

Neither reading nor writing needs `transformers`: a folder is config.json, preprocessor_config.json, model.safetensors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import GluMlp
from torch import Tensor

from depthkit.bundle import WEIGHTS, BundleError, BundleFacts, load_strict, sha256, write_folder
from depthkit.config import DPTConfig
from depthkit.formats.layout import Layout, read_layout, read_tensors, write_layout
from depthkit.formats.official import PUBLISHED, SHORT_SIDE, dinov2_of, num_blocks, official_layout, published
from depthkit.models import DepthModel, build_model

ARCHITECTURE = "DepthAnythingForDepthEstimation"
CONFIG, PROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
PICKLED_WEIGHTS = "pytorch_model.bin"
SPLIT_WEIGHTS = f"{WEIGHTS}.index.json"
CUBIC = 3  # PIL's number, as the processor's config has it

RENAMES = (
    (r"^pretrained\.(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    (r"^pretrained\.pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^pretrained\.patch_embed\.proj\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^pretrained\.norm\.", "backbone.layernorm."),
    (r"^pretrained\.blocks\.", "backbone.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^depth_head\.projects\.(\d)\.", r"neck.reassemble_stage.layers.\1.projection."),
    (r"^depth_head\.resize_layers\.(\d)\.", r"neck.reassemble_stage.layers.\1.resize."),
    (r"^depth_head\.scratch\.layer(\d)_rn\.", lambda found: f"neck.convs.{int(found[1]) - 1}."),
    (r"^depth_head\.scratch\.refinenet(\d)\.", lambda found: f"neck.fusion_stage.layers.{4 - int(found[1])}."),
    (r"\.resConfUnit([12])\.conv([12])\.", r".residual_layer\1.convolution\2."),
    (r"\.out_conv\.", ".projection."),
    (r"^depth_head\.scratch\.output_conv1\.", "head.conv1."),
    (r"^depth_head\.scratch\.output_conv2\.0\.", "head.conv2."),
    (r"^depth_head\.scratch\.output_conv2\.2\.", "head.conv3."),
)
"""From the names of the original checkpoints."""


def huggingface_layout(*, is_gated: bool) -> Layout:
    """The names in `model.safetensors`; queries, keys and values are three matrices there."""
    official = official_layout(is_gated=is_gated)

    def layout(key: str) -> list[str]:
        (name,) = official(key)
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." not in name:
            return [name]
        return [name.replace(".attn.qkv.", f".attention.attention.{part}.") for part in ("query", "key", "value")]

    return layout


# --- writing ---------------------------------------------------------------------------------------------------------


def write_huggingface(model: DepthModel, facts: BundleFacts, folder: Path, *, card: str) -> None:
    """A folder for `AutoModelForDepthEstimation` and `AutoImageProcessor`; `card` becomes its README.md.

    It appears as a whole or not at all. BundleError if that class cannot hold the model.
    """
    vit = dinov2_of(model)
    if facts.model.max_depth is not None and facts.model.max_depth != int(facts.model.max_depth):
        raise BundleError(f"model.max_depth={facts.model.max_depth}: transformers knows whole metres only")
    is_gated = isinstance(vit.blocks[0].mlp, GluMlp)
    state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
    with write_folder(folder) as temporary:
        save_file(
            write_layout(state, huggingface_layout(is_gated=is_gated)), temporary / WEIGHTS, metadata={"format": "pt"}
        )
        for name, settings in ((CONFIG, model_settings(model, facts)), (PROCESSOR, processor_settings(model, facts))):
            (temporary / name).write_text(json.dumps(settings, indent=2) + "\n")
        (temporary / CARD).write_text(card)


def model_settings(model: DepthModel, facts: BundleFacts) -> dict[str, Any]:
    """The content of config.json."""
    vit = dinov2_of(model)
    block, config = vit.blocks[0], facts.model
    assert isinstance(config, DPTConfig)  # `dinov2_of` takes no others
    is_gated = isinstance(block.mlp, GluMlp)
    # Of the gated layer, transformers counts the width before a third of it is taken off.
    hidden = block.mlp.fc1.out_features * 3 / 4 if is_gated else block.mlp.fc1.out_features
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "depth_anything",
        "backbone_config": {
            "model_type": "dinov2",
            "hidden_size": vit.embed_dim,
            "num_hidden_layers": len(vit.blocks),
            "num_attention_heads": block.attn.num_heads,
            "mlp_ratio": as_integer(hidden / vit.embed_dim),
            "image_size": vit.patch_embed.img_size[0],
            "patch_size": model.encoder.multiple,
            "layer_norm_eps": vit.norm.eps,
            "qkv_bias": True,
            "layerscale_value": 1.0,
            "hidden_act": "gelu",
            "use_swiglu_ffn": is_gated,
            "apply_layernorm": True,
            "reshape_hidden_states": False,
            # Counted from 1: stage 0 is the embedding.
            "out_indices": [tap + 1 for tap in config.tap_layers],
            "out_features": [f"stage{tap + 1}" for tap in config.tap_layers],
        },
        "patch_size": model.encoder.multiple,
        "reassemble_hidden_size": vit.embed_dim,
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": list(config.out_channels),
        "fusion_hidden_size": config.features,
        "head_in_index": -1,
        "head_hidden_size": model.decoder.head_out[0].out_channels,  # type: ignore[union-attr,index]
        "depth_estimation_type": "relative" if config.max_depth is None else "metric",
        "max_depth": 1 if config.max_depth is None else int(config.max_depth),
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def processor_settings(model: DepthModel, facts: BundleFacts) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": facts.short_side, "width": facts.short_side},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": model.encoder.multiple,
        "resample": CUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts.mean),
        "image_std": list(facts.std),
        "do_pad": False,
    }


def as_integer(number: float) -> int | float:
    """`4` rather than `4.0`, where it is one."""
    return int(number) if number == int(number) else number


# --- reading ---------------------------------------------------------------------------------------------------------


def read_huggingface(folder: Path) -> tuple[DepthModel, BundleFacts]:
    """A folder of `DepthAnythingForDepthEstimation` (V1, V2, relative or metric) as our model, on the CPU.

    BundleError names the file and the setting that our model cannot follow, or lists missing and unexpected keys.
    """
    settings = read_json(folder / CONFIG)
    config = model_config(settings, folder / CONFIG)
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    path, state = read_weights(folder)
    with torch.device("meta"):
        model = build_model(config)
    layout = huggingface_layout(is_gated=settings["backbone_config"].get("use_swiglu_ffn", False))
    optional = ["encoder.mask_token"]  # configs with `use_mask_token: false`
    weights = read_layout(state, model.state_dict(), layout, path, optional=optional)
    weights.setdefault("encoder.mask_token", torch.zeros(1, settings["backbone_config"].get("hidden_size", 768)))
    load_strict(model, weights, path, assign=True)
    facts = BundleFacts(
        content="depth_model",
        model=config,
        kind=config.kind,
        short_side=processor.get("size", {}).get("height", SHORT_SIDE),
        sha256=sha256(path),
        provenance={
            "stage": "imported",
            "source": folder.resolve().name,
            "source_sha256": sha256(path),
            "licence": None,
        },
    )
    keys = {"mean": "image_mean", "std": "image_std"}
    statistics: dict[str, Any] = {name: tuple(processor[key]) for name, key in keys.items() if key in processor}
    return model.eval(), replace(facts, **statistics)


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights of a folder, and the file that stands for them; of a split model that is the index of its parts."""
    if (folder / SPLIT_WEIGHTS).is_file():
        parts = sorted(set(read_json(folder / SPLIT_WEIGHTS).get("weight_map", {}).values()))
        return folder / SPLIT_WEIGHTS, {
            key: item for part in parts for key, item in read_tensors(folder / part).items()
        }
    path = folder / PICKLED_WEIGHTS if (folder / PICKLED_WEIGHTS).is_file() else folder / WEIGHTS
    return path, read_tensors(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file") from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def model_config(settings: Mapping[str, Any], path: Path) -> DPTConfig:
    """Our settings for those of config.json; what it leaves out has the defaults of `transformers`."""
    if settings.get("model_type") != "depth_anything":
        raise BundleError(f"{path}: model_type={settings.get('model_type')!r}: only depth_anything can be read")
    backbone = settings.get("backbone_config")
    if not isinstance(backbone, dict) or backbone.get("model_type", "dinov2") != "dinov2":
        raise BundleError(f"{path}: backbone_config: only a backbone of model_type dinov2 can be read, got {backbone}")
    width, depth = backbone.get("hidden_size", 768), backbone.get("num_hidden_layers", 12)
    heads, patch_size = backbone.get("num_attention_heads", 12), backbone.get("patch_size", 14)
    features = settings.get("fusion_hidden_size", 64)
    fixed = {
        "reassemble_factors": (settings.get("reassemble_factors", [4, 2, 1, 0.5]), [4, 2, 1, 0.5]),
        "head_in_index": (settings.get("head_in_index", -1), -1),
        "head_hidden_size": (settings.get("head_hidden_size", 32), min(32, features)),
        "backbone_config.qkv_bias": (backbone.get("qkv_bias", True), True),
        "backbone_config.apply_layernorm": (backbone.get("apply_layernorm", True), True),
        "backbone_config.hidden_act": (backbone.get("hidden_act", "gelu"), "gelu"),
        "backbone_config.layer_norm_eps": (backbone.get("layer_norm_eps", 1e-6), 1e-6),
    }
    for name, (value, expected) in fixed.items():
        if value != expected:
            raise BundleError(f"{path}: {name}={value!r}: this model has {expected!r}")
    is_gated = backbone.get("use_swiglu_ffn", False)
    base_width = max(PUBLISHED) if is_gated else width if width in PUBLISHED else min(PUBLISHED)
    base = published(base_width)
    encoder_args: dict[str, Any] = {"img_size": backbone.get("image_size", 224)}
    own = {
        "embed_dim": (width, base_width),
        "depth": (depth, num_blocks(base)),
        "num_heads": (heads, base_width // 64),
        "patch_size": (patch_size, 14),
        "mlp_ratio": (backbone.get("mlp_ratio", 4), 4),
    }
    encoder_args |= {name: value for name, (value, usual) in own.items() if value != usual}
    is_metric = settings.get("depth_estimation_type", "relative") == "metric"
    return replace(
        base,
        encoder_args=encoder_args,
        tap_layers=[stage - 1 for stage in out_stages(backbone, path)],
        features=features,
        out_channels=settings.get("neck_hidden_sizes", [48, 96, 192, 384]),
        max_depth=float(settings.get("max_depth") or 1) if is_metric else None,
    )


def out_stages(backbone: Mapping[str, Any], path: Path) -> list[int]:
    """The stages that the neck reads, from 1."""
    if backbone.get("out_indices"):
        return list(backbone["out_indices"])
    if backbone.get("out_features"):
        return [int(name.removeprefix("stage")) for name in backbone["out_features"]]
    raise BundleError(f"{path}: backbone_config has neither out_indices nor out_features: which blocks are tapped?")


__all__ = ["huggingface_layout", "read_huggingface", "write_huggingface"]
