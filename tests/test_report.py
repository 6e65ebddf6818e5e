"""What goes into the report of an evaluation: tables, error over depth, pictures and clouds; the page stands alone."""

import base64
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from test_evaluate import npy, write_dataset

from depthkit.evaluation.depth_errors import depth_edges, error_by_depth
from depthkit.evaluation.describe import describe
from depthkit.evaluation.evaluate import evaluate
from depthkit.evaluation.protocols import Comparison, protocol_id
from depthkit.evaluation.report import choose_images, write_report
from depthkit.evaluation.report_pictures import cloud_context, intrinsics_of, make_picture, quantize, shrink, thin
from depthkit.evaluation.report_tables import (
    DASH,
    MINUS,
    depth_chart,
    difference_rows,
    image_table,
    mean_groups,
    number,
)
from depthkit.evaluation.results import Evaluation
from depthkit.evaluation.settings import Alignment, GroundTruth, ProtocolConfig
from depthkit.types import Kind, Prediction

PROTOCOL = ProtocolConfig(name="disparity", max_depth=80, alignment=Alignment.disparity_least_squares)
SIZE = (48, 64)
INTRINSICS = [50.0, 52.0, 31.0, 25.0]


@dataclass
class Stub:
    """A model that computes its disparity from the depth that the image shows in its grey values (see `scene`)."""

    function: Callable[[np.ndarray], np.ndarray]
    sha256: str
    name: str = "stub"
    kind: Kind = "disparity"
    unit: str = "relative"

    def predict(self, image: np.ndarray, *, flip: bool = False) -> Prediction:
        depth = image[..., 0].astype(np.float32) / 10
        return Prediction(values=self.function(depth).astype(np.float32), kind=self.kind, unit=self.unit)


MODELS = {
    "exact": Stub(lambda depth: 2 / depth + 1, "ab" * 32),
    "<blurred>": Stub(lambda depth: cv2.blur(1 / depth, (9, 9)), "cd" * 32),
}


def scene(seed: int, facts: dict[str, Any] | None = None) -> dict[str, bytes]:
    """A floor that runs away from 1 to 12 m with a box on it, and holes in the ground truth."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    grey = np.repeat(np.linspace(120, 20, height)[:, None], width, axis=1)
    top, left = rng.integers(4, 20), rng.integers(4, 34)
    grey[top : top + 22, left : left + 24] = rng.integers(10, 30)
    depth = grey.astype(np.uint8).astype(np.float32) / 10
    depth[rng.random(SIZE) < 0.2] = 0
    return {
        "png": cv2.imencode(".png", grey.astype(np.uint8))[1].tobytes(),
        "depth.npy": npy(depth),
        "json": json.dumps({"intrinsics_px": INTRINSICS} if facts is None else facts).encode(),
    }


def evaluate_scenes(folder: Path) -> Evaluation:
    """Both models on seven scenes whose camera is known, and five whose is not."""
    near = write_dataset(folder / "near", [scene(i) for i in range(7)], name="near")
    far = write_dataset(folder / "far", [scene(i, {}) for i in range(7, 12)], name="far")
    return evaluate(MODELS, [near, far], PROTOCOL)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate_scenes(tmp_path_factory.mktemp("scenes"))


class Page(HTMLParser):
    """What a page would load, its text, and its data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.loaded: list[str] = []
        self.text = ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            value or "" for name, value in attrs if name in ("src", "srcset") or (name == "href" and tag == "link")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', self.html, re.S)[1])


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("report")
    write_report(evaluation, out, num_pictures=4)
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "report.html"]
    assert cv2.imread(str(out / "grid.png")).shape[1] > 500
    return Page(out / "report.html")


def test_the_page_stands_alone(page: Page):
    assert len(page.loaded) == 4 * (2 + 2 * 2) + 1
    assert all(source.startswith("data:") for source in page.loaded)
    for outside in ("url(", "@import", "http://", "https://", "fetch("):
        assert outside not in page.html


def test_the_page_names_its_protocol_and_what_it_means(page: Page):
    assert protocol_id(PROTOCOL) in page.text
    assert describe(PROTOCOL) in page.text


def test_names_are_escaped(page: Page):
    assert "<blurred>" in page.text
    assert "<blurred>" not in page.html
    assert page.data["models"] == list(MODELS)


