"""The tiny commands of docs/recipes.md, one after another in the order of the page, with less to do.

The full recipes need the papers' data sets; their commands are composed by test_readme.py.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_docs_walked import depthkit, folder, shrunk, train_here  # noqa: F401 - folder is a fixture
from test_readme import ROOT, commands

PAGE = (ROOT / "docs" / "recipes.md").read_text()
SHOWN = commands(PAGE)
FEW = ["trainer.max_steps=3", "data.num_workers=0", "trainer.enable_progress_bar=false"]


def is_tiny(argv: list[str]) -> bool:
    return any(word.startswith("experiment=tiny_") for word in argv)


def small_worlds(config: Any) -> list[str]:
    """Overrides that make every procedural data set of a recipe a few small pictures, as `small_world` does."""
    sets = [
        (f"data.{group}.{name}.world", dataset.world)
        for group in ("labeled", "unlabeled", "val", "val_clips")
        for name, dataset in getattr(config.data, group).items()
        if dataset.world is not None
    ]
    return [
        item for name, world in sets for item in (f"{name}.num_images={24 * world.num_frames}", f"{name}.size=[32,40]")
    ]


def test_the_page_shows_every_recipe_and_its_twin():
    """Those of the three stages are on pages of their own."""
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    stages = ("pretrain", "teacher", "label", "student", "evaluate")
    missing = {name for name in experiments if not name.endswith(stages)} - set(re.findall(r"`(\w+)`", PAGE))
    assert not missing


@pytest.mark.slow
def test_the_tiny_recipes_run_in_the_order_of_the_page(
    compose: Any,
    folder: Path,  # noqa: F811
    samples_dir: Path,
) -> None:
    train_here(compose, folder, *shrunk(["train", "experiment=tiny_student"]))
    pack = next(argv for argv in SHOWN if argv[0] == "pack")
    depthkit(folder, *(word.replace("SAMPLES", str(samples_dir)) for word in pack), "--workers", "1")
    walked = [argv for argv in SHOWN if is_tiny(argv) and argv[0] == "train"]
    assert len(walked) > 10
    for argv in walked:
        config = compose(*argv[1:])
        warmup = ["optim.warmup_steps=0"] if config.optim.warmup_steps else []
        few = [word for word in argv if not word.startswith("trainer.max_steps=")]
        train_here(compose, folder, *few, *FEW, *warmup, *small_worlds(config))
        assert (folder / config.run_dir / "bundle" / "model.json").is_file(), shlex.join(argv)
