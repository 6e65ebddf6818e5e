import numpy as np
import pytest
import torch
from torch.nn import functional as F

from depthkit.models.linear import LinearDecoder


def decoder(**settings):
    torch.manual_seed(0)
    return LinearDecoder(widths=[3, 5], strides=[4, 8], **settings)


def taps():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 6, 4, generator=generator), torch.randn(2, 5, 3, 2, generator=generator)]


@pytest.mark.parametrize("max_depth", [None, 10.0])
def test_it_is_one_linear_layer_on_taps_side_by_side(max_depth):
    """In the other order: enlarge, put side by side, then one matrix; in float64."""
    model = decoder(max_depth=max_depth)
    big = torch.cat([F.interpolate(tap.double(), (24, 16), mode="bilinear") for tap in taps()], 1)
    matrix = torch.cat([project.weight.double() for project in model.projects], 1)[0, :, 0, 0].detach()
    linear = np.einsum("c,bchw->bhw", matrix.numpy(), big.numpy()) + model.projects[0].bias.item()
    expected = np.log1p(np.exp(linear)) if max_depth is None else max_depth / (1 + np.exp(-linear))
    found = model(taps())
    assert found.shape == (2, 24, 16)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)


def test_it_has_one_weight_for_each_channel_and_a_bias():
    assert sum(parameter.numel() for parameter in decoder().parameters()) == 3 + 5 + 1
