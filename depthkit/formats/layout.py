"""Other people's names for our weights.

A layout is a function from one of our keys to the names that a file has for it. Several names mean that the rows of our
tensor are kept apart there, one part after the other. Reading and writing both follow that one function.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from depthkit.bundle import BundleError

Layout = Callable[[str], list[str]]

SHOWN = 12
"""Keys of each sort that an error lists."""
WRAPPERS = ("model", "state_dict")
"""Keys under which training scripts put the weights beside their own state."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .pth or .safetensors file, freed of `{"model": ...}` and of the prefix `module.`.

    Nothing but tensors and plain values is unpickled. BundleError says what is wrong with the file.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"{path} is no checkpoint, or holds Python objects, which are not loaded because they could run code; "
            f"save its state_dict alone ({first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{path} is no checkpoint, or a damaged one ({first_line(error)})") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    keys = [str(key) for key in content] if isinstance(content, Mapping) else []
    if not keys or not all(isinstance(item, Tensor) for item in content.values()):
        raise BundleError(f"{path} looks like {describe(keys)}; expected a state_dict: names and tensors")
    return {str(key).removeprefix("module."): tensor for key, tensor in content.items()}


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def write_layout(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our weights under the names of `layout`."""
    written: dict[str, Tensor] = {}
    for key, tensor in state.items():
        names = layout(key)
        parts = tensor.chunk(len(names)) if len(names) > 1 else [tensor]
        written.update({name: part.contiguous() for name, part in zip(names, parts, strict=True)})
    return written


def read_layout(
    state: Mapping[str, Tensor], keys: Iterable[str], layout: Layout, source: Path, *, optional: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Our weights `keys` from a file that names them by `layout`, as float32.

    BundleError lists every name that is missing or unexpected. Our keys in `optional` may be missing.
    """
    names = {key: layout(key) for key in keys}
    wanted = {name for key in names for name in names[key]}
    excused = {name for key in optional for name in layout(key)}
    missing, unexpected = wanted - state.keys() - excused, state.keys() - wanted
    if missing or unexpected:
        raise BundleError(
            f"{source} looks like {describe(state)}, but does not fit it:\n"
            + list_keys("missing", missing)
            + list_keys("unexpected", unexpected)
        )
    present = {key: parts for key, parts in names.items() if parts[0] in state}
    return {key: torch.cat([state[part] for part in parts]).float() for key, parts in present.items()}


def list_keys(title: str, keys: Iterable[str]) -> str:
    """One line per key, the first `SHOWN` of them."""
    ordered = sorted(keys)
    lines = [f"  {title}: {key}\n" for key in ordered[:SHOWN]]
    return "".join(lines) + (f"  {title}: and {len(ordered) - SHOWN} more\n" if len(ordered) > SHOWN else "")


MARKS = {
    "depth_head.scratch.": "a Depth Anything checkpoint",
    "backbone.embeddings.": "weights of a Hugging Face DepthAnythingForDepthEstimation",
    "decoder.fusions.": "weights of a depthkit bundle (give its folder, not the file)",
    "core.core.": "a ZoeDepth checkpoint",
    "pretrained.model.": "a MiDaS or DPT checkpoint",
    "model.backbone.": "a Depth Anything 3 checkpoint",
    "register_tokens": "DINOv2 with registers, as from its hub",
    "reg_token": "a timm vision transformer with registers",
    "blocks.": "the weights of a plain vision transformer (DINOv2 or timm)",
    "optimizer": "a training checkpoint that holds more than weights",
    "layer1.": "the weights of a ResNet",
    "stages.": "the weights of a ConvNeXt or another network with stages",
}
"""What the beginning of a key tells, in the order in which they are looked for."""


def describe(state: Iterable[str]) -> str:
    """What a file with these keys looks like, in words."""
    keys = list(state)
    for mark, description in MARKS.items():
        if any(key.startswith(mark) for key in keys):
            return description
    shown = ", ".join(sorted(keys)[:3])
    return f"no model that is known here ({len(keys)} entries: {shown}, ...)" if keys else "an empty file"
