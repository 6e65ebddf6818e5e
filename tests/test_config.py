"""Every file of conf composes to the dataclass it names; what cannot work is refused before anything is opened."""

from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf

from depthkit.checks import check_streams, num_steps, size_multiple, validate
from depthkit.config import (
    CONF_DIR,
    AugmentConfig,
    ConfigError,
    DataConfig,
    DatasetConfig,
    DPTConfig,
    OptimConfig,
    PretrainConfig,
    PseudoLabelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    WorldConfig,
)
from depthkit.evaluation.settings import Alignment, EvaluateConfig, ProtocolConfig
from depthkit.models import build_model


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


TOP = {path.name for path in CONF_DIR.glob("*.yaml")}


# --- every file ------------------------------------------------------------------------------------------------------


ASKED_FOR = {f"da_{version}_label": ["stage.images=x", "stage.out=x"] for version in ("v1", "v2")}
"""Settings that an experiment leaves to the user."""


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_its_model_builds(compose, experiment):
    config = compose(f"experiment={experiment}", *ASKED_FOR.get(experiment, []))
    assert isinstance(config, TrainConfig)
    assert config.run_name == experiment
    training_sets = [*config.data.labeled.values(), *config.data.unlabeled.values()]
    if training_sets and all(dataset.world for dataset in training_sets):  # the others are files to be packed first
        validate(config, pending=[str(config.stage.encoder_weights)])
    if not isinstance(config.stage, PseudoLabelConfig):
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in build_model(config.model).parameters()) > 0


@pytest.mark.parametrize("experiment", sorted(ASKED_FOR))
def test_what_an_experiment_leaves_to_the_user_is_asked_for(compose, experiment):
    with pytest.raises(ConfigError, match=r"no value for stage\.images, stage\.out"):
        compose(f"experiment={experiment}")


@pytest.mark.parametrize("model", names("model"))
def test_every_model_builds(compose, model):
    config = compose("data=tiny_teacher", f"model={model}").model
    with torch.device("meta"):
        assert build_model(config).encoder.multiple == size_multiple(config)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in ("stage", "data", "optim", "trainer", "logger", "callbacks", "paths")
        for name in names(group)
    ],
)
def test_every_file_of_a_group_composes(compose, group, name):
    needed = {"stage=pseudo_label": ["stage.bundle=x", "stage.images=x", "stage.out=x"]}.get(f"{group}={name}", [])
    data = ["data.batch_size=12"] if group == "data" else ["data=tiny_teacher"]  # the recipe's size is the experiment's
    config = compose(*data, f"{group}={name}", *needed)
    assert isinstance(config, TrainConfig)
    if group == "stage":
        assert config.stage.name == {"zoedepth": "metric"}.get(name, name)  # ZoeDepth's loss, in the stage metric


@pytest.mark.parametrize("dataset", names("dataset"))
def test_every_dataset_composes(compose, dataset):
    config = compose("data=tiny", f"+dataset@data.labeled.it={dataset}").data.labeled["it"]
    assert isinstance(config, DatasetConfig)
    assert config.manifest.endswith(f"{dataset}/manifest.json")


@pytest.mark.parametrize("protocol", names("protocol"))
def test_every_protocol_composes_for_training_and_for_evaluation(compose, protocol):
    trained = compose("data=tiny_teacher", f"protocol={protocol}").protocol
    evaluated = compose(f"protocol={protocol}", "models=[m]", "datasets=[d]", config_name="evaluate")
    assert isinstance(evaluated, EvaluateConfig)
    assert isinstance(trained, ProtocolConfig)
    assert trained == evaluated.protocol
    assert trained.name == protocol


def test_no_folder_of_conf_is_left_out():
    """A new group needs a test above."""
    tested = {"experiment", "model", "stage", "data", "optim", "trainer", "logger", "callbacks", "paths", "dataset"}
    elsewhere = {"cluster", "hydra", "sweep", "transfer"}  # in the tests of plan, sweeps, Slurm and transfer
    assert {path.name for path in CONF_DIR.iterdir() if path.is_dir()} == tested | {"protocol"} | elsewhere
    for path in CONF_DIR.rglob("*.yaml"):
        OmegaConf.load(path)
    assert {"train.yaml", "evaluate.yaml"} <= TOP


