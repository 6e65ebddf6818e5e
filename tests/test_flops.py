"""FLOPs and parameters, counted by shapes alone, against published figures and a count by hand."""

import pytest
import torch
from torch import nn

from depthkit.flops import forward_flops, num_parameters
from depthkit.hardware import DEVICES, find_device, peak_tflops
from depthkit.models import build_model


@pytest.fixture(scope="session")
def model_config(compose):
    return lambda name: compose("stage=teacher", f"model={name}", "data=v1_labeled").model


# GMACs of the encoder at 518 x 518 as timm's results list them; weights of the official .pth files.
@pytest.mark.parametrize(
    ("name", "gmacs", "encoder", "total"),
    [
        ("vits", 46.76, 22_056_576, 24_785_089),
        ("vitb", 151.71, 86_580_480, 97_470_785),
        ("vitl", 507.15, 304_368_640, 335_315_649),
        ("vitg", 1784.2, 1_136_480_768, 1_258_132_225),
    ],
)
def test_published_figures(name, gmacs, encoder, total, model_config):
    config = model_config(name)
    with torch.device("meta"):
        model = build_model(config)
    assert forward_flops(model.encoder, (518, 518)) / 2e9 == pytest.approx(gmacs, rel=2e-3)
    assert num_parameters(model.encoder) == encoder
    assert num_parameters(config) == total
    assert forward_flops(config, (518, 518)) > forward_flops(model.encoder, (518, 518))


def test_attention_and_convolutions_by_hand():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, stride=4)
            self.register_buffer("scale", torch.ones(1))

        def forward(self, image):
            tokens = self.conv(image).flatten(2).transpose(1, 2) * self.scale
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    tokens = (8 // 4) * (16 // 4)
    convolution = tokens * 8 * (3 * 4 * 4)
    attention = 2 * tokens * tokens * 8
    net = Net()
    assert forward_flops(net, (8, 16)) == 2 * (convolution + attention)
    assert net.conv.weight.device.type == "cpu"


def test_trainable_weights(model_config):
    config = model_config("tiny")
    model = build_model(config)
    frozen = sum(each.numel() for each in model.parameters() if not each.requires_grad)
    assert frozen > 0
    assert num_parameters(config, trainable=True) == num_parameters(config) - frozen


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756),
        ("NVIDIA H200", "32-true", 494.7),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312),
        ("NVIDIA A10", "bf16-mixed", 125),
        ("NVIDIA L40S", "bf16-mixed", 362),
        ("Tesla V100-SXM2-32GB", "16-mixed", 125),
        ("Tesla V100-SXM2-32GB", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 3090", "bf16-mixed", 71),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16-mixed", None),
        ("AMD EPYC", "32-true", None),
        ("NVIDIA H100 80GB HBM3", "64-true", None),
    ],
)
def test_peak_by_the_name_that_torch_gives(name, precision, tflops):
    assert peak_tflops(name, precision) == tflops


def test_every_entry_is_found_by_its_own_name():
    for name, device in DEVICES.items():
        assert find_device(name) is device
        assert device.memory_gb > 0
        assert device.fp16 >= device.fp32
