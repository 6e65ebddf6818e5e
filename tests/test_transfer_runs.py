"""Transfer as a run has it: composed by one override, refused in time, in checkpoints and in the bundle."""

import pytest
import torch

from depthkit.bundle import load_model, read_facts
from depthkit.checks import validate
from depthkit.config import ConfigError, TransferMode
from depthkit.flops import forward_flops
from depthkit.from_checkpoint import load_checkpoint
from depthkit.models.dpt import DPTDecoder
from depthkit.models.linear import LinearDecoder
from depthkit.reporting import batch_flops
from depthkit.settings.transfer import read_transfer
from depthkit.train import build_module, run

MODES = {
    "frozen": ["transfer=frozen"],
    "last_blocks": ["transfer=last_blocks", "transfer.blocks=1"],
    "linear_probe": ["transfer=linear_probe"],
    "lora": ["transfer=lora", "transfer.lora_rank=2"],
}


LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def config(tiny_config, tiny_teacher, tmp_path):
    def compose(*overrides, stage="teacher", start=tiny_teacher, name="run"):
        return tiny_config(stage, tmp_path / name, f"stage.encoder_weights={start}", *overrides)

    return compose


def changed(before, after):
    """Names of weights of the encoder that are not as before; all are there."""
    return {name for name in before if name.startswith("encoder.") and not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_run_changes_what_it_may(config, tiny_teacher, tmp_path, mode):
    run(config(*MODES[mode]))
    before, (model, facts) = load_model(tiny_teacher)[0].state_dict(), load_model(tmp_path / "run" / "bundle")
    after = model.state_dict()
    assert isinstance(model.decoder, LinearDecoder if mode == "linear_probe" else DPTDecoder)
    found = changed(before, after)
    last = {name for name in before if name.startswith(("encoder.vit.blocks.3.", "encoder.vit.norm."))}
    linear = {f"encoder.vit.blocks.{i}.{part}.weight" for i in range(4) for part in LINEAR}
    assert found == {"frozen": set(), "linear_probe": set(), "last_blocks": last, "lora": linear}[mode]
    stated = facts.provenance["hyperparameters"]["transfer"]["mode"]
    assert stated == ("frozen" if mode == "linear_probe" else mode)


def test_full_is_not_mentioned(config, tmp_path):
    run(config("trainer.max_steps=1"))
    assert not read_facts(tmp_path / "run" / "bundle").provenance["hyperparameters"]["transfer"]


def test_a_checkpoint_of_lora_gives_what_the_bundle_holds(config, tmp_path):
    run(config(*MODES["lora"], "callbacks.checkpoint.every_n_train_steps=6"))
    bundled, _ = load_model(tmp_path / "run" / "bundle")
    model, _ = load_checkpoint(max((tmp_path / "run" / "checkpoints").glob("*.ckpt")))
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in bundled.state_dict().items()
    }
    image = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(model(image).values, bundled(image).values)


@pytest.mark.slow
def test_lora_goes_on_where_it_was_stopped(config, tmp_path):
    every = ["callbacks.checkpoint.every_n_train_steps=3"]
    run(config(*MODES["lora"], *every, name="whole"))
    run(config(*MODES["lora"], *every, name="cut"))
    checkpoint = min((tmp_path / "cut" / "checkpoints").glob("*.ckpt"))
    run(config(*MODES["lora"], *every, f"resume={checkpoint}", name="cut"))
    whole, cut = (load_model(tmp_path / name / "bundle")[0].state_dict() for name in ("whole", "cut"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_a_frozen_encoder_is_no_work_in_the_backward_pass(config):
    full, frozen = (config(f"transfer={mode}") for mode in ("full", "frozen"))
    module = build_module(frozen)
    encoder = full.data.batch_size * forward_flops(module.model.encoder, tuple(full.data.crop_size))
    assert batch_flops(frozen, module) == pytest.approx(batch_flops(full, build_module(full)) - 2 * encoder)
    assert encoder > 0


def test_a_student_may_be_frozen_too(config, tmp_path):
    run(config("transfer=last_blocks", "transfer.blocks=1", "trainer.max_steps=2", stage="student"))
    assert load_model(tmp_path / "run" / "bundle")


@pytest.mark.parametrize("mode", ["frozen", "last_blocks", "lora"])
def test_random_weights_that_stay_are_refused(config, mode):
    with pytest.raises(ConfigError, match=rf"stage.encoder_weights=None.*transfer.mode={mode}"):
        validate(config(f"transfer={mode}", start="null"))


def test_blocks_that_are_not_there_are_refused_while_composing(config):
    with pytest.raises(ConfigError, match=r"transfer.blocks=4: the encoder has 4"):
        validate(config("transfer=last_blocks", "transfer.blocks=4"))


def test_pre_training_is_not_transferred(config):
    with pytest.raises(ConfigError, match=r"transfer.mode='frozen': must be full with stage=pretrain"):
        validate(config("transfer=frozen", "stage.encoder_weights=null", stage="pretrain"))


@pytest.mark.parametrize("wrong", ["transfer.blocks=0", "transfer.lora_rank=0"])
def test_numbers_out_of_range(config, wrong):
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        config(wrong)


def test_settings_of_runs_without_transfer():
    assert read_transfer({}).mode is TransferMode.full
    assert read_transfer({"mode": "lora", "blocks": 4, "lora_rank": 3}).lora_rank == 3
