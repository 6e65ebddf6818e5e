"""ONNX files: one graph for every batch and image size, checked against the torch model before it is kept.

The graph takes `image` (B, 3, H, W) float32, normalised with mean and standard deviation, H and W multiples of what the
encoder needs, and gives `depth` (B, H, W) float32, `values` of the model. It uses standard operators alone. What stands
in `model.json` of a bundle travels in the file's metadata, in keys that begin with `depthkit.`.
"""

import importlib
import io
import json
import logging
import math
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

import depthkit
from depthkit.bundle import BundleFacts, parse_facts, sha256, sync_to_disk
from depthkit.models import DepthModel

FORMAT = 1
INPUT, OUTPUT = "image", "depth"
BATCH_SIZES = (1, 2)
"""At which each size is checked."""
TOLERANCE = 1e-4
"""Largest relative error that an exported file may have."""
MAX_EMBEDDED = 2_000_000_000
"""Bytes of weights that still fit into the file beside the graph: protobuf reads no message above 2 GiB."""
DATA_SUFFIX = ".data"
"""Of the file for the weights of larger models, beside NAME.onnx."""

PREFIX = "depthkit."
"""Of the keys in the file's metadata."""

Size = tuple[int, int]


class OnnxError(ValueError):
    """A model that cannot be exported, or a file that cannot be run; the message names it and says why."""


def export_onnx(model: DepthModel, facts: BundleFacts, path: Path, *, tolerance: float = TOLERANCE) -> float:
    """Write `model`, on the CPU and in eval mode from here on, to `path` (NAME.onnx) and return its largest error.

    Before the file takes its place it is run in onnxruntime at three sizes x `BATCH_SIZES` of noise; the error of a
    case is max|onnx - torch| / max|torch|. OnnxError when one is above `tolerance`, when the encoder cannot be exported
    for every size, or when an operator is not a standard one; `path` is then as it was before. Weights of more than
    `MAX_EMBEDDED` bytes go to NAME.onnx.data beside it.
    """
    require("onnx", "onnxscript", "onnxruntime")
    if path.suffix != ".onnx":
        raise OnnxError(f"{path}: the name of the file must end in .onnx")
    network = _Values(model).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with Console(file=sys.stderr).status(f"exporting {facts.model.title} to {path} ...") as status:
        with quiet():
            program = trace(network, facts.model.title, model.encoder.multiple)
        with temporary_folder(path) as folder:
            file, data = folder / path.name, folder / (path.name + DATA_SUFFIX)
            program.save(file, external_data=size_of_weights(program) > MAX_EMBEDDED)
            opset = program.model.opset_imports[""]
            del program
            status.update("comparing it with the torch model in onnxruntime ...")
            errors = measure_errors(network, file, check_sizes(model, facts))
            for size, error in errors.items():
                print(f"{size[0]} x {size[1]}: maximum relative error {error:.1e}")
                if not error <= tolerance:
                    raise OnnxError(
                        f"{path} was not written: at {size[0]} x {size[1]} the maximum relative error against torch is "
                        f"{error:.1e}, above the tolerance of {tolerance:.1e}"
                    )
            content = {**describe(facts, model.encoder.multiple, tolerance, errors), "opset": opset}
            if data.exists():
                content["data_sha256"] = sha256(data)
            add_metadata(file, content)
            # The weights first: with the old graph they are refused, as their hash is another.
            for new in (data, file):
                if new.exists():
                    sync_to_disk(new)
                    new.replace(path.with_name(new.name))
    return max(errors.values())


class _Values(nn.Module):
    """The depth model without its features, which no consumer of an exported file reads."""

    def __init__(self, model: DepthModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image).values


