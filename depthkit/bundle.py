"""The bundle: a folder with `model.safetensors` and `model.json`, in which a stage hands its model to the next one.

`model.json` holds what is needed to rebuild and to understand the model without any YAML: architecture, what it
predicts, at which size it was trained, the sha256 of the weights, and where it comes from.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import depthkit
from depthkit.config import MetricBinsConfig, ModelConfig, check
from depthkit.data.windows import IMAGENET_MEAN, IMAGENET_STD
from depthkit.models import DepthModel, Encoder, build_model
from depthkit.models.metric_bins import MetricBinsModel
from depthkit.settings.model import read_model
from depthkit.types import Kind

FORMAT = 1
WEIGHTS = "model.safetensors"
FACTS = "model.json"

UNITS: dict[Kind, str] = {"disparity": "relative, larger = nearer", "depth": "metres, planar z"}


class BundleError(ValueError):
    """A folder that is not a whole bundle, or not one for the purpose; the message names it and says why."""


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """The content of `model.json`."""

    content: Literal["depth_model", "encoder"]
    model: ModelConfig
    kind: Kind  # what `values` of the model are
    short_side: int  # pixels; the size it was trained at and predicts at by default
    canonical_focal_px: float | None = None  # depth is as a camera of this focal length would see it; null: as it is
    sha256: str = ""  # of the weights file
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    provenance: dict[str, Any] = field(default_factory=dict)  # stage, seed, steps, data, teacher, versions

    def __post_init__(self) -> None:
        check(self.content in ("depth_model", "encoder"), "content", self.content, "depth_model or encoder")
        check(self.kind in tuple(UNITS), "kind", self.kind, "one of " + ", ".join(UNITS))
        focal = self.canonical_focal_px
        check(focal is None or focal > 0, "canonical_focal_px", focal, "> 0 (pixels), or null")


ReadWeights = Callable[[Path, BundleFacts], dict[str, Tensor]]
"""`read_weights`, or `read_shapes` for a model without memory."""


def save_bundle(folder: Path, module: DepthModel | Encoder, facts: BundleFacts) -> Path:
    """Write a bundle as a whole: a reader finds the old one or the new one, never a mixture or half."""
    with write_folder(folder) as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        text = {"format": FORMAT, "depthkit": depthkit.__version__, **asdict(facts)}
        text["sha256"] = sha256(temporary / WEIGHTS)
        (temporary / FACTS).write_text(json.dumps(text, indent=2) + "\n")
    return folder


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which stands at `folder`, whole and on disk, when the block ends without an exception.

    Folders cannot be exchanged in one step everywhere: a process killed between the two renames leaves the old one
    beside the place, as `.NAME.RANDOM.old`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            sync_to_disk(path)
        put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(new: Path, folder: Path) -> None:
    """Rename the folder `new` to `folder`, in the place of what may be there."""
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def read_facts(folder: Path) -> BundleFacts:
    """The facts of a bundle; BundleError names what is wrong."""
    try:
        text = json.loads((folder / FACTS).read_text())
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: it holds no {FACTS}") from error
    except ValueError as error:
        raise BundleError(f"{folder / FACTS} is not JSON: {error}; copy the bundle again") from error
    if not isinstance(text, dict) or text.pop("format", None) != FORMAT:
        raise BundleError(f"{folder / FACTS}: this version reads format {FORMAT}; write the bundle again")
    text.pop("depthkit", None)
    try:
        return parse_facts(text)
    except (TypeError, KeyError, ValueError) as error:
        raise BundleError(f"{folder / FACTS}: {error}") from error


def parse_facts(content: Mapping[str, Any]) -> BundleFacts:
    """Facts from their JSON form; TypeError, KeyError or ValueError for what is missing, unknown or out of range."""
    lists = {name: tuple(content[name]) for name in ("mean", "std") if name in content}
    return BundleFacts(**{**content, **lists, "model": read_model(content["model"])})


def read_weights(folder: Path, facts: BundleFacts) -> dict[str, Tensor]:
    """The weights of a bundle; BundleError when they are not the ones that its facts describe."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise BundleError(f"{folder} holds no {WEIGHTS}")
    found = sha256(path)
    if found != facts.sha256:
        raise BundleError(f"{path}: sha256 is {found}, {FACTS} says {facts.sha256}; copy the bundle again")
    return load_file(path)


def read_shapes(folder: Path, facts: BundleFacts) -> dict[str, Tensor]:
    """The weights of a bundle without memory, from the header of their file."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = file.keys()
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except FileNotFoundError as error:
        raise BundleError(f"{folder} holds no {WEIGHTS}") from error
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS}: {error}; copy the bundle again") from error


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: Path | str, *, assign: bool = False) -> None:
    """Load weights into `module`; BundleError lists every key that is missing, unexpected or of another shape.

    `assign` puts the tensors themselves in the place of parameters that have no memory yet.
    """
    own = module.state_dict()
    problems = [f"missing: {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected: {name}" for name in state.keys() - own.keys()]
    problems += [
        f"shape: {name} is {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in sorted(problems)[:20])
        raise BundleError(f"{source} does not fit the model ({len(problems)} differences):\n{shown}")
    module.load_state_dict(state, assign=assign)


def load_model(folder: Path) -> tuple[DepthModel, BundleFacts]:
    """The depth model of a bundle, in eval mode on the CPU."""
    facts = read_facts(folder)
    if facts.content != "depth_model":
        raise BundleError(f"{folder} holds an encoder alone: it cannot predict; use it as stage.encoder_weights")
    model = build_model(facts.model)
    load_strict(model, read_weights(folder, facts), folder)
    return model.eval(), facts


def load_encoder_weights(encoder: Encoder, folder: Path, read: ReadWeights = read_weights) -> None:
    """Fill `encoder` from a bundle of an encoder or of a whole depth model, of which the encoder's part is taken."""
    facts = read_facts(folder)
    state = read(folder, facts)
    if facts.content == "depth_model":
        prefix = "encoder."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    load_strict(encoder, state, f"{folder} ({facts.model.title})")


def load_depth_model_weights(model: DepthModel, folder: Path, read: ReadWeights = read_weights) -> None:
    """Fill `model` from the bundle of a depth model, of whatever kind: the heads have the same weights. Of a model with
    metric bins, the relative model below them is filled from the bundle of one.
    """
    facts = read_facts(folder)
    if facts.content != "depth_model":
        raise BundleError(f"{folder} holds an encoder alone: no decoder to start from; set stage.decoder_weights=false")
    has_bins = isinstance(facts.model, MetricBinsConfig)
    if isinstance(model, MetricBinsModel) and not has_bins and facts.kind != "disparity":
        raise BundleError(f"{folder} predicts {facts.kind}: metric bins start from a model of relative disparity")
    part = model.relative() if isinstance(model, MetricBinsModel) and not has_bins else model
    load_strict(part, read(folder, facts), f"{folder} ({facts.model.title})")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
