"""Decoder and whole models: sizes, published parameter counts, gradients."""

import pytest
import torch
from torch import nn

from depthkit.config import DPTConfig
from depthkit.models import DepthModel, build_encoder, build_model
from depthkit.models.dpt import DPTDecoder

# Depth Anything V2 as released: parameters of the whole, of the encoder, and tensors in the checkpoint.
PUBLISHED = {
    "vits": (24_785_089, 22_056_576, 239),
    "vitb": (97_470_785, None, 239),
    "vitl": (335_315_649, 304_368_640, 407),
    "vitg": (1_258_132_225, None, 631),
}
TAPS = {"vits": [2, 5, 8, 11], "vitb": [2, 5, 8, 11], "vitl": [4, 11, 17, 23], "vitg": [9, 19, 29, 39]}


def tiny(**changes: object) -> DPTConfig:
    settings = {
        "encoder": "vit_tiny_patch16_224",
        "encoder_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
        "conv_stem": True,
        "tap_layers": [0, 1, 2, 3],
        "features": 16,
        "out_channels": [8, 8, 16, 16],
    }
    return DPTConfig(**{**settings, **changes})


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_size(compose, name):
    config = compose("data=tiny_teacher", f"model={name}").model
    with torch.device("meta"):
        model = build_model(config)
    total, encoder, tensors = PUBLISHED[name]
    assert num_parameters(model) == total
    assert len(model.state_dict()) == tensors
    assert model.encoder.multiple == 14
    assert model.encoder.vit.pos_embed.shape[1] == 1 + 37 * 37
    if encoder is not None:
        assert num_parameters(model.encoder) == encoder
        assert num_parameters(model.decoder) == total - encoder


@pytest.mark.parametrize("name", TAPS)
def test_tapped_blocks_are_those_of_v2(compose, name):
    assert compose("data=tiny_teacher", f"model={name}").model.tap_layers == TAPS[name]


