"""`depthkit plan`: memory by engine against sums by hand and a real step, counts without data, the verdict."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from depthkit.config import CONF_DIR, ConfigError
from depthkit.data.facts import load_facts
from depthkit.planning import labels, memory, plan, training
from depthkit.planning.amounts import LABEL_BYTES, images_of, published_images
from depthkit.planning.memory import (
    ENGINES,
    BatchBytes,
    Counts,
    Held,
    LiveBytes,
    held_bytes,
    largest_batch,
    step_bytes,
)
from depthkit.planning.plan import make_plan
from depthkit.planning.step import bare_module, frozen_encoder, random_batch, smallest_batch
from depthkit.train import STAGES

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
PLANNED = [name for name in EXPERIMENTS if name.startswith(("da_v", "tiny_")) and name != "tiny_evaluate"]
SMALL = ["model=vits", "model.tap_layers=[8,9,10,11]"]
OPEN = ["stage.images=''", "stage.out=''"]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def compose_plan(compose, tmp_path, monkeypatch):
    """`compose_plan(experiment, *overrides)` in an empty folder: nothing is packed, trained or labeled."""
    monkeypatch.chdir(tmp_path)

    def compose_in_empty_folder(experiment, *overrides):
        more = OPEN if experiment in ("da_v1_label", "da_v2_label") else []
        return compose(f"experiment={experiment}", *more, *overrides, config_name="plan")

    return compose_in_empty_folder


@pytest.fixture
def a_gigabyte_per_image(monkeypatch):
    """Batches need not be counted: one GB and one more for each image."""
    line = BatchBytes(fixed=1e9, per_image=1e9)
    monkeypatch.setattr(training, "measure_batch", lambda config, smallest: line)
    monkeypatch.setattr(labels, "forward_bytes", lambda model, size, precision: line)


def figure(made, name):
    (found,) = [each for figures in made.figures.values() for each in figures if each.name == name]
    return found


# --- without data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", PLANNED)
def test_every_experiment_is_planned_without_data(experiment, compose_plan, a_gigabyte_per_image, tmp_path):
    made = make_plan(compose_plan(experiment, f"cluster={'h100x8' if experiment.startswith('da') else 'laptop'}"))
    assert made.rows
    assert sum(row.chosen for row in made.rows) == 1
    assert all(each.basis for figures in made.figures.values() for each in figures)
    if experiment.startswith("da"):
        assert figure(made, "device-hours").value > 0
    assert list(tmp_path.iterdir()) == []


def test_images_come_from_published_facts_until_there_is_a_manifest(compose_plan, tiny_world):
    config = compose_plan(
        "da_v1_student", "data.unlabeled={}", f"data.labeled.irs.manifest={tiny_world}/x/manifest.json"
    )
    published = load_facts("diml").splits["train"].images
    assert published_images("data/diml/manifest.json") == published_images("s3://b/diml/manifest.json") == published
    assert images_of(config.data.labeled["diml"], config).basis == "published"
    assert images_of(config.data.labeled["irs"], config) is None
    config.data.labeled["irs"].manifest = str(tiny_world / "source_train" / "manifest.json")
    counted = images_of(config.data.labeled["irs"], config)
    shards = sum(path.stat().st_size for path in (tiny_world / "source_train").glob("*.tar"))
    assert counted == (24, "counted", shards, "counted")


def test_steps_are_those_of_one_sweep(compose_plan, a_gigabyte_per_image):
    config = compose_plan("da_v1_student", *SMALL, "cluster=h100x8")
    unlabeled = sum(load_facts(name).splits["train"].images for name in config.data.unlabeled)
    made = make_plan(config)
    assert figure(made, "optimizer steps").value == round(unlabeled / 128)
    assert figure(made, "optimizer steps").basis == "published"
    assert figure(made, "images seen").value == 192 * round(unlabeled / 128)
    assert figure(made, "pseudo-labels").value == unlabeled * LABEL_BYTES


def test_steps_of_unknown_data_are_refused(compose_plan, a_gigabyte_per_image):
    overrides = ["sweeps=1", "trainer.max_steps=-1"]
    with pytest.raises(ConfigError, match=r"manifest=data/real/.*give sweeps=null"):
        make_plan(compose_plan("tiny_real_teacher", *overrides))


def test_a_measured_rate_takes_the_place_of_the_assumed_one(compose_plan, a_gigabyte_per_image):
    made = make_plan(compose_plan("da_v2_teacher", *SMALL, "cluster=h100x8", "images_per_second=20"))
    assert figure(made, "device-hours").value == pytest.approx(160_000 * 64 / 20 / 3600)
    assert figure(made, "device-hours").basis == "measured"
    assumed = make_plan(compose_plan("da_v2_teacher", *SMALL, "cluster=h100x8", "mfu=0.5"))
    rate = 0.5 * 989.4e12 / figure(assumed, "FLOPs per image").value
    assert figure(assumed, "images/s of a device").value == pytest.approx(rate)
    assert figure(assumed, "device-hours").basis == "assumed"


def test_label_bytes_are_those_that_were_measured():
    assert f"{LABEL_BYTES:,}" in (ROOT / "docs" / "label-storage.md").read_text()


def test_settings_are_those_of_training():
    """plan.yaml repeats the list of train.yaml, because a schema of its own cannot come after that of training."""
    train, planned = (OmegaConf.load(CONF_DIR / f"{name}.yaml") for name in ("train", "plan"))
    own = [{"cluster": "laptop"}, {"override hydra/job_logging": "stdout"}, "base_plan"]
    assert [each for each in planned.defaults if each not in own] == [
        each for each in train.defaults if each not in ("base_train", {"sweep": None})
    ]
    for key in ("run_name", "run_dir"):
        assert OmegaConf.to_container(planned)[key] == OmegaConf.to_container(train)[key]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "cluster").glob("*.yaml")))
def test_clusters(name, compose_plan):
    config = compose_plan("tiny_teacher", f"cluster={name}")
    assert config.cluster.name == name
    assert (config.trainer.devices, config.trainer.num_nodes) == (
        config.cluster.gpus_per_node,
        config.cluster.num_nodes,
    )
    assert config.cluster.memory_gb > 0


def test_a_device_without_data_sheet_needs_its_memory(compose_plan):
    with pytest.raises(ConfigError, match=r"cluster\.memory_gb=None.*device='Voodoo 2'"):
        compose_plan("tiny_teacher", "cluster.device=Voodoo 2", "cluster.memory_gb=null")


def test_more_devices_than_the_cluster_has(compose_plan):
    with pytest.raises(ConfigError, match=r"trainer\.devices=9: must be at most 8, as cluster=h100x8 has"):
        make_plan(compose_plan("da_v2_teacher", "cluster=h100x8", "trainer.devices=9"))


# --- memory ----------------------------------------------------------------------------------------------------------


def test_what_engines_hold_by_hand():
    """100 weights, 80 of them trained, on 4 devices: the table of `held_bytes` with numbers."""
    bucket = 4 * 400_000_000
    expected = {
        "ddp": Held(400, 320, 640, 0, 320),
        "zero1": Held(400, 320, 240, 0, bucket),
        "zero1_offload": Held(400, 320, 0, 0, bucket, host=240),
        "zero2": Held(400, 80, 240, 0, bucket),
        "zero2_offload": Held(400, 0, 0, 0, bucket, host=240 + 80),
        "zero3": Held(100, 80, 160, 0, bucket + 400),
        "zero3_offload": Held(0, 0, 0, 0, bucket + 400, host=240 + 80 + 100),
    }
    assert {engine.name: held_bytes(engine, Counts(100, 80), 4) for engine in ENGINES} == expected
    assert held_bytes(ENGINES[0], Counts(100, 80, ema=90), 1) == Held(400, 320, 640, 360, 0)
    assert expected["ddp"].total == 400 + 320 + 640 + 320
    for engine in ENGINES:
        assert held_bytes(engine, Counts(100, 80, frozen=7), 4).weights == expected[engine.name].weights + 28


def test_live_bytes_by_hand():
    """y = exp(x) is kept for the backward pass, twice y is not; the square keeps its input, which is the sum's."""
    x = torch.ones(1000, requires_grad=True)
    x.grad = torch.zeros(1000)
    with LiveBytes() as live:
        y = x.exp()
        assert (live.now, live.peak) == (4000, 4000)
        z = (2 * y).sum()
        assert (live.now, live.peak) == (4004, 8004)
        del y
        assert live.now == 4004  # autograd holds it
        z.backward()
        del z
    assert live.now == 0
    assert live.peak == 4004 + 4 + 4000 + 4000  # gradient of the sum, of 2 y (a view of it) times 2, times y


