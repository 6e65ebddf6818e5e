import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from handmade import DEPTH, jpeg, png, pseudo_labels, unlabeled_sample, write_dataset

from depthkit.data.inspect import inspect, main
from depthkit.data.inspection.page import NUM_SHOWN, shown
from depthkit.data.manifest import load_manifest, save_manifest


def sample(seed: int, factor: float = 1.0) -> dict[str, bytes]:
    """A floor that starts 2 m away, under a picture of noise."""
    rng = np.random.default_rng(seed)
    depth = np.tile(2000 * factor / np.linspace(1, 0.25, 48)[:, None], 64).astype(np.uint16)
    depth[:8] = 0
    image = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (64, 48))
    return {"jpg": jpeg(image), "depth.png": png(depth), "json": json.dumps({"seed": seed}).encode()}


def pictures(html: str) -> list[np.ndarray]:
    data = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR_RGB) for text in data]


@pytest.fixture
def page(tmp_path: Path) -> str:
    train = write_dataset(tmp_path / "train", {f"room{n}": sample(n) for n in range(3)})
    test = write_dataset(tmp_path / "test", {"hall": sample(1)}, name="<halls>")
    save_manifest(replace(load_manifest(test), split="test"), test)
    assert main([str(train), str(test), "--html", str(tmp_path / "out" / "page.html")]) == 1
    return (tmp_path / "out" / "page.html").read_text()


def test_the_page_stands_alone(page: str) -> None:
    assert "http" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []
    assert "<halls>" not in page  # names are text, not tags
    assert "&lt;halls&gt;" in page


def test_the_page_names_samples_facts_and_leaks(page: str) -> None:
    for text in ("room0", "room1", "room2", "hall", "83.3% valid", "depth, metric, png16, stored number / 1000"):
        assert text in page
    assert "hall looks the same as" in page
    assert "Leakage: 1 evaluation image" in page


def test_the_pictures_of_the_page(page: str) -> None:
    tiles = pictures(page)
    assert len(tiles) == 2 + 4 * 3  # both sides of the leak; image, label and mask of four samples
    image, label, mask = tiles[2:5]
    assert image.shape == (240, 320, 3)
    assert label.shape[0] > 240  # a bar below
    top, bottom = mask[10, 160].astype(int), mask[230, 160].astype(int)
    assert top[0] > top[1] + 40  # red: nothing measured
    assert bottom[1] > bottom[0] + 40  # green
    near, far = label[236, 160].astype(int).sum(), label[60, 160].astype(int).sum()
    assert near != far


def test_what_contradicts_comes_first(tmp_path: Path) -> None:
    samples = {f"s{n:02d}": sample(n) for n in range(30)} | {"x-broken": {**sample(90), "depth.png": b"?"}}
    samples["y-far"] = sample(91, 3.0)
    path = write_dataset(tmp_path / "set", samples, replace(DEPTH, depth_range=(1.0, 9.0)))
    inspection = inspect([path], num_samples=100)
    keys = [look.key for look in shown(inspection.findings[0])]
    assert len(keys) == NUM_SHOWN
    assert keys[:2] == ["x-broken", "y-far"]
    assert keys[2:] == sorted(keys[2:])
    main([str(path), "--html", str(tmp_path / "page.html")])
    html = (tmp_path / "page.html").read_text()
    assert html.index("x-broken") < html.index("y-far")
    assert "expected a PNG" in html


def test_every_kind_of_set_has_its_section(tmp_path: Path) -> None:
    keys = ["a", "b"]
    images = write_dataset(tmp_path / "images", {key: unlabeled_sample(n) for n, key in enumerate(keys)}, None)
    labels = pseudo_labels(tmp_path / "labels", images, keys)
    points = np.zeros((480, 640), np.uint16)
    points[::40, ::40] = 5000
    sparse = {
        "jpg": jpeg(np.zeros((480, 640, 3), np.uint8)),
        "depth.png": png(points),
    }
    lidar = write_dataset(tmp_path / "lidar", {"p": sparse})
    missing = tmp_path / "none.json"
    main([str(images), str(labels), str(lidar), str(missing), "--html", str(tmp_path / "page.html")])
    html = (tmp_path / "page.html").read_text()
    tiles = pictures(html)
    assert len(tiles) == 2 * 1 + 2 * 3 + 3
    green = (tiles[-1][..., 1] > tiles[-1][..., 0].astype(int) + 30).mean()
    assert green > 0.005  # single points survive the way to a thumbnail
    assert str(missing) in html
    assert "shorter side 32 px, precision 32-true, scale 1, also mirrored" in html
