"""How much of a network that starts from other weights is trained."""

from dataclasses import dataclass
from enum import Enum

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
    blocks: int = 4  # of last_blocks: transformer blocks, counted from the end, that are trained
    lora_rank: int = 8  # of lora

    def __post_init__(self) -> None:
        check(self.blocks > 0, "transfer.blocks", self.blocks, "> 0")
        check(self.lora_rank > 0, "transfer.lora_rank", self.lora_rank, "> 0")
