"""The page of `depthkit inspect`: one HTML file with its pictures inside, for a person to look at."""

import base64
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader

from depthkit import __version__
from depthkit.data.decode import decode_image
from depthkit.data.inspection.contradictions import place, share_outside
from depthkit.data.inspection.duplicates import Match
from depthkit.data.inspection.findings import Findings, Inspection, facts, label_kind
from depthkit.data.inspection.look import DataSet, Label, Look, paired_image, read_label, reason
from depthkit.data.shards import image_member
from depthkit.files import atomic_write
from depthkit.visualize import COLORMAPS, LABELS, ColorScale, colorize, depth_scale, value_range, with_color_bar

NUM_SHOWN = 12
NUM_LEAKS_SHOWN, NUM_LEAKS_LISTED = 12, 1000
TILE_WIDTH = 320  # pixels
JPEG = [
    cv2.IMWRITE_JPEG_QUALITY, 82,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,  # single points keep their colour
]  # fmt: skip
NUM_BINS = 60
SPARSE = 0.1  # share of valid pixels below which single points are drawn three pixels wide
MEASURED, SKY, NOTHING = (40, 160, 80), (70, 130, 220), (200, 60, 50)
"""Colours of the mask over the grey image; the template names them."""


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page for `inspection` to `path`, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("depthkit.data.inspection", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    leaks = inspection.duplicates.leaks
    html = environment.get_template("page.html.j2").render(
        sections=[_section(found, number) for number, found in enumerate(inspection.findings)],
        leaks=[_leak(inspection, match) for match in leaks[:NUM_LEAKS_LISTED]],
        num_leaks=len(leaks),
        leak_pictures=[
            {"text": _leak(inspection, match), "tiles": [_image_of(inspection, image) for image in match[:2]]}
            for match in leaks[:NUM_LEAKS_SHOWN]
        ],
        colors={"measured": MEASURED, "sky": SKY, "nothing": NOTHING},
        version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(html.encode())


def _section(found: Findings, number: int) -> dict[str, Any]:
    """What the template needs to know of one data set."""
    section = {"id": f"set{number}", "path": found.name, "problems": found.problems, "warnings": found.warnings}
    if found.data is None:
        name = PurePath(found.name).parent.name
        return section | {"name": name, "seen": {}, "stated": {}, "histogram": None, "samples": []}
    manifest = found.data.manifest
    return section | {
        "name": manifest.name,
        "split": manifest.split,
        "description": manifest.description,
        "seen": facts(found),
        "stated": stated_facts(found.data),
        "histogram": histogram(found),
        "samples": list(_samples(found, found.data)),
    }


def stated_facts(data: DataSet) -> dict[str, str]:
    """Name -> what the manifest says, for a table."""
    manifest = data.manifest
    stated = {
        "samples": f"{manifest.num_samples} in {len(manifest.shards)} shards",
        "licence": manifest.licence,
        "source": manifest.source,
    }
    if manifest.target is None:
        return stated | {"labels": "none"}
    target = manifest.target
    unit = "metric" if target.metric else "without a unit"
    stated["labels"] = f"{target.quantity}, {unit}, {target.codec}, stored number / {target.scale:g}"
    if target.depth_range:
        stated["range"] = "{:g} to {:g} m".format(*target.depth_range)
    if manifest.labels_of:
        origin = manifest.labels_of
        stated["labels of"] = f"{origin.images} by teacher {origin.teacher_sha256[:12]}"
        stated["labelled with"] = str(origin.settings or origin.resolution)
    return stated


def histogram(found: Findings) -> dict[str, Any] | None:
    """Bars of the kept values as (left, height) in percent, on a logarithmic axis where all are positive."""
    values = [look.values for look in found.looks if look.values is not None]
    if not values or found.data is None:
        return None
    kept = np.concatenate(values)
    low, high = np.percentile(kept, [0.1, 99.9])
    kind = label_kind(found.data.manifest)
    scale = ColorScale(low, max(high, low + 1e-6), COLORMAPS[kind], LABELS[kind], is_logarithmic=low > 0)
    counts, _ = np.histogram(scale.position(kept), NUM_BINS, (0, 1))
    return {
        "bars": [(100 * n / NUM_BINS, 100 * count / counts.max()) for n, count in enumerate(counts)],
        "width": 100 / NUM_BINS,
        "ticks": [(float(100 * scale.position(np.array(tick))), f"{tick:g}") for tick in scale.ticks()],
        "label": f"{scale.label}; {'logarithmic' if scale.is_logarithmic else 'linear'} axis, 99.8 % of the values",
    }


def shown(found: Findings) -> list[Look]:
    """A dozen samples: those with a problem first, then those most out of range, then evenly spread ones."""
    target = found.data.manifest.target if found.data else None
    badness = {look.key: (look.problem is not None, share_outside(target, look)) for look in found.looks}
    bad = sorted((look for look in found.looks if any(badness[look.key])), key=lambda look: badness[look.key])[::-1]
    good = [look for look in found.looks if not any(badness[look.key])]
    places = np.linspace(0, len(good) - 1, min(len(good), max(0, NUM_SHOWN - len(bad)))).astype(int)
    return (bad + [good[place] for place in places])[:NUM_SHOWN]


def _samples(found: Findings, data: DataSet) -> Iterator[dict[str, Any]]:
    for look in shown(found):
        sample: dict[str, Any] = {"place": place(data.manifest, look), "problem": look.problem, "tiles": []}
        sample["facts"] = [
            *([f"{look.valid_share:.1%} valid"] if look.valid_share is not None else []),
            *([f"{share_outside(data.manifest.target, look):.0%} out of range"] if _is_outside(data, look) else []),
        ]
        try:
            sample["tiles"] = [_uri(tile) for tile in tiles(data, look)]
        except Exception as error:  # a broken sample is what the page is there to show
            sample["problem"] = sample["problem"] or reason(error)
        yield sample


def _is_outside(data: DataSet, look: Look) -> bool:
    return share_outside(data.manifest.target, look) > 0


def tiles(data: DataSet, look: Look) -> Iterator[np.ndarray]:
    """Image, label in colours with its bar, and the mask over the grey image; what cannot be read is left out."""
    raw = data.reader().read(look.shard, look.sample)
    manifest = data.manifest
    image = None
    if manifest.labels_of is None:
        image = _small(decode_image(image_member(raw.members)))
    elif data.images is not None:
        image = _small(decode_image(image_member(paired_image(data.images, look.shard, look).members)))
    if image is not None:
        yield image
    if manifest.target is None or look.is_rejected:
        return
    label = _small_label(read_label(raw, manifest.target))
    values, scale = label.disparity, ColorScale(*value_range(label.disparity, label.measured), "magma", "disparity")
    if manifest.target.metric:
        values = np.where(label.measured, 1 / np.where(label.measured, label.disparity, 1), 0)
        scale = depth_scale(values, label.measured, "metres")
    yield with_color_bar(colorize(values, label.measured, scale), scale)
    yield _mask_over(image, label)


def _mask_over(image: np.ndarray | None, label: Label) -> np.ndarray:
    height, width = label.measured.shape
    grey = np.full((height, width), 128, np.uint8)
    if image is not None:
        grey = cv2.cvtColor(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    color = np.where(label.sky[..., None], SKY, np.where(label.measured[..., None], MEASURED, NOTHING))
    return (0.5 * grey[..., None] + 0.5 * color).astype(np.uint8)


def _small(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.resize(image, (TILE_WIDTH, max(1, round(height * TILE_WIDTH / width))), interpolation=cv2.INTER_AREA)


def _small_label(label: Label) -> Label:
    """At the width of a tile. The nearest of the pixels that fall together stays, and single points are drawn large."""
    height, width = label.measured.shape
    size = (TILE_WIDTH, max(1, round(height * TILE_WIDTH / width)))
    points = 3 if label.measured.mean() < SPARSE else 1
    reach = np.ones((points * -(-width // TILE_WIDTH),) * 2, np.uint8)

    def shrink(values: np.ndarray) -> np.ndarray:
        return cv2.resize(cv2.dilate(values, reach), size, interpolation=cv2.INTER_NEAREST)

    lowest = label.disparity.min()
    disparity = shrink(np.where(label.measured, label.disparity, lowest))
    return Label(disparity, shrink(label.measured.astype(np.uint8)) > 0, shrink(label.sky.astype(np.uint8)) > 0)


def _leak(inspection: Inspection, match: Match) -> str:
    return f"{inspection.findings[match.second[0]].name}: {inspection.describe(match)}"


def _image_of(inspection: Inspection, image: tuple[int, int]) -> str:
    """One image of a leak; empty when it cannot be read any more."""
    found = inspection.findings[image[0]]
    assert found.data is not None
    shard, sample = found.pictures.places[image[1]].tolist()
    try:
        return _uri(_small(decode_image(image_member(found.data.reader().read(shard, sample).members))))
    except (OSError, ValueError):
        return ""


def _uri(image: np.ndarray) -> str:
    done, data = cv2.imencode(".jpg", image[..., ::-1], JPEG)
    assert done
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
