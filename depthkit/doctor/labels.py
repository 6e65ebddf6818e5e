"""Checks of what the network is shown: labels, their place in the image, and flips."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from depthkit.config import AugmentConfig, DataConfig
from depthkit.data.datamodule import build_streams
from depthkit.doctor.alignment import Agreement, measure, t_value
from depthkit.doctor.finding import Finding, Level
from depthkit.types import Batch, Kind, Sample

WEAK = 0.05  # correlation of edges below which nothing is said of where labels lie
CLEAR = 3.0
"""Standard errors from which on a difference is taken for one."""
FEWEST_IMAGES = 8  # of which alignment is judged
FAR = 4  # working pixels: a shift of 3 % of the image's side or more
SMALLEST_GAIN = 0.03  # of the correlation, that another place or side of the labels must give
BEYOND, UNUSED = 0.1, 0.2  # share of pixels beyond max_depth, share of max_depth that is in use: worth a word
NUM_FLIPPED = 4  # positions of each stream


def check_values(batches: Sequence[Batch], max_depth: float | None) -> Finding:
    """Are there labels, do they vary, and can the head say them?"""
    targets, masks = (torch.cat([batch[name] for batch in batches]) for name in ("target", "valid_mask"))
    keys = [key for batch in batches for key in batch["key"]]
    values = targets[masks]
    if not len(values):
        return Finding(Level.problem, f"none of {len(keys)} images has a valid pixel")
    if not values.isfinite().all():
        bad = [k for k, target, mask in zip(keys, targets, masks, strict=True) if not target[mask].isfinite().all()]
        return Finding(Level.problem, f"valid pixels that are not finite, in {shown(bad)}")
    found = {"images": len(keys), "valid_share": float(masks.float().mean())}
    found |= {"min": float(values.min()), "max": float(values.max())}
    text = f"{len(keys)} images, {found['valid_share']:.0%} of pixels valid, "
    text += f"values {found['min']:.4g} to {found['max']:.4g}"
    remarks = []
    flat = [key for key, target, mask in zip(keys, targets, masks, strict=True) if is_flat(target[mask])]
    if flat:
        remarks.append(f"empty or constant in {len(flat)} of them, which teach nothing: {shown(flat)}")
    if max_depth is not None:
        found["beyond_max_depth"] = float((values > max_depth).float().mean())
        if found["beyond_max_depth"] > BEYOND:
            share = f"{found['beyond_max_depth']:.0%}"
            remarks.append(f"{share} of them lie beyond model.max_depth={max_depth:g} and are never learned")
        if found["max"] < UNUSED * max_depth:
            remarks.append(f"model.max_depth={max_depth:g} is far above them: choose one near the largest")
    return Finding(Level.warning if remarks else Level.ok, "; ".join([text, *remarks]), found)


def is_flat(values: Tensor) -> bool:
    return len(values) == 0 or bool(values.max() <= values.min())


def shown(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def check_alignment(images: Sequence[Tensor], batches: Sequence[Batch]) -> Finding:
    """Do the edges of labels lie on those of their images? `images` (B, 3, H, W) uint8 are those of the batches."""
    targets, masks = (torch.cat([batch[name] for batch in batches]) for name in ("target", "valid_mask"))
    agreement = measure(torch.cat(list(images)), targets, masks)
    if agreement is None or len(agreement.own) < FEWEST_IMAGES:
        number = 0 if agreement is None else len(agreement.own)
        text = (
            f"{number} images have labels dense enough to show edges; it takes {FEWEST_IMAGES} (images=N examines more)"
        )
        return Finding(Level.skipped, text)
    level, text, values = judge(agreement)
    return Finding(level, text, {"images": len(agreement.own), **values})


def judge(agreement: Agreement) -> tuple[Level, str, dict[str, float]]:
    """What the agreement means, in words, with the correlations that say so."""
    own, other = agreement.own, agreement.other
    values = {"own": float(own.mean()), "other_image": float(other.mean()), "t": t_value(own - other)}
    values |= {name: float(each.mean()) for name, each in agreement.turned.items()}
    best = max(agreement.turned, key=lambda name: values[name])
    down, right = best_shift(agreement.shifted)
    reach = agreement.shifted.shape[1] // 2
    moved, straight = agreement.shifted[:, reach + down, reach + right], agreement.shifted[:, reach, reach]
    is_turned = values[best] > moved.mean() and values[best] > agreement.chance
    if is_turned and is_clearly_better(agreement.turned[best], own):
        return Level.problem, f"labels fit their images better when {best}: turn them when packing", values
    is_moved = max(abs(down), abs(right)) > 1 and moved.mean() > agreement.chance + SMALLEST_GAIN
    if is_moved and is_clearly_better(moved, straight):
        values |= {"down_px": float(-down * agreement.factor), "right_px": float(-right * agreement.factor)}
        level = Level.problem if max(abs(down), abs(right)) >= FAR else Level.warning
        text = f"labels seem to lie {place(values)}: are depth and colour registered, and of one frame?"
        return level, text, values
    numbers = f"correlation of edges {values['own']:.2f}, with another image's label {values['other_image']:.2f}"
    if values["t"] < CLEAR:
        text = f"labels show no more of their own image than of another one ({numbers}): is each label its image's?"
        return Level.warning if values["t"] > 1 else Level.problem, text, values
    if values["own"] < WEAK:
        text = f"edges of labels and images have too little in common to tell whether they belong together ({numbers})"
        return Level.warning, text, values
    return Level.ok, f"labels lie on their images ({numbers})", values


def is_clearly_better(other: Tensor, own: Tensor) -> bool:
    gain = other - own
    return float(gain.mean()) > SMALLEST_GAIN and t_value(gain) > CLEAR


def best_shift(shifted: Tensor) -> tuple[int, int]:
    """(down, right) in working pixels at which the label agrees best."""
    reach = shifted.shape[1] // 2
    down, right = divmod(int(shifted.mean(0).argmax()), shifted.shape[2])
    return down - reach, right - reach


def place(values: Mapping[str, float]) -> str:
    """Where the labels lie, in pixels of the crop."""
    words = {"down_px": ("low", "high"), "right_px": ("far right", "far left")}
    parts = [f"{abs(values[key]):g} px too {word[values[key] < 0]}" for key, word in words.items() if values[key]]
    return " and ".join(parts)


def check_cameras(batches: Sequence[Batch]) -> Finding:
    """Are the intrinsics known, without which labels have no normals?"""
    known = torch.cat([batch["intrinsics_px"] for batch in batches]).isfinite().all(1)
    keys = [key for batch in batches for key in batch["key"]]
    values = {"images": len(keys), "with_camera": int(known.sum())}
    if known.all():
        return Finding(Level.ok, f"the camera of all {len(keys)} images is known, so that labels have normals", values)
    lacking = [key for key, is_known in zip(keys, known.tolist(), strict=True) if not is_known]
    text = (
        f"{len(lacking)} of {len(keys)} images lack intrinsics_px and teach no normals: {shown(lacking)}; state K in "
    )
    return Finding(
        Level.warning if known.any() else Level.problem,
        f"{text}the index that is packed, or stage.normals=false",
        values,
    )


def check_flips(config: DataConfig, target_kind: Kind | None, seed: int) -> Finding:
    """Is a mirrored sample mirrored in all its parts: image, label, mask and principal point?"""
    streams = [
        build_streams(replace(config, augment=AugmentConfig(horizontal_flip=probability)), target_kind, seed)
        for probability in (0.0, 1.0)
    ]
    for name, plain in streams[0].items():
        for position in range(NUM_FLIPPED):
            (straight, *_), (mirrored, *_) = plain.load(position), streams[1][name].load(position)
            if part := next((part for part in MIRRORED if not is_mirror(straight, mirrored, part)), None):
                text = f"{part} of {straight.key} ({straight.dataset}) is not mirrored with the others"
                return Finding(Level.problem, text)
    parts = "image, label and mask" if target_kind else "image and principal point"
    text = f"{parts} are mirrored together ({NUM_FLIPPED} samples of {' and '.join(streams[0])})"
    return Finding(Level.ok, text)


MIRRORED = ("image", "target", "valid_mask", "intrinsics_px")


def is_mirror(straight: Sample, mirrored: Sample, part: str) -> bool:
    """Columns run the other way; the principal point, `cx` from the left, is as far from the right."""
    found, other = getattr(straight, part), getattr(mirrored, part)
    if part != "intrinsics_px":
        return np.array_equal(np.flip(found, -2 if part == "image" else -1), other)  # an image may be a clip of many
    fx, fy, cx, cy = found
    return np.allclose([fx, fy, straight.image.shape[-2] - cx, cy], other, rtol=1e-4, equal_nan=True)


def per_stream(batches: Sequence[Mapping[str, Batch]]) -> dict[str, list[Batch]]:
    """The batches of each stream that is supervised at all."""
    names = dict.fromkeys(name for batch in batches for name in batch)
    streams = {name: [batch[name] for batch in batches] for name in names}
    return {
        name: found
        for name, found in streams.items()
        if any("target" in part and bool(part["valid_mask"].any()) for part in found)
    }
