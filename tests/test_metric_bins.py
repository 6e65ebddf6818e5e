"""Metric bins: against transformers' ZoeDepth heads with the same weights, and against small cases done by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ZoeDepthConfig
from transformers.models.zoedepth import modeling_zoedepth as published

from depthkit.models.dpt import DPTMaps
from depthkit.models.metric_bins import (
    MetricBins,
    attraction,
    expected_depth,
    log_binomial_coefficient,
    position_encoding,
)

FEATURES = 24
RANGES = {"nyu": 10.0, "kitti": 80.0}


def make_maps(batch: int = 2) -> DPTMaps:
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int, height: int, width: int) -> torch.Tensor:
        return torch.randn(batch, channels, height, width, generator=generator)

    sizes = [(4, 6), (8, 12), (16, 24), (32, 48)]
    return DPTMaps(
        values=draw(1, 28, 42)[:, 0].relu(),
        activation=draw(32, 28, 42).relu(),
        bottleneck=draw(FEATURES, 2, 3),
        fused=[draw(FEATURES, *size) for size in sizes],
    )


def make_bins(heads: dict[str, float], num_attractors: list[int], *, is_bounded: bool = False) -> MetricBins:
    return MetricBins(
        features=FEATURES,
        head_width=32,
        heads=heads,
        num_bins=64,
        embedding=128,
        num_attractors=num_attractors,
        attractor_alpha=300,  # what the published attractors run with, whatever the configuration says
        attractor_gamma=2,
        min_depth=1e-3,
        is_bounded=is_bounded,
    ).eval()


def make_published(heads: dict[str, float], centers: str) -> nn.Module:
    config = ZoeDepthConfig(
        bin_configurations=[
            {"name": name, "n_bins": 64, "min_depth": 1e-3, "max_depth": largest} for name, largest in heads.items()
        ],
        bin_centers_type=centers,
        bottleneck_features=FEATURES,
        fusion_hidden_size=FEATURES,
        num_patch_transformer_layers=4,
        patch_transformer_hidden_size=128,
        patch_transformer_intermediate_size=1024,
        patch_transformer_num_attention_heads=4,
    )
    torch.manual_seed(1)
    one, many = published.ZoeDepthMetricDepthEstimationHead, published.ZoeDepthMultipleMetricDepthEstimationHeads
    head = (many if len(heads) > 1 else one)(config)
    for parameter in head.parameters():  # weights as large as trained ones: fresh ones leave every bin where it is
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return head.eval()


def copy_weights(source: nn.Module, bins: MetricBins, *, is_bounded: bool) -> None:
    """Weights of transformers' head, by layer."""

    def pair(layers: nn.Sequential, of: nn.Module) -> None:
        layers[0].load_state_dict(of.conv1.state_dict())
        layers[2].load_state_dict(of.conv2.state_dict())

    bins.bottleneck.load_state_dict(source.conv2.state_dict())
    pair(bins.seed_embedding, source.seed_projector)
    for layers, of in zip(bins.embeddings, source.projectors, strict=True):
        pair(layers, of)
    for name, head in bins.heads.items():
        several = len(bins.heads) > 1
        seeds = source.seed_bin_regressors[name] if several else source.seed_bin_regressor
        attractors = source.attractors[name] if several else source.attractors
        binomial = source.conditional_log_binomial[name] if several else source.conditional_log_binomial
        pair(head.seeds, seeds)
        head.distribution.load_state_dict(binomial.mlp.state_dict())
        for layers, of in zip(head.attractors, attractors, strict=True):
            layers[0].load_state_dict(of.conv1.state_dict())
            # Of each pair of channels the bounded layer of the published code reads the first alone.
            step = 2 if is_bounded else 1
            layers[2].load_state_dict({key: tensor[::step] for key, tensor in of.conv2.state_dict().items()})
    if bins.router is not None:
        copy_router(source, bins.router)


def copy_router(source: nn.Module, router: nn.Module) -> None:
    router.embedding.load_state_dict(source.patch_transformer.embedding_convPxP.state_dict())
    for layer, of in zip(router.transformer.layers, source.patch_transformer.transformer_encoder, strict=True):
        state = of.state_dict()
        attention = "self_attn."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{attention}{name}.{kind}") for name in ("query", "key", "value")]
            state[f"{attention}in_proj_{kind}"] = torch.cat(parts)
        layer.load_state_dict(state)
    router.classifier[0].load_state_dict(source.mlp_classifier.linear1.state_dict())
    router.classifier[2].load_state_dict(source.mlp_classifier.linear2.state_dict())


def call_published(head: nn.Module, maps: DPTMaps) -> tuple[torch.Tensor, torch.Tensor | None]:
    depth, logits = head(
        outconv_activation=maps.activation,
        bottleneck=maps.bottleneck,
        feature_blocks=maps.fused,
        relative_depth=maps.values,
    )
    return depth.squeeze(1), logits


@pytest.mark.parametrize("centers", ["normed", "softplus"])
@pytest.mark.parametrize("largest", [10.0, 80.0])
@torch.no_grad()
def test_one_head_as_in_transformers(centers: str, largest: float) -> None:
    source = make_published({"nyu": largest}, centers)
    bins = make_bins({"nyu": largest}, [16, 8, 4, 1], is_bounded=centers == "normed")
    copy_weights(source, bins, is_bounded=centers == "normed")
    maps = make_maps()
    expected, _ = call_published(source, maps)
    depth, logits = bins(maps)
    assert expected.std() > 0.01 * expected.mean()  # the weights tell pixels apart
    assert logits is None
    assert ((depth - expected).abs() / expected).max() < 1e-4