def trace(network: nn.Module, encoder: str, multiple: int) -> torch.onnx.ONNXProgram:
    """The ONNX program of a network for any batch size and sides of any `multiple`; OnnxError names the encoder."""
    sides = {2: multiple * Dim("h"), 3: multiple * Dim("w")}
    try:
        program = torch.onnx.export(
            network,
            # Different and neither 0 nor 1, which torch would take for constants.
            (torch.zeros(2, 3, 3 * multiple, 5 * multiple),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: Dim("batch"), **sides},),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:
        raise OnnxError(
            f"encoder {encoder} cannot be exported for any batch and image size: {reason(error)}"
        ) from error
    assert program is not None
    shape = list(program.model.graph.inputs[0].shape or ())
    if any(isinstance(shape[axis], int) for axis in (0, 2, 3)):
        fixed = " x ".join(str(length) for length in shape)
        raise OnnxError(
            f"encoder {encoder} cannot be exported for any batch and image size: torch gave a graph for {fixed}"
        )
    foreign = {node.domain for node in program.model.graph.all_nodes()} - {"", "ai.onnx"}
    if foreign:
        raise OnnxError(f"encoder {encoder} needs operators that are not standard: {', '.join(sorted(foreign))}")
    drop_traces(program)
    return program


def drop_traces(program: torch.onnx.ONNXProgram) -> None:
    """Take out the stack traces that torch keeps with every node: paths of this machine, and most of a small file."""
    graph = program.model.graph
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def reason(error: BaseException) -> str:
    """The first line of what first went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def size_of_weights(program: torch.onnx.ONNXProgram) -> int:
    """Bytes."""
    values = program.model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def check_sizes(model: DepthModel, facts: BundleFacts) -> list[Size]:
    """The size for which the encoder's positions were learned (else that of training), a wide and a tall one."""
    multiple = model.encoder.multiple
    embeddings: list[Any] = [module for module in model.encoder.modules() if getattr(module, "grid_size", None)]
    side = facts.short_side
    if embeddings:
        side = embeddings[0].grid_size[0] * embeddings[0].patch_size[0]
    n = max(1, round(side / multiple))
    half, quarter = math.ceil(n / 2), math.ceil(n / 4)
    grids = [(n, n), (half, n + half), (n + quarter, n - quarter or 1)]
    return [(multiple * h, multiple * w) for h, w in grids]


def measure_errors(network: nn.Module, file: Path, sizes: list[Size]) -> dict[Size, float]:
    """For each size the largest max|onnx - torch| / max|torch| over `BATCH_SIZES`, with normally distributed input."""
    run = open_session(file, torch.device("cpu"))
    noise = torch.Generator().manual_seed(0)
    errors: dict[Size, float] = {}
    for size in sizes:
        cases = []
        for batch_size in BATCH_SIZES:
            image = torch.randn(batch_size, 3, *size, generator=noise)
            with torch.inference_mode():
                expected = network(image)
            try:
                found = run_session(run, image)
            except Exception as error:
                where = f"{batch_size} image(s) of {size[0]} x {size[1]}"
                raise OnnxError(f"the exported graph does not run on {where}: {reason(error)}") from error
            cases.append(relative_error(found, expected))
        errors[size] = max(cases)
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|; infinite where they do not compare."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return math.inf
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    return difference / scale if scale else (math.inf if difference else 0.0)


def describe(facts: BundleFacts, multiple: int, tolerance: float, errors: Mapping[Size, float]) -> dict[str, object]:
    """What the file says of itself; `facts` are those of the bundle."""
    return {
        "format": FORMAT,
        "facts": asdict(facts),
        "weights_sha256": facts.sha256,
        "multiple": multiple,
        "mean": facts.mean,
        "std": facts.std,
        "tolerance": tolerance,
        "max_relative_error": max(errors.values()),
        "max_relative_errors": {f"{height}x{width}": error for (height, width), error in errors.items()},
        "version": depthkit.__version__,
        "torch": torch.__version__,
    }


def add_metadata(file: Path, content: Mapping[str, object]) -> None:
    """Append entries to an ONNX file: protobuf messages written one after the other are read as one."""
    (onnx,) = require("onnx")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}
    entries = [onnx.StringStringEntryProto(key=PREFIX + key, value=text) for key, text in texts.items()]
    with file.open("ab") as stream:
        stream.write(onnx.ModelProto(metadata_props=entries).SerializeToString())


