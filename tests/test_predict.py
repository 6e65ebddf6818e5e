"""Predicting files: what is written can be read back, nothing of others is overwritten, what failed is named."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from depthkit.inference import depth_files
from depthkit.inference import predict as module
from depthkit.inference.depth_files import DepthJob
from depthkit.inference.predict import find_inputs, is_result, main, output_bases, predict_files
from depthkit.types import Kind, Prediction


class Stub:
    """Predicts (red - 64) / 10, so that every image has its own values; notes the batches and options it was given."""

    sha256, name, multiple, facts = "cd" * 32, "stub", 8, SimpleNamespace(short_side=16)

    def __init__(self, kind: Kind = "disparity", unit: str = "relative, larger = nearer") -> None:
        self.kind, self.unit = kind, unit
        self.batches: list[list[tuple[int, ...]]] = []
        self.options: dict[str, object] = {}
        self.check: Callable[[list[np.ndarray]], None] = lambda images: None

    def focal_lengths(self, focal_px: float | None, num_images: int) -> list[float | None]:
        return [focal_px] * num_images

    def predict(self, images: list[np.ndarray], **options: object) -> list[Prediction]:
        self.batches.append([image.shape[:2] for image in images])
        self.options = options
        self.check(images)
        return [Prediction(values=depth_of(image), kind=self.kind, unit=self.unit) for image in images]


def depth_of(image: np.ndarray) -> np.ndarray:
    return ((image[..., 0].astype(np.float32) - 64) / 10).astype(np.float32)


def write_image(path: Path, size: tuple[int, int] = (20, 30), seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    cv2.imwrite(str(path), image[..., ::-1])
    return image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed, name in enumerate(("a.jpg", "b.JPG", "c.png")):
        write_image(folder / name, seed=seed)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run(input, *arguments, stub=...)`: the command with a stub as its model, into tmp_path / "out"."""

    def run_command(source: Path, *arguments: str, stub: Stub | None = None) -> int:
        monkeypatch.setattr(module, "load", lambda path, **options: stub or Stub())
        return main(["bundle", str(source), "--out", str(tmp_path / "out"), *arguments])

    return run_command


@pytest.mark.parametrize(("kind", "unit"), [("disparity", "relative, larger = nearer"), ("depth", "metres, planar z")])
def test_values_come_back_within_half_a_code(tmp_path: Path, kind: Kind, unit: str):
    path = tmp_path / "photos" / "a.png"
    expected = depth_of(write_image(path))
    job = DepthJob(predictor=Stub(kind, unit), options={"flip": True, "short_side": 70})
    assert predict_files(job, output_bases([path], tmp_path / "out")) == {}
    facts = json.loads((tmp_path / "out" / "a.json").read_text())
    codes = cv2.imread(str(tmp_path / "out" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert codes.dtype == np.uint16
    assert list(codes.shape) == facts["size"] == [20, 30]
    restored = codes / 65535 * facts["scale"] + facts["offset"]
    assert np.abs(restored - expected).max() <= facts["scale"] / 65535 / 2 * 1.001
    assert facts["formula"] == "value = code / 65535 * scale + offset"
    assert (facts["kind"], facts["unit"], facts["model_sha256"], facts["model"]) == (kind, unit, "cd" * 32, "stub")
    assert (facts["source"], facts["flip"], facts["short_side"]) == (str(path), True, 70)
    assert "tile" not in facts
    assert cv2.imread(str(tmp_path / "out" / "a.color.png")) is not None


def test_npy_holds_the_values_themselves(tmp_path: Path, run: Callable[..., int]):
    expected = depth_of(write_image(tmp_path / "a.png"))
    assert run(tmp_path / "a.png", "--format", "npy") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.npy", "a.json", "a.color.png"}
    values = np.load(tmp_path / "out" / "a.npy")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)
    assert not {"formula", "scale", "offset"} & json.loads((tmp_path / "out" / "a.json").read_text()).keys()


def test_the_picture_says_what_its_colours_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels = []
    draw = depth_files.with_color_bar
    monkeypatch.setattr(
        depth_files, "with_color_bar", lambda picture, scale: labels.append(scale.label) or draw(picture, scale)
    )
    for stub in (Stub(), Stub("depth", "metres, planar z")):
        depth_files.color_picture(stub.predict([np.full((20, 30, 3), 200, np.uint8)])[0])
    assert labels == ["relative disparity, larger = nearer", "metres, planar z"]


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((480, 640), (480, 640)), ((30, 40), (360, 480)), ((4000, 6000), (1280, 1920)), ((900, 300), (1440, 480))],
)
def test_pictures_are_neither_tiny_nor_huge(size: tuple[int, int], fitted: tuple[int, int]):
    assert depth_files.fitted_size(size, min_width=480, max_side=1920) == fitted


