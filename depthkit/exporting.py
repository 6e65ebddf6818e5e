"""`depthkit export BUNDLE --format hf|onnx|pth|bundle --out PATH`: a model in the format that another tool loads."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from depthkit.bundle import BundleFacts, load_model, save_bundle
from depthkit.formats.huggingface import write_huggingface
from depthkit.formats.model_card import model_card
from depthkit.formats.official import is_published, write_checkpoint
from depthkit.formats.onnx import TOLERANCE, export_onnx
from depthkit.from_checkpoint import load_checkpoint
from depthkit.models import DepthModel, Encoder


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="depthkit export", description="A bundle or a checkpoint in the format that another tool loads."
    )
    parser.add_argument("bundle", type=Path, help="bundle folder, or a checkpoint (.ckpt) of a run")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="hf: a folder for transformers, with a model card; onnx: one file for any batch and image size; pth: the "
        "keys of the original repositories; bundle: what the other stages read, from a checkpoint",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder (hf) or file (onnx, pth)")
    parser.add_argument("--licence", help="hf: the licence that you publish under; default: what follows from the data")
    parser.add_argument(
        "--results", type=Path, nargs="*", default=[], help="hf: results.json files of depthkit evaluate, for the card"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="onnx: largest relative error (default: %(default)g)"
    )
    arguments = parser.parse_args(argv)
    try:
        model, facts = load(arguments.bundle)
        if facts.content == "encoder" and arguments.format != "bundle":
            raise ValueError(f"{arguments.bundle} holds an encoder alone, which makes a bundle but no depth")
        if facts.canonical_focal_px is not None and arguments.format in ("hf", "pth"):
            focal = f"depth of a camera of {facts.canonical_focal_px:g} px focal length (stage.canonical_focal_px)"
            reason = f"which --format {arguments.format} cannot say; use onnx"
            raise ValueError(f"{arguments.bundle} predicts {focal}, {reason}")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[arguments.format](model, facts, arguments)
    except (ValueError, OSError) as error:
        print(f"depthkit export: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: written and whole")
    return 0


def load(path: Path) -> tuple[Any, BundleFacts]:
    return load_checkpoint(path) if path.suffix == ".ckpt" else load_model(path)


def to_bundle(model: DepthModel | Encoder, facts: BundleFacts, arguments: argparse.Namespace) -> None:
    save_bundle(arguments.out, model, facts)


def to_huggingface(model: DepthModel, facts: BundleFacts, arguments: argparse.Namespace) -> None:
    card = model_card(facts, results=arguments.results, licence=arguments.licence)
    write_huggingface(model, facts, arguments.out, card=card)


def to_onnx(model: DepthModel, facts: BundleFacts, arguments: argparse.Namespace) -> None:
    export_onnx(model, facts, arguments.out, tolerance=arguments.tolerance)


def to_pth(model: DepthModel, facts: BundleFacts, arguments: argparse.Namespace) -> None:
    write_checkpoint(model, arguments.out)
    if not is_published(facts.model):
        print("the original repositories build only ViT-S, B, L and G of full depth: this model needs changes there")


FORMATS: dict[str, Callable[[Any, BundleFacts, argparse.Namespace], None]] = {
    "bundle": to_bundle,
    "hf": to_huggingface,
    "onnx": to_onnx,
    "pth": to_pth,
}
