"""The page on little data is walked, with less to do."""

from pathlib import Path
from typing import Any

import pytest
from test_docs_walked import depthkit, folder, shrunk, train_here  # noqa: F401 - folder is a fixture
from test_readme import ROOT, commands

QUICK = ["images=24", "steps=30", "sweep_steps=8"]


@pytest.mark.slow
def test_the_page_on_little_data(compose: Any, folder: Path) -> None:  # noqa: F811
    shown = commands((ROOT / "docs" / "learning-from-little.md").read_text())
    assert {argv[0] for argv in shown} == {"doctor", "train", "label", "select"}
    for argv in shown:
        words = shrunk(argv)
        if argv[0] == "doctor":
            words = [*words, *QUICK]
        if argv[0] == "label":
            words += ["stage.num_workers=0"]
        if argv[0] == "train":
            train_here(compose, folder, *words)
        else:
            depthkit(folder, *words)
    assert (folder / "runs" / "hard" / "bundle" / "model.json").is_file()
