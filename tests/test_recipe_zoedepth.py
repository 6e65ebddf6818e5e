"""ZoeDepth, and Depth Anything V1 in metres: settings against a table written apart from them, and short runs."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import logged

import depthkit
from depthkit.bundle import BundleFacts, load_model
from depthkit.checks import validate
from depthkit.config import ConfigError, MetricBinsConfig, TrainConfig
from depthkit.formats.onnx import export_onnx, load_onnx
from depthkit.models import build_model
from depthkit.optim import build_optimizer, build_schedule, parameter_groups
from depthkit.train import build_metric, run

# config_zoedepth.json, config_zoedepth_kitti.json, config_zoedepth_nk.json and utils/config.py of isl-org/ZoeDepth;
# metric_depth/ of LiheYoung/Depth-Anything. Rates: of the bins, and the factors by which those of the encoder and of
# the DPT decoder (`scratch`) are smaller.
PUBLISHED: dict[str, dict[str, Any]] = {
    "metric_zoedepth_nyu": {"max_depth": 10.0, "centers": "softplus", "lr": 1.61e-4, "encoder": 10, "decoder": 1},
    "metric_zoedepth_kitti": {"max_depth": 80.0, "centers": "normed", "lr": 1.61e-4, "encoder": 10, "decoder": 1},
    "metric_zoedepth_nk": {"max_depth": 80.0, "centers": "softplus", "lr": 2.512e-4, "encoder": 10, "decoder": 10},
    "metric_da_v1_nyu": {"max_depth": 10.0, "centers": "softplus", "lr": 1.61e-4, "encoder": 50, "decoder": 50},
    "metric_da_v1_kitti": {"max_depth": 80.0, "centers": "normed", "lr": 1.61e-4, "encoder": 50, "decoder": 50},
}
BRIGHTNESS = {"nyu": [0.75, 1.25], "kitti": [0.9, 1.1], "nk": [0.9, 1.1]}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_settings_are_the_published_ones(compose: Any, name: str) -> None:
    config: TrainConfig = compose(f"experiment={name}")
    table, model, stage, camera = PUBLISHED[name], config.model, config.stage, config.data.augment.camera
    assert isinstance(model, MetricBinsConfig)
    assert (model.max_depth, model.centers, model.min_depth) == (table["max_depth"], table["centers"], 1e-3)
    assert (model.num_bins, model.embedding, model.num_attractors) == (64, 128, [16, 8, 4, 1])
    assert (model.attractor_alpha, model.attractor_gamma) == (1000.0, 2.0)
    assert model.heads == ({"nyu": 10.0, "kitti": 80.0} if name.endswith("nk") else {})
    assert (stage.name, stage.loss.value, stage.decoder_weights) == ("metric", "silog", True)
    assert (stage.loss_scale, stage.variance_focus, stage.sample_variance, stage.pooled) == (10.0, 0.85, True, True)
    assert stage.domain_weight == 100.0
    assert (config.sweeps, config.data.batch_size, config.trainer.accumulate_grad_batches) == (5, 16, 1)
    assert (config.trainer.gradient_clip_val, config.trainer.precision) == (0.1, "32-true")
    assert 1400 < (config.trainer.val_check_interval or 0) < 1600  # the best checkpoint is looked for once an epoch
    assert (config.data.augment.horizontal_flip, camera.rotation, camera.color, camera.zoom) == (0.5, 1.0, 0.5, [1, 1])
    assert camera.gamma == camera.channel_gain == [0.9, 1.1]
    assert camera.brightness == BRIGHTNESS[name.rpartition("_")[2]]
    ranges = {"nyu": [0.001, 10.0], "kitti": [0.001, 80.0]}
    assert {key: dataset.depth_range for key, dataset in config.data.labeled.items()}.items() <= ranges.items()
    assert config.data.balanced == name.endswith("nk")
    expected_taps = [20, 21, 22, 23] if "da_v1" in name else [4, 11, 17, 23]
    assert model.tap_layers == expected_taps


def rates_of(config: TrainConfig) -> dict[str, set[float]]:
    with torch.device("meta"):
        model = build_model(config.model)
    groups = parameter_groups(model, model.encoder, config.optim)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    found: dict[str, set[float]] = {}
    starts = ["encoder", "decoder.relative.projects", "decoder.relative.resizes", "decoder.relative", "decoder.bins"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(next(s for s in starts if name.startswith(s)), set()).add(rates[id(parameter)])
    return found


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_layer_has_its_published_rate(compose: Any, name: str) -> None:
    """The factors of the code: what MiDaS calls `pretrained` holds the layers that reassemble tokens, too."""
    table = PUBLISHED[name]
    full, encoder, decoder = (table["lr"] / factor for factor in (1, table["encoder"], table["decoder"]))
    reassemble = decoder if "da_v1" in name else encoder  # there both are one part, `depth_head`
    found = rates_of(compose(f"experiment={name}"))
    expected = {"encoder": encoder, "decoder.relative": decoder, "decoder.bins": full}
    expected |= {f"decoder.relative.{part}": reassemble for part in ("projects", "resizes")}
    assert found.keys() == expected.keys()
    for part, rate in expected.items():
        assert list(found[part]) == pytest.approx([rate]), part


def test_the_wording_of_the_paper_is_an_option(compose: Any) -> None:
    found = rates_of(compose("experiment=metric_da_v1_nyu", "optim=da_v1_metric_paper"))
    assert list(found.pop("encoder")) == pytest.approx([1.61e-4 / 50])
    assert all(list(rates) == pytest.approx([1.61e-4]) for rates in found.values())


def test_the_schedule_is_one_cycle(compose: Any) -> None:
    """1.61e-4 at once and for 70 % of the steps, then down to 1e-4 of it; momentum from 0.95 to 0.85 and back."""
    config = compose("experiment=metric_zoedepth_nyu")
    weight = torch.nn.Parameter(torch.zeros(1))
    groups = [{"name": "bins", "params": [weight], "lr": 1.61e-4}]
    optimizer = build_optimizer(groups, config.optim)
    schedule = build_schedule(optimizer, config.optim, num_steps=1000)
    rates, momenta = [], []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        schedule.step()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert rates[:700] == pytest.approx([1.61e-4] * 700)
    assert all(later < earlier for earlier, later in pairwise(rates[700:]))
    assert rates[-1] == pytest.approx(1.61e-8, abs=1e-8)
    assert (momenta[0], min(momenta), momenta[-1]) == pytest.approx((0.95, 0.85, 0.95), abs=1e-3)


# --- short runs ------------------------------------------------------------------------------------------------------

TINY = ["model.embedding=16", "model.num_bins=8", "model.num_attractors=[4,2,2,1]"]


def small(experiment: str, world: Path, runs: Path, teacher: Path, *settings: str) -> list[str]:
    overrides = [f"experiment={experiment}", f"paths.runs={runs}", "data.num_workers=0", "data.crop_size=[32,32]"]
    overrides += ["trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "data.shuffle_block=4"]
    overrides += ["model.encoder_args={img_size:32,patch_size:8,embed_dim:32,depth:4,num_heads:2,init_values:0.1}"]
    overrides += ["model.features=16", "model.out_channels=[8,8,16,16]", *TINY]
    overrides += [f"stage.encoder_weights={teacher}"]
    folders = {"labeled.source": "source_train", "val.source": "source_val"}
    if experiment.endswith("nk"):
        folders["labeled.target"] = "source_val"
    for name, folder in folders.items():
        overrides += [f"data.{name}.world=null", f"data.{name}.manifest={world / folder / 'manifest.json'}"]
    return [*overrides, *settings]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["tiny_zoedepth", "tiny_zoedepth_nk"])
def test_a_short_run_trains_and_ends_in_a_bundle(
    compose: Any, tiny_world: Path, tiny_teacher: Path, tmp_path: Path, experiment: str
) -> None:
    config = compose(*small(experiment, tiny_world, tmp_path, tiny_teacher, "trainer.max_steps=60"))
    run(config)
    losses = [float(row["loss/labeled"]) for row in logged(Path(config.run_dir)) if row.get("loss/labeled")]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    prediction = depthkit.load(Path(config.run_dir) / "bundle").predict(np.zeros((40, 60, 3), np.uint8))
    assert (prediction.kind, prediction.values.shape) == ("depth", (40, 60))
    assert prediction.values.min() > 0
    model, _ = load_model(Path(config.run_dir) / "bundle")
    assert [*model.decoder.bins.heads] == (["source", "target"] if experiment.endswith("nk") else ["depth"])


@pytest.mark.slow
def test_two_heads_as_onnx_route_every_image_of_a_batch(compose: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    """For any number of images: the graph holds no batch size."""
    config = compose(*small("tiny_zoedepth_nk", tmp_path, tmp_path, tiny_teacher)).model
    torch.manual_seed(0)
    model = build_model(config).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        model.decoder.bins.router.classifier[2].bias -= model(images).domain_logits.mean(0)
        expected = model(images)
    assert set(expected.domain_logits.argmax(1).tolist()) == {0, 1}
    facts = BundleFacts(content="depth_model", model=config, kind="depth", short_side=32)
    export_onnx(model, facts, tmp_path / "model.onnx")
    network, found, _ = load_onnx(tmp_path / "model.onnx", torch.device("cpu"))
    assert found.model == config
    torch.testing.assert_close(network(images), expected.values, rtol=1e-4, atol=1e-4)


def test_it_starts_from_the_whole_relative_model(
    compose: Any, tiny_world: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    module = build_metric(compose(*small("tiny_zoedepth", tiny_world, tmp_path, tiny_teacher)))
    relative, _ = load_model(tiny_teacher)
    for name, tensor in relative.state_dict().items():
        name = name.replace("decoder.", "decoder.relative.")
        assert torch.equal(module.model.state_dict()[name], tensor), name


def test_the_router_learns_which_data_set_an_image_is_of(
    compose: Any, tiny_world: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Cross entropy by hand; `stage.domains` sends a data set to a head of another name."""
    config = compose(*small("tiny_zoedepth_nk", tiny_world, tmp_path, tiny_teacher))
    config.model.heads, config.stage.domains = {"near": 80.0, "far": 20.0}, {"source": "far", "target": "near"}
    validate(config)
    module = build_metric(config)
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    found = module.domain_loss(logits, ["source", "target"])
    np.testing.assert_allclose(found, [np.log(1 + np.exp(2)), np.log(2)], rtol=1e-6)


