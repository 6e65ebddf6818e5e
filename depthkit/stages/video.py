"""Depth and ego-motion from video, without labels."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from depthkit.config import OptimConfig, VideoConfig
from depthkit.data.windows import IMAGENET_MEAN, IMAGENET_STD
from depthkit.evaluation.protocols import rank_correlation
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.icp import icp_loss
from depthkit.losses_video import (
    mean_normalized,
    minimum_reprojection_loss,
    photometric_error,
    reconstruction_loss,
    smoothness_loss,
    ssim_loss,
)
from depthkit.metrics_video import ate
from depthkit.models import DepthModel
from depthkit.models.activations import keep_disparity_alive
from depthkit.models.egomotion import EgomotionNet
from depthkit.optim import build_optimizer, build_schedule, parameter_groups
from depthkit.stages.base import DepthModule
from depthkit.types import Batch, Kind, Rejection, StepOutput
from depthkit.warping import back_project, invert_motion, pose_matrix, scaled_intrinsics, warp

SMALLEST_DISPARITY = 0.01
"""Added to the disparity of a network that may say 0, so that depth is finite; DispNet has it built in."""

VIDEO_METRICS = ("rank_correlation/spearman", "ate/egomotion", "ate/constant_motion")
"""Logged as `val/NAME`: of images the correlation of predicted and true nearness; of clips the absolute trajectory
error of all their frames, in metres, and that of a camera that goes straight ahead at constant speed."""


class VideoModule(DepthModule):
    """vid2depth (Mahjourian et al. 2018): each frame, warped into its neighbours in time by predicted depth and motion,
    must look like them, and their clouds of points must agree.

    A loss is summed over scales, and over frames or ordered pairs of neighbouring frames. `minimum_reprojection` and
    `auto_mask` put the photometric loss of monodepth2 in the place of the first two terms. With a model that predicts
    disparity that is taken for inverse depth up to scale.
    """

    stage: VideoConfig

    def __init__(
        self,
        model: DepthModel,
        egomotion: EgomotionNet,
        kind: Kind,
        stage: VideoConfig,
        optim: OptimConfig,
        protocol: ProtocolConfig,
    ) -> None:
        super().__init__(model, stage, optim, protocol)
        keep_disparity_alive(model.decoder)
        self.egomotion = egomotion
        self.kind = kind
        metrics = {name: MeanMetric(nan_strategy="ignore") for name in VIDEO_METRICS}
        self.video_metrics: Mapping[str, MeanMetric] = nn.ModuleDict(metrics)  # type: ignore[assignment]

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> StepOutput:
        clip, intrinsics_px = batch["unlabeled"]["image"], batch["unlabeled"]["intrinsics_px"]
        pairs = Pairs(self.egomotion(clip))
        pyramid = disparity_pyramid(self.model, clip.flatten(0, 1), self.kind, self.stage.num_scales)
        images = unnormalized(clip)
        parts: dict[str, list[Tensor]] = {"photometric": [], "smoothness": [], "icp": []}
        for scale, disparity in enumerate(pyramid):
            frames = by_frame(functional.avg_pool2d(images.flatten(0, 1), 2**scale), clip.shape[1])
            disparity = by_frame(disparity, clip.shape[1])
            if self.stage.normalize_disparity:
                disparity = mean_normalized(disparity)
            intrinsics = scaled_intrinsics(intrinsics_px, 0.5**scale)
            parts["photometric"].append(self.photometric(frames, disparity.reciprocal(), intrinsics, pairs))
            parts["smoothness"].append(self.smoothness(disparity, frames) / 2**scale)
            if self.stage.icp_weight > 0:
                parts["icp"].append(self.clouds(disparity.reciprocal(), intrinsics, pairs) / 2**scale)
        sums = {name: torch.stack(values).sum(0) for name, values in parts.items() if values}
        return self.weigh(sums, self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """The photometric part is weighted inside."""
        return {"photometric": 1.0, "smoothness": self.stage.smoothness_weight, "icp": self.stage.icp_weight}

    def photometric(self, frames: Tensor, depth: Tensor, intrinsics_px: Tensor, pairs: "Pairs") -> Tensor:
        """(B,) for frames (B, T, 3, h, w) and their depth (B, T, h, w)."""
        stage = self.stage
        source, target = pairs.sources(frames), pairs.targets(frames)
        warped, valid_mask = warp(source, pairs.targets(depth), pairs.matrices, pairs.repeat(intrinsics_px))
        weights = {"reconstruction_weight": stage.reconstruction_weight, "ssim_weight": stage.ssim_weight}
        if not stage.minimum_reprojection:
            losses = stage.reconstruction_weight * reconstruction_loss(warped, target, valid_mask)
            losses = losses + stage.ssim_weight * ssim_loss(warped, target, valid_mask)
            return pairs.by_clip(losses).sum(1)
        errors = pairs.by_clip(photometric_error(warped, target, **weights))
        static_errors = pairs.by_clip(photometric_error(source, target, **weights)) if stage.auto_mask else None
        return minimum_over_neighbours(errors, pairs.by_clip(valid_mask), static_errors, pairs)

    def smoothness(self, disparity: Tensor, frames: Tensor) -> Tensor:
        """(B,), the sum over the frames."""
        losses = smoothness_loss(disparity.flatten(0, 1), frames.flatten(0, 1))
        return by_frame(losses, disparity.shape[1]).sum(1)

    def clouds(self, depth: Tensor, intrinsics_px: Tensor, pairs: "Pairs") -> Tensor:
        """(B,), the ICP loss of every ordered pair of neighbouring frames, summed."""
        numbers = spread(depth.shape[-2] * depth.shape[-1], self.stage.icp_points, depth.device)
        intrinsics = intrinsics_px.repeat_interleave(depth.shape[1], 0)
        points = back_project(depth.flatten(0, 1), intrinsics).flatten(2)[..., numbers].mT
        points = by_frame(points, depth.shape[1])
        losses = icp_loss(pairs.targets(points), pairs.vectors, pairs.sources(points).detach())
        return pairs.by_clip(losses).sum(1)

    def validation_step(self, batch: Batch | Rejection, batch_idx: int) -> None:
        """Of images, the protocol's metrics and the rank correlation; of clips, ATE beside a camera that goes straight
        ahead at constant speed."""
        if isinstance(batch, Rejection):
            return
        if batch["image"].dim() == 4:
            values = self.predict(batch)
            self.judge(values, batch)
            correlation = rank_correlation(values, batch["target"], batch["valid_mask"], self.kind)
            self.video_metrics["rank_correlation/spearman"].update(correlation)
            return
        true = batch["camera_to_world"]
        predicted = trajectory(self.window_motions(batch["image"]))
        straight = torch.eye(4, device=true.device).repeat(*true.shape[:2], 1, 1)
        straight[..., 2, 3] = torch.arange(true.shape[1], device=true.device)
        for name, poses in (("ate/egomotion", predicted), ("ate/constant_motion", straight)):
            errors = [ate(path, truth, len(truth)) for path, truth in zip(poses, true, strict=True)]
            self.video_metrics[name].update(torch.cat(errors))

    def window_motions(self, clip: Tensor) -> Tensor:
        """Motions (B, T - 1, 6) of a clip of T frames, at least as long as the network's: those of its windows, where
        they overlap their mean."""
        num_frames, length = self.egomotion.num_frames, clip.shape[1]
        total, count = clip.new_zeros(len(clip), length - 1, 6), clip.new_zeros(length - 1, 1)
        for first in range(length - num_frames + 1):
            covered = slice(first, first + num_frames - 1)
            total[:, covered] += self.egomotion(clip[:, first : first + num_frames])
            count[covered] += 1
        return total / count

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        for name, metric in self.video_metrics.items():
            if metric.update_called:
                self.log(f"val/{name}", metric, logger=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups(self.model, self.model.encoder, self.optim)
        rate = self.optim.encoder_lr * self.optim.decoder_lr_multiplier
        groups.append({"name": "egomotion", "params": [*self.egomotion.parameters()], "lr": rate})
        optimizer = build_optimizer(groups, self.optim)
        schedule = build_schedule(optimizer, self.optim, num_steps=int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Pairs:
    """The ordered pairs (target, source) of frames that are neighbours in time, P = 2 (T - 1) of each clip, and the
    motion from the one to the other: `motions` (B, T - 1, 6) forwards, negated backwards (vid2depth `model.py`)."""

    def __init__(self, motions: Tensor) -> None:
        steps = range(motions.shape[1])
        self.target = [*steps, *(step + 1 for step in steps)]
        self.source = [*(step + 1 for step in steps), *steps]
        self.vectors = torch.cat([motions, -motions], 1).flatten(0, 1)  # (B * P, 6)
        self.matrices = pose_matrix(self.vectors)

    def targets(self, values: Tensor) -> Tensor:
        """(B, T, ...) to (B * P, ...)."""
        # Slices, because a list of numbers would have to reach the device in every step.
        return torch.cat([values[:, :-1], values[:, 1:]], 1).flatten(0, 1)

    def sources(self, values: Tensor) -> Tensor:
        return torch.cat([values[:, 1:], values[:, :-1]], 1).flatten(0, 1)

    def repeat(self, values: Tensor) -> Tensor:
        """(B, ...) to (B * P, ...)."""
        return values.repeat_interleave(len(self.target), 0)

    def by_clip(self, values: Tensor) -> Tensor:
        """(B * P, ...) to (B, P, ...)."""
        return by_frame(values, len(self.target))


def minimum_over_neighbours(errors: Tensor, valid_masks: Tensor, static_errors: Tensor | None, pairs: Pairs) -> Tensor:
    """Sum over the frames of the minimum reprojection loss of each one's neighbours, (B,); maps are (B, P, h, w)."""
    losses = []
    for frame in sorted(set(pairs.target)):
        own = [number for number, target in enumerate(pairs.target) if target == frame]
        maps = (errors, valid_masks) if static_errors is None else (errors, valid_masks, static_errors)
        losses.append(minimum_reprojection_loss(*(torch.stack([each[:, number] for number in own]) for each in maps)))
    return torch.stack(losses).sum(0)


