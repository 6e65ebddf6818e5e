"""`depthkit sweep-report DIR`: a sweep as a table, pictures, and the best settings as an experiment."""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from depthkit.files import atomic_write
from depthkit.sweeps.results import Sweep, Trial, importances, read_sweep

DESCRIPTION = """\
What a sweep has found out, complete or still running: DIR is the folder of `depthkit train --multirun`, of lists or of
a search. Prints a table, and writes into DIR/report
  trials.csv                one row for each trial, failed and pruned ones too
  parallel_coordinates.png  every trial as a line through its settings to its value
  history.png               values in the order of the trials, and the best so far
  importance.png            which settings matter, from ten complete trials on
  experiment/best.yaml      the best settings: depthkit train --config-dir DIR/report experiment=best"""

ORDER = {"complete": 0, "pruned": 1, "unfinished": 2, "failed": 3}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="depthkit sweep-report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, help="folder of the sweep")
    parser.add_argument("--out", type=Path, help="folder to write to; DIR/report")
    arguments = parser.parse_args(argv)
    try:
        report(read_sweep(arguments.dir), arguments.out or arguments.dir / "report")
    except (OSError, ValueError) as error:
        print(f"depthkit sweep-report: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def report(sweep: Sweep, out: Path) -> None:
    """Print and write all there is to say."""
    from depthkit.sweeps.pictures import draw

    (out / "experiment").mkdir(parents=True, exist_ok=True)
    Console(width=None if sys.stdout.isatty() else 240).print(table(sweep))
    for trial in sweep.trials:
        if trial.error:
            print(f"trial {trial.number}: {trial.error.splitlines()[0]}")
    write(out / "trials.csv", as_csv(sweep))
    draw(sweep, importances(sweep), out)
    if not sweep.complete:
        print(f"no trial is complete: there is no best one\n{out}")
        return
    best = sweep.complete[0]
    write(out / "experiment" / "best.yaml", as_experiment(sweep, best, out))
    print(f"best: trial {best.number}, {sweep.metric} = {best.value:.6g}")
    print(f"  depthkit train --config-dir {out} experiment=best")


def write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def table(sweep: Sweep) -> Table:
    """Trials, best first; then pruned, unfinished and failed ones."""
    shown = Table(
        title=f"{sweep.folder}\nvalue: {sweep.metric}, smaller is better", box=SIMPLE_HEAD, title_justify="left"
    )
    for name in ("trial", "state", "value", "time", *sweep.params):
        shown.add_column(name.rpartition(".")[2], justify="left" if name == "state" else "right", overflow="fold")
    for trial in sorted(sweep.trials, key=lambda each: (ORDER[each.state], each.value or 0.0, each.number)):
        state = f"pruned at {trial.step}" if trial.state == "pruned" else trial.state
        value = "" if trial.value is None else f"{trial.value:.4g}"
        params = [shorten(trial.params.get(key, "")) for key in sweep.params]
        style = {"failed": "red", "complete": ""}.get(trial.state, "dim")
        shown.add_row(str(trial.number), state, value, clock(trial.seconds), *params, style=style)
    return shown


def shorten(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def as_csv(sweep: Sweep) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", "value", "step", "seconds", "error", *sweep.params])
    for trial in sweep.trials:
        facts = [trial.number, trial.state, trial.value, trial.step, round(trial.seconds, 3), trial.error]
        rows.writerow([*facts, *(trial.params.get(key) for key in sweep.params)])
    return text.getvalue()


GROUPS = ("data", "optim", "trainer", "protocol", "logger", "callbacks", "paths")


def as_experiment(sweep: Sweep, trial: Trial, out: Path) -> str:
    """All settings of a trial as a file of the group `experiment`, which depends on no other file of conf."""
    settings: Any = OmegaConf.load(sweep.folder / str(trial.number) / "hydra" / "config.yaml")
    stage = settings.stage.name
    settings.run_name = f"{sweep.folder.name}_best"
    settings.pop("run_dir")  # as in conf/train.yaml: from run_name
    settings.callbacks.pop("pruning", None)
    model = f"  - override /model: base_{settings.model.architecture}\n"  # the schema of its settings
    groups = model + "\n".join(f"  - override /{group}: null" for group in GROUPS)
    chosen = "\n".join(f"#   {key} = {value}" for key, value in trial.params.items())
    return (
        f"# @package _global_\n# The best of {len(sweep.trials)} trials in {sweep.folder}: trial {trial.number}, "
        f"{sweep.metric} = {trial.value:.6g}\n{chosen}\n"
        f"#   depthkit train --config-dir {out} experiment=best\n"
        f"defaults:\n  - override /stage: {stage}\n{groups}\n\n{OmegaConf.to_yaml(settings)}"
    )
