"""How a model is run: settings that fit together, and settings that change nothing but speed and memory."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import bundle_weights, logged

from depthkit.bundle import BundleFacts, load_model, save_bundle
from depthkit.checks import check_model, validate
from depthkit.config import (
    CONF_DIR,
    ConfigError,
    PretrainConfig,
    PseudoLabelConfig,
    StageConfig,
    TeacherConfig,
    TrainerConfig,
)
from depthkit.engine import prepare_model
from depthkit.stages.teacher import TeacherModule
from depthkit.train import build_pretrain, build_teacher, run
from depthkit.trainer_checks import check_trainer

GROUPS = sorted(path.stem for path in (CONF_DIR / "trainer").glob("*.yaml"))


def refused(stage: StageConfig | None = None, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check_trainer(TrainerConfig(**settings), stage or TeacherConfig())
    return str(error.value)


def write_json(path: Path, **settings: object) -> str:
    path.write_text(json.dumps(settings))
    return str(path)


# --- composing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_every_engine_composes(tiny_config, tmp_path, group):
    file = write_json(tmp_path / "ds.json", zero_optimization={"stage": 3})
    own = [f"trainer.deepspeed_config={file}"] if group == "deepspeed" else []
    config = tiny_config("student", tmp_path, f"trainer={group}", "data.batch_size=48", *own)
    validate(config)
    trainer = config.trainer
    assert (trainer.strategy == "deepspeed") == group.startswith("deepspeed")
    assert trainer.offload == group.endswith("_offload")
    if "zero" in group:
        assert f"zero{trainer.zero_stage}" in group
    assert trainer.precision == ("32-true" if group == "cpu" else "bf16-mixed")


def test_engines_are_those_that_are_promised():
    stages = [f"deepspeed_zero{name}" for name in ("1", "2", "2_offload", "3", "3_offload")]
    assert sorted(["cpu", "gpu", "ddp", "deepspeed", *stages]) == GROUPS


DEEPSPEED = {"strategy": "deepspeed"}
ZERO_2 = {"strategy": "deepspeed", "zero_stage": 2}
FILE = {"deepspeed_config": "x.json"}


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({"precision": "16-mixed"}, "trainer.precision=16-mixed", "trainer.accelerator=cpu"),
        ({"offload": True}, "trainer.strategy=auto", "trainer.offload=True"),
        ({"strategy": "ddp", "zero_stage": 3}, "trainer.strategy=ddp", "trainer.zero_stage=3"),
        (FILE, "trainer.strategy=auto", "trainer.deepspeed_config=x.json"),
        (DEEPSPEED, "trainer.strategy=deepspeed", "trainer.zero_stage=None"),
        (ZERO_2 | {"channels_last": True}, "trainer.strategy=deepspeed", "trainer.channels_last=True"),
        (DEEPSPEED | {"zero_stage": 3, "compile": True}, "trainer.compile=True", "trainer.zero_stage=3"),
        (ZERO_2 | FILE, "trainer.deepspeed_config=x.json", "trainer.zero_stage=2"),
        (DEEPSPEED | FILE | {"offload": True}, "trainer.deepspeed_config=x.json", "trainer.offload=True"),
    ],
)
def test_two_settings_that_cannot_work_are_both_named(settings, first, second):
    assert refused(**settings).startswith(f"{first} and {second}: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "trainer.precision='fp16': must be one of 32-true, bf16-mixed, 16-mixed"),
        ({"strategy": "fsdp"}, "trainer.strategy='fsdp': must be one of auto, ddp, deepspeed"),
        ({"zero_stage": 4}, "trainer.zero_stage=4: must be one of None, 1, 2, 3"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0: must be > 0"),
        ({"gradient_clip_val": 0.0}, "trainer.gradient_clip_val=0.0: must be a norm > 0, or null"),
    ],
)
def test_values_out_of_range(settings, message):
    assert refused(**settings) == message


def test_refused_while_composing(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        validate(tiny_config("teacher", tmp_path, "trainer.precision=16-mixed"))


@pytest.mark.parametrize("setting", ["compile", "channels_last"])
def test_pretraining_has_no_model_to_compile_and_no_decoder(setting):
    assert refused(PretrainConfig(), **{setting: True}).startswith(f"stage=pretrain and trainer.{setting}=True: ")


def test_labelling_has_no_strategy():
    stage = PseudoLabelConfig(bundle="bundle", images="images", out="out")
    assert "give trainer=gpu or trainer=ddp" in refused(stage, **ZERO_2)
    check_trainer(TrainerConfig(strategy="ddp"), stage)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("depthkit.trainer_checks.find_spec", lambda name: None)
    assert "pip install 'depthkit[deepspeed]'" in refused(**ZERO_2)


# --- a user's own DeepSpeed settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "optim"),
        ({"gradient_clipping": 1.0}, "trainer.gradient_clip_val"),
        ({"gradient_accumulation_steps": 2}, "trainer.accumulate_grad_batches"),
        ({"train_batch_size": 8}, "data.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "data.batch_size"),
        ({"bf16": {"enabled": True}}, "trainer.precision"),
        ({"fp16": {"enabled": "auto"}}, "trainer.precision"),
        ({"activation_checkpointing": {}}, "trainer.activation_checkpointing"),
    ],
)
def test_what_a_deepspeed_file_would_set_twice_is_named(tmp_path, settings, ours):
    (key,) = settings
    file = write_json(tmp_path / "ds.json", zero_optimization={"stage": 2}, **settings)
    expected = f"trainer.deepspeed_config={file}: sets {key}, which is {ours} here; take it out of the file"
    assert refused(strategy="deepspeed", deepspeed_config=file) == expected


@pytest.mark.parametrize("text", ["", "[1]", '{"zero_optimization": 2}', "{'a': 1}"])
def test_unreadable_deepspeed_file(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    message = refused(strategy="deepspeed", deepspeed_config=str(tmp_path / "ds.json"))
    assert f"{tmp_path / 'ds.json'}: cannot be read as a JSON object" in message


def test_deepspeed_file_that_is_not_there():
    assert "No such file" in refused(**DEEPSPEED, **FILE)


def test_deepspeed_file_needs_a_stage_that_splits(tmp_path):
    file = write_json(tmp_path / "ds.json", steps_per_print=10)
    assert "zero_optimization.stage=0 must be 1, 2 or 3" in refused(**DEEPSPEED, deepspeed_config=file)


def test_stage_of_a_deepspeed_file_counts(tmp_path):
    file = write_json(tmp_path / "ds.json", zero_optimization={"stage": 3})
    message = refused(**DEEPSPEED, deepspeed_config=file, compile=True)
    assert message.startswith("trainer.compile=True and trainer.zero_stage=3: ")


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny_config, tmp_path) -> TeacherModule:
    torch.manual_seed(0)
    module = build_teacher(tiny_config("teacher", tmp_path))
    assert isinstance(module, TeacherModule)
    return module


def gradients(module: TeacherModule, image: torch.Tensor) -> dict[str, torch.Tensor]:
    module(image).values.square().mean().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def prepared(module: TeacherModule, tiny_config, tmp_path, setting: str) -> TeacherModule:
    changed = copy.deepcopy(module)
    prepare_model(changed, tiny_config("teacher", tmp_path, f"trainer.{setting}=true").trainer)
    assert list(changed.state_dict()) == list(module.state_dict())
    return changed


def test_activation_checkpointing_runs_blocks_twice_for_the_same_gradients(teacher, tiny_config, tmp_path):
    image = torch.randn(2, 3, 32, 40)
    changed = prepared(teacher, tiny_config, tmp_path, "activation_checkpointing")
    runs = []
    for block in changed.model.encoder.vit.blocks:
        block.attn.register_forward_hook(lambda *_: runs.append(1))
    expected, found = gradients(teacher, image), gradients(changed, image)
    assert len(runs) == 2 * len(changed.model.encoder.vit.blocks)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_activation_checkpointing_needs_an_encoder_that_can(tiny_config, tmp_path):
    config = tiny_config("teacher", tmp_path, "trainer.activation_checkpointing=true")
    config.model = replace(config.model, encoder="vgg11", conv_stem=False, encoder_args={}, tap_layers=[1, 2, 3, 4])
    with pytest.raises(ConfigError, match=r"checkpointing=True and model vgg11: no part .* can be run again"):
        check_model(config)


def test_activation_checkpointing_of_pretraining(tiny_config, tmp_path):
    config = tiny_config("pretrain", tmp_path, "trainer.activation_checkpointing=true")
    module = build_pretrain(config)
    prepare_model(module, config.trainer)
    assert module.encoder.vit.grad_checkpointing


def test_channels_last_changes_the_format_of_the_decoder_alone(teacher, tiny_config, tmp_path):
    image = torch.randn(2, 3, 32, 40)
    changed = prepared(teacher, tiny_config, tmp_path, "channels_last")
    weight = changed.model.decoder.head_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    torch.testing.assert_close(changed(image).values, teacher(image).values)
    expected, found = gradients(teacher, image), gradients(changed, image)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.slow
def test_compiled_model_has_the_same_names_outputs_and_gradients(teacher, tiny_config, tmp_path, monkeypatch):
    # The same graphs as for Inductor, without the minute that its C++ takes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    image = torch.randn(2, 3, 32, 40)
    changed = prepared(teacher, tiny_config, tmp_path, "compile")
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(changed(image).values, teacher(image).values)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    expected, found = gradients(teacher, image), gradients(changed, image)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    facts = BundleFacts(
        content="depth_model", model=tiny_config("teacher", tmp_path).model, kind="disparity", short_side=32
    )
    folder = save_bundle(tmp_path / "bundle", changed.model, facts)
    assert load_model(folder)[0].state_dict().keys() == teacher.model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++ on a CPU, and there is no g++")
def test_compiled_run_ends_with_the_bundle_of_the_plain_one(tiny_config, tmp_path):
    for name, compiles in (("plain", False), ("compiled", True)):
        run(tiny_config("teacher", tmp_path / name, f"trainer.compile={compiles}"))
    plain, compiled = (bundle_weights(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled.keys() == plain.keys()
    # Adam makes whole steps of the rounding errors in gradients near 0, so not the weights but what they do is alike.
    plain_losses, losses = ([row["loss"] for row in logged(tmp_path / name)] for name in ("plain", "compiled"))
    assert len(losses) == 6
    assert losses == pytest.approx(plain_losses, rel=1e-3)
