"""The page of public data sets is what the facts say."""

import re
import runpy
from pathlib import Path

from depthkit.data.facts import known_datasets, load_facts

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "datasets_table.py"))


def test_the_committed_page_is_what_the_script_makes() -> None:
    committed = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert committed == SCRIPT["page"](), "run `python scripts/datasets_table.py` and commit docs/datasets.md"


def test_every_data_set_has_a_row_with_its_licence_and_a_section_with_its_defects() -> None:
    page = SCRIPT["page"]()
    rows = {cells[0]: cells for line in page.splitlines() if line.startswith("| [") for cells in [cells_of(line)]}
    assert rows.keys() == {f"[{name}](#{name})" for name in known_datasets()}
    for name in known_datasets():
        facts = load_facts(name)
        row, section = rows[f"[{name}](#{name})"], page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert row[3] == " ".join(facts.licence.split())
        assert row[4] == {True: "yes", False: "no", None: "?"}[facts.commercial_use]
        for split in facts.splits.values():
            assert split.images is None or f"{split.images:,}" in row[2]
        for defect in facts.defects:
            assert defect.reported in section
            assert " ".join(defect.text.split()) in section


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_labels_say_quantity_encoding_and_unit() -> None:
    labels = {name: SCRIPT["label"](load_facts(name).target) for name in known_datasets()}
    assert labels["vkitti2"] == "planar depth, 16-bit PNG, stored / 100 = m"
    assert labels["hypersim"] == "ray distance, .npz, m"
    assert labels["irs"] == "stereo disparity, EXR, px"
    assert labels["hrwsi"] == "inverse depth, 8-bit PNG, no unit"
    assert SCRIPT["label"](None) == "none"
