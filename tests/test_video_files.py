"""Videos as files: cut off, rates, codecs, names."""

import struct
from pathlib import Path

import numpy as np
import pytest
from test_video import frames_of, write_video

from depthkit.inference import video
from depthkit.inference.depth_video import in_ranges
from depthkit.inference.video import Frame, VideoError, atomic_mp4, frame_rate, missing_bytes, read_frames


@pytest.fixture(autouse=True)
def fast_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "CODECS", ("mp4v",))


def test_a_cut_off_mp4_is_noticed(tmp_path: Path):
    """Of one whose index stands at its beginning the rest can be played."""
    data = write_video(tmp_path / "clip.mp4").read_bytes()
    start = data.index(b"moov") - 4
    assert missing_bytes(tmp_path / "clip.mp4") == 0
    for suffix in (".mp4", ".MOV"):
        path = (tmp_path / "cut").with_suffix(suffix)
        path.write_bytes(data[start:] + data[: start - 100])
        assert missing_bytes(path) == 100
    long = data[: data.index(b"mdat") - 4] + struct.pack(">I4sQ", 1, b"mdat", 16 + 1000) + bytes(700)
    path.write_bytes(long)
    assert missing_bytes(path) == 300
    path.write_bytes(data[: data.index(b"mdat") - 4] + struct.pack(">I4s", 0, b"mdat") + bytes(700))
    assert missing_bytes(path) == 0


def test_an_mp4_appears_whole_or_not_at_all(tmp_path: Path):
    picture = np.zeros((32, 32, 3), np.uint8)

    def write_pictures(pictures: list[np.ndarray], error: type[Exception] | None = None) -> None:
        with atomic_mp4(tmp_path / "x.mp4", 10.0, (32, 32)) as write:
            for one in pictures:
                write(one)
            assert not (tmp_path / "x.mp4").exists()
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        write_pictures([picture], KeyError)
    with pytest.raises(OSError, match="1 of 2 frames"):
        write_pictures([picture, picture[:16]])  # OpenCV leaves out what has another size
    assert not list(tmp_path.iterdir())
    write_pictures([picture])
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"]


def test_one_of_the_codecs_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.undo()
    assert len(video.CODECS) > 1
    with atomic_mp4(tmp_path / "x.mp4", 10.0, (64, 64)) as write:
        for value in (30, 200):
            write(np.full((64, 64, 3), (value, 60, 90), np.uint8))
    for value, image in zip((30, 200), frames_of(tmp_path / "x.mp4"), strict=True):
        assert np.abs(image.astype(int) - (value, 60, 90)).max() < 12
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(video, "CODECS", ("none",))
    with pytest.raises(OSError, match=r"y\.mp4"), atomic_mp4(tmp_path / "y.mp4", 10.0, (64, 64)):
        pass


def test_errors_name_the_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        next(read_frames(tmp_path / "none.mp4"))
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(VideoError, match=r"text\.mp4"):
        next(read_frames(tmp_path / "text.mp4"))


@pytest.mark.parametrize(
    ("stated", "last", "expected"),
    [
        (30.0, (60, 2.0), 30.0),
        (29.97, (60, 2.0), 29.97),  # times may be rounded to milliseconds
        (90000.0, (60, 2.0), 30.0),
        (60.0, (60, 2.0), 30.0),  # of variable rate
        (float("nan"), (60, 2.0), 30.0),
        (24.0, (0, 0.0), 24.0),
        (0.0, (0, 0.0), 25.0),
    ],
)
def test_frame_rate(stated: float, last: tuple[int, float], expected: float):
    image = np.zeros((1, 1, 3), np.uint8)
    assert frame_rate(stated, Frame(0, 0.0, image), Frame(*last, image)) == expected


def test_numbers_in_ranges():
    assert in_ranges([3, 7, 8, 9, 12, 13]) == "3, 7-9, 12-13"
