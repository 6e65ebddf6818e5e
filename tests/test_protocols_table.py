"""The page of protocols is what conf/protocol says."""

import runpy
from pathlib import Path

from shipped import SHIPPED

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "protocols_table.py"))


def test_the_committed_page_is_what_the_script_makes() -> None:
    committed = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    assert committed == SCRIPT["page"](), "run `python scripts/protocols_table.py` and commit docs/protocols.md"


def test_every_protocol_says_where_it_comes_from() -> None:
    for name in SHIPPED:
        section = SCRIPT["section"](name, SCRIPT["composed"](name)).splitlines()
        assert len(section[3]) > 40, f"conf/protocol/{name}.yaml begins with no comment"
