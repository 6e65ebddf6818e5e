"""The encoder against timm, and the position embedding against a bicubic interpolation written out here."""

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from depthkit.models.encoder import ConvStem, PlainEncoder, create_encoder, interpolate_position_embedding

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="module")
def encoder() -> PlainEncoder:
    torch.manual_seed(0)
    model = create_encoder("vit_tiny_patch16_224", tap_layers=[0, 1, 3], **ARGS).eval()
    torch.nn.init.normal_(model.vit.pos_embed)
    return model


# --- position embedding ----------------------------------------------------------------------------------------------


def bicubic_matrix(size: int, native: int, scale: float) -> np.ndarray:
    """(size, native) weights of bicubic interpolation (a = -0.75, no antialiasing), borders replicated."""
    weights = np.zeros((size, native))
    for target in range(size):
        source = (target + 0.5) / scale - 0.5
        base = int(np.floor(source))
        for neighbour in range(base - 1, base + 3):
            t = abs(source - neighbour)
            near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3
            weights[target, min(max(neighbour, 0), native - 1)] += near if t <= 1 else far
    return weights


def bicubic(patches: np.ndarray, grid: tuple[int, int], offset: float) -> np.ndarray:
    """(g, g, D) resampled to (h, w, D) with scale (h + offset) / g, float64."""
    native = patches.shape[0]
    rows, cols = (bicubic_matrix(side, native, (side + offset) / native) for side in grid)
    return np.einsum("hi,wj,ijd->hwd", rows, cols, patches)


@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (10, 4), (1, 6), (5, 6)])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_position_embedding_is_bicubic_with_offset_a_tenth(grid, num_prefix):
    embedding = torch.randn(1, num_prefix + 25, 8, generator=torch.Generator().manual_seed(1))
    found = interpolate_position_embedding(embedding, grid, num_prefix)
    assert torch.equal(found[:, :num_prefix], embedding[:, :num_prefix])
    patches = embedding[0, num_prefix:].double().numpy().reshape(5, 5, 8)
    result = found[0, num_prefix:].double().numpy().reshape(*grid, 8)
    np.testing.assert_allclose(result, bicubic(patches, grid, 0.1), atol=1e-5)
    assert np.abs(result - bicubic(patches, grid, 0.0)).max() > 1e-2


def test_position_embedding_is_untouched_at_the_native_grid():
    embedding = torch.randn(1, 26, 8)
    assert interpolate_position_embedding(embedding, (5, 5), 1) is embedding


def test_position_embedding_at_the_sizes_of_the_released_models():
    """From 37 x 37 patches; rounding must never give one row too few or too many."""
    embedding = torch.randn(1, 1 + 37 * 37, 2)
    for side in range(1, 120):
        assert interpolate_position_embedding(embedding, (side, 37 + side % 3), 1).shape[1] == 1 + side * (
            37 + side % 3
        )


def test_position_embedding_keeps_half_precision():
    embedding = torch.randn(1, 26, 8).bfloat16()
    assert interpolate_position_embedding(embedding, (7, 4), 1).dtype == torch.bfloat16


# --- taps ------------------------------------------------------------------------------------------------------------


def test_taps_equal_timm_at_the_native_size(encoder):
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        taps, features = encoder(image)
        final, expected = encoder.vit.forward_intermediates(image, indices=[0, 1, 3], norm=True)
    assert len(taps) == 3
    for tap, map_ in zip(taps, expected, strict=True):
        torch.testing.assert_close(tap, map_)
    torch.testing.assert_close(features, expected[-1])
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), final[:, 1:])


def test_taps_differ_from_timms_resampling_at_other_sizes(encoder):
    """timm scales the position embedding by h / g and antialiases; the released weights do not expect that."""
    image = torch.randn(1, 3, 48, 24)
    with torch.no_grad():
        _, features = encoder(image)
        plain = encoder.vit.forward_intermediates(image, indices=[3], norm=True, intermediates_only=True)[0]
    assert features.shape == plain.shape == (1, 32, 6, 3)
    assert (features - plain).abs().max() > 1e-2