def test_tapped_blocks_of_v1_build(compose):
    config = compose("data=tiny_teacher", "model=vits", "model.tap_layers=[8,9,10,11]").model
    with torch.device("meta"):
        model = build_model(config)
    assert model.encoder.tap_layers == [8, 9, 10, 11]
    assert num_parameters(model) == PUBLISHED["vits"][0]


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (40, 24), (16, 72), (56, 8)])
def test_output_has_the_size_of_the_image_and_is_not_negative(size):
    torch.manual_seed(0)
    model = build_model(tiny())
    output = model(torch.randn(2, 3, *size))
    assert output.values.shape == (2, *size)
    assert output.features.shape == (2, 32, size[0] // 8, size[1] // 8)
    assert output.values.min() >= 0


def test_output_is_clipped_at_zero():
    model = build_model(tiny())
    nn.init.constant_(model.decoder.head_out[2].bias, -100.0)
    assert torch.equal(model(torch.randn(1, 3, 32, 32)).values, torch.zeros(1, 32, 32))


@pytest.mark.parametrize("seed", range(5))
def test_a_fresh_model_starts_positive(seed):
    """A ReLU that starts negative everywhere has no gradient."""
    torch.manual_seed(seed)
    assert (build_model(tiny())(torch.randn(2, 3, 32, 32)).values > 0).float().mean() > 0.9


@pytest.mark.parametrize("conv_stem", [True, False])
def test_gradients_reach_every_trainable_parameter(conv_stem):
    """DDP without a search for unused parameters hangs otherwise."""
    torch.manual_seed(0)
    model = build_model(tiny(conv_stem=conv_stem))
    model(torch.randn(2, 3, 40, 24)).values.square().sum().backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert reached == trainable
    frozen = {name for name, _ in model.named_parameters()} - trainable
    merge = {f"decoder.fusions.3.merge.{conv}.{part}" for conv in ("conv1", "conv2") for part in ("weight", "bias")}
    assert frozen == merge | {"encoder.mask_token"}


def test_unused_merge_unit_changes_nothing():
    torch.manual_seed(0)
    model = build_model(tiny()).eval()
    image = torch.randn(1, 3, 32, 32)
    before = model(image).values
    with torch.no_grad():
        for parameter in model.decoder.fusions[3].merge.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(model(image).values, before)


def test_every_tap_reaches_the_output():
    torch.manual_seed(0)
    decoder = DPTDecoder(widths=[32] * 4, strides=[8] * 4, features=16, out_channels=[8, 8, 16, 16])
    taps = [torch.randn(1, 32, 4, 5, requires_grad=True) for _ in range(4)]
    decoder(taps).sum().backward()
    assert all(tap.grad is not None and tap.grad.any() for tap in taps)


def test_resolutions_inside_the_decoder():
    """x4, x2, x1, x1/2 of the patch grid, each fusion doubling up to x8, then the image (Ranftl et al. 2021)."""
    decoder = DPTDecoder(widths=[32] * 4, strides=[8] * 4, features=16, out_channels=[8, 8, 16, 16])
    sizes = {}
    for index in range(4):
        decoder.resizes[index].register_forward_hook(
            lambda _, __, output, index=index: sizes.update({f"resize{index}": tuple(output.shape[-2:])})
        )
        decoder.fusions[index].register_forward_hook(
            lambda _, __, output, index=index: sizes.update({f"fusion{index}": tuple(output.shape[-2:])})
        )
    assert decoder([torch.randn(1, 32, 5, 3) for _ in range(4)]).shape == (1, 40, 24)
    resized = {"resize0": (20, 12), "resize1": (10, 6), "resize2": (5, 3), "resize3": (3, 2)}
    assert sizes == resized | {"fusion3": (5, 3), "fusion2": (10, 6), "fusion1": (20, 12), "fusion0": (40, 24)}


def test_encoder_alone_is_the_encoder_of_the_model():
    torch.manual_seed(0)
    encoder = build_encoder(tiny())
    model = build_model(tiny())
    assert isinstance(model, DepthModel)
    assert encoder.state_dict().keys() == model.encoder.state_dict().keys()


def test_images_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    model = build_model(tiny()).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together = model(images).values
        alone = torch.cat([model(image[None]).values for image in images])
    torch.testing.assert_close(together, alone)


# --- metric head, pyramids -------------------------------------------------------------------------------------------


def test_metric_output_is_a_sigmoid_times_the_range():
    torch.manual_seed(0)
    model = build_model(tiny(max_depth=20.0)).eval()
    image = torch.randn(1, 3, 32, 32)
    logits = {}
    model.decoder.head_out[2].register_forward_hook(lambda _, __, output: logits.update(values=output))
    with torch.no_grad():
        values = model(image).values
    torch.testing.assert_close(values, 20 / (1 + torch.exp(-logits["values"][:, 0])))
    assert 0 < values.min() < values.max() < 20


def test_metric_and_relative_models_have_the_same_weights():
    assert build_model(tiny(max_depth=20.0)).state_dict().keys() == build_model(tiny()).state_dict().keys()


def test_a_pyramid_is_not_resized():
    decoder = DPTDecoder(widths=[8, 12, 16, 20], strides=[4, 8, 16, 32], features=16, out_channels=[8, 8, 16, 16])
    assert all(isinstance(resize, nn.Identity) for resize in decoder.resizes)
    maps = [torch.randn(1, width, 64 // s, 96 // s) for width, s in zip([8, 12, 16, 20], [4, 8, 16, 32], strict=True)]
    assert decoder(maps).shape == (1, 64, 96)


def test_strides_that_cannot_be_fused():
    with pytest.raises(ValueError, match=r"cannot fuse maps of strides \[4, 8, 64, 128\]"):
        DPTDecoder(widths=[8] * 4, strides=[4, 8, 64, 128], features=16, out_channels=[8] * 4)