def disparity_pyramid(model: DepthModel, image: Tensor, kind: Kind, num_scales: int) -> Sequence[Tensor]:
    """Inverse depth up to scale at sizes (H / 2^s, W / 2^s): the model's own, or its one map averaged."""
    output = model(image)
    if output.disparities is not None:
        return output.disparities[:num_scales]
    values = output.values.float()
    finest = values + SMALLEST_DISPARITY if kind == "disparity" else values.clamp(min=SMALLEST_DISPARITY).reciprocal()
    return [functional.avg_pool2d(finest[:, None], 2**scale).squeeze(1) for scale in range(num_scales)]


def by_frame(values: Tensor, num_frames: int) -> Tensor:
    """(B * T, ...) to (B, T, ...)."""
    return values.reshape(-1, num_frames, *values.shape[1:])


def unnormalized(image: Tensor) -> Tensor:
    """The image (..., 3, H, W) in 0..1 again, in which the constants of SSIM are."""
    channels = zip(image.float().unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([channel * std + mean for channel, mean, std in channels], -3)


def spread(count: int, limit: int | None, device: torch.device) -> Tensor:
    """At most `limit` of the numbers 0 to `count` - 1, evenly spread; all for None."""
    number = count if limit is None else min(limit, count)
    return torch.arange(number, device=device) * count // number


def trajectory(motions: Tensor) -> Tensor:
    """Motions from frame to frame, (B, T - 1, 6), to poses camera-to-world (B, T, 4, 4) in the first camera's axes."""
    poses = [torch.eye(4, device=motions.device).expand(len(motions), 4, 4)]
    for motion in invert_motion(pose_matrix(motions)).unbind(1):
        poses.append(poses[-1] @ motion)
    return torch.stack(poses, 1)