def test_the_total_is_the_sum_of_depth_and_100_times_domain(
    compose: Any, tiny_world: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    module = build_metric(compose(*small("tiny_zoedepth_nk", tiny_world, tmp_path, tiny_teacher))).eval()
    module.log = module.log_dict = lambda *_, **__: None
    depth = torch.rand(2, 32, 32) + 1
    batch = {"image": torch.randn(2, 3, 32, 32), "target": depth, "valid_mask": depth > 1.2}
    batch |= {"dataset": ["source", "target"]}
    step = module.training_step({"labeled": batch}, 0)
    parts = {name: values.mean() for name, values in step["image_losses"].items()}
    torch.testing.assert_close(step["loss"].detach(), parts["labeled"] + 100 * parts["domain"])
    # The loss of the pixels of both images at once, in float64.
    difference = module.predict(batch).detach()[depth > 1.2].double().log() - depth[depth > 1.2].double().log()
    expected = 10 * (difference.var() + 0.15 * difference.mean() ** 2).sqrt()
    torch.testing.assert_close(parts["labeled"].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["+stage.domains={source:rooms}"],
            r"stage\.domains\.source='rooms': must be one of model\.heads=\['source', 't",
        ),
        (["+stage.domains={rooms:source}"], r"stage\.domains=\['rooms'\]: must be names in data\.labeled="),
        (["model.max_depth=50"], r"model\.max_depth=50\.0: must be 80\.0, the largest of model\.heads"),
        (["model.heads.source=0.0001"], r"model\.min_depth=0\.001: must be > 0 and below 0\.0001"),
        (["data.labeled.source.depth_range=[0,50]"], r"model\.max_depth=20.*at least 50 m.*data\.labeled\.source"),
        (["data.labeled.source.depth_range=null"], r"model\.max_depth=20.*at least 250 m.*manifest.*\[0,20\]"),
        (["model.centers=exp"], r"model\.centers='exp': must be softplus or normed"),
        (["model.decoder=linear"], r"model\.decoder='linear': must be dpt"),
    ],
)
def test_what_cannot_work_is_refused(
    compose: Any, tiny_world: Path, tiny_teacher: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(compose(*small("tiny_zoedepth_nk", tiny_world, tmp_path, tiny_teacher, *settings)))


def test_one_head_takes_no_domains_and_needs_a_range(
    compose: Any, tiny_world: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    for setting, message in [
        ("+stage.domains={source:source}", r"stage\.domains.*must be \{\} for a model with one head"),
        ("model.max_depth=null", r"model\.max_depth=None: must be metres"),
        ("+model.heads={one:80}", r"model\.heads.*at least two"),
    ]:
        with pytest.raises(ConfigError, match=message):
            validate(compose(*small("tiny_zoedepth", tiny_world, tmp_path, tiny_teacher, setting)))
