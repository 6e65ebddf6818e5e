"""The networks of Eigen et al. 2014: the sizes of their table, layer by layer, and where their outputs lie."""

import numpy as np
import pytest
import torch
from torch import nn

from depthkit.config import ConfigError, Eigen2014Config
from depthkit.models.eigen import CoarseNetwork, Eigen2014, FineNetwork, nearest_outputs, output_size

NYU = Eigen2014Config(input_size=[228, 304], predicted_rows=228, max_depth=10.0)
KITTI = Eigen2014Config(input_size=[172, 576], predicted_rows=116, max_depth=80.0)
SMALL = {"coarse_widths": [4, 6, 8, 8, 6], "hidden": 16, "fine_width": 5, "max_depth": 10.0}

# Figure 1 of the paper, as channels x rows x columns; it writes columns x rows.
TABLE = {
    "nyu": {
        "coarse1": (96, 27, 37),
        "coarse2": (256, 13, 18),
        "coarse3": (384, 13, 18),
        "coarse4": (384, 13, 18),
        "coarse5": (256, 6, 8),
        "coarse6": (4096,),
        "coarse7": (55, 74),
        "fine1": (63, 55, 74),
        "fine3": (64, 55, 74),
        "fine4": (1, 55, 74),
    },
    "kitti": {
        "coarse1": (96, 20, 71),
        "coarse2": (256, 9, 35),
        "coarse3": (384, 9, 35),
        "coarse4": (384, 9, 35),
        "coarse5": (256, 4, 17),
        "coarse6": (4096,),
        "coarse7": (27, 142),
        "fine1": (63, 27, 142),
        "fine3": (64, 27, 142),
        "fine4": (1, 27, 142),
    },
}


@pytest.mark.parametrize(("config", "name"), [(NYU, "nyu"), (KITTI, "kitti")], ids=["nyu", "kitti"])
def test_every_layer_has_the_size_of_the_table(config: Eigen2014Config, name: str):
    with torch.device("meta"):
        coarse, fine = CoarseNetwork(config), FineNetwork(config)
    seen: dict[str, tuple[int, ...]] = {}
    for layer, module in [*coarse.layers.named_children(), *fine.named_children()]:
        module.register_forward_hook(lambda _m, _i, out, layer=layer: seen.update({layer: tuple(out.shape[1:])}))
    image = torch.empty(2, 3, 375, 1242, device="meta")
    assert fine(coarse(image)[0]).shape == (2, *TABLE[name]["coarse7"])
    assert seen == TABLE[name]


def test_the_layers_are_those_of_the_table():
    """Kernels, strides, pooling, activations and dropout; the last layers of both networks are linear."""
    with torch.device("meta"):
        coarse, fine = CoarseNetwork(NYU), FineNetwork(NYU)

    def kinds(layer: nn.Module) -> list[str]:
        return [type(module).__name__ for module in layer.modules() if not [*module.children()]]

    convolutions = {
        name: (module.kernel_size[0], module.stride[0])
        for network in (coarse.layers, fine)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert convolutions == {
        "coarse1.0": (11, 4),
        "coarse2.1": (5, 1),
        "coarse3.0": (3, 1),
        "coarse4.0": (3, 1),
        "coarse5.0": (3, 2),
        "fine1.0": (9, 2),
        "fine3.0": (5, 1),
        "fine4": (5, 1),
    }
    pooled = [name for name, layer in coarse.layers.named_children() if "MaxPool2d" in kinds(layer)]
    assert pooled == ["coarse1", "coarse2"]
    assert kinds(fine.fine1) == ["Conv2d", "ReLU", "MaxPool2d"]
    assert kinds(coarse.layers.coarse6) == ["Flatten", "Linear", "ReLU", "Dropout"]
    assert kinds(coarse.layers.coarse7) == ["Linear", "Unflatten"]
    assert kinds(fine.fine4) == ["Conv2d"]


@pytest.mark.parametrize("size", [(228, 304), (116, 576), (63, 64), (75, 98), (71, 101)])
def test_output_size_is_that_of_fine1(size: tuple[int, int]):
    with torch.device("meta"):
        layer = FineNetwork(Eigen2014Config(input_size=list(size), predicted_rows=size[0], **SMALL)).fine1
        assert layer(torch.empty(1, 3, *size)).shape[2:] == output_size(size)


def model(*, fine: bool = True, rows: int = 64) -> Eigen2014:
    torch.manual_seed(0)
    return Eigen2014(Eigen2014Config(input_size=[64, 96], predicted_rows=rows, fine=fine, **SMALL)).eval()


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (37, 151), (200, 40)])
def test_any_image_gives_positive_depth_of_its_size(fine: bool, size: tuple[int, int]):
    output = model(fine=fine)(torch.randn(2, 3, *size))
    assert output.values.shape == (2, *size)
    assert output.values.min() > 0
    assert output.features.shape[:2] == (2, 6)


