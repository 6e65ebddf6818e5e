"""README's section about published models, run line by line: from an official file to depth maps, from a trained
student to a pipeline of `transformers`."""

import re
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from depthkit.__main__ import main
from depthkit.formats.official import published, write_checkpoint
from depthkit.models import build_model
from depthkit.train import run

pytest.importorskip("transformers", reason="comes with depthkit[dev]")

README = Path(__file__).parents[1] / "README.md"
SECTION = README.read_text().split("## Published models, in and out")[1].split("\n## ")[0]
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config) -> Path:
    """What a reader has: an official checkpoint (with random weights), photos, a video, and a trained student."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    write_checkpoint(build_model(published(384)), folder / "depth_anything_v2_vits.pth")
    (folder / "photos").mkdir()
    for name in ("street", "garden"):
        image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        cv2.imwrite(str(folder / "photos" / f"{name}.jpg"), cv2.resize(image, (128, 96)))
    video = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 48))
    for shade in (50, 100, 150):
        video.write(np.full((48, 64, 3), shade, np.uint8))
    video.release()
    run(tiny_config("student", folder / "runs" / "my_student", "model.conv_stem=false", "stage.encoder_weights=null"))
    return folder


@pytest.mark.slow
def test_every_line_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert [language for language, _ in BLOCKS] == ["bash", "bash", "python"]
    for language, text in BLOCKS:
        if language == "python":
            scope: dict[str, object] = {}
            exec(text, scope)
            assert scope["depth"].size == (128, 96)
            continue
        for line in text.splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            assert main() == 0, (line, capsys.readouterr().err)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names >= {
        "bundles/da_v2_vits/model.json",
        "predictions/street.png",
        "predictions/garden.color.png",
        "predictions/clip.mp4",
        "exported/my_student/README.md",
        "exported/my_student.onnx",
        "exported/my_student.pth",
    }
    card = (folder / "exported" / "my_student" / "README.md").read_text()
    assert "procedural_source" in card