def test_settings_survive_yaml(compose):
    """`config.yaml` of a run holds all of its settings."""
    config = compose("experiment=tiny_student")
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), OmegaConf.create(text))) == config


# --- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.encoder_rl=1", ["encoder_rl"]),
        ("data.batch_sizes=4", ["batch_sizes"]),
        ("model=vitx", ["vitx", "vits"]),
        ("experiment=tiny", ["experiment/tiny", "tiny_teacher"]),
        ("optim.encoder_lr=fast", ["encoder_lr", "fast"]),
        ("data.batch_size=2.5", ["batch_size", "2.5"]),
        ("data.crop_size=96", ["crop_size", "96"]),
        ("stage.loss=l1", ["loss", "l1", "affine_invariant"]),
        ("protocol.alignment=median", ["alignment", "median", "disparity_least_squares"]),
        ("trainer.devices=all", ["devices", "all"]),
    ],
)
def test_unknown_keys_and_wrong_types_name_the_field_and_the_value(compose, override, words):
    with pytest.raises(HydraException) as error:
        compose("data=tiny_teacher", override)
    message = f"{error.value}\n{error.value.__cause__}"
    assert all(word in message for word in words), message


WORLD = {"domain": "source", "split": "train", "num_images": 4}
MODEL = {"encoder": "vit", "tap_layers": [0, 1, 2, 3], "features": 16, "out_channels": [8, 8, 8, 8]}
PROTOCOL = {"name": "p", "max_depth": 80.0, "alignment": Alignment.disparity_least_squares}
ONE = {"it": DatasetConfig(manifest="m")}


