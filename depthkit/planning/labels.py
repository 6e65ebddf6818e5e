"""The plan of a stage that labels: forward passes alone."""

from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra

from depthkit.bundle import read_facts
from depthkit.checks import size_multiple
from depthkit.compose import to_config
from depthkit.config import CONF_DIR, DatasetConfig, ModelConfig, PseudoLabelConfig
from depthkit.flops import forward_flops, num_parameters
from depthkit.planning import amounts
from depthkit.planning.amounts import Figure, Images
from depthkit.planning.memory import Engine, Held, forward_bytes, largest_batch, usable_bytes
from depthkit.planning.result import EngineRow, Plan
from depthkit.planning.settings import PlanConfig


def plan_labels(config: PlanConfig, stage: PseudoLabelConfig) -> Plan:
    model, where = teacher_of(config, stage)
    short_side = stage.short_side or min(config.data.crop_size)
    multiple = size_multiple(model)
    size = tuple(multiple * round(side / multiple) for side in (short_side, short_side * amounts.IMAGE_ASPECT))
    images, source = images_to_label(config, stage)
    views = len(stage.scales) * (2 if stage.flip else 1)
    area = sum(scale**2 for scale in stage.scales) / len(stage.scales)
    flops = forward_flops(model, (size[0], size[1])) * views * area
    time = amounts.time_figures(config, float(images.number), flops)
    weights = num_parameters(model)
    held = Held(weights=4.0 * weights, gradients=0.0, optimizer=0.0, ema=0.0, buffers=0.0)
    batch = forward_bytes(model, (size[0], size[1]), config.trainer.precision)
    usable = usable_bytes(config.cluster.memory_gb or 0.0)
    row = EngineRow(
        engine=Engine("forward alone", 0),
        checkpointing=False,
        held=held,
        batch=batch(stage.batch_size),
        total=held.total + batch(stage.batch_size),
        usable=usable,
        host=0.0,
        host_usable=config.cluster.host_memory_gb * 1e9,
        largest_batch=largest_batch(usable, held.total, batch, {"images": 1}),
        chosen=True,
    )
    figures = {
        "model": [
            Figure("teacher", weights, "weights", "counted", where),
            Figure(
                "FLOPs per image", flops, "FLOP", "assumed", f"{views} view(s) of {size[0]} x {size[1]} px, 4:3 assumed"
            ),
        ],
        "work": [Figure("images", images.number, "", images.basis, source)],
        "time": time,
        "disk": [
            Figure("image shards", images.bytes, "B", images.bytes_basis, f"image_kb={config.image_kb:g}"),
            amounts.labels_figure(images, short_side),
        ],
    }
    trouble = amounts.precision_trouble(config)
    if not row.fits:
        trouble.append(f"stage.batch_size={row.largest_batch}" if row.largest_batch else "a smaller teacher or device")
    return Plan(f"{config.run_name} on {config.cluster.name}", figures, [row], row.fits and not trouble, trouble)


def teacher_of(config: PlanConfig, stage: PseudoLabelConfig) -> tuple[ModelConfig, str]:
    """The model of the bundle; before there is one, that of the experiment whose folder it will lie in."""
    bundle = Path(stage.bundle)
    if stage.bundle and (bundle / "model.json").is_file():
        return read_facts(bundle).model, f"{bundle}"
    name = bundle.parent.name
    if (CONF_DIR / "experiment" / f"{name}.yaml").is_file():
        in_hydra = GlobalHydra.instance().is_initialized()
        with nullcontext() if in_hydra else hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_config(hydra.compose("train", [f"experiment={name}"])).model, f"experiment={name}: no bundle yet"
    return config.model, f"model={config.model.title}: no bundle at {stage.bundle or 'stage.bundle'}"


def images_to_label(config: PlanConfig, stage: PseudoLabelConfig) -> tuple[Images, str]:
    """Those of stage.images, or of all unlabeled sets of the data group; where that is not known, a million."""
    if stage.images:
        found, source = amounts.images_of(DatasetConfig(manifest=stage.images), config), stage.images
    else:
        found = amounts.sum_of(amounts.images_of(each, config) for each in config.data.unlabeled.values())
        source = (
            f"data.unlabeled, {len(config.data.unlabeled)} sets" if found else "stage.images or data=GROUP says which"
        )
    if found is None:
        return Images(10**6, "assumed", 1e9 * config.image_kb, "assumed"), f"a million, as an example: {source}"
    return found, source
