"""How far the exported formats are from the model itself: a Markdown table, one row for each model, format and size.

    python scripts/parity_table.py vits vitb vitl
    python scripts/parity_table.py bundles/depth_anything_v2_vits --sizes 518x518 518x686

A model is a name in `conf/model`, which gets random weights, or the folder of a bundle. Each format is written, loaded
by its own tool (`transformers`, onnxruntime; a .pth by depthkit itself) and run on the same random image. The error is
the largest difference relative to the span of the model's output. Needs `depthkit[dev]`; a ViT-L takes some minutes.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from depthkit.bundle import BundleFacts, load_model
from depthkit.config import CONF_DIR, DPTConfig
from depthkit.formats.huggingface import write_huggingface
from depthkit.formats.official import read_checkpoint, write_checkpoint
from depthkit.formats.onnx import export_onnx, load_onnx
from depthkit.models import DepthModel, build_model
from depthkit.models.encoder import interpolate_position_embedding

Module = TypeVar("Module", bound=nn.Module)
Size = tuple[int, int]
Run = Callable[[Tensor], Tensor]

SIZES = ["518x518", "518x686", "392x518"]
"""Square as trained; 3:4 as the preprocessing makes it; smaller than trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["vits"], help="names in conf/model, or bundle folders")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="HEIGHTxWIDTH in pixels, multiples of the patch")
    arguments = parser.parse_args()
    sizes = [tuple(int(side) for side in size.split("x")) for size in arguments.sizes]
    print("| model | format | " + " | ".join(arguments.sizes) + " |")
    print("| --- | --- |" + " --- |" * len(sizes))
    for name in arguments.models:
        model, facts = open_model(name)
        for label, errors in compare(model, facts, sizes):  # type: ignore[arg-type]
            cells = [facts.provenance.get("source") or name, label]
            cells += [f"{error:.1e}" if error else "0" for error in errors]
            print("| " + " | ".join(cells) + " |", flush=True)


def open_model(name: str) -> tuple[DepthModel, BundleFacts]:
    """A bundle, or a model of `conf/model` with random weights."""
    if Path(name).is_dir():
        return load_model(Path(name))
    settings = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml"))
    assert isinstance(settings, dict)
    config = DPTConfig(**{str(key): value for key, value in settings.items() if key != "defaults"})
    facts = BundleFacts(content="depth_model", model=config, kind="disparity", short_side=518)
    return randomise(build_model(config)), facts


@torch.inference_mode()
def compare(model: DepthModel, facts: BundleFacts, sizes: list[Size]) -> Iterator[tuple[str, list[float]]]:
    """For each format its name and its error at each size."""
    images = [torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)) for size in sizes]
    expected = [model(image).values for image in images]
    with tempfile.TemporaryDirectory() as folder:
        for label, load in FORMATS.items():
            run = load(model, facts, Path(folder))
            yield label, [relative_error(run(image), values) for image, values in zip(images, expected, strict=True)]


def by_pth(model: DepthModel, facts: BundleFacts, folder: Path) -> Run:
    write_checkpoint(model, folder / "model.pth")
    taps = ",".join(map(str, facts.model.tap_layers))
    read, _ = read_checkpoint(folder / "model.pth", taps=taps, max_depth=facts.model.max_depth)
    assert isinstance(read, DepthModel)
    return lambda image: read(image).values


def by_transformers(model: DepthModel, facts: BundleFacts, folder: Path) -> Run:
    theirs = load_theirs(model, facts, folder)
    return lambda image: theirs(image).predicted_depth


def by_transformers_with_our_positions(model: DepthModel, facts: BundleFacts, folder: Path) -> Run:
    theirs = load_theirs(model, facts, folder)
    embeddings, patch = theirs.backbone.embeddings, model.encoder.multiple

    def positions(tokens: Tensor, height: int, width: int) -> Tensor:
        return interpolate_position_embedding(embeddings.position_embeddings, (height // patch, width // patch), 1)

    embeddings.interpolate_pos_encoding = positions
    return lambda image: theirs(image).predicted_depth


def load_theirs(model: DepthModel, facts: BundleFacts, folder: Path) -> nn.Module:
    """The model as `transformers` loads it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_huggingface(model, facts, folder / "hf", card="")
    theirs: nn.Module = transformers.AutoModelForDepthEstimation.from_pretrained(folder / "hf").eval()
    return theirs


def by_onnxruntime(model: DepthModel, facts: BundleFacts, folder: Path) -> Run:
    export_onnx(model, facts, folder / "model.onnx")
    run, _, _ = load_onnx(folder / "model.onnx", torch.device("cpu"))
    return run


FORMATS: dict[str, Callable[[DepthModel, BundleFacts, Path], Run]] = {
    ".pth": by_pth,
    "transformers": by_transformers,
    "transformers, positions as here": by_transformers_with_our_positions,
    "onnxruntime": by_onnxruntime,
}


def randomise(module: Module, seed: int = 0) -> Module:
    """Random weights under which every part shows in the output; a fresh model predicts nearly a constant.

    Matrices by their fan-in, norms around 1, scales around 0.5, biases and tokens around 0. Positions are smooth, as
    trained ones are: noise would blow up the difference between two ways of interpolating them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == 1:
                parameter.fill_(1.0)  # the last bias: an output behind a ReLU must not be 0 everywhere
            elif name.endswith(("pos_embed", "position_embeddings")):
                parameter.copy_(smooth_positions(noise))
            elif parameter.ndim > 1 and not name.endswith("token"):
                parameter.copy_(noise * (parameter.numel() / parameter.shape[0]) ** -0.5)
            elif name.endswith("gamma"):
                parameter.copy_(0.5 + 0.1 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return module.eval()


def smooth_positions(noise: Tensor) -> Tensor:
    """(1, 1 + g g, D): the values of a 4 x 4 grid, enlarged to g x g."""
    side = int((noise.shape[1] - 1) ** 0.5)
    coarse = noise[0, :16].T.reshape(1, -1, 4, 4)
    patches = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    return torch.cat([noise[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the span of the expected values; a constant cannot hide behind its size."""
    span = expected.max() - expected.min()
    assert span > 0, "a constant output shows nothing"
    return float((found - expected).abs().max() / span)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
