"""Encoders of other families: sizes are read from timm, the decoder fits them, and training reaches every weight."""

import numpy as np
import pytest
import timm
import torch

from depthkit.checks import describe_encoder
from depthkit.config import ConfigError, DPTConfig
from depthkit.inference.loading import load
from depthkit.models import build_model
from depthkit.models.encoder import IntermediatesEncoder, PlainEncoder
from depthkit.train import run

SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2}

TRANSFORMERS = {
    "vit_base_patch16_224.mae": 16,
    "vit_base_patch16_clip_224": 16,
    "deit3_small_patch16_224": 16,
    "vit_small_patch14_reg4_dinov2": 14,
    "vit_base_patch16_siglip_224.v2_webli": 16,
    "vit_small_patch16_dinov3": 16,
    "eva02_tiny_patch14_224": 14,
    "vit_pe_core_tiny_patch16_384": 16,
    "vit_so150m2_patch16_reg1_gap_256": 16,
}
"""timm name -> patch size. Class token or none, registers, learned, rotary or both positions, pooling heads."""

SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
PYRAMIDS = {
    "resnet18": ([1, 2, 3, 4], {}, [64, 128, 256, 512]),
    "convnext_atto": ([0, 1, 2, 3], {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, [8, 16, 24, 32]),
    "swin_tiny_patch4_window7_224": ([0, 1, 2, 3], SWIN, [16, 32, 64, 128]),
    "efficientnet_b0": ([1, 2, 3, 4], {}, [24, 40, 112, 320]),
}
"""timm name -> stages of strides 4 to 32, arguments that make it small, widths."""


def config(encoder: str, *, tap_layers: list[int], encoder_args: dict[str, object]) -> DPTConfig:
    return DPTConfig(
        encoder=encoder, encoder_args=encoder_args, tap_layers=tap_layers, features=16, out_channels=[8, 8, 16, 16]
    )


def transformer(name: str) -> DPTConfig:
    return config(name, tap_layers=[0, 1, 2, 3], encoder_args=SMALL | {"img_size": 4 * TRANSFORMERS[name]})


def pyramid(name: str) -> DPTConfig:
    tap_layers, encoder_args, _ = PYRAMIDS[name]
    return config(name, tap_layers=tap_layers, encoder_args=encoder_args)


ALL = [pytest.param(transformer(name), id=name) for name in TRANSFORMERS]
ALL += [pytest.param(pyramid(name), id=name) for name in PYRAMIDS]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_are_measured_by_timm(name):
    patch = TRANSFORMERS[name]
    encoder = build_model(transformer(name)).encoder
    assert encoder.widths == [32] * 4
    assert encoder.strides == [patch] * 4
    assert encoder.multiple == patch
    taps, features = encoder(torch.randn(2, 3, 2 * patch, 3 * patch))
    assert [tuple(tap.shape) for tap in taps] == [(2, 32, 2, 3)] * 4
    assert features is taps[-1]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramids_are_measured_by_timm(name):
    widths = PYRAMIDS[name][2]
    encoder = build_model(pyramid(name)).encoder
    assert isinstance(encoder, IntermediatesEncoder)
    assert encoder.widths == widths
    assert encoder.strides == [4, 8, 16, 32]
    assert encoder.multiple == 32
    taps, features = encoder(torch.randn(2, 3, 64, 96))
    assert [tuple(tap.shape) for tap in taps] == [
        (2, width, 64 // stride, 96 // stride) for width, stride in zip(widths, [4, 8, 16, 32], strict=True)
    ]
    assert features.shape == (2, widths[-1], 2, 3)


@pytest.mark.parametrize("model", ALL)
def test_output_has_the_size_of_the_image_and_every_weight_learns(model):
    """DDP without a search for unused parameters hangs when one is never reached."""
    torch.manual_seed(0)
    network = build_model(model)
    multiple = network.encoder.multiple
    for height, width in ((2, 3), (5, 2)):
        image = torch.randn(2, 3, height * multiple, width * multiple)
        output = network(image)
        assert output.values.shape == (2, height * multiple, width * multiple)
    (output.values.square().mean() + output.features.square().mean()).backward()
    silent = [name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
    assert silent == []


@pytest.mark.parametrize("model", ALL)
def test_checks_before_a_run_accept_it(model):
    assert describe_encoder(model).multiple == build_model(model).encoder.multiple


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_taps_are_timms_normalised_intermediates(name):
    torch.manual_seed(0)
    settings = transformer(name)
    encoder = build_model(settings).encoder.eval()
    net = timm.create_model(name, num_classes=0, dynamic_img_size=True, **settings.encoder_args).eval()
    missing, unexpected = net.load_state_dict(encoder.net.state_dict(), strict=False)
    assert (missing, unexpected) == ([], [])
    image = torch.randn(1, 3, 2 * encoder.multiple, 5 * encoder.multiple)
    with torch.no_grad():
        expected = net.forward_intermediates(image, indices=[0, 1, 2, 3], norm=True, intermediates_only=True)
        taps, _ = encoder(image)
    for tap, map_ in zip(taps, expected, strict=True):
        torch.testing.assert_close(tap, map_)


def test_features_are_of_the_last_stage_when_no_tap_is():
    settings = config("vit_small_patch16_dinov3", tap_layers=[0, 1, 2, 3], encoder_args=SMALL | {"depth": 6})
    taps, features = build_model(settings).encoder.eval()(torch.randn(1, 3, 32, 32))
    assert len(taps) == 4
    assert features.shape == taps[-1].shape
    assert not torch.equal(features, taps[-1])


def test_which_encoder_reads_which_network():
    assert isinstance(build_model(transformer("vit_base_patch16_224.mae")).encoder, PlainEncoder)
    assert isinstance(build_model(transformer("vit_small_patch14_reg4_dinov2")).encoder, IntermediatesEncoder)


@pytest.mark.parametrize(
    ("name", "tap_layers", "message"),
    [
        ("beit_base_patch16_224", [0, 1, 2, 3], r"does not take an image of \(32, 48\): .*; depth needs an encoder"),
        ("resnet18", [2, 3, 4, 5], r"model\.tap_layers=\[2, 3, 4, 5\]: resnet18 has stages 0 to 4"),
    ],
)
def test_networks_that_cannot_serve_are_refused(name, tap_layers, message):
    model = config(name, tap_layers=tap_layers, encoder_args={})
    with pytest.raises(ConfigError, match=message):
        describe_encoder(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "convnext_atto"])
def test_a_student_trains_with_it(name, tiny_config, tmp_path):
    """Features are aligned with a frozen copy of the same encoder, and the bundle predicts."""
    model = transformer(name) if name in TRANSFORMERS else pyramid(name)
    config = tiny_config("student", tmp_path, "data.crop_size=[64,64]", "trainer.max_steps=2", "optim.warmup_steps=0")
    config.model = model
    run(config)
    prediction = load(tmp_path / "bundle", device="cpu").predict(np.zeros((50, 70, 3), np.uint8))
    assert prediction.values.shape == (50, 70)
    assert np.isfinite(prediction.values).all()
