"""Videos: every frame gets its depth, colours mean the same throughout, what is damaged is counted and named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from depthkit.inference import depth_video, video
from depthkit.inference import predict as module
from depthkit.inference.depth_files import read_values
from depthkit.inference.depth_video import SideBySide
from depthkit.inference.predict import main
from depthkit.inference.video import missing_bytes, read_frames
from depthkit.types import Prediction
from depthkit.visualize import kind_scale


class Stub:
    """Predicts the red channel / 10."""

    sha256, name, multiple, facts = "cd" * 32, "stub", 8, SimpleNamespace(short_side=16)
    kind, unit = "disparity", "relative, larger = nearer"

    def focal_lengths(self, focal_px: float | None, num_images: int) -> list[float | None]:
        return [focal_px] * num_images

    def predict(self, images: list[np.ndarray], **options: object) -> list[Prediction]:
        return [Prediction(values=depth_of(image), kind="disparity", unit=self.unit) for image in images]


def depth_of(image: np.ndarray) -> np.ndarray:
    return image[..., 0].astype(np.float32) / 10


def write_video(path: Path, num_frames: int = 10, size: tuple[int, int] = (48, 64), rate: float = 12.0) -> Path:
    """A grey ramp that moves and grows lighter; the first pixels of frame n have a value near 20 n."""
    codec = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), rate, size[::-1])
    for number in range(num_frames):
        image = np.full((*size, 3), 20 * number, np.uint8)
        image[size[0] // 2 :, :: 2 + number % 3] = 255
        writer.write(image)
    writer.release()
    return path


@pytest.fixture(autouse=True)
def fast_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "CODECS", ("mp4v",))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run(input, *arguments, stub=...)`: the command with a stub as its model, into tmp_path / "out"."""

    def run_command(source: Path, *arguments: str, stub: Stub | None = None) -> int:
        monkeypatch.setattr(module, "load", lambda path, **options: stub or Stub())
        return main(["bundle", str(source), "--out", str(tmp_path / "out"), *arguments])

    return run_command


def frames_of(path: Path) -> list[np.ndarray]:
    return [frame.image for frame in read_frames(path)]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.webm"])
@pytest.mark.parametrize("depth_format", ["png", "npy"])
def test_every_frame_has_its_depth(tmp_path: Path, run: Callable[..., int], name: str, depth_format: str):
    source = write_video(tmp_path / name)
    assert run(source, "--format", depth_format, "--batch-size", "4", "--flip") == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"clip", "clip.mp4"}
    facts = json.loads((out / "clip" / "depth.json").read_text())
    assert len(facts["frames"]) == 10
    assert {path.name for path in (out / "clip").iterdir()} == {"depth.json", *facts["frames"]}
    for number, image in enumerate(frames_of(source)):
        file = out / "clip" / f"{number:06d}.{depth_format}"
        values = read_values(file, facts["frames"][file.name])
        np.testing.assert_allclose(values, depth_of(image), atol=25.5 / 65535)
    assert (facts["kind"], facts["unit"], facts["model_sha256"]) == ("disparity", Stub.unit, "cd" * 32)
    assert (facts["size"], facts["frame_rate"], facts["source"]) == ([48, 64], 12.0, str(source))
    assert facts["flip"] is True
    assert ("formula" in facts) == (depth_format == "png")


def test_the_mp4_shows_image_and_depth_at_the_same_rate(tmp_path: Path, run: Callable[..., int]):
    source = write_video(tmp_path / "clip.mp4", size=(240, 320), rate=29.97)
    assert run(source) == 0
    with video.capture(tmp_path / "out" / "clip.mp4") as result:
        assert result.get(cv2.CAP_PROP_FPS) == pytest.approx(29.97, rel=1e-4)
        assert result.get(cv2.CAP_PROP_FRAME_COUNT) == 10
    low, high = json.loads((tmp_path / "out" / "clip" / "depth.json").read_text())["color_range"]
    assert low < 3
    assert high > 20
    scale = kind_scale("disparity", low, high)
    drawn = frames_of(tmp_path / "out" / "clip.mp4")
    for image, picture in zip(frames_of(source), drawn, strict=True):
        expected = SideBySide((240, 320), scale).draw(image, depth_of(image)).astype(float)
        assert picture.shape == expected.shape
        top = slice(0, 110)  # above the stripes, which the codec blurs
        assert np.abs(picture[top] - expected[top]).mean() < 6, "one scale for the whole video"


