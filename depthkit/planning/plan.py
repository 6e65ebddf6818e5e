"""`depthkit plan experiment=NAME cluster=NAME`: what a run needs, from its settings alone.

No GPU and no data set is needed. Every figure says whether it is set, counted, measured, published or assumed.
"""

from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from depthkit.checks import check_averaging, check_model, check_sizes, check_streams
from depthkit.compose import to_config
from depthkit.config import PseudoLabelConfig, check
from depthkit.files import atomic_write
from depthkit.hydra_entry import hydra_main
from depthkit.planning.labels import plan_labels
from depthkit.planning.report import show
from depthkit.planning.result import Plan
from depthkit.planning.settings import PlanConfig
from depthkit.planning.training import plan_training
from depthkit.trainer_checks import check_trainer


def main(argv: list[str]) -> int:
    return hydra_main("plan", argv, run, convert=to_plan_config)


def to_plan_config(cfg: DictConfig) -> PlanConfig:
    """As for training; but what a labelling stage asks for may be left open."""
    if OmegaConf.get_type(cfg.stage) is PseudoLabelConfig:
        for name in ("bundle", "images", "out"):
            if OmegaConf.is_missing(cfg.stage, name):
                cfg.stage[name] = ""
    config: PlanConfig = to_config(cfg)
    return config


def run(config: PlanConfig) -> None:
    plan = make_plan(config)
    show(plan, config)
    if config.out is not None:
        with atomic_write(Path(config.out)) as file:
            file.write(plan.as_json().encode())


def make_plan(config: PlanConfig) -> Plan:
    cluster, trainer = config.cluster, config.trainer
    allowed = f"at most {cluster.gpus_per_node}, as cluster={cluster.name} has"
    check(trainer.devices <= cluster.gpus_per_node, "trainer.devices", trainer.devices, allowed)
    allowed = f"at most {cluster.num_nodes}, as cluster={cluster.name} has"
    check(trainer.num_nodes <= cluster.num_nodes, "trainer.num_nodes", trainer.num_nodes, allowed)
    if isinstance(config.stage, PseudoLabelConfig):
        return plan_labels(config, config.stage)
    if trainer.strategy != "deepspeed" or find_spec("deepspeed"):
        check_trainer(trainer, config.stage)
    check_averaging(config)
    check_streams(config)
    check_sizes(config)
    check_model(config)
    return plan_training(config)
