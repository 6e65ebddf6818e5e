"""What devices can do, from their makers' data sheets: the yardstick of MFU and of `depthkit plan`."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates in TFLOP/s of dense matrix products with sums in float32, by what is multiplied; memory in 10^9 bytes.

    `fp32` is the rate of TF32 where there is such a unit. None: the device has no unit for it.
    """

    bf16: float | None
    fp16: float
    fp32: float
    memory_gb: float


# Data sheets that state rates "with sparsity" are halved here.
DEVICES = {
    "T4": Device(None, 65, 8.1, 16),  # NVIDIA T4 data sheet
    "V100 SXM2 16GB": Device(None, 125, 15.7, 16),  # NVIDIA V100 data sheet
    "V100 SXM2 32GB": Device(None, 125, 15.7, 32),
    "V100 SXM3 32GB": Device(None, 125, 15.7, 32),
    "V100 PCIE 16GB": Device(None, 112, 14, 16),
    "V100 PCIE 32GB": Device(None, 112, 14, 32),
    "A10": Device(125, 125, 62.5, 24),  # NVIDIA A10 data sheet
    "A40": Device(149.7, 149.7, 74.8, 48),  # NVIDIA A40 data sheet
    "A100 40GB": Device(312, 312, 156, 40),  # NVIDIA A100 data sheet
    "A100 80GB": Device(312, 312, 156, 80),
    "A800 80GB": Device(312, 312, 156, 80),
    "RTX A6000": Device(154.8, 154.8, 77.4, 48),  # NVIDIA Ampere GA102 whitepaper, appendix
    "RTX 3090": Device(71, 71, 35.6, 24),
    "RTX 4090": Device(165.2, 165.2, 82.6, 24),  # NVIDIA Ada GPU architecture whitepaper, appendix A
    "RTX 6000 Ada": Device(364.2, 364.2, 182.1, 48),  # NVIDIA RTX 6000 Ada data sheet
    "RTX 5090": Device(209.5, 209.5, 104.8, 32),  # NVIDIA RTX Blackwell GPU architecture whitepaper
    "L4": Device(121, 121, 60, 24),  # NVIDIA L4 data sheet
    "L40": Device(181, 181, 90.5, 48),  # NVIDIA L40 data sheet
    "L40S": Device(362, 362, 183, 48),  # NVIDIA L40S data sheet
    "H20": Device(148, 148, 74, 96),  # NVIDIA H20 data sheet
    "H100": Device(989.4, 989.4, 494.7, 80),  # NVIDIA H100 data sheet, SXM; PCIe: H100 whitepaper, table 2
    "H100 PCIe": Device(756, 756, 378, 80),
    "H100 NVL": Device(835.5, 835.5, 417.5, 94),
    "H800": Device(989.4, 989.4, 494.7, 80),
    "H200": Device(989.4, 989.4, 494.7, 141),  # NVIDIA H200 data sheet
    "H200 NVL": Device(835.5, 835.5, 417.5, 141),
    "GH200 480GB": Device(989.4, 989.4, 494.7, 96),  # NVIDIA GH200 data sheet; the name counts the memory of its CPU
    "B200": Device(2250, 2250, 1100, 180),  # NVIDIA Blackwell (HGX B200) data sheet, an eighth of the board
    "MI300X": Device(1307.4, 1307.4, 653.7, 192),  # AMD Instinct MI300X data sheet
}
"""Words that the name of a device contains -> what it can do. The entry with the most words holds."""

SLOWER_KINDS = {"laptop", "mig", "ti", "d", "max"}
"""Words in the names of other devices than the one in the table: parts of one, or with fewer or more units."""


def find_device(name: str) -> Device | None:
    """The device that a name means, such as torch.cuda.get_device_name() gives; None for one that is not listed."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & SLOWER_KINDS:
        return None
    listed = [key for key in DEVICES if set(key.lower().split()) <= words]
    return DEVICES[max(listed, key=lambda key: len(key.split()))] if listed else None


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak rate in TFLOP/s of dense matrix products, by Lightning's name of the precision (bf16-mixed, 32-true, ...).

    None where the device is not listed, or has no unit for the precision.
    """
    device = find_device(device_name)
    kind = {"bf16": "bf16", "16": "fp16", "32": "fp32"}.get(precision.split("-")[0])
    return None if device is None or kind is None else getattr(device, kind)