@pytest.mark.parametrize("predicted_rows", [64, 40])
def test_depth_is_the_exponential_of_the_map(predicted_rows: int):
    """At the size of the input an output fills 4 x 4 pixels of the lowest rows, from 3.5 pixels on; what lies around
    repeats the nearest ones."""
    network = model(rows=predicted_rows)
    image = torch.randn(1, 3, 64, 96)
    taps, _ = network.encoder(image)
    depth = network.decoder(taps).exp()[0].detach().numpy()
    assert depth.shape == ({64: 14, 40: 8}[predicted_rows], 22)
    rows = np.clip((np.arange(64) + 0.5 - (64 - predicted_rows) - 3.5) // 4, 0, len(depth) - 1).astype(int)
    cols = np.clip((np.arange(96) + 0.5 - 3.5) // 4, 0, 21).astype(int)
    np.testing.assert_allclose(network(image).values[0].detach(), depth[rows][:, cols], rtol=1e-6)


def test_outputs_stand_for_the_pixels_that_fine1_sees_in_its_middle():
    """The gradient of one output of fine1 covers 11 pixels, around the 4 that take it."""
    config = Eigen2014Config(input_size=[64, 96], predicted_rows=40, **SMALL)
    network = FineNetwork(config)
    image = torch.randn(1, 3, 64, 96, requires_grad=True)
    network.fine1[0](image[:, :, -40:])[0, :, 6:8].sum().backward()  # what output row 3 is pooled from
    (rows,) = image.grad.abs().sum((0, 1, 3)).nonzero(as_tuple=True)
    (taken,) = (nearest_outputs(torch.arange(64), 64, 64 - 40, 8) == 3).nonzero(as_tuple=True)
    assert rows.tolist() == [*range(24 + 12, 24 + 23)]
    assert taken.tolist() == [24 + 15, 24 + 16, 24 + 17, 24 + 18]
    assert rows.float().mean() == pytest.approx(float(taken.float().mean()), abs=0.51)


def test_the_fine_network_sees_the_lowest_rows_alone_and_the_coarse_one_all():
    network = model(rows=40)
    image = torch.randn(1, 3, 64, 96, requires_grad=True)
    taps, _ = network.encoder(image)
    fixed = [taps[0], taps[1].detach()]
    (by_fine,) = torch.autograd.grad(network.decoder(fixed).sum(), image, retain_graph=True)
    (by_coarse,) = torch.autograd.grad(taps[1].sum(), image)
    assert not by_fine[:, :, :24].any()
    assert by_fine[:, :, 24:].any(dim=3).all(dim=(0, 1))[:36].all()
    assert by_coarse[:, :, :24].any()


def test_coarse_alone_is_the_coarse_map():
    both, alone = model(), model(fine=False)
    alone.load_state_dict({k: v for k, v in both.state_dict().items() if k.startswith("encoder.")})
    image = torch.randn(1, 3, 64, 96)
    (_, coarse), _ = both.encoder(image)
    assert torch.equal(alone.decoder(alone.encoder(image)[0]), coarse)
    assert not [*alone.decoder.parameters()]


def test_half_precision_does_not_overflow():
    network = model().to(torch.bfloat16)
    with torch.no_grad():
        network.decoder.fine4.bias.fill_(60.0)
    values = network(torch.randn(1, 3, 64, 96, dtype=torch.bfloat16)).values
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"input_size": [60, 80]}, "input_size"),
        ({"input_size": [64]}, "input_size"),
        ({"predicted_rows": 65}, "predicted_rows"),
        ({"predicted_rows": 9}, "predicted_rows"),
        ({"coarse_widths": [1, 2]}, "coarse_widths"),
        ({"dropout": 1.0}, "dropout"),
        ({"fine_width": 1}, "fine_width"),
    ],
)
def test_bad_settings_are_named(settings: dict, name: str):
    with pytest.raises(ConfigError, match=f"model.{name}"):
        Eigen2014Config(**{"input_size": [64, 96], "predicted_rows": 64, **settings})
