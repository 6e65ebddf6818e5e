import numpy as np
import pytest
import torch
from torch.nn import functional as F

from depthkit.bundle import BundleError, BundleFacts, load_model, save_bundle
from depthkit.config import ConfigError
from depthkit.formats.model_card import architecture
from depthkit.formats.official import write_checkpoint
from depthkit.models import build_model
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


def test_a_bundle_with_it_predicts_and_names_it(tmp_path, compose):
    config = compose("transfer=linear_probe", "stage.encoder_weights=timm", "data=tiny_teacher").model
    model = build_model(config).eval()
    assert isinstance(model.decoder, LinearDecoder)
    facts = BundleFacts(content="depth_model", model=config, kind=config.kind, short_side=32)
    again, read = load_model(save_bundle(tmp_path / "bundle", model, facts))
    image = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(again(image).values, model(image).values)
    assert "linear decoder" in architecture(read.model)


def test_it_is_not_taken_for_a_published_network(tmp_path, compose):
    config = compose("model=vits", "model.decoder=linear", "data=tiny_teacher").model
    config.encoder_args = {"img_size": 28, "embed_dim": 32, "num_heads": 2}
    with pytest.raises(BundleError, match="the decoder is not DPT's"):
        write_checkpoint(build_model(config), tmp_path / "model.pth")


def test_another_decoder_is_refused(compose):
    with pytest.raises(ConfigError, match=r"model.decoder='linaer'.*dpt or linear"):
        compose("model.decoder=linaer", "data=tiny_teacher")
