"""`depthkit demo seed=0 out=runs/demo`: the whole recipe on a small procedural world.

Renders the world, pre-trains the tiny encoder, trains the teacher on the labeled source domain, labels the target
domain, trains the student on both, evaluates both on held-out target scenes. Writes `summary.json`, `report.html` and
`grid.png` into `out`. A demo that was stopped goes on where it was when it is started again.
"""

import json
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, DemoConfig, TrainConfig
from depthkit.data.datamodule import render_missing
from depthkit.evaluation.evaluate import evaluate
from depthkit.evaluation.outputs import save, summary_table
from depthkit.evaluation.protocols import protocol_id
from depthkit.evaluation.report import write_report
from depthkit.evaluation.results import Evaluation
from depthkit.files import atomic_write
from depthkit.hydra_entry import hydra_main
from depthkit.inference.loading import load
from depthkit.train import run

FROM_PRETRAINED = {"tiny_teacher": ["stage.encoder_weights='${paths.runs}/tiny_pretrain/bundle'"]}
"""Alone, `tiny_teacher` needs no earlier stage; here it starts from the pre-trained encoder, as the student does."""

MIN_STEPS = 4
MIN_IMAGES = 24

STAGES = {
    "tiny_pretrain": "pre-training the encoder on unlabeled images of both domains",
    "tiny_teacher": "training the teacher on the labeled source domain",
    "tiny_label": "pseudo-labelling the unlabeled target domain",
    "tiny_student": "training the student on both, with strong perturbation and feature alignment",
}


def main(argv: list[str]) -> int:
    return hydra_main("demo", argv, demo)


def demo(config: DemoConfig) -> Evaluation:
    """Run every stage, evaluate teacher and student, write and print the summary."""
    start = time.monotonic()
    out = Path(config.out)
    console = Console()
    configs = {experiment: compose_stage(experiment, config) for experiment in STAGES}
    evaluation_config = compose_stage("tiny_evaluate", config)
    (test_set,) = evaluation_config.data.val.values()

    console.rule(f"[1/{len(STAGES) + 2}] rendering the world")
    for stage in (*configs.values(), evaluation_config):
        for group in (stage.data.labeled, stage.data.unlabeled, stage.data.val):
            render_missing(group)
    for number, (experiment, text) in enumerate(STAGES.items(), start=2):
        console.rule(f"[{number}/{len(STAGES) + 2}] {text}")
        run(configs[experiment])

    console.rule(f"[{len(STAGES) + 2}/{len(STAGES) + 2}] evaluating on held-out target scenes")
    models = {name: load(f"{configs[f'tiny_{name}'].run_dir}/bundle") for name in ("teacher", "student")}
    evaluation = evaluate(models, [Path(test_set.manifest)], evaluation_config.protocol)
    save(evaluation, out)
    write_report(evaluation, out, num_pictures=8)
    summary = {
        "protocol": protocol_id(evaluation.protocol),
        "seed": config.seed,
        **{name: {metric: evaluation.means(name)[metric] for metric in ("abs_rel", "delta1")} for name in models},
        "images": len(evaluation.images),
        "scale": config.scale,
        "seconds": round(time.monotonic() - start, 1),
    }
    with atomic_write(out / "summary.json") as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    console.print(summary_table(evaluation))
    console.print(f"summary: {out / 'summary.json'}   report: {out / 'report.html'}", soft_wrap=True)
    return evaluation


def compose_stage(experiment: str, config: DemoConfig) -> TrainConfig:
    """Settings of one stage below `config.out`, with images and steps scaled."""
    out = Path(config.out).resolve()
    overrides = [
        f"experiment={experiment}",
        f"seed={config.seed}",
        f"paths.runs='{out}'",
        f"paths.data='{out / 'data'}'",
        *FROM_PRETRAINED.get(experiment, []),
        *config.overrides,
    ]
    # The demo itself was started by Hydra, which keeps one global state.
    GlobalHydra.instance().clear()
    register_schemas()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        stage: TrainConfig = to_config(compose("train", overrides=overrides))
    scale_down(stage, config.scale)
    return stage


def scale_down(stage: TrainConfig, scale: float) -> None:
    """Multiply steps and rendered images by `scale`, with enough left of each for a batch."""
    if stage.trainer.max_steps > 0:
        stage.trainer.max_steps = max(MIN_STEPS, round(stage.trainer.max_steps * scale))
        stage.optim.warmup_steps = min(stage.optim.warmup_steps, stage.trainer.max_steps // 2)
    for group in (stage.data.labeled, stage.data.unlabeled, stage.data.val):
        for dataset in group.values():
            if dataset.world is not None:
                dataset.world.num_images = max(MIN_IMAGES, round(dataset.world.num_images * scale))
