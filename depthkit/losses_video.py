"""The losses of learning from video: how well one frame, warped into another, agrees with it.

Shapes: B images, C channels, H/W pixels. Images are (B, C, H, W) with values in 0..1, masks (B, H, W) bool, True = the
warped image is known. Maps of errors are (B, H, W) >= 0; losses (B,), one value per image. All compute in float32
whatever autocast says; what lies outside a mask, NaN included, changes neither value nor gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def reconstruction_error(warped: Tensor, image: Tensor) -> Tensor:
    """`mean over channels |warped - image|`, (B, H, W)."""
    return (warped.float() - image.float()).abs().mean(1)


def ssim_error(warped: Tensor, image: Tensor) -> Tensor:
    """`clip((1 - SSIM) / 2, 0, 1)`, mean over channels, of the 3 x 3 windows that fit: (B, H - 2, W - 2).

    Source: Wang et al. 2004 with averages in the place of Gaussian windows (vid2depth, monodepth).
    """
    a, b = warped.float(), image.float()
    mean_a, mean_b = window_mean(a), window_mean(b)
    variance_a, variance_b = window_mean(a * a) - mean_a**2, window_mean(b * b) - mean_b**2
    covariance = window_mean(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    extent = (mean_a**2 + mean_b**2 + SSIM_C1) * (variance_a + variance_b + SSIM_C2)
    return ((1 - likeness / extent) / 2).clamp(0, 1).mean(1)


def window_mean(values: Tensor) -> Tensor:
    """Mean of every 3 x 3 window that fits."""
    # Two sums of shifted maps take a third of the time of torch's average pooling on a CPU.
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


def reconstruction_loss(warped: Tensor, image: Tensor, valid_mask: Tensor) -> Tensor:
    """Sum of the valid pixels' reconstruction error over the number of all pixels (vid2depth equation 4)."""
    warped = torch.where(valid_mask[:, None], warped, image)
    return reconstruction_error(warped, image).mean((1, 2))


def ssim_loss(warped: Tensor, image: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean over the windows of their SSIM error times the share of valid pixels in them (vid2depth equation 6)."""
    warped = torch.where(valid_mask[:, None], warped, image)
    share = window_mean(valid_mask[:, None].float()).squeeze(1)
    return (ssim_error(warped, image) * share).mean((1, 2))


def photometric_error(
    warped: Tensor, image: Tensor, *, reconstruction_weight: float = 0.15, ssim_weight: float = 0.85
) -> Tensor:
    """The weighted sum of both errors at every pixel, (B, H, W); windows at the border see it mirrored.

    Source: monodepth2 (Godard et al. 2019) section 3.1, whose weights are the default.
    """
    mirrored = [functional.pad(values.float(), (1, 1, 1, 1), mode="reflect") for values in (warped, image)]
    return reconstruction_weight * reconstruction_error(warped, image) + ssim_weight * ssim_error(*mirrored)


def minimum_reprojection_loss(errors: Tensor, valid_masks: Tensor, static_errors: Tensor | None = None) -> Tensor:
    """Mean over the pixels that count of the smallest of the sources' errors; 0 where no pixel counts.

    `errors`, `valid_masks` are (S, B, H, W): photometric errors of S warped sources and where each is known. The
    minimum forgives what only one neighbour hides. With `static_errors` (S, B, H, W), those of the sources as they are,
    a pixel counts only where warping is better than not warping: what moves along with the camera, and a camera that
    stands still, teach nothing. Source: monodepth2 (Godard et al. 2019) sections 3.1 and 3.2.
    """
    smallest = torch.where(valid_masks, errors.float(), torch.inf).amin(0)
    counts = valid_masks.any(0)
    if static_errors is not None:
        counts = counts & (smallest.detach() < static_errors.amin(0))
    total = torch.where(counts, smallest, 0.0).sum((1, 2))
    return total / counts.sum((1, 2)).clamp(min=1)


def smoothness_loss(disparity: Tensor, image: Tensor) -> Tensor:
    """Mean of `|dx d| exp(-mean_c |dx I|)` plus that along y: disparity may jump where the image does.

    Source: vid2depth equation 7, on the disparity (B, H, W) as it is.
    """
    loss = disparity.new_zeros(len(disparity), dtype=torch.float32)
    for axis in (-1, -2):
        edges = image.float().diff(dim=axis).abs().mean(1)
        loss = loss + (disparity.float().diff(dim=axis).abs() * torch.exp(-edges)).mean((1, 2))
    return loss


def mean_normalized(disparity: Tensor) -> Tensor:
    """`d / mean d`, the mean over all but the first dimension: of each image (B, H, W), or of each clip (B, T, H, W).

    Without it smoothness gains from a world that shrinks, and the motion that fits depends on a scale that no image
    shows. Source: Wang et al. 2018 (DDVO) section 3.2.
    """
    disparity = disparity.float()
    mean = disparity.flatten(1).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return disparity / mean.view(-1, *[1] * (disparity.dim() - 1))
