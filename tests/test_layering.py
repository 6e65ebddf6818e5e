"""Who may import whom, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "depthkit"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
METRICS = ("metrics", "metrics_edges", "metrics_pairs", "metrics_pixels", "metrics_video")
VIDEO = ("warping", "losses_video", "icp")
LOSSES = ("losses", "multitask", "normals", "pareto")
MATHEMATICS = {f"depthkit.{name}" for name in ("types", "geometry", "alignment", *VIDEO, *LOSSES, *METRICS)}


def nodes(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """Every node of a syntax tree, or those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child
        is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_for_types
        if into_functions or not is_later:
            yield from nodes(child, into_functions=into_functions)


def imports(module: str, *, into_functions: bool = True) -> set[str]:
    """Full names that a module imports."""
    found = set()
    for node in nodes(ast.parse(MODULES[module].read_text()), into_functions=into_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {name_of(str(node.module), alias.name) for alias in node.names}
    return found


def name_of(module: str, attribute: str) -> str:
    """`from module import attribute` as the module it reads."""
    return f"{module}.{attribute}" if f"{module}.{attribute}" in MODULES else module


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "depthkit"}


def theirs(module: str) -> set[str]:
    """Packages that are neither ours nor Python's."""
    return {name.split(".")[0] for name in imports(module)} - {"depthkit"} - sys.stdlib_module_names


def within(package: str) -> list[str]:
    return sorted(name for name in MODULES if name == package or name.startswith(package + "."))


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_source_is_found():
    assert "depthkit.losses" in MODULES
    assert ours("depthkit.losses") == {"depthkit.alignment"}
    assert theirs("depthkit.losses") == {"torch"}
    assert "depthkit.inference.loading" in ours("depthkit")
    assert "cv2" in imports("depthkit.data.datamodule") - imports("depthkit.data.datamodule", into_functions=False)


@pytest.mark.parametrize("module", sorted(MATHEMATICS))
def test_mathematics_is_torch_numpy_and_scipy(module):
    assert ours(module) <= MATHEMATICS
    assert theirs(module) <= {"torch", "numpy", "scipy"}


def test_config_knows_nothing_of_ours_but_other_settings():
    settings = [name for name in within("depthkit.settings") if name != "depthkit.settings"]
    assert ours("depthkit.config") == {"depthkit.errors", "depthkit.evaluation.settings", *settings}
    for module in ("depthkit.config", "depthkit.evaluation.settings", *settings):
        assert theirs(module) <= {"omegaconf"}
    for module in settings:
        assert ours(module) <= {"depthkit.errors", *settings}


@pytest.mark.parametrize("module", within("depthkit.models"))
def test_models_know_config_and_types(module):
    allowed = ("depthkit.models", "depthkit.config", "depthkit.types")
    assert all(is_within(name, *allowed) for name in ours(module))


@pytest.mark.parametrize("module", within("depthkit.data"))
def test_data_knows_no_model_and_no_stage(module):
    forbidden = (
        "models",
        "stages",
        "evaluation",
        "formats",
        "inference",
        "runtime",
        "train",
        "label",
        "losses",
        "bundle",
    )
    assert not [name for name in ours(module) if is_within(name, *(f"depthkit.{name}" for name in forbidden))]


@pytest.mark.parametrize("module", within("depthkit.stages"))
def test_stages_share_the_base_alone(module):
    own = {module, "depthkit.stages.base"}
    assert not [name for name in ours(module) if is_within(name, "depthkit.stages") and name not in own]
    assert not [
        name for name in ours(module) if is_within(name, "depthkit.train", "depthkit.label", "depthkit.runtime")
    ]


@pytest.mark.parametrize(
    "module", [*within("depthkit.evaluation"), *within("depthkit.formats"), *within("depthkit.inference")]
)
def test_evaluation_formats_and_inference_know_no_stage(module):
    forbidden = ("depthkit.stages", "depthkit.train", "depthkit.label", "depthkit.runtime")
    assert not [name for name in ours(module) if is_within(name, *forbidden)]


@pytest.mark.parametrize("module", within("depthkit.runtime"))
def test_callbacks_know_no_model_and_no_stage(module):
    forbidden = ("depthkit.models", "depthkit.stages", "depthkit.train", "depthkit.label")
    assert not [name for name in ours(module) if is_within(name, *forbidden)]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_extras_are_imported_where_they_are_used(module):
    """Optional packages only inside functions; a plain install can import every module."""
    extras = {
        "boto3",
        "deepspeed",
        "transformers",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "optuna",
        "peft",
        "submitit",
        "wandb",
        "tensorboard",
    }
    top = {name.split(".")[0] for name in imports(module, into_functions=False)}
    assert not top & extras


def test_nothing_imports_in_circles():
    """Modules in an order in which each imports only earlier ones."""
    waiting = {module: {name for name in ours(module) if name != module} for module in MODULES}
    waiting["depthkit"] = set()  # its import of the bundle lies inside a function
    while waiting:
        ready = [module for module, needs in waiting.items() if not needs & waiting.keys()]
        assert ready, waiting
        for module in ready:
            del waiting[module]