@pytest.mark.parametrize(
    ("schema", "settings", "message"),
    [
        (OptimConfig, {"encoder_lr": -1.0}, "optim.encoder_lr=-1.0: must be >= 0"),
        (OptimConfig, {"decoder_lr_multiplier": 0.0}, "optim.decoder_lr_multiplier=0.0: must be > 0"),
        (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay=-0.1: must be >= 0"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps=-1: must be >= 0"),
        (OptimConfig, {"final_lr_fraction": 2.0}, "optim.final_lr_fraction=2.0: must be 0 to 1"),
        (DataConfig, {"batch_size": 0}, "data.batch_size=0: must be > 0"),
        (DataConfig, {"num_workers": -1}, "data.num_workers=-1: must be >= 0"),
        (DataConfig, {"unlabeled_per_labeled": 0}, "data.unlabeled_per_labeled=0: must be > 0"),
        (DataConfig, {"shuffle_block": 0}, "data.shuffle_block=0: must be > 0"),
        (DataConfig, {"crop_size": [96]}, "data.crop_size=[96]: must be [height, width]"),
        (DataConfig, {"quarantine_budget": 1.0}, "data.quarantine_budget=1.0: must be a share"),
        (
            DataConfig,
            {"labeled": ONE, "unlabeled": ONE, "batch_size": 25},
            "data.batch_size=25: must be a multiple of 3, so that labeled:unlabeled is exactly 1:2",
        ),
        (AugmentConfig, {"blur": 1.5}, "data.augment.blur=1.5: must be a probability"),
        (AugmentConfig, {"cutmix": -0.1}, "data.augment.cutmix=-0.1: must be a probability"),
        (AugmentConfig, {"hue": 0.6}, "data.augment.hue=0.6: must be 0 to 0.5"),
        (AugmentConfig, {"cutmix_area": [0.5, 0.2]}, "data.augment.cutmix_area=[0.5, 0.2]: must be [low, high]"),
        (AugmentConfig, {"cutmix_aspect": 0.0}, "data.augment.cutmix_aspect=0.0: must be 0 < aspect"),
        (DatasetConfig, {"manifest": "m", "weight": 0.0}, "dataset.weight=0.0: must be > 0"),
        (DatasetConfig, {"manifest": "m", "depth_range": [5.0, 2.0]}, "dataset.depth_range=[5.0, 2.0]: must be [low"),
        (WorldConfig, {**WORLD, "domain": "moon"}, "world.domain='moon': must be source or target"),
        (WorldConfig, {**WORLD, "num_images": 0}, "world.num_images=0: must be > 0"),
        (DPTConfig, {**MODEL, "tap_layers": [1, 2, 3]}, "model.tap_layers=[1, 2, 3]: must be four"),
        (DPTConfig, {**MODEL, "tap_layers": [1, 3, 2, 5]}, "model.tap_layers=[1, 3, 2, 5]: must be increasing"),
        (DPTConfig, {**MODEL, "features": 31}, "model.features=31: must be an even number"),
        (DPTConfig, {**MODEL, "out_channels": [8, 8]}, "model.out_channels=[8, 8]: must be four"),
        (ProtocolConfig, {**PROTOCOL, "max_depth": 0}, "protocol.max_depth=0.0: must be"),
        (ProtocolConfig, {**PROTOCOL, "metrics": ["abs"]}, "protocol.metrics=['abs']: must be among"),
        (ProtocolConfig, {**PROTOCOL, "crop": [0, 1, 0.5, 0.2]}, "protocol.crop=[0.0, 1.0, 0.5, 0.2]: must be"),
        (TeacherConfig, {"gradient_matching_weight": -1.0}, "stage.gradient_matching_weight=-1.0: must be >= 0"),
        (StudentConfig, {"tolerance_margin": 3.0}, "stage.tolerance_margin=3.0: must be 0 to 2"),
        (
            StudentConfig,
            {"labeled_weight": 0.0, "unlabeled_weight": 0.0, "feature_weight": 0.0},
            "stage weights (labeled, unlabeled, feature)=[0.0, 0.0, 0.0]: must be not all 0",
        ),
        (StudentConfig, {"drop_fraction": 1.0}, "stage.drop_fraction=1.0: must be 0 to < 1"),
        (StudentConfig, {"feature_weight": -1.0}, "stage.feature_weight=-1.0: must be >= 0"),
        (PretrainConfig, {"mask_ratio": 1.0}, "stage.mask_ratio=1.0: must be > 0 and < 1"),
        (PseudoLabelConfig, {"short_side": 0}, "stage.short_side=0: must be > 0 or null"),
        (PseudoLabelConfig, {"batch_size": 0}, "stage.batch_size=0: must be > 0"),
    ],
)
def test_values_out_of_range_name_the_field_and_the_value(schema, settings, message):
    with pytest.raises(ConfigError) as error:
        schema(**settings)
    assert message in str(error.value)


def test_ranges_are_checked_while_composing(compose):
    with pytest.raises(ConfigError, match=r"data\.batch_size=25: must be a multiple of 3"):
        compose("experiment=tiny_student", "data.batch_size=25")
    with pytest.raises(ConfigError, match=r"no value for stage\.bundle, stage\.images, stage\.out"):
        compose("stage=pseudo_label", "data=tiny_teacher")


@pytest.mark.parametrize("override", ["+optim.encoder_rl=1", "+data.labeled.source.world.sizes=1", "+swept=3"])
def test_a_plus_does_not_smuggle_in_an_unknown_key(compose, override):
    """Hydra adds any key after a plus sign, also to a dataclass that has no such field."""
    key = override[1:].split("=")[0]
    with pytest.raises(ConfigError, match=f"unknown setting {key}"):
        compose("data=tiny_teacher", override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.crop_size=[96,100]"], r"data\.crop_size=\[96, 100\]: must be positive multiples of 8"),
        (["trainer.max_steps=-1"], r"trainer\.max_steps=-1 and sweeps=None: give one"),
        (["sweeps=2"], r"trainer\.max_steps=900 and sweeps=2\.0: give one"),
        (["optim.warmup_steps=900"], r"optim\.warmup_steps=900: must be below trainer\.max_steps=900"),
        (["trainer.devices=5"], r"data\.batch_size=24: .*24 labeled images split evenly over 5 ranks"),
        (["data.labeled.source.world=null"], r"data\.labeled\.source\.manifest=.*: no such file; `depthkit pack`"),
        (["~data.labeled.source"], r"data\.labeled=\[\]: must be at least one data set for stage=teacher"),
        (["stage=student"], r"data\.unlabeled=\[\]: must be at least one data set for stage=student"),
        (["+dataset@data.unlabeled.t=target_train"], r"data\.unlabeled=\['t'\]: must be empty"),
        (["stage=pretrain", "+dataset@data.unlabeled.t=target_train"], r"data\.labeled=\['source'\]: must be empty"),
        (
            ["model.encoder=vit_x", "~model.encoder_args.patch_size"],
            r"model\.encoder=vit_x: timm .* has no such model",
        ),
    ],
)
def test_settings_that_contradict_each_other(compose, overrides, message):
    settings = ["experiment=tiny_teacher", "data.batch_size=24", "data.crop_size=[96,96]", "trainer.max_steps=900"]
    with pytest.raises(ConfigError, match=message):
        validate(compose(*settings, *overrides))


