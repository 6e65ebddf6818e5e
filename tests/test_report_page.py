"""The report in a real browser: a headless Chromium opens it, sorts, slides and turns as a reader would."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from test_report import MODELS, evaluate_scenes

from depthkit.evaluation.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NUM_IMAGES = 10_000
BACKGROUND = (0x1C, 0x16, 0x17)  # blue, green, red of a view in which there is no point

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright (extra dev) is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        # A sandbox of its own needs rights that containers seldom give; the only page is ours.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(evaluate_scenes(tmp_path_factory.mktemp("scenes")), out, num_pictures=4)
    return out / "report.html"


@pytest.fixture(scope="module")
def large_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images again and again, under other names."""
    evaluation = evaluate_scenes(tmp_path_factory.mktemp("scenes"))
    images = [
        replace(evaluation.images[number % len(evaluation.images)], key=f"image_{number:05d}", scores={
            model: dict.fromkeys(evaluation.protocol.metrics, number / NUM_IMAGES) for model in MODELS
        }) for number in range(NUM_IMAGES)
    ]  # fmt: skip
    out = tmp_path_factory.mktemp("large")
    write_report(replace(evaluation, images=images), out, num_pictures=2)
    return out / "report.html"


@pytest.fixture
def open_page(browser: "Browser") -> Iterator[Open]:
    """`open_page(path, **options of the context)`; at the end nothing was said on the console or asked from outside."""
    said: list[str] = []
    asked: list[str] = []
    with ExitStack() as stack:

        def open_one(path: Path, **options: Any) -> "Page":
            context = browser.new_context(
                **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
            )
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.as_uri())
            drawn(page.locator("#cloud-target"))
            return page

        yield open_one
    assert said == []
    assert asked
    assert [url[:80] for url in asked if not url.startswith(("file:///", "data:"))] == []


def pixels(element: "Locator") -> np.ndarray:
    """(H, W, 3) uint8, as the reader sees it."""
    element.scroll_into_view_if_needed()
    return cv2.imdecode(np.frombuffer(element.screenshot(), np.uint8), cv2.IMREAD_COLOR)


