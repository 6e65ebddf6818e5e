"""`depthkit doctor experiment=NAME`: would this run learn? Looks at labels, gradients and rates before step 1.

A run is examined as its settings stand, on one device and with the batches of one rank. Exit code 1 if there is
something to fix.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from depthkit.checks import validate
from depthkit.config import ConfigError, PseudoLabelConfig, SupervisedConfig
from depthkit.doctor.bench import Bench
from depthkit.doctor.finding import Finding, Level
from depthkit.doctor.labels import check_alignment, check_cameras, check_flips, check_values, per_stream
from depthkit.doctor.normalisation import check_normalisation
from depthkit.doctor.report import draw, draw_frames, draw_samples, show, write
from depthkit.doctor.settings import DoctorConfig
from depthkit.doctor.training import check_gradients, check_learning_rate, check_overfit
from depthkit.hydra_entry import hydra_main


def main(argv: list[str]) -> int:
    return hydra_main("doctor", argv, run)


def run(config: DoctorConfig) -> None:
    findings = examine(config)
    problems = sum(finding.level is Level.problem for finding in findings)
    show(findings, Console())
    print(f"{config.out}/doctor.json, doctor.png: {problems or 'nothing'} to fix, {len(findings)} things looked at")
    if problems:
        raise SystemExit(1)


def examine(config: DoctorConfig) -> list[Finding]:
    """All findings, which are also written to `config.out`. A check that fails is a finding too."""
    if isinstance(config.stage, PseudoLabelConfig):
        raise ConfigError(f"stage={config.stage.name} trains nothing; `depthkit inspect` looks at labels that exist")
    validate(config)
    bench = Bench(config)
    loaded = list(islice(bench.batches(), num_batches(config, bench)))
    findings, pictures = [], []
    for stream, batches in per_stream([batch for _, batch in loaded]).items():
        images = [pixels[stream] for pixels, _ in loaded]
        findings += [
            attempt(f"labels of {stream}", check_values, batches, config.model.max_depth),
            attempt(f"labels of {stream} on their images", check_alignment, images, batches),
        ]
        if stream == "labeled" and isinstance(config.stage, SupervisedConfig) and config.stage.normals:
            findings.append(attempt("cameras of labeled", check_cameras, batches))
        pictures.append(draw_samples(images[0], batches[0], config.stage.target_kind or "disparity"))
    if not pictures:
        pictures += [draw_frames(images) for images in loaded[0][0].values()]
    findings += [
        attempt("flips", check_flips, config.data, config.stage.target_kind, config.seed),
        attempt("normalisation", check_normalisation, bench),
    ]
    batch = bench.on_device(loaded[0][1])
    findings.append(attempt("gradients", check_gradients, bench, batch))
    rates = attempt("learning rate", check_learning_rate, bench, batch, config.sweep_steps)
    factor = rates.values.get("best_factor", 1.0)
    findings += [rates, attempt("one batch by heart", check_overfit, bench, batch, config.steps, factor)]
    write(findings, draw(pictures, findings), Path(config.out))
    return findings


def num_batches(config: DoctorConfig, bench: Bench) -> int:
    """Steps of which one rank sees `config.images` images of every stream, or as many as the run has."""
    per_rank = [count / bench.world_size for count in config.data.images_per_step().values() if count]
    return min(bench.data.num_steps, math.ceil(config.images / min(per_rank)))


def attempt(check: str, look: Callable[..., Finding], *arguments: Any) -> Finding:
    """The finding of a check; that it failed is one too."""
    try:
        return replace(look(*arguments), check=check)
    except (ValueError, OSError, RuntimeError) as error:
        return Finding(Level.problem, f"{type(error).__name__}: {error}", check=check)