def saved_bytes(config, images):
    """What autograd keeps of a real step, weights and batch apart: independent of `LiveBytes`."""
    module = bare_module(config)
    batch = random_batch(config, images, torch.device("cpu"))
    weights = [*module.parameters(), *frozen_encoder(module).parameters()]
    given = {tensor.untyped_storage().data_ptr() for tensor in weights}
    tensors = [value for part in batch.values() for value in part.values() if isinstance(value, torch.Tensor)]
    given |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module.training_step(batch, 0)
    loss = output if isinstance(output, torch.Tensor) else output["loss"]
    return sum(kept.values()), loss


@pytest.mark.parametrize("stage", ["pretrain", "teacher", "student"])
def test_counted_bytes_are_those_of_a_real_step(stage, tiny_config, tmp_path):
    config = tiny_config(stage, tmp_path, "model.features=64", "model.out_channels=[32,32,64,64]")
    images = {name: 4 * count for name, count in smallest_batch(config).items()}
    kept, _ = saved_bytes(config, images)
    counted = step_bytes(config, images)
    assert kept < counted < 1.5 * kept

    module = bare_module(config)
    batch = random_batch(config, images, torch.device("cpu"))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveBytes() as live:
        output = module.training_step(batch, 0)
        (output if isinstance(output, torch.Tensor) else output["loss"]).backward()
    assert counted == pytest.approx(live.peak, rel=0.02)