def test_warnings_stand_at_the_top(evaluation: Evaluation, tmp_path: Path):
    write_report(replace(evaluation, warnings=["the order is <reversed>"]), tmp_path, num_pictures=1)
    page = Page(tmp_path / "report.html")
    assert "the order is <reversed>" in page.text
    assert page.html.index("the order is &lt;reversed&gt;") < page.html.index("Differences on the same images")


def test_pairs_of_points_have_tables_and_no_maps(tmp_path: Path):
    members = [scene(i, {"pairs": [[2, 3, 40, 30, 2], [44, 9, 3, 60, 1]]}) for i in range(3)]
    protocol = ProtocolConfig(
        name="pairs",
        ground_truth=GroundTruth.pairs,
        max_depth=None,
        alignment=Alignment.none,
        metrics=["pair_accuracy"],
    )
    write_report(evaluate(MODELS, [write_dataset(tmp_path / "data", members)], protocol), tmp_path, num_pictures=2)
    page = Page(tmp_path / "report.html")
    assert "which point of each annotated pair is closer" in page.text
    assert page.data["images"]["scores"] == [[[1, 1, 1], [1, 1, 1]]]
    assert page.data["clouds"] == []
    assert not {'id="pictures"', 'id="depth"', 'id="slider"'} & set(re.findall(r'id="[^"]*"', page.html))
    assert not (tmp_path / "grid.png").exists()


def test_the_table_of_means_holds_every_data_set_model_and_metric(evaluation: Evaluation):
    groups = mean_groups(evaluation)
    assert [(group["title"], group["num_images"]) for group in groups] == [
        ("all images", 12), ("near/test", 7), ("far/test", 5),
    ]  # fmt: skip
    for group, dataset in zip(groups, (None, "near/test", "far/test"), strict=True):
        for row in group["rows"]:
            means = evaluation.means(row["model"], dataset)
            assert [cell["value"] for cell in row["cells"]] == list(means.values())
            low, high = evaluation.interval(row["model"], "abs_rel", dataset)
            assert row["cells"][0]["interval"] == f"{number(low)} {DASH} {number(high)}"
        assert [row["cells"][0]["best"] for row in group["rows"]] == [True, False]


def test_differences_say_what_is_better_worse_and_unclear(evaluation: Evaluation):
    (row,) = difference_rows(evaluation)
    verdicts = dict(zip(PROTOCOL.metrics, (cell["verdict"] for cell in row["cells"]), strict=True))
    assert row["model"] == "<blurred>"
    assert verdicts["abs_rel"] == verdicts["delta1"] == "worse", "lower and higher is better"
    assert row["cells"][0]["text"].startswith("+")
    assert row["cells"][PROTOCOL.metrics.index("delta1")]["text"].startswith(MINUS)
    backwards = replace(evaluation, predictors=dict(reversed(evaluation.predictors.items())))
    assert difference_rows(backwards)[0]["cells"][0]["verdict"] == "better"
    twins = replace(evaluation, predictors={"a": MODELS["exact"], "b": MODELS["exact"]}, images=[
        replace(image, scores=dict.fromkeys("ab", image.scores["exact"])) for image in evaluation.images
    ])  # fmt: skip
    assert {cell["verdict"] for cell in difference_rows(twins)[0]["cells"]} == {"unclear"}


def test_the_table_of_images_holds_their_scores(evaluation: Evaluation):
    table = image_table(evaluation, {3: 1})
    assert table["keys"] == [image.key for image in evaluation.images]
    assert table["pictures"] == [-1, -1, -1, 1] + [-1] * 8
    assert [table["dataset_names"][number] for number in table["datasets"]] == ["near/test"] * 7 + ["far/test"] * 5
    for metric, by_model in zip(PROTOCOL.metrics, table["scores"], strict=True):
        for model, values in zip(MODELS, by_model, strict=True):
            expected = [image.scores[model][metric] for image in evaluation.images]
            np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_a_value_that_is_not_defined_is_null(evaluation: Evaluation):
    first, *others = evaluation.images
    undefined = replace(first, scores=first.scores | {"exact": first.scores["exact"] | {"abs_rel": math.nan}})
    evaluation = replace(evaluation, images=[undefined, *others])
    assert image_table(evaluation, {})["scores"][0][0][0] is None
    chosen = choose_images(evaluation, 12)
    assert 0 not in chosen["worst"] + chosen["best"]


