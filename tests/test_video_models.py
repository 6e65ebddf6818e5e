"""DispNet and the ego-motion network against the published layers, and what they promise."""

import pytest
import torch

from depthkit.config import ConfigError, DispNetConfig, EgomotionConfig
from depthkit.models import build_model, num_parameters
from depthkit.models.dispnet import DispNet
from depthkit.models.egomotion import EgomotionNet, FrameMatching

# (width, kernel, stride) of every convolution on the way down, vid2depth nets.py.
DOWN = [
    (32, 7, 2), (32, 7, 1), (64, 5, 2), (64, 5, 1), (128, 3, 2), (128, 3, 1), (256, 3, 2), (256, 3, 1),
    (512, 3, 2), (512, 3, 1), (512, 3, 2), (512, 3, 1), (512, 3, 2), (512, 3, 1),
]  # fmt: skip
# (input, width) of icnv7 to icnv1: up-convolution, skip, and the coarser disparity from icnv3 on.
MERGED = [(512 + 512, 512), (512 + 512, 512), (256 + 256, 256), (128 + 128, 128), (64 + 64 + 1, 64), (32 + 32 + 1, 32),
          (16 + 1, 16)]  # fmt: skip


@pytest.fixture(scope="module")
def published() -> DispNet:
    with torch.device("meta"):
        model = build_model(DispNetConfig())
    assert isinstance(model, DispNet)
    return model


@pytest.fixture
def small() -> DispNet:
    torch.manual_seed(0)
    model = build_model(DispNetConfig(width_factor=0.1))
    assert isinstance(model, DispNet)
    return model


def test_dispnet_has_the_published_layers(published):
    down = [m for m in published.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in down] == DOWN
    merged = [merge[0] for merge in reversed(published.decoder.merges)]
    assert [(m.in_channels, m.out_channels) for m in merged] == MERGED
    assert [head.in_channels for head in published.decoder.heads] == [16, 32, 64, 128]


def test_dispnet_at_the_published_size(published):
    sizes = [tuple(d.shape) for d in published(torch.empty(2, 3, 128, 416, device="meta")).disparities]
    assert sizes == [(2, 128, 416), (2, 64, 208), (2, 32, 104), (2, 16, 52)]


@pytest.mark.parametrize("size", [(64, 96), (40, 56), (128, 136)])
def test_dispnet_takes_sizes_that_do_not_halve_evenly(small, size):
    disparities = small(torch.rand(2, 3, *size)).disparities
    assert [tuple(d.shape[1:]) for d in disparities] == [(size[0] >> s, size[1] >> s) for s in range(4)]


def test_dispnet_gives_the_inverse_of_its_finest_disparity(small):
    small.eval()
    image = torch.rand(2, 3, 64, 96) * 4 - 2
    output = small(image)
    torch.testing.assert_close(output.values, 1 / output.disparities[0])
    assert output.values.min() >= 0.0999
    assert output.values.max() <= 100
    assert output.features.shape[2:] == (1, 1)


def test_dispnet_is_depth_without_a_unit():
    config = DispNetConfig()
    assert (config.kind, config.unit) == ("depth", "relative")
    with pytest.raises(ConfigError, match="max_depth"):
        DispNetConfig(max_depth=80.0)


def test_all_of_dispnet_learns(small):
    sum(d.sum() for d in small(torch.rand(2, 3, 64, 96)).disparities).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_egomotion_has_the_published_layers():
    network = EgomotionNet(EgomotionConfig(), 3)
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in layers] == [16, 32, 64, 128, 256, 256, 256, 12]
    assert [m.kernel_size[0] for m in layers] == [7, 5, 3, 3, 3, 3, 3, 1]
    assert [m.stride[0] for m in layers] == [2, 2, 2, 2, 2, 2, 2, 1]
    assert layers[0].in_channels == 9
    convolutions = 9 * 16 * 49 + 16 * 32 * 25 + (32 * 64 + 64 * 128 + 128 * 256 + 2 * 256 * 256) * 9
    norms = 2 * (16 + 32 + 64 + 128 + 3 * 256)
    assert num_parameters(network) == convolutions + norms + 256 * 12 + 12


@pytest.mark.parametrize("search_px", [None, 3])
def test_egomotion_starts_small_and_fits_the_clip(search_px):
    torch.manual_seed(0)
    network = EgomotionNet(EgomotionConfig(widths=[8, 16, 16], search_px=search_px), 4)
    motions = network(torch.rand(2, 4, 3, 64, 96))
    assert motions.shape == (2, 3, 6)
    assert motions.abs().max() < 0.05
    with pytest.raises(ValueError, match="3 frames"):
        network(torch.rand(2, 3, 3, 64, 96))


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (2, 0), (-3, 1), (1, -2)])
def test_matching_finds_a_shift(dx, dy):
    torch.manual_seed(0)
    # Smooth over 2 x 2 pixels, so that halving loses nothing; shifted by whole pixels of the half size.
    frame = torch.rand(1, 3, 32, 48).repeat_interleave(2, 2).repeat_interleave(2, 3)
    later = torch.roll(frame, (2 * dy, 2 * dx), (2, 3))
    found = FrameMatching(4)(4 * torch.stack([frame, later], 1))
    assert found.shape == (1, 6, 32, 48)
    inner = found[0, 2:4, 8:-8, 8:-8]
    torch.testing.assert_close(inner, torch.tensor([dx, dy]).float()[:, None, None].expand_as(inner), atol=0.2, rtol=0)
    torch.testing.assert_close(found[0, 0, 0, [0, -1]], torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(found[0, 1, [0, -1], 0], torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"widths": []}, "widths"), ({"search_px": 0}, "search_px")],
)
def test_egomotion_settings_are_checked(settings, field):
    with pytest.raises(ConfigError, match=f"egomotion.{field}"):
        EgomotionConfig(**settings)