@pytest.mark.parametrize("size", [(480, 640), (322, 640), (31, 33), (1080, 1920), (1921, 1081), (50, 900)])
def test_layout_has_even_sides_and_both_pictures(size: tuple[int, int]):
    layout = SideBySide(size, kind_scale("disparity", 0.0, 10.0))
    image = np.full((*size, 3), (0, 200, 0), np.uint8)
    picture = layout.draw(image, np.full(size, 10.0, np.float32))
    assert picture.shape[:2] == layout.size
    assert all(side % 2 == 0 for side in layout.size)
    height, width = layout.tile
    assert width / height == pytest.approx(size[1] / size[0], rel=0.05)
    assert (picture[:height, :width] == (0, 200, 0)).all()
    assert (picture[:height, -width:] == picture[0, -1]).all()
    assert picture[0, -1].sum() > 600, "near is light"
    assert (picture[height:] < 100).any(), "a label"


def test_frames_that_cannot_be_decoded_are_named_and_the_others_are_done(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture
):
    monkey = write_video(tmp_path / "clip.mp4", num_frames=12)
    data = bytearray(monkey.read_bytes())
    starts = [index for index in range(len(data)) if data[index : index + 4] == b"\x00\x00\x01\xb6"]
    assert len(starts) == 12
    for number in (4, 5, 9):
        data[starts[number] : starts[number] + 4] = b"\x00\x00\x00\x00"
    monkey.write_bytes(data)
    assert run(tmp_path / "clip.mp4") == 1
    captured = capsys.readouterr()
    assert "clip.mp4: 3 frames (4-5, 9): could not be decoded" in captured.err
    assert "0 of 1 files" in captured.out
    facts = json.loads((tmp_path / "out" / "clip" / "depth.json").read_text())
    assert sorted(facts["frames"]) == [f"{number:06d}.png" for number in (0, 1, 2, 3, 6, 7, 8, 10, 11)]
    assert sorted(facts["failed_frames"]) == ["4", "5", "9"]
    assert len(frames_of(tmp_path / "out" / "clip.mp4")) == 9


