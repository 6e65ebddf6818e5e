"""ONNX files give what the torch model gives at every size, say what they are, and are not kept when they do not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from depthkit.bundle import BundleFacts, read_facts, save_bundle, sha256
from depthkit.config import DPTConfig
from depthkit.formats import onnx as formats_onnx
from depthkit.formats.onnx import OnnxError, export_onnx, load_onnx
from depthkit.inference.loading import load
from depthkit.inference.predictor import Predictor
from depthkit.models import DepthModel, build_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DECODER = {"tap_layers": [0, 1, 2, 3], "features": 16, "out_channels": [8, 8, 16, 16]}
VIT = {"img_size": 56, "embed_dim": 32, "depth": 4, "num_heads": 2, "init_values": 0.1}
MODELS = {
    "disparity": DPTConfig(encoder="vit_small_patch14_dinov2", encoder_args=VIT, **DECODER),
    "metric": DPTConfig(encoder="vit_small_patch14_reg4_dinov2", encoder_args=VIT, max_depth=20.0, **DECODER),
    "pyramid": DPTConfig(encoder="resnet18", **{**DECODER, "tap_layers": [1, 2, 3, 4]}),
}
GRIDS = [(4, 4), (2, 7), (9, 3)]
"""In units of `multiple`: native grid of the transformers, wide, tall; none but the native one is checked at export."""


def facts_of(config: DPTConfig) -> BundleFacts:
    return BundleFacts(
        content="depth_model",
        model=config,
        kind="disparity" if config.max_depth is None else "depth",
        short_side=56,
        sha256="5" * 64,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        provenance={"stage": "teacher", "seed": 7},
    )


def build_sensitive(config: DPTConfig) -> DepthModel:
    """A random model whose values depend on every part: where there is a position embedding, on that most of all."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("pos_embed"):
                weight.normal_()
            elif name.startswith("decoder") and weight.ndim > 1:
                weight.mul_(2)
    return model


@pytest.fixture(scope="module")
def model() -> DepthModel:
    return build_sensitive(MODELS["disparity"])


@pytest.fixture(scope="module")
def traced(model) -> torch.onnx.ONNXProgram:
    return formats_onnx.trace(formats_onnx._Values(model).eval(), "tiny", 14)


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request, tmp_path_factory) -> tuple[DPTConfig, DepthModel, Path]:
    config = MODELS[request.param]
    model = build_sensitive(config)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, facts_of(config), path)
    return config, model, path


@pytest.fixture
def no_trace(traced, monkeypatch) -> None:
    """Exports of `model` do not trace it again."""
    monkeypatch.setattr(formats_onnx, "trace", lambda *_: traced)


def test_one_session_serves_every_size_and_batch(exported):
    _, model, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    multiple = model.encoder.multiple
    for height, width in GRIDS:
        for batch_size in (1, 3):
            image = torch.randn(batch_size, 3, height * multiple, width * multiple)
            with torch.no_grad():
                expected = model(image).values.numpy()
            (found,) = session.run(None, {"image": image.numpy()})
            assert found.shape == (batch_size, height * multiple, width * multiple)
            assert expected.std() > 0.01 * expected.max()
            assert np.abs(found - expected).max() <= 1e-5 * expected.max()


def test_graph_is_standard_onnx_and_names_its_axes(exported):
    _, model, path = exported
    onnx.checker.check_model(path, full_check=True)
    content = onnx.load(path)
    assert {node.domain for node in content.graph.node} <= {"", "ai.onnx"}
    assert len(content.functions) == 0
    multiple = model.encoder.multiple
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*content.graph.input, *content.graph.output)
    }
    sides = [f"{multiple}*h", f"{multiple}*w"]
    assert axes == {"image": ["batch", 3, *sides], "depth": ["batch", *sides]}


def test_file_holds_no_path_of_the_machine_that_wrote_it(exported):
    assert str(Path(formats_onnx.__file__).parents[1]).encode() not in exported[2].read_bytes()


