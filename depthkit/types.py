"""What crosses a module border.

Shapes: B images, H/W pixels, h/w patches, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

if TYPE_CHECKING:  # see geometry.py
    from torch import Tensor

Kind = Literal["disparity", "depth"]
"""`disparity`: inverse depth up to scale and shift, larger = nearer. `depth`: planar z in metres, larger = farther."""


class BudgetExceeded(RuntimeError):
    """More went wrong than the settings allow; the message says what, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A sample that could not be used: where it lies and why."""

    dataset: str
    shard: str
    key: str
    reason: str


@dataclass(kw_only=True)
class Sample:
    """One decoded image with its target, between decode and collate.

    `image` is (H, W, 3) uint8 RGB, `target` (H, W) float32 of the stage's kind, `valid_mask` (H, W) bool, True =
    supervise this pixel. Invalid pixels hold 0 and False. Sky with a known label is disparity 0 and valid. `rejections`
    lists the samples that were tried first at this position and found broken. `intrinsics_px` (4,) float32 are fx, fy,
    cx, cy in pixels of `image`, `camera_to_world` (4, 4) float64; NaN where they are not known. The `image` of a clip
    is (T, H, W, 3) and its `camera_to_world` (T, 4, 4) float32 with the first camera as the world; all else is that of
    the middle frame.
    """

    image: np.ndarray
    target: np.ndarray
    valid_mask: np.ndarray
    key: str
    dataset: str
    shard: str = ""
    rejections: list[Rejection] = field(default_factory=list)
    intrinsics_px: np.ndarray = field(default_factory=lambda: np.full(4, np.nan, np.float32))
    camera_to_world: np.ndarray = field(default_factory=lambda: np.full((4, 4), np.nan))


class Batch(TypedDict):
    """Collated samples. The loader gives uint8 images; they are normalised once they are on the device.

    A batch of clips has images (B, T, 3, H, W) and `camera_to_world`; all else is that of their middle frames.
    """

    image: Tensor  # (B, 3, H, W) uint8, then float32 with the encoder's mean and standard deviation
    target: Tensor  # (B, H, W) float32
    valid_mask: Tensor  # (B, H, W) bool
    intrinsics_px: Tensor  # (B, 4) float32: fx, fy, cx, cy in pixels of `image`; NaN where they are not known
    camera_to_world: NotRequired[Tensor]  # (B, T, 4, 4) float32, the first camera is the world; NaN where unknown
    key: list[str]
    dataset: list[str]
    shard: NotRequired[list[str]]  # path or URL of the tar that holds the sample
    rejections: list[Rejection]
    cutmix_box: NotRequired[Tensor]  # (B, 4) int64 (top, left, height, width), height 0 = none; unlabeled batches
    cutmix_region: NotRequired[Tensor]  # (B, H, W) bool, True where the partner was pasted; after `cutmix`


class StudentBatch(TypedDict):
    labeled: Batch
    unlabeled: Batch


class StepOutput(TypedDict):
    """What a training step gives: the loss, and each of its parts as a value per image, (images,), detached."""

    loss: Tensor
    image_losses: dict[str, Tensor]


class ModelOutput(NamedTuple):
    """`values` (B, H, W) >= 0 in the model's kind; `features` (B, C, h, w), the normalised tokens of the last block;
    `domain_logits` (B, domains) of a model that chooses between heads; `disparities` (B, H / 2^s, W / 2^s), finest
    first, of one that predicts inverse depth up to scale at several scales.
    """

    values: Tensor
    features: Tensor
    domain_logits: Tensor | None = None
    disparities: Sequence[Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A prediction for one image, at the size of the image: `values` (H, W) float32, and what they mean."""

    values: np.ndarray
    kind: Kind
    unit: str

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise ValueError(f"a prediction is one (height, width) map, got shape {self.values.shape}")