def test_inputs_are_a_file_a_folder_or_a_pattern(photos: Path):
    (photos / "clip.MP4").write_bytes(b"")
    assert [path.name for path in find_inputs(str(photos))] == ["a.jpg", "b.JPG", "c.png", "clip.MP4"]
    assert find_inputs(str(photos / "a.jpg")) == [photos / "a.jpg"]
    assert [path.name for path in find_inputs(str(photos.parent / "**" / "*.png"))] == ["c.png"]
    with pytest.raises(FileNotFoundError, match="no image or video found"):
        find_inputs(str(photos / "*.tiff"))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["p/a/x.jpg", "p/b/x.jpg"], ["a/x", "b/x"]),
        (["p/x.jpg", "p/y.jpg"], ["x", "y"]),
        (["p/x.jpg", "p/x.png"], ["x.jpg", "x.png"]),
        (["p/x.jpg", "p/X.png"], ["x.jpg", "X.png"]),
        (["p/x.jpg", "p/x.color.jpg"], ["x.jpg", "x.color.jpg"]),
        (["p/v1.2/x.jpg"], ["x"]),
        (["p/x.jpg", "p/x.mp4"], ["x", "x"]),
        (["p/x/000000.jpg", "p/x.mp4"], ["x/000000.jpg", "x.mp4"]),
        (["p/x.mov", "p/x.mp4"], ["x.mov", "x.mp4"]),
    ],
)
def test_no_two_inputs_share_a_result(inputs: list[str], expected: list[str]):
    bases = output_bases([Path(path) for path in inputs], Path("out"))
    assert [str(base) for base in bases.values()] == [f"out/{name}" for name in expected]