def load_onnx(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], BundleFacts, int]:
    """The network of a file that `export_onnx` wrote, its facts, and what the sides of images must be multiples of.

    The network takes normalised images (B, 3, H, W) float32 and gives values (B, H, W) on `device`, `cpu` or `cuda`.
    `facts.sha256` is that of the file; `facts.provenance["onnx"]` holds the hash of the bundle's weights and what the
    export measured. OnnxError names a file that is damaged, not of depthkit, or not for this device.
    """
    session = open_session(path, device)
    properties = session.get_modelmeta().custom_metadata_map.items()
    metadata = {key.removeprefix(PREFIX): text for key, text in properties if key.startswith(PREFIX)}
    if "format" not in metadata:
        raise OnnxError(f"{path} was not written by depthkit: it does not say what it predicts from which input")
    if metadata["format"] != str(FORMAT):
        raise OnnxError(f"{path}: this version reads format {FORMAT}; export the model again")
    try:
        facts = parse_facts(json.loads(metadata["facts"]))
        multiple = int(metadata["multiple"])
        measured = {name: json.loads(metadata[name]) for name in ("tolerance", "max_relative_error")}
    except (TypeError, KeyError, ValueError) as error:
        raise OnnxError(f"{path}: metadata that this version does not read, {reason(error)}") from error
    data = path.with_name(path.name + DATA_SUFFIX)
    if "data_sha256" in metadata and sha256(data) != metadata["data_sha256"]:
        raise OnnxError(f"{data} does not belong to {path}; copy or export both again")
    provenance = {**facts.provenance, "onnx": {"weights_sha256": facts.sha256, **measured}}
    facts = replace(facts, sha256=sha256(path), provenance=provenance)
    return lambda image: run_session(session, image), facts, multiple


def open_session(path: Path, device: torch.device) -> Any:
    """An onnxruntime session; OnnxError when the file is damaged or onnxruntime has no such device."""
    (onnxruntime,) = require("onnxruntime")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if device.type not in PROVIDERS:
        raise OnnxError(f"device={device}: an ONNX file runs on {' or '.join(PROVIDERS)}")
    provider, package = PROVIDERS[device.type]
    if provider not in onnxruntime.get_available_providers():
        raise OnnxError(
            f"device={device}: this onnxruntime has no {provider}; pip install {package}, or use device=cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: what else goes wrong is raised
    options.intra_op_num_threads = torch.get_num_threads()
    arguments = {"device_id": device.index or 0} if device.type == "cuda" else {}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, arguments)])
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise OnnxError(f"{path} is damaged, incomplete or not an ONNX file: {reason(error)}") from error
    if provider not in session.get_providers():
        raise OnnxError(f"device={device}: {provider} does not start here (CUDA or cuDNN libraries); use device=cpu")
    return session


PROVIDERS = {"cpu": ("CPUExecutionProvider", "onnxruntime"), "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu")}
"""Torch device -> onnxruntime's execution provider and the package that has it."""


def has_cuda() -> bool:
    """Whether the installed onnxruntime runs on a GPU."""
    (onnxruntime,) = require("onnxruntime")
    provider, _ = PROVIDERS["cuda"]
    return provider in onnxruntime.get_available_providers()


def run_session(session: Any, image: Tensor) -> Tensor:
    values: np.ndarray = session.run([OUTPUT], {INPUT: image.float().cpu().numpy()})[0]
    return torch.from_numpy(values).to(image.device)


def require(*modules: str) -> list[Any]:
    """These packages, imported; OnnxError names the extra that brings them."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise OnnxError(f"ONNX files need the extra 'onnx': pip install 'depthkit[onnx]' ({error})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the exporter says: of an error it prints the whole graph, beside raising it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, gone with what is still in it when the block ends."""
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
