"""The findings on the screen, as JSON, and in a picture: samples as the network gets them, and its losses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text
from torch import Tensor

from depthkit.doctor.alignment import label_edges
from depthkit.doctor.finding import Finding, Level
from depthkit.evaluation.report_pictures import encode
from depthkit.files import atomic_write
from depthkit.types import Batch, Kind
from depthkit.visualize import DPI, PictureRow, Tile, colorize, kind_scale, picture_grid, render, value_range

MARKS = {Level.ok: ("ok", "green"), Level.warning: ("look", "yellow"), Level.problem: ("FIX", "bold red")}
MARKS |= {Level.skipped: ("-", "dim")}
EDGE_COLOR = (255, 0, 90)
EDGE_STRENGTH = 0.75  # of label edges that are drawn: three times the mean of the image
CURVE_SIZE = (7.0, 2.6)  # inches
MOST_LOSS = 2.0  # of the first one, that is drawn


def show(findings: Sequence[Finding], console: Console) -> None:
    """A line for each finding, the worst ones last, where they are seen."""
    width = max(len(finding.check) for finding in findings)
    order = [Level.ok, Level.skipped, Level.warning, Level.problem]
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        word, style = MARKS[finding.level]
        line = Text(f"{word:>5}  ", style=style).append(f"{finding.check:<{width}}  ", style="bold")
        console.print(line.append(finding.text, style="default"), soft_wrap=True, highlight=False)


def write(findings: Sequence[Finding], picture: np.ndarray, out: Path) -> None:
    """`doctor.json` and `doctor.png` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(finding), "level": finding.level.value} for finding in findings]
    with atomic_write(out / "doctor.json") as file:
        file.write((json.dumps({"findings": content}, indent=2) + "\n").encode())
    with atomic_write(out / "doctor.png") as file:
        file.write(encode(picture, ".png"))


def draw(samples: Sequence[np.ndarray], findings: Sequence[Finding]) -> np.ndarray:
    """One picture (H, W, 3) uint8: rows of samples above, the curves below."""
    pictures = [*samples, *curves(findings)] or [np.full((1, 1, 3), 255, np.uint8)]
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded)


def draw_samples(images: Tensor, batch: Batch, kind: Kind, most: int = 4) -> np.ndarray:
    """Image, label, and the label's edges on the image, of the first samples; `images` (B, 3, H, W) uint8."""
    targets, masks = batch["target"][:most], batch["valid_mask"][:most]
    edges = label_edges(targets, masks)
    drawn = torch.nn.functional.interpolate(edges.strength[:, None], images.shape[-2:])[:, 0] > EDGE_STRENGTH
    rows = []
    for index, pixels in enumerate(images[:most].permute(0, 2, 3, 1).cpu().numpy()):
        target, mask = targets[index].cpu().numpy(), masks[index].cpu().numpy()
        scale = kind_scale(kind, *value_range(target, mask))
        on_image = np.where(drawn[index].cpu().numpy()[..., None], np.array(EDGE_COLOR, np.uint8), pixels)
        title = Path(batch["key"][index]).name[:24]
        tiles = [Tile(title, pixels), Tile("label", colorize(target, mask, scale)), Tile("its edges", on_image)]
        rows.append(PictureRow(tiles, [scale]))
    return render(picture_grid(rows))


def draw_frames(images: Tensor, most: int = 4) -> np.ndarray:
    """Images without labels, (B, 3, H, W) uint8, in a row; clips (B, T, 3, H, W) in a row each."""
    clips = images[:most] if images.dim() == 5 else images[None, :most]
    rows = clips.permute(0, 1, 3, 4, 2).cpu().numpy()
    name = "frame" if images.dim() == 5 else "image"
    tiles = [[Tile(f"{name} {number + 1}", pixels) for number, pixels in enumerate(row)] for row in rows]
    return render(picture_grid([PictureRow(row, []) for row in tiles]))


def curves(findings: Sequence[Finding]) -> list[np.ndarray]:
    """The sweep of rates and the loss of one batch, where both were found."""
    found = {
        key: finding.values[key] for finding in findings for key in ("loss_ratio", "losses") if key in finding.values
    }
    if len(found) < 2:
        return []
    figure = Figure(figsize=CURVE_SIZE, dpi=DPI, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    ratios: Mapping[str, float] = found["loss_ratio"]
    left.plot(np.clip(list(ratios.values()), None, MOST_LOSS), "o-")
    left.set_xticks(range(len(ratios)), labels=list(ratios))  # a logarithmic axis would need fonts for its exponents
    left.axvline(list(ratios).index("1"), color="0.7", zorder=0)
    left.set(title="loss left after some steps", xlabel="times the rates of the settings", ylim=(0, 1.05 * MOST_LOSS))
    left.set(ylabel=f"share of the first ({MOST_LOSS:g} = more)")
    right.set(ylabel="loss")
    right.plot(found["losses"])
    right.set(title="one batch by heart", xlabel="step", ylim=(0, None))
    for axes in (left, right):
        axes.title.set_fontsize(8.5)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(7.5)
        axes.yaxis.label.set_fontsize(7.5)
    return [render(figure)]
