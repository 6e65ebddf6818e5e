"""What a check says: one line of plain language, how bad it is, and the numbers behind it."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Level(Enum):
    ok = "ok"
    warning = "warning"
    problem = "problem"
    skipped = "skipped"


@dataclass(frozen=True)
class Finding:
    """`text` says what was found and, where that is bad, the cure; `check` is the name of what was looked at."""

    level: Level
    text: str
    values: dict[str, Any] = field(default_factory=dict)
    check: str = ""