def test_an_input_is_never_overwritten(photos: Path):
    with pytest.raises(ValueError, match=r"c\.png would be replaced"):
        output_bases([photos / "a.jpg", photos / "c.png"], photos)
    (photos / "link").symlink_to(photos)
    with pytest.raises(ValueError, match=r"c\.png would be replaced"):
        output_bases([photos / "c.png"], photos / "link")
    (photos / "clip.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"clip\.mp4 would be replaced"):
        output_bases([photos / "clip.mp4"], photos)


def test_a_result_may_be_an_input_and_is_not_overwritten_then(tmp_path: Path, photos: Path, run: Callable[..., int]):
    assert run(photos / "a.jpg") == 0
    with pytest.raises(ValueError, match=r"a\.png would be replaced"):
        output_bases([tmp_path / "out" / "a.png"], tmp_path / "out")


@pytest.mark.parametrize("name", ["a.json", "a.png", "a.color.png"])
def test_what_no_run_wrote_is_never_overwritten(
    tmp_path: Path, photos: Path, run: Callable[..., int], capsys: pytest.CaptureFixture, name: str
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"values": "a.png"}')
    assert run(photos) == 1
    assert f"{name} would be replaced" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_run_replaces_its_own_results(tmp_path: Path, photos: Path, run: Callable[..., int]):
    def results() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    assert run(photos) == 0
    first = results()
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".png":
            path.write_bytes(b"old")
    assert run(photos) == 0
    assert results() == first
    assert len(first) == 9
    assert run(photos, "--format", "npy") == 0
    assert run(photos) == 0
    assert results() == first, "a change of the format leaves nothing of the other one"


def test_results_beside_the_inputs_are_no_inputs_of_the_next_run(photos: Path, monkeypatch: pytest.MonkeyPatch):
    (photos / "c.png").unlink()
    monkeypatch.setattr(module, "load", lambda path, **options: Stub())
    for _ in range(2):
        assert main(["bundle", str(photos), "--out", str(photos)]) == 0
    assert [path.name for path in find_inputs(str(photos / "*[gG]"))] == ["a.jpg", "b.JPG"]
    assert len(list(photos.iterdir())) == 3 + 2 * 3
    assert is_result(photos / "a.png")
    assert is_result(photos / "a.color.png")
    assert not is_result(photos / "a.jpg")


def test_images_of_one_size_for_the_network_share_a_batch(tmp_path: Path):
    sizes = [(32, 48), (48, 32), (32, 48), (32, 49), (48, 32), (32, 48), (64, 96), (32, 48)]
    for number, size in enumerate(sizes):
        write_image(tmp_path / "photos" / f"{number}.png", size, seed=number)
    stub = Stub()
    bases = output_bases(find_inputs(str(tmp_path / "photos")), tmp_path / "out")
    assert predict_files(DepthJob(predictor=stub, batch_size=3), bases) == {}
    assert sorted(map(len, stub.batches)) == [2, 3, 3]
    assert all(len({height > width for height, width in batch}) == 1 for batch in stub.batches)
    for number, size in enumerate(sizes):
        facts = json.loads((tmp_path / "out" / f"{number}.json").read_text())
        assert facts["source"] == str(tmp_path / "photos" / f"{number}.png")
        assert facts["size"] == list(size)
        expected = depth_of(cv2.imread(facts["source"])[..., ::-1])
        assert facts["offset"] + facts["scale"] == pytest.approx(expected.max(), rel=1e-6)


def test_few_images_wait_for_others_of_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(6):
        write_image(tmp_path / "photos" / f"{number}.png", (16, 16 * (number + 1)))
    monkeypatch.setattr(module, "WAITING_PIXELS", 16 * 16 * 4)
    stub, read = Stub(), []
    monkeypatch.setattr(module, "read_image", lambda path: read.append(path) or depth_files.cv2.imread(str(path)))
    monkeypatch.setattr(module, "IMAGES_AHEAD", 1)
    stub.check = lambda images: read.append(None)
    bases = output_bases(find_inputs(str(tmp_path / "photos")), tmp_path / "out")
    assert predict_files(DepthJob(predictor=stub, batch_size=8), bases) == {}
    assert len(stub.batches) == 6
    assert read.index(None) < 6, "the first batch does not wait until all are read"


def test_an_unreadable_file_is_named_and_the_others_are_done(
    tmp_path: Path, photos: Path, run: Callable[..., int], capsys: pytest.CaptureFixture
):
    (photos / "aa_broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:30])
    assert run(photos) == 1
    captured = capsys.readouterr()
    assert captured.err.count("aa_broken.jpg") == 1
    assert "3 of 4 files" in captured.out
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"a.json", "b.json", "c.json"}
    assert len(list((tmp_path / "out").iterdir())) == 3 * 3


@pytest.mark.filterwarnings("always")
def test_a_batch_that_fails_is_tried_one_by_one(
    tmp_path: Path, photos: Path, run: Callable[..., int], capsys: pytest.CaptureFixture
):
    def check(images: list[np.ndarray]) -> None:
        if len(images) > 1:
            raise MemoryError

    stub = Stub()
    stub.check = check
    with pytest.warns(RuntimeWarning, match=r"MemoryError.*--batch-size"):
        assert run(photos, stub=stub) == 0
    assert [len(batch) for batch in stub.batches] == [3, 1, 1, 1]
    assert "3 of 3 files" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:a batch failed")
def test_a_prediction_that_fails_is_named(
    tmp_path: Path, photos: Path, run: Callable[..., int], capsys: pytest.CaptureFixture
):
    def check(images: list[np.ndarray]) -> None:
        if any(image.shape[:2] == (21, 30) for image in images):
            raise RuntimeError("no kernel")

    write_image(photos / "b.JPG", (21, 30))
    stub = Stub()
    stub.check = check
    assert run(photos, stub=stub) == 1
    captured = capsys.readouterr()
    assert "b.JPG: RuntimeError: no kernel" in captured.err
    assert "2 of 3 files" in captured.out
    assert not list((tmp_path / "out").glob("b.*"))


def test_values_that_are_not_finite_are_no_result(
    tmp_path: Path, photos: Path, run: Callable[..., int], capsys: pytest.CaptureFixture, monkeypatch
):
    nothing = Prediction(values=np.full((20, 30), np.nan, np.float32), kind="disparity", unit="")
    monkeypatch.setattr(Stub, "predict", lambda self, images, **options: [nothing] * len(images))
    for depth_format in ("png", "npy"):
        assert run(photos / "a.jpg", "--format", depth_format) == 1
        assert "a.jpg: the prediction is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_failure_while_writing_leaves_the_old_results_whole(
    tmp_path: Path, photos: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
):
    def fail(prediction: Prediction) -> bytes:
        raise OSError("disk full")

    assert run(photos / "a.jpg") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_image(photos / "a.jpg", seed=7)
    monkeypatch.setattr(depth_files, "color_picture", fail)
    assert run(photos / "a.jpg") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_options_reach_the_model(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    stub, loading = Stub(), {}
    monkeypatch.setattr(module, "load", lambda path, **options: loading.update(options, path=path) or stub)
    out = ["--out", str(tmp_path / "out")]
    chosen = ["--short-side", "70", "--flip", "--tile", "140", "--batch-size", "2", "--device", "cpu"]
    more = ["--precision", "bfloat16", "--compile", "--taps", "v2", "--max-depth", "20"]
    assert main(["weights.pth", str(photos), *out, *chosen, *more]) == 0
    assert stub.options == {"short_side": 70, "flip": True, "tile": 140, "batch_size": 2}
    assert loading.pop("path") == "weights.pth"
    assert loading == {"device": "cpu", "precision": "bfloat16", "compile": True, "taps": "v2", "max_depth": 20.0}
    facts = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (facts["short_side"], facts["flip"], facts["tile"]) == (70, True, 140)


@pytest.mark.parametrize("option", ["--short-side", "--tile", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-3", "many", "nan"])
def test_numbers_are_above_zero(photos: Path, run: Callable[..., int], option: str, value: str, capsys):
    with pytest.raises(SystemExit) as stop:
        run(photos, option, value)
    assert stop.value.code == 2
    assert option in capsys.readouterr().err


def test_a_missing_bundle_is_one_line(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path / "none"), str(photos), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert not (tmp_path / "out").exists()


def test_a_real_model_predicts_the_same_as_from_python(tmp_path: Path, photos: Path, tiny_teacher: Path):
    from depthkit.inference.loading import load

    command = [str(tiny_teacher), str(photos), "--out", str(tmp_path / "out"), "--format", "npy", "--device", "cpu"]
    assert main([*command, "--flip", "--batch-size", "2"]) == 0
    predictor = load(tiny_teacher, device="cpu")
    for name in ("a.jpg", "b.JPG", "c.png"):
        expected = predictor.predict(photos / name, flip=True).values
        values = np.load((tmp_path / "out" / name).with_suffix(".npy"))
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    facts = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (facts["model"], facts["model_sha256"]) == (str(tiny_teacher), predictor.sha256)
