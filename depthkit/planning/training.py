"""The plan of a stage that trains: memory by engine, steps, time, disk."""

import math
from dataclasses import replace

import torch

from depthkit.checks import checkpointing_refusal
from depthkit.config import DatasetConfig, PretrainConfig
from depthkit.flops import num_parameters
from depthkit.planning import amounts
from depthkit.planning.amounts import Figure
from depthkit.planning.memory import ENGINES, Counts, Engine, held_bytes, largest_batch, measure_batch, usable_bytes
from depthkit.planning.result import EngineRow, Plan
from depthkit.planning.settings import PlanConfig
from depthkit.planning.step import bare_module, frozen_encoder, smallest_batch
from depthkit.reporting import batch_flops
from depthkit.trainer_checks import zero_stage


def plan_training(config: PlanConfig) -> Plan:
    with torch.device("meta"):
        module = bare_module(config)
    is_pretrain = isinstance(config.stage, PretrainConfig)
    encoder = num_parameters(module.get_submodule("encoder" if is_pretrain else "model.encoder"))
    frozen = num_parameters(frozen_encoder(module))
    everything, trained = num_parameters(module), num_parameters(module, trainable=True)
    counts = Counts(everything, trained, ema=0 if config.optim.ema_decay is None else trained, frozen=frozen)

    steps = amounts.steps_of(config)
    per_step = amounts.images_per_step(config)
    samples = float(steps.value or 0) * per_step
    flops = batch_flops(config, module) / sum(config.data.images_per_step().values())
    time = amounts.time_figures(config, samples, flops)
    rate = next(each for each in time if each.name.startswith("images/s"))
    sets = [*config.data.labeled.values(), *config.data.unlabeled.values()]
    images = amounts.sum_of(amounts.images_of(dataset, config) for dataset in sets)
    labeled_by_teacher = [each for each in config.data.unlabeled.values() if each.labels is not None]
    figures = {
        "model": [
            Figure("encoder", encoder, "weights", "counted"),
            Figure("decoder", everything - encoder, "weights", "counted"),
            Figure("frozen encoder", frozen, "weights", "counted"),
            Figure("FLOPs per image", flops, "FLOP", "counted", "forward pass, twice that for the backward pass"),
        ],
        "work": [
            Figure("images in the data sets", images and images.number, "", images.basis if images else "assumed"),
            steps,
            Figure("images per step", per_step, "", "set", "data.batch_size x trainer.accumulate_grad_batches"),
            Figure("images seen", samples, "", steps.basis),
        ],
        "time": [*time, amounts.loader_figure(config, rate)],
        "disk": [
            amounts.shards_figure(sets, config),
            *label_figures(labeled_by_teacher, config),
            amounts.checkpoints_figure(config, counts),
        ],
    }
    rows = engine_rows(config, counts)
    chosen = next(row for row in rows if row.chosen)
    title = f"{config.run_name} on {config.cluster.name}"
    trouble = amounts.precision_trouble(config)
    return Plan(title, figures, rows, chosen.fits and not trouble, trouble + advice(config, rows, chosen))


def label_figures(datasets: list[DatasetConfig], config: PlanConfig) -> list[Figure]:
    if not datasets:
        return []
    images = amounts.sum_of(amounts.images_of(dataset, config) for dataset in datasets)
    return [amounts.labels_figure(images, min(config.data.crop_size))]


# --- engines ----------------------------------------------------------------------------------------------------------


def engine_rows(config: PlanConfig, counts: Counts) -> list[EngineRow]:
    world_size = config.trainer.devices * config.trainer.num_nodes
    images = config.data.batch_size / world_size
    smallest = smallest_batch(config)
    usable = usable_bytes(config.cluster.memory_gb or 0.0)
    rows = []
    for checkpointing in (False, True) if checkpointing_refusal(config.model) is None else (False,):
        trainer = replace(config.trainer, activation_checkpointing=checkpointing)
        batch = measure_batch(replace(config, trainer=trainer), smallest)
        for engine in ENGINES if counts.ema == 0 else [each for each in ENGINES if each.zero_stage < 3]:
            held = held_bytes(engine, counts, world_size)
            rows.append(
                EngineRow(
                    engine=engine,
                    checkpointing=checkpointing,
                    held=held,
                    batch=batch(images),
                    total=held.total + batch(images),
                    usable=usable,
                    host=held.host * config.trainer.devices,
                    host_usable=config.cluster.host_memory_gb * 1e9,
                    largest_batch=largest_batch(usable, held.total, batch, smallest),
                    chosen=is_chosen(config, engine) and checkpointing == config.trainer.activation_checkpointing,
                )
            )
    return rows


def is_chosen(config: PlanConfig, engine: Engine) -> bool:
    return (engine.zero_stage, engine.offload) == (zero_stage(config.trainer), config.trainer.offload)


def advice(config: PlanConfig, rows: list[EngineRow], chosen: EngineRow) -> list[str]:
    """Overrides with which it fits, the smallest change first; with an engine that already fits nothing."""
    if chosen.fits:
        return []
    found = []
    if chosen.largest_batch > 0 and chosen.host <= chosen.host_usable:
        found += accumulation(config, chosen.largest_batch)
    order = sorted(rows, key=lambda row: (row.engine != chosen.engine, row.engine.offload, row.checkpointing))
    for row in [each for each in order if each.fits][:3]:
        checkpointing = " trainer.activation_checkpointing=true" if row.checkpointing else ""
        found.append(f"{row.engine.overrides}{checkpointing}")
    return found or ["no engine fits: more devices, a smaller model or smaller crops"]


def accumulation(config: PlanConfig, largest: int) -> list[str]:
    """The same step in several smaller batches, where the numbers divide."""
    world_size = config.trainer.devices * config.trainer.num_nodes
    smallest = sum(smallest_batch(config).values())
    per_device = config.data.batch_size // world_size
    for parts in range(math.ceil(per_device / largest), per_device + 1):
        if per_device % parts == 0 and (per_device // parts) % smallest == 0:
            batches = parts * config.trainer.accumulate_grad_batches
            return [f"data.batch_size={config.data.batch_size // parts} trainer.accumulate_grad_batches={batches}"]
    return []