@pytest.mark.parametrize("centers", ["normed", "softplus"])
@torch.no_grad()
def test_two_heads_and_router_as_in_transformers(centers: str) -> None:
    """The published code gives every level of its two heads 16 attractors, and routes a batch as a whole."""
    source = make_published(RANGES, centers)
    bins = make_bins(RANGES, [16, 16, 16, 16], is_bounded=centers == "normed")
    copy_weights(source, bins, is_bounded=centers == "normed")
    maps = make_maps()
    _, logits = bins(maps)
    source.mlp_classifier.linear2.bias -= logits.mean(0)  # so that the two images fall to different heads
    copy_router(source, bins.router)
    depth, logits = bins(maps)
    assert set(logits.argmax(1).tolist()) == {0, 1}
    for index in range(2):
        alone = DPTMaps(*(part[index : index + 1] for part in maps[:3]), [part[index : index + 1] for part in maps[3]])
        expected, expected_logits = call_published(source, alone)
        torch.testing.assert_close(logits[index : index + 1], expected_logits, rtol=1e-4, atol=1e-5)
        assert ((depth[index] - expected[0]).abs() / expected[0]).max() < 1e-4


def test_attraction_by_hand() -> None:
    points, centers = torch.tensor([1.0, 4.0]).view(1, 2, 1, 1), torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    moved = attraction(points, centers, alpha=3, gamma=2)
    # 2: towards 1 by -1 / (1 + 3), towards 4 by 2 / (1 + 12); 4: towards 1 by -3 / (1 + 27), and 4 is there
    expected = [(-1 / 4 + 2 / 13) / 2, (-3 / 28 + 0) / 2]
    np.testing.assert_allclose(moved.flatten(), expected, rtol=1e-6)


def test_bins_never_pass_an_attractor() -> None:
    points, centers = torch.rand(1, 1, 8, 8) * 9 + 0.1, torch.rand(1, 64, 8, 8) * 9 + 0.1
    after = centers + attraction(points, centers, alpha=300, gamma=2)
    assert ((after >= torch.minimum(points, centers) - 1e-6) & (after <= torch.maximum(points, centers) + 1e-6)).all()


def test_coefficients_near_the_exact_ones() -> None:
    from math import comb, log

    found = log_binomial_coefficient(63, torch.arange(64.0))
    exact = np.array([log(comb(63, k)) for k in range(64)])
    assert found[0] == found[63] == pytest.approx(0, abs=1e-4)
    assert np.argmax(found.numpy()) in (31, 32)
    assert np.abs(found.numpy() - exact).max() < 3  # Stirling's formula without its root


@pytest.mark.parametrize(("probability", "expected"), [(0.001, 1.0), (0.999, 64.0)])
def test_depth_is_a_bin_where_the_distribution_is_sharp(probability: float, expected: float) -> None:
    centers = torch.arange(1.0, 65.0).view(1, 64, 1, 1)
    shape = torch.ones(1, 1, 3, 4)
    depth = expected_depth(centers, probability * shape, 0 * shape)
    assert depth.shape == (1, 3, 4)
    assert depth == pytest.approx(expected * torch.ones(1, 3, 4), rel=1e-3)


def test_a_high_temperature_spreads_over_all_bins() -> None:
    centers, shape = torch.arange(1.0, 65.0).view(1, 64, 1, 1), torch.ones(1, 1, 1, 1)
    cold, hot = (float(expected_depth(centers, 0.1 * shape, share * shape)) for share in (0.0, 1.0))
    assert cold == pytest.approx(1 + 63 * 0.1, abs=1)
    assert cold < hot < 32.5  # the mean of all bins


def test_bounded_bins_stay_in_their_range() -> None:
    bins = make_bins({"nyu": 5.0}, [16, 8, 4, 1], is_bounded=True)
    for parameter in bins.parameters():
        nn.init.normal_(parameter, std=1.0)
    depth, _ = bins(make_maps())
    assert depth.min() >= 1e-3
    assert depth.max() <= 5.0


@pytest.mark.parametrize("heads", [{"nyu": 10.0}, RANGES], ids=len)
def test_every_weight_learns(heads: dict[str, float]) -> None:
    torch.manual_seed(0)
    bins = make_bins(heads, [16, 8, 4, 1])
    depth, logits = bins(make_maps())
    (depth.log().mean() + (0 if logits is None else logits.square().sum())).backward()
    assert [name for name, parameter in bins.named_parameters() if parameter.grad is None] == []


def test_depth_is_float32_under_autocast() -> None:
    bins = make_bins({"nyu": 10.0}, [16, 8, 4, 1])
    maps = make_maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        depth, _ = bins(maps)
    assert depth.dtype == torch.float32
    torch.testing.assert_close(depth, bins(maps)[0], rtol=0.1, atol=0.1)


def test_position_encoding() -> None:
    found = position_encoding(5, 4, torch.device("cpu"))
    expected = [[np.sin(t), np.sin(t / 100), np.cos(t), np.cos(t / 100)] for t in range(5)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