def test_checkpointing_takes_less(tiny_config, tmp_path):
    args = "model.encoder_args={img_size:32,patch_size:4,embed_dim:96,depth:8,num_heads:2,init_values:0.1}"
    config = tiny_config("teacher", tmp_path, args, "model.conv_stem=false", "model.tap_layers=[1,3,5,7]")
    images = {"labeled": 4}
    whole = step_bytes(config, images)
    config.trainer.activation_checkpointing = True
    assert step_bytes(config, images) < 0.6 * whole
    assert saved_bytes(config, images)[0] < 0.6 * whole


def test_autocast_takes_less(tiny_config, tmp_path):
    images = {"labeled": 16}
    full, mixed = (
        step_bytes(tiny_config("teacher", tmp_path, f"trainer.precision={precision}"), images)
        for precision in ("32-true", "bf16-mixed")
    )
    assert 0.4 * full < mixed < full


def test_weights_are_those_of_the_real_module(compose_plan, a_gigabyte_per_image):
    config = compose_plan("tiny_student")
    config.stage.encoder_weights = None
    module = STAGES[type(config.stage)](config)
    made = make_plan(config)
    count = lambda net: sum(each.numel() for each in net.parameters())  # noqa: E731
    assert figure(made, "encoder").value == count(module.model.encoder)
    assert figure(made, "decoder").value == count(module.model.decoder)
    assert figure(made, "frozen encoder").value == count(module.frozen_encoder)
    ddp = made.rows[0].held
    assert ddp.weights == 4 * (count(module.model) + count(module.frozen_encoder))
    assert ddp.optimizer == 8 * sum(each.numel() for each in module.parameters() if each.requires_grad)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], {"labeled": 1, "unlabeled": 2}),
        (["data.unlabeled_per_labeled=3", "data.batch_size=8"], {"labeled": 2, "unlabeled": 6}),
        (["~data.labeled.source", "data.batch_size=4"], {"unlabeled": 2}),
        (["~data.labeled.source", "data.batch_size=4", "data.augment.cutmix=0"], {"unlabeled": 1}),
    ],
)
def test_smallest_batch(overrides, parts, tiny_config, tmp_path):
    config = tiny_config("student", tmp_path, "data.augment.cutmix=0.5", *overrides)
    assert smallest_batch(config) == parts


def test_largest_batch():
    line = BatchBytes(fixed=10, per_image=2)
    assert largest_batch(100, 30, line, {"labeled": 1, "unlabeled": 2}) == 30
    assert largest_batch(99, 30, line, {"labeled": 1, "unlabeled": 2}) == 27
    assert largest_batch(41, 30, line, {"labeled": 1}) == 0
    assert largest_batch(10, 30, line, {"labeled": 1}) == 0


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_verdict_follows_the_memory(compose_plan, a_gigabyte_per_image):
    """24 images and the fixed GB take 25 GB on each of 8 devices, beside what DDP holds."""
    held = make_plan(compose_plan("da_v1_student", *SMALL, "cluster=h100x8")).rows[0].held.total
    needed = (held + 25e9 + memory.RESERVED) / (1 - memory.FRAGMENTATION) / 1e9
    enough, scarce = (
        make_plan(compose_plan("da_v1_student", *SMALL, "cluster=h100x8", f"cluster.memory_gb={needed + change}"))
        for change in (0.1, -0.1)
    )
    assert enough.fits
    assert enough.advice == []
    assert not scarce.fits
    assert scarce.advice
    assert enough.rows[0].largest_batch == 24
    assert scarce.rows[0].largest_batch == 21


