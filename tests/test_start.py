"""What a stage starts from, judged before anything is built: is it there, is it whole, does it fit?"""

import json
from pathlib import Path
from typing import Any

import pytest

from depthkit.bundle import FACTS, WEIGHTS, BundleFacts, save_bundle
from depthkit.checks import validate
from depthkit.config import ConfigError, TrainConfig
from depthkit.egomotion_bundle import save_egomotion
from depthkit.models import build_model
from depthkit.models.egomotion import EgomotionNet


@pytest.fixture
def write(compose: Any, tmp_path: Path) -> Any:
    """Bundle of an experiment's model as training begins with it -> its folder."""

    def write(experiment: str, *settings: str, encoder_alone: bool = False) -> Path:
        model = compose(f"experiment={experiment}", *settings).model
        module = build_model(model)
        facts = BundleFacts(
            content="encoder" if encoder_alone else "depth_model", model=model, kind=model.kind, short_side=32
        )
        return save_bundle(tmp_path / experiment, module.encoder if encoder_alone else module, facts)

    return write


def start(compose: Any, experiment: str, weights: Any, *settings: str) -> TrainConfig:
    config: TrainConfig = compose(f"experiment={experiment}", f"stage.encoder_weights='{weights}'", *settings)
    return config


def test_weights_of_a_model_of_the_same_shape_are_fine(compose, write):
    validate(start(compose, "tiny_metric", write("tiny_teacher")))
    validate(start(compose, "tiny_metric", write("tiny_teacher", encoder_alone=True)))
    validate(start(compose, "tiny_zoedepth", write("tiny_teacher")))
    validate(start(compose, "tiny_zoedepth", write("tiny_zoedepth", "stage.decoder_weights=false")))
    validate(start(compose, "tiny_eigen2014_fine", write("tiny_eigen2014_coarse")))


def test_a_bundle_that_is_not_there(compose, tmp_path):
    config = start(compose, "tiny_metric", tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"stage\.encoder_weights=.*nothing.*: .*nothing is not a bundle"):
        validate(config)
    validate(config, pending=[str(tmp_path / "nothing")])


def test_a_bundle_without_its_weights(compose, write):
    bundle = write("tiny_teacher")
    (bundle / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors"):
        validate(start(compose, "tiny_metric", bundle))


def test_a_bundle_that_was_cut_short(compose, write):
    bundle = write("tiny_teacher")
    whole = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*copy the bundle again"):
        validate(start(compose, "tiny_metric", bundle))


@pytest.mark.parametrize(
    ("experiment", "of"),
    [("tiny_eigen2014_fine", "tiny_teacher"), ("tiny_metric", "tiny_eigen2014_coarse")],
)
def test_a_bundle_of_another_network(compose, write, experiment, of):
    config = start(compose, experiment, write(of))
    with pytest.raises(ConfigError, match=rf"model {config.model.title}: .* does not fit the model (.|\n)*missing: "):
        validate(config)


def test_a_bundle_of_another_width(compose, write):
    config = start(compose, "tiny_metric", write("tiny_teacher"), "model.encoder_args.embed_dim=48")
    with pytest.raises(ConfigError, match=r"does not fit the model(.|\n)*shape: "):
        validate(config)


def test_an_encoder_alone_has_no_decoder_to_keep(compose, write):
    config = start(compose, "tiny_zoedepth", write("tiny_teacher", encoder_alone=True))
    with pytest.raises(ConfigError, match=r"an encoder alone: no decoder .*stage\.decoder_weights=false"):
        validate(config)


def test_metric_bins_start_from_relative_disparity(compose, write):
    metric = write("tiny_metric", "stage.encoder_weights=null")
    with pytest.raises(ConfigError, match="predicts depth: metric bins start from a model of relative disparity"):
        validate(start(compose, "tiny_zoedepth", metric))
    validate(start(compose, "tiny_zoedepth", metric, "stage.decoder_weights=false"))


def test_masked_images_start_from_random_weights(compose):
    with pytest.raises(ConfigError, match=r"stage\.encoder_weights='timm': must be null with stage=pretrain"):
        compose("experiment=tiny_pretrain", "stage.encoder_weights=timm")


def test_the_weights_of_an_egomotion_network(compose, tmp_path):
    config: TrainConfig = compose("experiment=tiny_vid2depth", f"stage.egomotion_weights='{tmp_path / 'motion'}'")
    with pytest.raises(ConfigError, match=r"stage\.egomotion_weights=.*motion is not a bundle"):
        validate(config)
    network = EgomotionNet(config.stage.egomotion, num_frames=3)
    save_egomotion(tmp_path / "motion", network, config.stage.egomotion)
    validate(config)
    facts = json.loads((tmp_path / "motion" / FACTS).read_text())
    facts["content"] = "depth_model"
    (tmp_path / "motion" / FACTS).write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="holds no ego-motion network"):
        validate(config)
