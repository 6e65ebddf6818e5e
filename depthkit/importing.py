"""`depthkit import CHECKPOINT --out BUNDLE`: published weights become a bundle.

Takes .pth and .safetensors files of Depth Anything V1 and V2, relative and metric, encoders of DINOv2 from its hub or
from timm, and folders of Hugging Face's `DepthAnythingForDepthEstimation`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from depthkit.bundle import BundleError, BundleFacts, save_bundle
from depthkit.config import DPTConfig
from depthkit.formats.huggingface import read_huggingface
from depthkit.formats.official import read_checkpoint
from depthkit.models import DepthModel, Encoder


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="depthkit import",
        description="Published weights become a bundle: Depth Anything V1 and V2 (relative or metric), encoders of "
        "DINOv2 from its hub or from timm, and Hugging Face folders of DepthAnythingForDepthEstimation.",
    )
    parser.add_argument("checkpoint", type=Path, help=".pth or .safetensors file, or Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--licence", help="of the weights, as their owner states it; goes into provenance and model cards"
    )
    arguments = parser.parse_args(argv)
    try:
        model, facts = read(arguments.checkpoint, taps=arguments.taps, max_depth=arguments.max_depth)
        facts = replace(facts, provenance={**facts.provenance, "licence": arguments.licence})
        save_bundle(arguments.out, model, facts)
    except (ValueError, OSError) as error:
        print(f"depthkit import: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {describe(model, facts)}")
    if arguments.licence is None:
        print("no licence stated: what is made from these weights will say that it is unknown; see --licence")
    return 0


def add_checkpoint_arguments(parser: argparse._ActionsContainer) -> None:
    """What weights alone do not tell."""
    parser.add_argument(
        "--taps",
        help="of a .pth: the blocks that the decoder reads: v1 (the last four), v2, or numbers such as 2,5,8,11",
    )
    parser.add_argument(
        "--max-depth", type=float, help="of a metric .pth: the range in metres (20 for Hypersim, 80 for Virtual KITTI)"
    )


def read(path: Path, *, taps: str | None, max_depth: float | None) -> tuple[DepthModel | Encoder, BundleFacts]:
    """The model of a file or folder that somebody else published."""
    if path.is_dir():
        for option, value in (("--taps", taps), ("--max-depth", max_depth)):
            if value is not None:
                raise BundleError(f"{option} {value}: config.json says that itself; leave it out")
        return read_huggingface(path)
    return read_checkpoint(path, taps=taps, max_depth=max_depth)


def describe(model: DepthModel | Encoder, facts: BundleFacts) -> str:
    """One line: what was imported."""
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if facts.content == "encoder":
        return f"{facts.model.title}, an encoder alone ({parameters:.1f} M parameters), for stage.encoder_weights"
    assert isinstance(facts.model, DPTConfig)  # all published files hold such
    taps = ",".join(map(str, facts.model.tap_layers))
    return f"{facts.model.title} with taps {taps} ({parameters:.1f} M parameters), {facts.kind}: {facts.model.unit}"