def test_cutmix_needs_pairs_on_every_rank(compose):
    settings = ["data.unlabeled_per_labeled=1", "data.batch_size=6", "data.augment.cutmix=0.5"]
    config = compose("experiment=tiny_student", *settings)
    with pytest.raises(ConfigError, match=r"data\.batch_size=6: .*3 unlabeled images per rank are an even number"):
        check_streams(config)
    config.data.augment.cutmix = 0.0
    check_streams(config)


def test_images_per_step():
    one = DatasetConfig(manifest="m")
    mixed = DataConfig(labeled={"a": one}, unlabeled={"b": one}, batch_size=12)
    assert mixed.images_per_step() == {"labeled": 4, "unlabeled": 8}
    assert DataConfig(labeled={"a": one}, batch_size=5).images_per_step() == {"labeled": 5, "unlabeled": 0}
    assert DataConfig(unlabeled={"a": one}, batch_size=5).images_per_step() == {"labeled": 0, "unlabeled": 5}
    with pytest.raises(ConfigError, match=r"data\.batch_size=10: must be a multiple of 4"):
        DataConfig(labeled={"a": one}, unlabeled={"b": one}, batch_size=10, unlabeled_per_labeled=3)


def test_sweeps_count_the_images_of_the_longer_stream(compose):
    settings = ["trainer.max_steps=-1", "sweeps=3", "data.batch_size=24", "data.labeled.source.world.num_images=1024"]
    teacher = ["experiment=tiny_teacher", *settings]
    assert num_steps(compose(*teacher)) == 3 * 1024 // 24
    assert num_steps(compose(*teacher, "trainer.accumulate_grad_batches=4")) == 3 * 1024 // (24 * 4)
    assert num_steps(compose(*teacher, "data.labeled.source.weight=0.5")) == 3 * 512 // 24
    student = ["experiment=tiny_student", *settings, "data.unlabeled.target.world.num_images=2048"]
    assert num_steps(compose(*student)) == 3 * 2048 // 16


def test_labels_of_other_images_are_refused(tiny_config, tiny_world, tmp_path):
    wrong = f"data.unlabeled.target.manifest={tiny_world / 'source_train' / 'manifest.json'}"
    with pytest.raises(ConfigError, match="label these images, or name the right manifest"):
        validate(tiny_config("student", tmp_path, wrong))
    validate(tiny_config("student", tmp_path))


def test_images_without_labels_cannot_train_a_teacher(tiny_config, tiny_world, tmp_path):
    unlabeled = f"data.labeled.source.manifest={tiny_world / 'target_train' / 'manifest.json'}"
    with pytest.raises(ConfigError, match="holds images without labels"):
        validate(tiny_config("teacher", tmp_path, unlabeled))


def test_augment_defaults_change_nothing_but_the_flip():
    off = AugmentConfig()
    assert (off.color_jitter, off.grayscale, off.blur, off.cutmix) == (0, 0, 0, 0)
    assert off.horizontal_flip == 0.5


def test_conf_dir_is_found():
    assert (Path(CONF_DIR) / "train.yaml").is_file()
