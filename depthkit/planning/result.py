"""What a plan says."""

import json
from dataclasses import asdict, dataclass, field

from depthkit.planning.amounts import Figure
from depthkit.planning.memory import Engine, Held


@dataclass(frozen=True)
class EngineRow:
    """Bytes on each device with one engine at the batch of the settings, and the largest batch that fits."""

    engine: Engine
    checkpointing: bool
    held: Held
    batch: float
    total: float
    usable: float
    host: float
    host_usable: float
    largest_batch: int
    chosen: bool

    @property
    def fits(self) -> bool:
        return self.total <= self.usable and self.host <= self.host_usable

    @property
    def name(self) -> str:
        return self.engine.name + (" + checkpointing" if self.checkpointing else "")


@dataclass(frozen=True)
class Plan:
    title: str
    figures: dict[str, list[Figure]]
    rows: list[EngineRow]
    fits: bool
    advice: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        rows = [{"name": row.name, "fits": row.fits, **asdict(row)} for row in self.rows]
        figures = {section: [each._asdict() for each in figures] for section, figures in self.figures.items()}
        whole = {"title": self.title, "fits": self.fits, "advice": self.advice, "figures": figures, "engines": rows}
        return json.dumps(whole, indent=2)