def test_features_are_of_the_last_block_when_no_tap_is(encoder):
    torch.manual_seed(0)
    shallow = create_encoder("vit_tiny_patch16_224", tap_layers=[0, 1], **ARGS).eval()
    shallow.load_state_dict(encoder.state_dict())
    image = torch.randn(1, 3, 40, 32)
    with torch.no_grad():
        torch.testing.assert_close(shallow(image)[1], encoder(image)[1])
        assert not torch.allclose(shallow(image)[0][-1], encoder(image)[1])


def test_registers_are_dropped_with_the_class_token():
    model = create_encoder("vit_tiny_patch16_224", tap_layers=[3], reg_tokens=4, **ARGS).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        taps, _ = model(image)
        expected = model.vit.forward_intermediates(image, indices=[3], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(taps[0], expected)


def test_embed_then_encode_is_forward(encoder):
    image = torch.randn(1, 3, 16, 40)
    with torch.no_grad():
        _, expected = encoder(image)
        _, found = encoder.encode(encoder.embed(image), encoder.grid(image))
    assert torch.equal(found, expected)


# --- refusals and frozen parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 32), (32, 20), (7, 7)])
def test_sizes_that_are_no_multiple_of_the_patch(encoder, size):
    with pytest.raises(ValueError, match=rf"image size \({size[0]}, {size[1]}\) is not a multiple of 8"):
        encoder(torch.zeros(1, 3, *size))


def test_tap_layers_must_exist():
    with pytest.raises(ValueError, match=r"model\.tap_layers=\[1, 4\]: vit_tiny_patch16_224 has blocks 0 to 3"):
        create_encoder("vit_tiny_patch16_224", tap_layers=[1, 4], **ARGS)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_giant", {}, r"model\.encoder=vit_giant: timm .* has no such model"),
        ("vit_tiny_patch16_224", {"width": 3}, r"model\.encoder_args; .*width"),
        (
            "resnet18",
            {"patch_size": 8},
            r"model\.encoder=resnet18: does not take these model\.encoder_args; .*patch_size",
        ),
    ],
)
def test_other_networks_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_encoder(name, tap_layers=[0], **arguments)


def test_mask_token_is_frozen_and_part_of_the_weights(encoder):
    assert not encoder.mask_token.requires_grad
    assert "mask_token" in encoder.state_dict()


def test_conv_stem():
    torch.manual_seed(0)
    model = create_encoder("vit_tiny_patch16_224", tap_layers=[3], conv_stem=True, **ARGS)
    stem = model.vit.patch_embed
    assert isinstance(stem, ConvStem)
    assert [layer.stride for layer in stem.layers if isinstance(layer, torch.nn.Conv2d)] == [(2, 2)] * 3 + [(1, 1)]
    assert model.embed(torch.zeros(2, 3, 40, 24)).shape == (2, 5, 3, 32)
    taps, features = model(torch.randn(2, 3, 40, 24))
    assert taps[0].shape == features.shape == (2, 32, 5, 3)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in stem.parameters())


def test_conv_stem_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two, got 14"):
        create_encoder(
            "vit_tiny_patch16_224", tap_layers=[3], conv_stem=True, **{**ARGS, "patch_size": 14, "img_size": 28}
        )


def test_bicubic_reference_is_torchs():
    """The reference above against torch where both are defined: plain scaling."""
    patches = torch.randn(5, 5, 3, dtype=torch.float64)
    plain = F.interpolate(patches.permute(2, 0, 1)[None], size=(7, 4), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(bicubic(patches.numpy(), (7, 4), 0.0), plain[0].permute(1, 2, 0).numpy(), atol=1e-12)


def test_timm_resamples_without_the_offset():
    """Why the encoder does not leave it to timm."""
    embedding = torch.randn(1, 26, 8)
    plain = timm.layers.resample_abs_pos_embed(embedding, [7, 4], num_prefix_tokens=1)
    assert (interpolate_position_embedding(embedding, (7, 4), 1) - plain).abs().max() > 1e-2
