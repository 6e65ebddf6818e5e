"""Every command that README and docs show is one that depthkit takes, and every file they name is there.

Nothing is run here: settings are composed, arguments are parsed. What the commands do, the other tests say.
"""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException

from depthkit import label, launch
from depthkit.__main__ import VERBS
from depthkit.compose import register_schemas
from depthkit.config import CONF_DIR, ConfigError, DemoConfig, PseudoLabelConfig, TrainConfig
from depthkit.doctor.settings import DoctorConfig
from depthkit.evaluation import evaluate
from depthkit.evaluation.settings import EvaluateConfig
from depthkit.planning.plan import to_plan_config
from depthkit.planning.settings import PlanConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL_BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")

BY_ARGPARSE = ("pack", "replay", "inspect", "select", "predict", "import", "export", "sweep-report")


def commands(text: str) -> list[list[str]]:
    """The arguments of every depthkit command in the shell blocks of a page; lines that end in a backslash go on."""
    lines = "\n".join(SHELL_BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    words = (shlex.split(line.removeprefix("$ "), comments=True) for line in lines)
    return [line[1:] for line in words if line[:1] == ["depthkit"]]


COMMANDS = [(page, argv) for page in PAGES for argv in commands(page.read_text())]
SHOWN = [pytest.param(argv, id=f"{page.name}: {' '.join(argv)}") for page, argv in COMMANDS]


class Parsed(Exception):
    """The arguments were accepted."""


def overrides_of(argv: list[str]) -> list[str]:
    """The settings in the arguments of a verb by Hydra. A sweep stands for its first value."""
    settings = [item for item in argv if item not in ("--multirun", "-m", "--help", "--cfg", "job")]
    if "--config-dir" in argv:  # a file that an earlier command wrote: `test_sweeps` runs these
        return []
    if "--multirun" in argv or "-m" in argv:
        settings = [item for item in settings if "(" not in item]  # ranges of a search
        settings = [re.sub(r"=([^\[{,]+),.*", r"=\1", item) for item in settings]
    return settings


def test_pages_show_commands():
    assert {page.name for page in PAGES} >= {"README.md"}
    assert {argv[0] for _, argv in COMMANDS} >= {"train", "label", "pack"}


def test_commands_are_found_in_blocks():
    shell = "```bash\ndepthkit train a=1 \\\n  b=2  # why\nls\n$ depthkit demo\n```\n"
    text = f"{shell}```python\ndepthkit pack\n```\ndepthkit inspect\n"
    assert commands(text) == [["train", "a=1", "b=2"], ["demo"]]


@pytest.mark.parametrize("argv", SHOWN)
def test_command_is_one_that_depthkit_takes(argv, compose, monkeypatch):
    verb, *arguments = argv
    assert verb in VERBS or verb.startswith("-"), f"depthkit has no verb {verb}"
    if verb in BY_ARGPARSE:
        assert_parses(verb, arguments, monkeypatch)
    elif verb in VERBS and arguments != ["--help"]:
        assert_composes(verb, arguments, compose)


def assert_parses(verb: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`argparse` ends the program where it does not accept the arguments; here it also ends where it does."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, args: list[str]) -> None:
        raise Parsed(parse_args(parser, args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        import_module(VERBS[verb][0]).main(arguments)


def assert_composes(verb: str, arguments: list[str], compose) -> None:
    settings = overrides_of(arguments)
    if verb == "label":
        config = compose(*label.as_stage_settings(settings))
        assert isinstance(config.stage, PseudoLabelConfig)
    elif verb == "evaluate":
        assert isinstance(compose(*evaluate.as_lists(settings), config_name="evaluate"), EvaluateConfig)
    elif verb == "plan":
        register_schemas()
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            assert isinstance(to_plan_config(hydra.compose("plan", settings)), PlanConfig)
    elif verb == "launch":
        assert len(launch.composed(launch.parse(arguments))) >= 2
    else:
        schema = {"train": TrainConfig, "doctor": DoctorConfig, "demo": DemoConfig}[verb]
        assert isinstance(compose(*settings, config_name=verb), schema)


@pytest.mark.parametrize(
    "wrong",
    [
        ["train", "experiment=tiny"],
        ["train", "experiment=tiny_teacher", "optim.rate=1"],
        ["label", "bundle=b", "images=i"],
        ["label", "experiment=tiny_teacher"],
        ["evaluate", "model=a"],
        ["pack", "folder"],
        ["predict", "model", "photo.jpg", "--output", "x"],
        ["tain", "experiment=tiny_teacher"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_would_be_found(wrong, compose, monkeypatch):
    with pytest.raises((AssertionError, ConfigError, HydraException, SystemExit)):
        test_command_is_one_that_depthkit_takes(wrong, compose, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_are_there(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_are_there(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = re.findall(r"^make ([a-z-]+)", "\n".join(SHELL_BLOCK.findall(page.read_text())), re.MULTILINE)
    assert set(shown) <= targets


def experiment_comments() -> list:
    """The commands in the head of each experiment, where no value is left open."""
    shown = []
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        for line in re.findall(r"^#   (depthkit (?:train|label) .*)", path.read_text(), re.MULTILINE):
            shown.append(pytest.param(shlex.split(line, comments=True)[1:], id=f"{path.name}: {line}"))
    return shown


@pytest.mark.parametrize("argv", experiment_comments())
def test_command_in_the_head_of_an_experiment(argv, compose):
    assert_composes(argv[0], argv[1:], compose)