def drawn(canvas: "Locator") -> None:
    """Waits until the next frame, in which a view that has to be drawn is."""
    canvas.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    canvas.page.wait_for_function("clouds.views.length > 0")
    canvas.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the pixels that differ visibly."""
    return float((np.abs(a.astype(int) - b).max(-1) > 24).mean())


def models_shown(page: "Page") -> list[str]:
    return page.locator("#means-table tbody").first.locator("th[scope=row]").all_inner_texts()


def column(page: "Page", number: int) -> list[float]:
    rows = page.locator("#image-table tbody tr:not(.gap)")
    return [float(text) for text in rows.locator(f"td:nth-of-type({number})").all_inner_texts()]


def test_means_sort_within_their_data_set(open_page: Open, report: Path):
    page = open_page(report)
    heading = page.locator("#means-table th", has_text="abs_rel")
    assert heading.get_attribute("aria-sort") == "none"
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending", "the best first"
    assert models_shown(page) == ["exact", "<blurred>"]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert models_shown(page) == ["<blurred>", "exact"]
    groups = page.locator("#means-table tbody th[scope=rowgroup]").all_inner_texts()
    assert [text.split(" ")[0] for text in groups] == ["all", "near/test", "far/test"], "these stay where they are"


def test_images_sort_by_any_metric_and_model(open_page: Open, report: Path):
    page = open_page(report)
    assert column(page, 1) == sorted(column(page, 1), reverse=True), "the worst of the first model come first"
    page.get_by_role("button", name="<blurred>").first.click()
    assert column(page, 2) == sorted(column(page, 2), reverse=True)
    page.get_by_role("button", name="<blurred>").first.click()
    assert column(page, 2) == sorted(column(page, 2))
    page.locator("#metric").select_option(label="delta1 ↑")
    assert column(page, 2) == sorted(column(page, 2))
    assert max(column(page, 2)) <= 1
    page.get_by_role("button", name="spread", exact=True).click()
    spreads = np.abs(np.subtract(column(page, 1), column(page, 2)))
    np.testing.assert_allclose(column(page, 3), spreads, atol=2e-4)
    assert column(page, 3) == sorted(column(page, 3), reverse=True)


def test_images_are_found_by_name_and_data_set(open_page: Open, report: Path):
    page = open_page(report)
    rows = page.locator("#image-table tbody tr:not(.gap)")
    page.locator("#dataset").select_option(label="far/test")
    assert rows.count() == 5
    page.locator("#filter").fill("GE_3")
    assert rows.count() == 1
    assert "image_3" in rows.inner_text()
    assert page.get_by_role("status").inner_text() == "1 of 12"


def test_ten_thousand_images_stay_usable(open_page: Open, large_report: Path):
    page = open_page(large_report)
    rows = page.locator("#image-table tbody tr:not(.gap)")
    assert rows.count() < 40, "only rows in view exist"
    assert "image_09999" in rows.first.inner_text()
    assert page.locator("#image-table tbody .thumb img").count() <= 2
    box = page.locator(".rows")
    box.evaluate("box => { box.scrollTop = box.scrollHeight }")
    last = box.get_by_text("image_00000")
    last.wait_for()
    assert rows.count() < 40
    assert last.bounding_box()["y"] < box.bounding_box()["y"] + box.bounding_box()["height"], "in view"
    page.locator("#image-table").get_by_role("button", name="image").click()
    assert "image_00000" in rows.first.inner_text()
    page.locator("#filter").fill("777")
    assert page.get_by_role("status").inner_text() == f"{sum('777' in f'{n:05d}' for n in range(NUM_IMAGES))} of 10,000"


def test_the_slider_follows_mouse_and_keyboard(open_page: Open, report: Path):
    page = open_page(report)
    page.locator("#left").select_option(label="image")
    page.locator("#right").select_option(label="ground truth")
    slider = page.locator("#slider")
    middle = pixels(slider)
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 4, steps=4)
    page.mouse.up()
    right = pixels(slider)
    width = middle.shape[1]
    assert difference(middle[:, : width // 3], right[:, : width // 3]) < 0.02, "left of both places: the same picture"
    assert difference(middle[:, width * 6 // 10 : width * 8 // 10], right[:, width * 6 // 10 : width * 8 // 10]) > 0.5
    shown = slider.evaluate("slider => parseFloat(getComputedStyle(slider).getPropertyValue('--at'))")
    assert shown == pytest.approx(90, abs=1.5), "the divider is where the mouse is"
    handle = page.get_by_role("slider")
    handle.focus()
    page.keyboard.press("Home")
    assert slider.evaluate("slider => slider.style.getPropertyValue('--at')") == "0%"
    assert difference(pixels(slider), right) > 0.5


def test_choosing_a_layer_shows_its_scale(open_page: Open, report: Path):
    page = open_page(report)
    bars = page.locator("#bars .bar:visible")
    assert bars.all_inner_texts()[0].startswith("metres, planar z")
    page.locator("#left").select_option(label="error of exact")
    assert bars.count() == 2
    page.locator("#right").select_option(label="error of <blurred>")
    assert bars.count() == 1
    assert bars.inner_text().startswith("abs rel error")


def test_clouds_turn_together_with_the_mouse(open_page: Open, report: Path):
    page = open_page(report)
    views = [page.locator("#cloud-target"), page.locator("#cloud-prediction")]
    before = [pixels(view) for view in views]
    for view in before:
        assert 0.1 < difference(view, np.full_like(view, BACKGROUND)) < 0.95, "points before a background"
    box = views[0].bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 120, box["y"] + box["height"] / 2 + 20, steps=5)
    page.mouse.up()
    drawn(views[0])
    after = [pixels(view) for view in views]
    assert min(map(difference, before, after)) > 0.05
    assert difference(after[0], after[1]) < 0.3, "seen from the same place"
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    drawn(views[0])
    assert difference(pixels(views[0]), after[0]) == 0, "let go"
    page.get_by_role("button", name="reset view").click()
    drawn(views[0])
    assert difference(pixels(views[0]), before[0]) == 0


def test_clouds_zoom_and_turn_with_wheel_and_keys_once_focused(open_page: Open, report: Path):
    page = open_page(report)
    view = page.locator("#cloud-prediction")
    before = pixels(view)
    scrolled = page.evaluate("scrollY")
    view.hover()
    page.mouse.wheel(0, -60)
    page.wait_for_function(f"scrollY !== {scrolled}")
    drawn(view)
    assert difference(pixels(view), before) == 0, "the page scrolled instead"
    view.focus()
    for key in ("ArrowLeft", "+"):
        page.keyboard.press(key)
        drawn(view)
        after = pixels(view)
        assert difference(before, after) > 0.03, key
        before = after
    scrolled = page.evaluate("scrollY")
    view.hover()
    page.mouse.wheel(0, 300)
    drawn(view)
    assert difference(pixels(view), before) > 0.03
    assert page.evaluate("scrollY") == scrolled


def test_untouched_a_cloud_shows_the_photograph(open_page: Open, report: Path):
    """The projection is right: without a turn the points fall where the image has their colours."""
    page = open_page(report)
    page.evaluate("Object.assign(clouds.turn, { yaw: 0, pitch: 0, zoom: 1 }); drawClouds()")
    view = page.locator("#cloud-target")
    drawn(view)
    cloud = pixels(view)
    picture = cv2.imdecode(np.frombuffer(page.locator("#image-0").screenshot(), np.uint8), cv2.IMREAD_COLOR)
    height, width = cloud.shape[:2]
    scale = height / 48
    # The principal point (31, 25) of the 64 x 48 pixels lies at the middle of the view.
    place = np.float32(
        [
            [64 * scale / picture.shape[1], 0, width / 2 - 31 * scale],
            [0, 48 * scale / picture.shape[0], height / 2 - 25 * scale],
        ]
    )
    expected = cv2.warpAffine(picture, place, (width, height))
    inside = cv2.warpAffine(np.ones(picture.shape[:2], np.uint8), place, (width, height)) > 0
    off = {"as it is": expected, "below": np.roll(expected, round(6 * scale), axis=0), "mirrored": expected[:, ::-1]}
    same = {name: (np.abs(cloud.astype(int) - picture).max(-1) < 24)[inside].mean() for name, picture in off.items()}
    assert same["as it is"] > 0.8, "all but holes of the ground truth"
    assert max(same["below"], same["mirrored"]) < same["as it is"] - 0.1


def test_error_colours_and_the_camera_are_told(open_page: Open, report: Path):
    page = open_page(report)
    page.locator(".strip button").nth(0).click()
    page.locator("#cloud-model").select_option(label="<blurred>")
    drawn(page.locator("#cloud-prediction"))
    assert page.locator("#cloud-name").inner_text() == "<blurred>"
    before = pixels(page.locator("#cloud-prediction"))
    page.locator("#cloud-colors").select_option(label="by error")
    page.wait_for_timeout(100)
    drawn(page.locator("#cloud-prediction"))
    assert difference(before, pixels(page.locator("#cloud-prediction"))) > 0.1
    told = set()
    for button in page.locator(".strip button").all():
        button.click()
        page.wait_for_timeout(100)
        told.add(page.locator("#cloud-camera").inner_text().split(".")[0])
    assert told == {"Drawn with the intrinsics of the data set", "The camera of this image is not known: drawn with an "
                    "assumed field of view of 60° across"}  # fmt: skip


def test_everything_is_reached_by_the_keyboard(open_page: Open, report: Path):
    page = open_page(report)
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(document.activeElement.id || document.activeElement.className || "
                                  "document.activeElement.textContent.trim())"))  # fmt: skip
    assert {"skip", "scroll", "rows", "metric", "dataset", "filter", "left", "right", "cloud-model", "cloud-target",
            "cloud-prediction", "cloud-reset", "show"} <= reached  # fmt: skip
    page.locator("#means-table button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#means-table th").nth(1).get_attribute("aria-sort") == "ascending"


def test_every_control_and_picture_has_a_name(open_page: Open, report: Path):
    page = open_page(report)
    unnamed = page.evaluate("""[...document.querySelectorAll('select, input, button, canvas, [tabindex]')].filter(
        (element) => !(element.labels?.length || element.ariaLabel || element.textContent.trim())).length""")
    assert unnamed == 0
    assert page.evaluate("[...document.querySelectorAll('main figure img')].every((image) => image.alt)")
    assert page.evaluate("document.querySelectorAll('h1').length") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page: Open, report: Path, scheme: str):
    """At least 4.5 to 1, as WCAG 2 AA asks, of each colour of text with the surfaces it stands on."""
    page = open_page(report, color_scheme=scheme)
    pairs = {"--ink": ("--page", "--card"), "--soft": ("--page", "--card"), "--accent": ("--card", "--tint"),
             "--good": ("--page", "--card"), "--bad": ("--page", "--card"), "--warn-ink": ("--warn",)}  # fmt: skip
    colors = {
        name: page.evaluate("name => getComputedStyle(document.documentElement).getPropertyValue(name)", name)
        for name in {*pairs, *(surface for surfaces in pairs.values() for surface in surfaces)}
    }  # fmt: skip
    for ink, surfaces in pairs.items():
        for surface in surfaces:
            assert contrast(colors[ink], colors[surface]) >= 4.5, (ink, surface)
    assert (luminance(colors["--page"]) > 0.5) == (scheme == "light")


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2)."""
    digits = color.strip().lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    shares = np.array([int(digits[start : start + 2], 16) for start in (0, 2, 4)]) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(a: str, b: str) -> float:
    dark, light = sorted(map(luminance, (a, b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_the_page_fits_its_window(open_page: Open, report: Path, width: int):
    page = open_page(report, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    size = page.evaluate("Math.min(...[...document.querySelectorAll('p, td, th, label')].map("
                         "(element) => parseFloat(getComputedStyle(element).fontSize)))")  # fmt: skip
    assert size >= 12
    assert pixels(page.locator("#slider")).shape[1] > min(300, width - 80)
