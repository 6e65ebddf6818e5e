"""A plan as tables on the console."""

from rich.console import Console
from rich.table import Table

from depthkit.planning.amounts import Figure
from depthkit.planning.memory import FRAGMENTATION, RESERVED
from depthkit.planning.result import EngineRow, Plan
from depthkit.planning.settings import PlanConfig

WIDTH = 118
"""Columns, where the output is no terminal."""
BYTES = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6)]
HELD = ["weights", "gradients", "optimizer", "ema", "buffers"]


def show(plan: Plan, config: PlanConfig) -> None:
    console = Console(width=None if Console().is_terminal else WIDTH, highlight=False)
    trainer, cluster = config.trainer, config.cluster
    devices = f"{trainer.num_nodes} x {trainer.devices} {cluster.device}, {cluster.memory_gb:g} GB each"
    console.print(f"[bold]{plan.title}[/bold]: {devices}, {trainer.precision}")
    console.print(figures_table(plan.figures))
    console.print(engines_table(plan.rows))
    console.print(
        f"GB are 10^9 bytes. Of {cluster.memory_gb:g} GB {plan.rows[0].usable / 1e9:.1f} are counted as usable: "
        f"{FRAGMENTATION:.0%} and {RESERVED / 1e9:g} GB less (assumed)."
    )
    console.print(f"[bold]{'fits' if plan.fits else 'does not fit'}[/bold]", end="")
    console.print("" if plan.fits else ": " + ", or ".join(plan.advice))


def figures_table(sections: dict[str, list[Figure]]) -> Table:
    table = Table("", "figure", "value", "basis", "from", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    table.columns[2].no_wrap = True
    for section, figures in sections.items():
        for index, figure in enumerate(figures):
            table.add_row("" if index else section, figure.name, text(figure), figure.basis, figure.source)
    return table


def text(figure: Figure) -> str:
    """The value of a figure with its unit, to three digits or the whole number."""
    if figure.value is None:
        return "not known"
    if figure.unit == "B":
        unit, size = next((each for each in BYTES if figure.value >= each[1]), BYTES[-1])
        return f"{figure.value / size:,.1f} {unit}"
    if figure.unit == "FLOP":
        return f"{figure.value:.3g} FLOP"
    is_whole = figure.value >= 100 or figure.value == int(figure.value)
    return f"{figure.value:{',.0f' if is_whole else '.3g'}} {figure.unit}".strip()


def engines_table(rows: list[EngineRow]) -> Table:
    columns = ("engine", *HELD, "batch", "total", "host", "largest", "fits")
    table = Table(*columns, box=None, pad_edge=False, title="GB per device", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        parts = (*(getattr(row.held, name) for name in HELD), row.batch, row.total, row.host)
        cells = [f"{part / 1e9:.1f}" for part in parts]
        chosen = "* " if row.chosen else "  "
        table.add_row(chosen + row.name, *cells, str(row.largest_batch), "yes" if row.fits else "no")
    return table
