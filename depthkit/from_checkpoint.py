"""The model in a checkpoint of a run, for whoever does not want to wait for its end."""

import os
from pathlib import Path

import torch
from torch import Tensor

from depthkit.bundle import BundleError, BundleFacts, load_strict
from depthkit.config import DPTConfig
from depthkit.models import DepthModel, Encoder, build_encoder, build_model, num_parameters
from depthkit.runtime.checkpoint import is_whole, read_facts
from depthkit.settings.model import read_model
from depthkit.settings.transfer import read_transfer
from depthkit.transfer import apply_transfer, merge_adapters


def load_checkpoint(path: Path) -> tuple[DepthModel | Encoder, BundleFacts]:
    """The model of a checkpoint, of one file or of a folder of DeepSpeed's, as a bundle would hold it.

    Of a run with `optim.ema_decay` it is the averaged one. BundleError says what is wrong with the checkpoint.
    """
    if not is_whole(path):
        raise BundleError(f"{path} is damaged, or no checkpoint; the folder `checkpoints` of a run has others")
    facts = read_facts(path)
    if not facts:
        raise BundleError(f"{path} is no checkpoint of a training run; `depthkit import` reads published weights")
    settings = facts["config"]
    config = read_model(settings["model"])
    is_encoder = settings["stage"]["name"] == "pretrain"
    model: DepthModel | Encoder
    transfer = read_transfer(settings.get("transfer", {}))
    if is_encoder:
        assert isinstance(config, DPTConfig)
        model = build_encoder(config)
    else:
        model = build_model(config)
        apply_transfer(model, transfer)
    prefix = "encoder." if is_encoder else "model."
    weights = read_weights(path)
    load_strict(model, {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}, path)
    if isinstance(model, DepthModel):
        model = merge_adapters(model, transfer)
    return model.eval(), BundleFacts(
        content="encoder" if is_encoder else "depth_model",
        model=config,
        kind="disparity" if is_encoder else config.kind,
        short_side=min(settings["data"]["crop_size"]),
        canonical_focal_px=settings["stage"].get("canonical_focal_px"),
        provenance=facts["provenance"] | {"steps": facts["step"], "num_parameters": num_parameters(model)},
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights in float32 by the names of the stage's module; averaged ones where the run averages."""
    file = min(path.rglob("*mp_rank_00_model_states.pt")) if path.is_dir() else path
    checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    weights: dict[str, Tensor] = checkpoint["module" if path.is_dir() else "state_dict"]
    if path.is_dir():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # Of trained weights alone in ZeRO 1.
        weights = weights | get_fp32_state_dict_from_zero_checkpoint(str(path))
    return weights | checkpoint["callbacks"].get("WeightAverage", {}).get("average", {})
