"""What stage=metric asks of model and data, judged while composing."""

from collections.abc import Mapping
from pathlib import Path

from depthkit.config import DatasetConfig, MetricBinsConfig, MetricConfig, TrainConfig, check
from depthkit.data.manifest import load_manifest
from depthkit.data.reader import labels_manifest
from depthkit.data.remote import is_remote


def check_metric(config: TrainConfig) -> None:
    """Every labeled data set has a head, and none is known to hold depths that its head cannot say."""
    if not isinstance(config.stage, MetricConfig):
        return
    limits = largest_depths(config, config.stage)
    if config.stage.canonical_focal_px is not None:
        return  # what the network says is not the depth of the data set
    for name, dataset in config.data.labeled.items():
        found, source = largest_label(dataset)
        limit = limits[name]
        if found is not None and limit is not None:
            allowed = (
                f"at least {found:g} m, the largest depth that {source} states for data.labeled.{name}; or cut its "
                f"labels with data.labeled.{name}.depth_range=[0,{limit:g}]"
            )
            check(found <= limit, "model.max_depth", limit, allowed)


def largest_depths(config: TrainConfig, stage: MetricConfig) -> Mapping[str, float | None]:
    """Name in `data.labeled` -> metres, the largest depth that its head is for; None without a limit."""
    heads = config.model.heads if isinstance(config.model, MetricBinsConfig) else {}
    if not heads:
        check(not stage.domains, "stage.domains", stage.domains, "{} for a model with one head (model.heads={})")
        return dict.fromkeys(config.data.labeled, config.model.max_depth)
    unknown = sorted(stage.domains.keys() - config.data.labeled.keys())
    check(not unknown, "stage.domains", unknown, f"names in data.labeled={list(config.data.labeled)}")
    chosen = {name: stage.domains.get(name, name) for name in config.data.labeled}
    for name, head in chosen.items():
        check(head in heads, f"stage.domains.{name}", head, f"one of model.heads={list(heads)}")
    return {name: heads[head] for name, head in chosen.items()}


def largest_label(dataset: DatasetConfig) -> tuple[float | None, str]:
    """Metres, and what says so: the cut that is asked for, or what the authors state; None where nobody does."""
    if dataset.depth_range is not None:
        return dataset.depth_range[1], "its depth_range"
    if is_remote(dataset.manifest) or Path(dataset.manifest).is_file():
        target = labels_manifest(dataset, load_manifest(dataset.manifest)).target
    elif dataset.world is not None:
        from depthkit.data.procedural.pack import TARGET as target
    else:
        return None, ""  # a file that is missing is another check's
    return (target.depth_range[1] if target and target.depth_range else None), "its manifest"
