"""Fixtures that several test files share. Heavy imports stay inside: most tests need no torch or Lightning."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import initialize_config_dir

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, TrainConfig

Compose = Callable[..., Any]

SAMPLES = Path(os.environ.get("DEPTHKIT_SAMPLES", Path(__file__).parents[2] / "shared" / "samples"))


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """Folder of real RGB-D samples (`index.jsonl` inside)."""
    if not (SAMPLES / "index.jsonl").is_file():
        pytest.skip(f"no real samples at {SAMPLES}; set DEPTHKIT_SAMPLES to a folder with index.jsonl")
    return SAMPLES


@pytest.fixture(scope="session")
def compose() -> Compose:
    """`compose(*overrides, config_name="train")`: what the command line would compose, as the dataclass."""

    def compose_config(*overrides: str, config_name: str = "train") -> Any:
        register_schemas()
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_config(hydra.compose(config_name, list(overrides)))

    return compose_config


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Procedural data sets of 32 x 40 px in shards of 8: source_train (24), source_val (8) and target_train (24)."""
    from depthkit.data.procedural import WorldSpec, write_world

    root = tmp_path_factory.mktemp("world")
    for domain, split, num_images in (("source", "train", 24), ("source", "val", 8), ("target", "train", 24)):
        spec = WorldSpec(
            domain=domain,
            split=split,
            num_images=num_images,
            size=(32, 40),
            labeled=domain == "source",
            samples_per_shard=8,
        )
        write_world(root / f"{domain}_{split}", spec, progress=False)
    return root


TINY_MODEL = [
    "model.encoder_args={img_size:32,patch_size:8,embed_dim:32,depth:4,num_heads:2,init_values:0.1}",
    "model.tap_layers=[0,1,2,3]",
    "model.features=16",
    "model.out_channels=[8,8,16,16]",
]


@pytest.fixture(scope="session")
def tiny_settings(tiny_world: Path, tiny_labels: Path) -> Callable[[str, Path], list[str]]:
    """`tiny_settings(stage, run_dir)`: overrides for six steps of six crops of 32 x 32 with a ViT of width 32."""
    datasets = {
        "pretrain": {"unlabeled.source": "source_train", "unlabeled.target": "target_train"},
        "teacher": {"labeled.source": "source_train", "val.source": "source_val"},
        "student": {"labeled.source": "source_train", "unlabeled.target": "target_train", "val.source": "source_val"},
    }

    def settings(stage: str, run_dir: Path) -> list[str]:
        overrides = [f"stage={stage}", f"data=tiny_{stage}", f"run_dir={run_dir}", "data.crop_size=[32,32]"]
        overrides += ["data.batch_size=6", "data.num_workers=0", "data.shuffle_block=4", "trainer.max_steps=6"]
        overrides += ["optim.encoder_lr=1e-3", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"]
        overrides += TINY_MODEL
        for name, folder in datasets[stage].items():
            overrides += [f"data.{name}.world=null", f"data.{name}.manifest={tiny_world / folder / 'manifest.json'}"]
        if stage == "student":
            overrides += [f"data.unlabeled.target.labels={tiny_labels}"]
        return overrides

    return settings


@pytest.fixture(scope="session")
def tiny_config(compose: Compose, tiny_settings: Callable[[str, Path], list[str]]) -> Compose:
    """`tiny_config(stage, run_dir, *overrides)`: what `tiny_settings` composes."""

    def compose_tiny(stage: str, run_dir: Path, *overrides: str) -> TrainConfig:
        config: TrainConfig = compose(*tiny_settings(stage, run_dir), *overrides)
        return config

    return compose_tiny


@pytest.fixture(scope="session")
def tiny_teacher(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a tiny model with random weights."""
    import torch

    from depthkit.bundle import BundleFacts, save_bundle
    from depthkit.models import build_model

    model = compose("stage=pretrain", "data=tiny_pretrain", *TINY_MODEL).model
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "bundle"
    return save_bundle(
        folder, build_model(model), BundleFacts(content="depth_model", model=model, kind="disparity", short_side=32)
    )


@pytest.fixture(scope="session")
def tiny_labels(
    tiny_world: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory, compose: Compose
) -> Path:
    """Manifest of the random teacher's pseudo-labels for target_train."""
    from depthkit.label import label

    out = tmp_path_factory.mktemp("labels")
    images = tiny_world / "target_train" / "manifest.json"
    settings = [f"stage.bundle={tiny_teacher}", f"stage.images={images}", f"stage.out={out}", "stage.num_workers=0"]
    return label(compose("stage=pseudo_label", *settings, "trainer.enable_progress_bar=false"))
