"""How much of a network that starts from other weights is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from depthkit.errors import check


class TransferMode(Enum):
    full = "full"
    frozen = "frozen"
    last_blocks = "last_blocks"
    lora = "lora"


@dataclass(kw_only=True)
class TransferConfig:
    """Of the encoder; the decoder is always trained."""

    mode: TransferMode = TransferMode.full
    blocks: int = 4  # of last_blocks: blocks, counted from the end, that are trained, and the norm behind them
    lora_rank: int = 8  # of lora: width of the factors beside every linear layer of the blocks

    def __post_init__(self) -> None:
        check(self.blocks > 0, "transfer.blocks", self.blocks, "> 0")
        check(self.lora_rank > 0, "transfer.lora_rank", self.lora_rank, "> 0")


def read_transfer(settings: Mapping[str, Any]) -> TransferConfig:
    """From plain values, which older runs have none of."""
    mode = TransferMode[settings["mode"]] if "mode" in settings else TransferMode.full
    return TransferConfig(**{**settings, "mode": mode})