def test_what_it_advises_fits(compose_plan, a_gigabyte_per_image):
    little = [*SMALL, "cluster=h100x8", "cluster.memory_gb=27"]
    made = make_plan(compose_plan("da_v1_student", *little))
    assert not made.fits
    assert "data.batch_size=96 trainer.accumulate_grad_batches=2" in made.advice
    for each in made.advice:
        assert make_plan(compose_plan("da_v1_student", *little, *each.split())).fits, each


def test_too_little_for_any_engine(compose_plan, a_gigabyte_per_image):
    made = make_plan(compose_plan("da_v2_teacher", *SMALL, "cluster=h100x8", "cluster.memory_gb=3"))
    assert not made.fits
    assert made.advice == ["no engine fits: more devices, a smaller model or smaller crops"]


def test_offload_needs_the_memory_of_the_host(compose_plan, a_gigabyte_per_image):
    overrides = ["cluster=h100x8", "trainer=deepspeed_zero2_offload"]
    chosen = {}
    for host in (2000, 0.1):
        made = make_plan(compose_plan("da_v2_teacher", *SMALL, *overrides, f"cluster.host_memory_gb={host}"))
        (chosen[host],) = [row for row in made.rows if row.chosen]
    assert chosen[2000].name == chosen[0.1].name == "zero2_offload"
    assert chosen[2000].fits
    assert not chosen[0.1].fits


def test_bfloat16_on_a_device_without(compose_plan, a_gigabyte_per_image):
    overrides = [*SMALL, "cluster=v100x128", "data.batch_size=384"]
    made = make_plan(compose_plan("da_v1_student", *overrides))
    assert not made.fits
    assert any("trainer.precision=16-mixed" in each for each in made.advice)
    assert make_plan(compose_plan("da_v1_student", *overrides, "trainer.precision=16-mixed")).fits


def test_labels_of_several_views_cost_more(compose_plan, a_gigabyte_per_image):
    one, four = (
        make_plan(compose_plan("da_v1_label", "cluster=h100x8", "stage.images=data/sa1b/manifest.json", *views))
        for views in ([], ["stage.flip=true", "stage.scales=[1.0,2.0]"])
    )
    assert figure(one, "images").value == load_facts("sa1b").splits["train"].images
    assert figure(one, "teacher").value == 335_315_649
    assert figure(four, "FLOPs per image").value == pytest.approx(2 * (1 + 4) * figure(one, "FLOPs per image").value)
    everything = make_plan(compose_plan("da_v2_label", "cluster=h100x8", "data=v2_student"))
    assert figure(everything, "images").value > figure(one, "images").value
    assert figure(everything, "teacher").value == 1_258_132_225


def test_labelling_takes_the_bundle_where_there_is_one(compose_plan, a_gigabyte_per_image, tiny_teacher):
    made = make_plan(compose_plan("tiny_label", f"stage.bundle={tiny_teacher}"))
    assert figure(made, "teacher").source == str(tiny_teacher)
    assert figure(made, "teacher").value < figure(make_plan(compose_plan("tiny_label")), "teacher").value


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_prints_the_tables_and_writes_json(compose_plan, a_gigabyte_per_image, tmp_path, capsys):
    plan.run(compose_plan("da_v1_student", *SMALL, "cluster=h100x8", f"out={tmp_path / 'plan.json'}"))
    printed = capsys.readouterr().out
    assert "da_v1_student on h100x8: 1 x 8 NVIDIA H100 80GB HBM3, 80 GB each, bf16-mixed" in printed
    assert "22,056,576 weights  counted" in printed
    assert printed.splitlines()[-1] == "fits"
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"] is True
    assert {row["name"] for row in written["engines"]} >= {"ddp", "zero3_offload + checkpointing"}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(compose_plan, capsys):
    plan.run(compose_plan("da_v1_student", "cluster=h100x8"))
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert f"```text\n{printed}\n```" in (ROOT / "docs" / "performance.md").read_text(), printed