def test_of_very_many_images_the_table_holds_the_worst(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("depthkit.evaluation.report_tables.MAX_ROWS", 3)
    table = image_table(evaluation, {})
    errors = np.array([np.mean([scores["abs_rel"] for scores in image.scores.values()]) for image in evaluation.images])
    assert table["keys"] == [evaluation.images[place].key for place in sorted(np.argsort(errors)[-3:])]


def test_pictures_hold_the_extremes_and_do_not_repeat(evaluation: Evaluation):
    chosen = choose_images(evaluation, 8)
    errors = [sum(scores["abs_rel"] for scores in image.scores.values()) for image in evaluation.images]
    assert chosen["worst"][0] == np.argmax(errors)
    assert chosen["best"][0] == np.argmin(errors)
    assert len({place for places in chosen.values() for place in places}) == 8
    assert choose_images(evaluation, 8) == chosen
    assert sum(map(len, choose_images(evaluation, 100).values())) == 12


def test_pictures_come_from_every_data_set(evaluation: Evaluation):
    """One data set has 7 images, the other 5; without extremes each gives two of four."""
    undefined = [
        replace(image, scores={model: {**scores, "abs_rel": math.nan} for model, scores in image.scores.items()})
        for image in evaluation.images
    ]
    assert choose_images(replace(evaluation, images=undefined), 4)["evenly spread"] == [0, 6, 7, 11]


# --- error over depth ------------------------------------------------------------------------------------------------


def test_errors_are_added_up_by_true_depth():
    edges = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    target = torch.tensor([[[0.5, 1.5, 2.0, 3.0, 8.0, 99.0, 3.0]]])
    prediction = torch.tensor([[[1.0, 3.0, 1.0, 3.0, 6.0, 99.0, 9.0]]])
    valid_mask = torch.tensor([[[True, True, True, True, True, True, False]]])
    sums, counts = error_by_depth(Comparison(prediction, target, valid_mask), edges).tolist()
    assert sums == pytest.approx([1 + 1 + 0.5, 0, 0.25])
    assert counts == [3, 1, 2]


def test_an_image_without_a_valid_pixel_adds_nothing():
    maps = torch.full((1, 2, 2), torch.nan)
    added = error_by_depth(Comparison(maps, maps, torch.zeros(1, 2, 2, dtype=torch.bool)), depth_edges(PROTOCOL))
    assert added.abs().sum() == 0


def test_bins_are_of_equal_ratio_and_end_at_the_cap():
    edges = depth_edges(PROTOCOL)
    torch.testing.assert_close(edges[1:] / edges[:-1], (edges[1] / edges[0]).expand(len(edges) - 1))
    assert edges[-1].item() == pytest.approx(80)
    assert edges[0].item() == pytest.approx(0.08)
    assert depth_edges(replace(PROTOCOL, min_depth=2.0))[0].item() == pytest.approx(2)


def test_the_run_adds_up_the_errors_of_all_images(evaluation: Evaluation):
    """Pixels counted = evaluated pixels; a mean over all bins = AbsRel over the pixels of all images."""
    valid = [image.dataset.read(image.shard, image.index).valid_mask.sum() for image in evaluation.images]
    for model, (sums, counts) in evaluation.depth_errors.items():
        assert counts.sum() == sum(valid)
        by_image = np.array([image.scores[model]["abs_rel"] for image in evaluation.images])
        assert sums.sum() == pytest.approx((by_image * valid).sum(), rel=1e-5)


def test_the_chart_shows_means_at_the_centres_of_the_bins():
    errors = {"a": np.array([[0.0, 1.0, 0.0, 8.0], [0, 10, 0, 20]])}
    chart = depth_chart([0.5, 1, 2, 4, 8], errors, "metres", height=100)
    assert chart is not None
    assert [bin["range"] for bin in chart["bins"]] == [f"1 {DASH} 2", f"2 {DASH} 4", f"4 {DASH} 8"], (
        "from the first filled bin on"
    )
    assert [bin["share"] for bin in chart["bins"]] == [50, 0, 100]
    (line,) = chart["lines"]
    first, empty, last = line["points"]
    assert empty is None
    assert (first["x"], first["y"]) == pytest.approx((100 / 6, 75), abs=0.01)  # 0.1 of 0.4, the upper end
    assert (last["x"], last["y"]) == pytest.approx((500 / 6, 0), abs=0.01)
    assert line["steps"] == [], "no line over a bin without pixels"
    assert [tick["text"] for tick in chart["ticks"]] == ["1", "2", "5"]
    assert depth_chart([1, 2], {"a": np.zeros((2, 1))}, "metres") is None


# --- pictures and clouds ---------------------------------------------------------------------------------------------


def test_shrinking_keeps_sparse_measurements():
    values, valid = np.zeros((100, 1120), np.float32), np.zeros((100, 1120), bool)
    values[::2, ::2], valid[::2, ::2] = 7.0, True
    small, small_valid = shrink(values, valid)
    assert small.shape == (50, 560)
    assert small_valid.all()
    np.testing.assert_allclose(small, 7.0)


def test_thinning_takes_measured_depths_and_invents_none():
    rng = np.random.default_rng(0)
    depth = np.where(np.arange(60) < 31, 2.0, 9.0) * np.ones((40, 1))  # the edge lies inside a cell
    valid_mask = rng.random(depth.shape) < 0.3
    valid_mask[:4, :4] = False
    grid = thin(depth, valid_mask, max_points=150)
    assert grid.shape == (10, 15)
    assert set(np.unique(grid)) <= {0.0, 2.0, 9.0}
    assert grid[0, 0] == 0
    assert (grid[5, :7] == 2).all()
    assert (grid[5, 8:] == 9).all()
    np.testing.assert_array_equal(thin(depth, np.ones(depth.shape, bool), max_points=60 * 40), depth)


def test_codes_of_a_cloud_keep_depth_to_a_thousandth():
    depth = np.array([[0, 0.5, 0.73, 11, 80]], np.float32)
    codes = np.frombuffer(quantize(depth, 0.5, 80), "<u2")
    assert codes[[0, 1, 4]].tolist() == [0, 1, 65535]
    decoded = 0.5 * (80 / 0.5) ** ((codes[1:] - 1) / 65534)
    np.testing.assert_allclose(decoded, depth[0, 1:], rtol=1e-4)


def test_a_cloud_says_whether_its_camera_is_known(evaluation: Evaluation):
    near, far = (make_picture(evaluation, evaluation.images[place], "best") for place in (0, -1))
    known, assumed = cloud_context(near), cloud_context(far)
    assert not known["assumed"]
    assert known["intrinsics"] == INTRINSICS, "cells of one pixel"
    assert assumed["assumed"]
    assert math.degrees(2 * math.atan(assumed["cols"] / 2 / assumed["intrinsics"][0])) == pytest.approx(60)
    codes = np.frombuffer(base64.b64decode(known["grids"]["target"]), "<u2").reshape(SIZE)
    truth = evaluation.images[0].dataset.read(0, 0)
    np.testing.assert_array_equal(codes > 0, truth.valid_mask)
    decoded = known["near"] * (known["far"] / known["near"]) ** ((codes - 1.0) / 65534)
    np.testing.assert_allclose(decoded[truth.valid_mask], truth.depth[truth.valid_mask], rtol=1e-3)


def test_a_window_moves_the_principal_point(evaluation: Evaluation):
    assert intrinsics_of(evaluation.images[0], (40, 61)) == (50, 52, 31 - 1, 25 - 8)


def test_points_far_behind_the_ground_truth_are_left_out(evaluation: Evaluation):
    picture = make_picture(evaluation, evaluation.images[0], "best")
    sky = picture.models["exact"].grid.copy()
    sky[:10] = 80
    cloud = cloud_context(replace(picture, models={"exact": replace(picture.models["exact"], grid=sky)}))
    codes = np.frombuffer(base64.b64decode(cloud["grids"]["exact"]), "<u2").reshape(SIZE)
    assert (codes[:10] == 0).all()
    assert (codes[10:] > 0).all()


def test_numbers_are_as_long_as_they_need_to_be():
    assert [number(value) for value in (0.12345, 23.456, 1234.5, math.nan)] == ["0.1235", "23.46", "1234", DASH]