def test_what_is_read_back(exported):
    config, model, path = exported
    network, facts, multiple = load_onnx(path, CPU)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    error = json.loads(metadata["depthkit.max_relative_error"])
    assert multiple == model.encoder.multiple
    assert facts.model == config
    assert facts.sha256 == sha256(path)
    assert (list(facts.mean), list(facts.std), facts.short_side) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 56)
    assert facts.kind == ("disparity" if config.max_depth is None else "depth")
    origin = {"weights_sha256": "5" * 64, "tolerance": 1e-4, "max_relative_error": error}
    assert facts.provenance == {"stage": "teacher", "seed": 7, "onnx": origin}
    assert metadata["depthkit.torch"] == torch.__version__
    assert json.loads(metadata["depthkit.mean"]) == [0.5, 0.4, 0.3]
    assert int(metadata["depthkit.opset"]) == next(e.version for e in onnx.load(path).opset_import if not e.domain)
    image = torch.randn(2, 3, 2 * multiple, 3 * multiple)
    with torch.no_grad():
        torch.testing.assert_close(network(image), model(image).values, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("no_trace")
def test_error_is_printed_per_size_stored_and_returned(model, tmp_path, capsys, monkeypatch):
    errors = iter([1e-6, 3e-6, 5e-6, 4e-6, 2e-6, 1e-6])
    monkeypatch.setattr(formats_onnx, "relative_error", lambda found, expected: next(errors))
    assert export_onnx(model, facts_of(MODELS["disparity"]), tmp_path / "model.onnx") == 5e-6
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "56 x 56: maximum relative error 3.0e-06",
        "28 x 84: maximum relative error 5.0e-06",
        "70 x 42: maximum relative error 2.0e-06",
    ]
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(metadata["depthkit.max_relative_errors"]) == {"56x56": 3e-6, "28x84": 5e-6, "70x42": 2e-6}


def test_relative_error():
    expected = torch.tensor([[1.0, 4.0]])
    assert formats_onnx.relative_error(torch.tensor([[1.5, 4.0]]), expected) == 0.125
    assert formats_onnx.relative_error(expected, expected) == 0
    zeros = torch.zeros(1, 2)
    assert formats_onnx.relative_error(zeros, zeros) == 0
    for found in (torch.tensor([[float("nan"), 4.0]]), torch.zeros(2, 2)):
        assert formats_onnx.relative_error(found, expected) == float("inf")
    assert formats_onnx.relative_error(expected, zeros) == float("inf")