@pytest.mark.filterwarnings("ignore:a batch failed")
def test_frames_that_cannot_be_predicted_are_named(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def predict(self: Stub, images: list[np.ndarray], **options: object) -> list[Prediction]:
        if any(90 < image[0, 0, 0] < 110 for image in images):
            raise RuntimeError("no kernel")
        values = [np.where(image[0, 0, 0] > 150, np.nan, depth_of(image)) for image in images]
        return [Prediction(values=one, kind="disparity", unit=self.unit) for one in values]

    monkeypatch.setattr(Stub, "predict", predict)
    assert run(write_video(tmp_path / "clip.mp4")) == 1
    error = capsys.readouterr().err
    assert "1 frames (5): could not be predicted: no kernel" in error
    assert "2 frames (8-9): the prediction is not finite" in error
    assert len(frames_of(tmp_path / "out" / "clip.mp4")) == 7


def test_a_cut_off_video_is_done_as_far_as_it_goes(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture
):
    path = write_video(tmp_path / "clip.avi", num_frames=12)
    data = path.read_bytes()
    assert missing_bytes(path) == 0
    middle = (data.index(b"movi") + data.index(b"idx1")) // 2
    path.write_bytes(data[:middle])
    assert missing_bytes(path) == len(data) - middle
    num_left = len(frames_of(path))
    assert 0 < num_left < 12
    assert run(path) == 1
    assert "clip.avi: the file is cut off: " in capsys.readouterr().err
    assert len(frames_of(tmp_path / "out" / "clip.mp4")) == num_left


@pytest.mark.parametrize("hidden", [0, 5000])
def test_a_video_trimmed_by_an_editor_is_whole(tmp_path: Path, run: Callable[..., int], hidden: int):
    """The edit list of an mp4 shows a part of what is stored."""
    path = write_video(tmp_path / "clip.mp4", num_frames=12)
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    duration, start, _ = struct.unpack_from(">iiI", data, entry)
    struct.pack_into(">ii", data, entry, duration // 2, start + hidden)
    path.write_bytes(data)
    assert 0 < len(frames_of(path)) < 12
    assert run(path) == 0


def test_the_rotation_of_a_phone_is_respected(tmp_path: Path, run: Callable[..., int]):
    path = write_video(tmp_path / "clip.mp4", size=(48, 64))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    assert struct.unpack_from(">9i", data, matrix) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert run(path) == 0
    assert json.loads((tmp_path / "out" / "clip" / "depth.json").read_text())["size"] == [64, 48]


@pytest.mark.parametrize("content", [b"", b"no video" * 100], ids=["empty", "text"])
def test_what_is_no_video_is_named_and_leaves_nothing(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture, content: bytes
):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "broken.mp4").write_bytes(content)
    write_video(folder / "whole.mp4", num_frames=2)
    assert run(folder) == 1
    captured = capsys.readouterr()
    assert captured.err.count("broken.mp4: no video that can be opened") == 1
    assert "1 of 2 files" in captured.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["whole", "whole.mp4"]


def test_a_video_without_a_frame_is_an_error(tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture):
    path = write_video(tmp_path / "clip.avi", num_frames=3)
    data = bytearray(path.read_bytes())
    start = data.index(b"movi")
    data[start + 4 : data.index(b"idx1")] = bytes(data.index(b"idx1") - start - 4)
    path.write_bytes(data)
    assert run(path) == 1
    assert "clip.avi" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_run_replaces_its_own_video_and_nothing_else(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture
):
    assert run(write_video(tmp_path / "clip.mp4", num_frames=6)) == 0
    assert run(write_video(tmp_path / "clip.mp4", num_frames=3), "--format", "npy") == 0
    names = {path.name for path in (tmp_path / "out" / "clip").iterdir()}
    assert names == {"000000.npy", "000001.npy", "000002.npy", "depth.json"}
    (tmp_path / "out" / "clip" / "diary.txt").write_text("mine")
    assert run(tmp_path / "clip.mp4") == 1
    assert "diary.txt would be replaced" in capsys.readouterr().err
    assert (tmp_path / "out" / "clip" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["clip.mp4", "clip/000000.png"])
def test_what_no_run_wrote_is_never_overwritten(tmp_path: Path, run: Callable[..., int], name: str):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    assert run(write_video(tmp_path / "clip.mp4", num_frames=2)) == 1
    assert foreign.read_text() == "mine"


def test_videos_beside_their_results_are_predicted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "load", lambda path, **options: Stub())
    write_video(tmp_path / "clip.avi", num_frames=2)
    for _ in range(2):
        assert main(["bundle", str(tmp_path / "**"), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"clip.avi", "clip", "clip.mp4"}


def test_a_failure_while_drawing_leaves_the_old_results(
    tmp_path: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
):
    def fail(self: SideBySide, image: np.ndarray, values: np.ndarray) -> np.ndarray:
        raise OSError("disk full")

    def results() -> dict[str, bytes]:
        files = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    path = write_video(tmp_path / "clip.mp4", num_frames=4)
    assert run(path) == 0
    before = results()
    monkeypatch.setattr(SideBySide, "draw", fail)
    assert run(write_video(path, num_frames=2)) == 1
    assert results() == before


def test_the_colour_scale_covers_the_whole_video(
    tmp_path: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(depth_video, "SCALE_FRAMES", 3)
    monkeypatch.setattr(depth_video, "SCALE_PIXELS", 100)
    assert run(write_video(tmp_path / "clip.mp4")) == 0
    low, high = json.loads((tmp_path / "out" / "clip" / "depth.json").read_text())["color_range"]
    assert low < 2
    assert high > 20
