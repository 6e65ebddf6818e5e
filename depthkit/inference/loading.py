"""`depthkit.load`: a bundle, a Hugging Face folder, an ONNX file or a published .pth as a `Predictor`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from depthkit.bundle import BundleError, BundleFacts, load_model
from depthkit.formats.huggingface import CONFIG, read_huggingface
from depthkit.formats.official import read_checkpoint
from depthkit.formats.onnx import has_cuda, load_onnx
from depthkit.inference.predictor import Network, Predictor
from depthkit.models import DepthModel

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What `load` was asked for, beside the path."""

    device: str = "auto"
    precision: str = "float32"
    compile: bool = False
    taps: str | None = None
    max_depth: float | None = None


class Loaded(NamedTuple):
    """What a loader makes of a file or folder; `multiple` as in `Predictor`."""

    network: Network
    facts: BundleFacts
    multiple: int
    device: torch.device


def load(
    path: str | Path,
    device: str = "auto",
    *,
    precision: str = "float32",
    compile: bool = False,
    taps: str | None = None,
    max_depth: float | None = None,
) -> Predictor:
    """Load a model for prediction: a bundle, a Hugging Face folder, an .onnx file, or a .pth as it was published.

    `device` is a torch device or "auto" (a GPU where there is one). `precision` is the type of weights and activations:
    float32, bfloat16 or float16. `compile` runs the model through `torch.compile`, for any image size: slow at first,
    then faster. `taps` ("v1", "v2" or "2,5,8,11") and, for a metric model, `max_depth` (metres) are what a .pth cannot
    say of itself. ValueError names the option that does not fit the file, or what is wrong with the file.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    options = LoadOptions(device=device, precision=precision, compile=compile, taps=taps, max_depth=max_depth)
    loader, allowed = next((loader, allowed) for recognises, loader, allowed in LOADERS if recognises(Path(path)))
    for name, usual in vars(LoadOptions()).items():
        value = getattr(options, name)
        if value != usual and name not in allowed:
            raise ValueError(f"{name}={value}: not for {path}, which says that itself or cannot follow; leave it out")
    network, facts, multiple, torch_device = loader(Path(path), options)
    return Predictor(network, facts, name=str(path), multiple=multiple, device=torch_device)


def from_bundle(path: Path, options: LoadOptions) -> Loaded:
    return prepare(*load_model(path), options)


def from_huggingface(path: Path, options: LoadOptions) -> Loaded:
    return prepare(*read_huggingface(path), options)


def from_checkpoint(path: Path, options: LoadOptions) -> Loaded:
    model, facts = read_checkpoint(path, taps=options.taps, max_depth=options.max_depth)
    if not isinstance(model, DepthModel):
        raise BundleError(f"{path} holds an encoder alone: it cannot predict; `depthkit import` makes a bundle of it")
    return prepare(model, facts, options)


def from_onnx(path: Path, options: LoadOptions) -> Loaded:
    on_gpu = torch.cuda.is_available() and has_cuda()
    device = torch.device(("cuda" if on_gpu else "cpu") if options.device == "auto" else options.device)
    return Loaded(*load_onnx(path, device), device)


def prepare(model: DepthModel, facts: BundleFacts, options: LoadOptions) -> Loaded:
    """A torch model on its device, in its precision, compiled or not, as a network of float32 tensors."""
    device, dtype = choose_device(options.device), PRECISIONS[options.precision]
    model = model.eval().to(device, dtype)
    if options.compile:
        model.compile(dynamic=True)
    return Loaded(lambda image: model(image.to(dtype)).values.float(), facts, model.encoder.multiple, device)


def choose_device(device: str) -> torch.device:
    """The torch device that a name means; "auto" takes CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device={device}: {str(error).splitlines()[0]}") from error


TORCH_OPTIONS = ("device", "precision", "compile")
LOADERS: tuple[tuple[Callable[[Path], bool], Callable[[Path, LoadOptions], Loaded], tuple[str, ...]], ...] = (
    (lambda path: path.suffix == ".onnx", from_onnx, ("device",)),
    (lambda path: (path / CONFIG).is_file(), from_huggingface, TORCH_OPTIONS),
    (lambda path: path.is_file(), from_checkpoint, (*TORCH_OPTIONS, "taps", "max_depth")),
    (lambda path: True, from_bundle, TORCH_OPTIONS),
)
"""In this order: whether a path is of the format, what loads it, and the options it takes. The last says what is
missing."""
