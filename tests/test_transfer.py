import copy

import pytest
import torch

from depthkit.config import ConfigError, TransferConfig, TransferMode
from depthkit.models import DepthModel, create_encoder
from depthkit.models.linear import LinearDecoder
from depthkit.transfer import apply_transfer, blocks_of, keep_frozen_in_eval, merge_adapters

VIT = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2, "init_values": 0.1}


def build(name="vit_tiny_patch16_224", tap_layers=(0, 1, 2, 3), **encoder_args):
    torch.manual_seed(0)
    encoder = create_encoder(name, tap_layers=list(tap_layers), **(encoder_args or VIT))
    return DepthModel(encoder, LinearDecoder(widths=encoder.widths, strides=encoder.strides))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def transferred(model, mode, **settings):
    apply_transfer(model, TransferConfig(mode=mode, **settings))
    return trainable(model)


DECODER = {name for name in trainable(build()) if name.startswith("decoder.")}


def test_full_trains_all_that_was_trained():
    model = build()
    before = trainable(model)
    assert transferred(model, TransferMode.full) == before > DECODER


def test_frozen_trains_the_decoder_alone():
    assert transferred(build(), TransferMode.frozen) == DECODER


@pytest.mark.parametrize("blocks", [1, 3])
def test_last_blocks_trains_those_and_the_last_norm(blocks):
    model = build()
    inside = tuple(f"encoder.vit.{part}." for part in ("norm", *(f"blocks.{3 - i}" for i in range(blocks))))
    expected = {name for name, _ in model.named_parameters() if name.startswith(inside)}
    assert transferred(model, TransferMode.last_blocks, blocks=blocks) == DECODER | expected


def test_last_blocks_of_a_network_with_stages_are_residual_ones():
    model = build("resnet18", (1, 2, 3, 4), in_chans=3)
    assert len(blocks_of(model.encoder)) == 8
    found = transferred(model, TransferMode.last_blocks, blocks=3) - DECODER
    assert {".".join(name.split(".")[2:4]) for name in found} == {"layer3.1", "layer4.0", "layer4.1"}


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"blocks=4.*has 4.*transfer=full"):
        transferred(build(), TransferMode.last_blocks, blocks=4)


@pytest.mark.parametrize("mode", [TransferMode.last_blocks, TransferMode.lora])
def test_an_encoder_without_blocks_is_refused(mode):
    model = build()
    model.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    with pytest.raises(ConfigError, match=r"Sequential has no blocks"):
        transferred(model, mode)


def test_lora_needs_linear_layers():
    with pytest.raises(ConfigError, match="no linear layers"):
        transferred(build("resnet18", (1, 2, 3, 4), in_chans=3), TransferMode.lora)


def test_lora_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"depthkit\[lora\]"):
        transferred(build(), TransferMode.lora)


def test_lora_trains_factors_of_every_linear_layer_of_the_blocks():
    model = build()
    found = transferred(model, TransferMode.lora, lora_rank=3) - DECODER
    layers = {name.partition(".lora_")[0] for name in found}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert layers == {f"encoder.vit.blocks.{i}.{part}" for i in range(4) for part in parts}
    assert all(3 in model.get_parameter(name).shape for name in found)
    assert len(found) == 2 * len(layers)


def test_lora_starts_as_the_network_it_adapts():
    model, image = build(), torch.randn(2, 3, 32, 48)
    before = model(image).values
    transferred(model, TransferMode.lora)
    torch.testing.assert_close(model(image).values, before)


def test_merged_adapters_predict_the_same_and_are_gone():
    model, image = build(), torch.randn(2, 3, 32, 48)
    names = set(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    config = TransferConfig(mode=TransferMode.lora, lora_rank=2)
    apply_transfer(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(image).values.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = model(image).values
        merged = merge_adapters(model, config)
        torch.testing.assert_close(merged(image).values, trained, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(image).values, trained)  # the model itself stays as it was
    state = merged.state_dict()
    assert set(state) == names
    assert not torch.equal(state["encoder.vit.blocks.0.mlp.fc1.weight"], before["encoder.vit.blocks.0.mlp.fc1.weight"])
    assert torch.equal(state["encoder.vit.pos_embed"], before["encoder.vit.pos_embed"])


def test_there_is_nothing_to_merge_without_adapters():
    model = build()
    assert merge_adapters(model, TransferConfig()) is model


def test_frozen_batch_norm_keeps_its_statistics_and_the_trained_one_does_not():
    model = build("resnet18", (1, 2, 3, 4), in_chans=3)
    transferred(model, TransferMode.last_blocks, blocks=1)
    keep_frozen_in_eval(model.train())
    statistics = {name: value.clone() for name, value in model.encoder.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    moved = {name for name, value in model.encoder.named_buffers() if not torch.equal(value, statistics[name])}
    assert moved
    assert all(".layer4.1." in f".{name}" for name in moved)