@pytest.mark.usefixtures("no_trace")
def test_file_above_tolerance_is_not_kept(tmp_path):
    """The graph holds the weights from before the change: another model."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older file")
    other = build_sensitive(MODELS["disparity"])
    with torch.no_grad():
        other.decoder.head_out[0].weight.mul_(1.01)
    message = r"model\.onnx was not written: at 56 x 56 .* error against torch is .*, above the tolerance of 1\.0e-04"
    with pytest.raises(OnnxError, match=message):
        export_onnx(other, facts_of(MODELS["disparity"]), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"an older file"


@pytest.mark.usefixtures("no_trace")
def test_weights_beyond_the_limit_lie_beside_the_graph(model, tmp_path, monkeypatch):
    monkeypatch.setattr(formats_onnx, "MAX_EMBEDDED", 1000)
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    export_onnx(model, facts_of(MODELS["disparity"]), path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, data.name}
    assert path.stat().st_size < data.stat().st_size
    network, _, _ = load_onnx(path, CPU)
    image = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        torch.testing.assert_close(network(image), model(image).values, rtol=1e-4, atol=1e-5)
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(OnnxError, match=r"model\.onnx\.data does not belong to .*model\.onnx; copy or export both"):
        load_onnx(path, CPU)
    data.unlink()
    with pytest.raises(OnnxError, match=r"model\.onnx is damaged, incomplete .*model\.onnx\.data"):
        load_onnx(path, CPU)


def test_encoder_that_cannot_be_exported_is_named_and_nothing_is_left(tmp_path, capfd):
    model = build_model(MODELS["disparity"])
    forward = model.encoder.forward
    model.encoder.forward = lambda image: forward(image * 2 if image.mean() > 0 else image)
    message = r"encoder vit_small_patch14_dinov2 cannot be exported .*data-dependent expression"
    with pytest.raises(OnnxError, match=message) as caught:
        export_onnx(model, facts_of(MODELS["disparity"]), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class MeanColor(nn.Module):
    def forward(self, image):
        return image.mean(1)


class MeanColorOfOneBatchSize(MeanColor):
    def forward(self, image):
        return super().forward(image).expand(len(image), -1, -1)


def test_graph_for_one_batch_size_is_refused():
    with pytest.raises(OnnxError, match=r"encoder tiny .* torch gave a graph for 2 x 3 x 14\*h x 14\*w"):
        formats_onnx.trace(MeanColorOfOneBatchSize().eval(), "tiny", 14)


def test_operators_that_are_not_standard_are_refused(monkeypatch):
    program = formats_onnx.trace(MeanColor().eval(), "tiny", 14)
    next(iter(program.model.graph)).domain = "com.example"
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    with pytest.raises(OnnxError, match=r"encoder tiny needs operators that are not standard: com\.example"):
        formats_onnx.trace(MeanColor().eval(), "tiny", 14)


@pytest.mark.usefixtures("no_trace")
def test_failure_while_writing_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(formats_onnx, "add_metadata", fail)
    with pytest.raises(OSError, match="no space left"):
        export_onnx(model, facts_of(MODELS["disparity"]), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_name_must_say_the_format(model, tmp_path):
    with pytest.raises(OnnxError, match=r"model\.bin: the name of the file must end in \.onnx"):
        export_onnx(model, facts_of(MODELS["disparity"]), tmp_path / "model.bin")


@pytest.fixture
def foreign(tmp_path) -> Path:
    """The identity as an ONNX file."""
    axes = ["batch", 3, "h", "w"]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes) for name in ("image", "depth")]
    node = onnx.helper.make_node("Identity", ["image"], ["depth"])
    graph = onnx.helper.make_graph([node], "identity", values[:1], values[1:])
    path = tmp_path / "foreign.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_files_of_others_and_of_other_versions_are_refused(foreign):
    with pytest.raises(OnnxError, match=r"foreign\.onnx was not written by depthkit"):
        load_onnx(foreign, CPU)
    formats_onnx.add_metadata(foreign, {"format": 1, "multiple": 14})
    with pytest.raises(OnnxError, match=r"foreign\.onnx: metadata .*facts"):
        load_onnx(foreign, CPU)
    content = onnx.load(foreign)
    onnx.helper.set_model_props(content, {"depthkit.format": "2"})
    onnx.save(content, foreign)
    with pytest.raises(OnnxError, match=r"foreign\.onnx: this version reads format 1"):
        load_onnx(foreign, CPU)


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_damaged_files_are_named(exported, share, tmp_path, capfd):
    content = exported[2].read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(OnnxError, match=r"cut\.onnx is damaged"):
        load_onnx(path, CPU)
    assert capfd.readouterr().err == ""


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        load_onnx(tmp_path / "none.onnx", CPU)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", r"device=cuda: this onnxruntime has no CUDAExecutionProvider"), ("meta", r"device=meta: .* cpu or cuda")],
)
def test_devices_that_onnxruntime_does_not_have(foreign, device, message, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(OnnxError, match=message):
        load_onnx(foreign, torch.device(device))


def test_missing_packages_name_the_extra(foreign, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call in (
        lambda: load_onnx(foreign, CPU),
        lambda: export_onnx(model, facts_of(MODELS["disparity"]), tmp_path / "model.onnx"),
    ):
        with pytest.raises(OnnxError, match=r"pip install 'depthkit\[onnx\]'") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_import_needs_no_onnx():
    code = "import sys, depthkit.formats.onnx as _; sys.exit(bool({'onnx', 'onnxruntime'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("no_trace")
def test_file_predicts_as_its_bundle(model, tmp_path):
    path, folder = tmp_path / "model.onnx", tmp_path / "bundle"
    save_bundle(folder, model, facts_of(MODELS["disparity"]))
    export_onnx(model, read_facts(folder), path)
    bundle = load(folder, device="cpu")
    network, facts, multiple = load_onnx(path, CPU)
    assert facts.provenance["onnx"]["weights_sha256"] == bundle.sha256
    predictor = Predictor(network, facts, name=str(path), multiple=multiple, device=CPU)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((32, 32), (40, 33), (64, 20), (32, 32))]
    for found, expected in zip(predictor.predict(images), bundle.predict(images), strict=True):
        assert (found.kind, found.unit) == (expected.kind, expected.unit)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
