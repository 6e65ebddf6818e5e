"""`depthkit doctor` on healthy runs of every stage, and on runs that each lack one thing."""

import json
import subprocess
import sys

import pytest
import torch

from depthkit.bundle import BundleFacts, save_bundle
from depthkit.config import ConfigError
from depthkit.doctor.bench import Bench
from depthkit.doctor.doctor import examine, main
from depthkit.doctor.finding import Level
from depthkit.doctor.normalisation import check_normalisation
from depthkit.doctor.report import draw_frames
from depthkit.doctor.training import check_gradients, check_learning_rate, check_overfit, judge_rates

QUICK = ["images=12", "steps=12", "sweep_steps=8"]


@pytest.fixture
def doctor_config(compose, tiny_settings):
    """`doctor_config(stage, run_dir, *overrides)`."""

    def compose_doctor(stage, run_dir, *overrides):
        return compose(*tiny_settings(stage, run_dir), *QUICK, *overrides, config_name="doctor")

    return compose_doctor


@pytest.fixture
def bench(doctor_config, tmp_path):
    """`bench(*overrides, stage="teacher")`: a bench and the batch of its first step."""

    def build(*overrides, stage="teacher"):
        bench = Bench(doctor_config(stage, tmp_path, *overrides))
        return bench, bench.on_device(next(bench.batches())[1])

    return build


@pytest.mark.parametrize("stage", ["pretrain", "teacher", "student"])
def test_a_healthy_run_of_every_stage(doctor_config, tmp_path, stage):
    config = doctor_config(stage, tmp_path, "data.augment.horizontal_flip=0.5")
    findings = {finding.check: finding for finding in examine(config)}
    written = json.loads((tmp_path / "doctor" / "doctor.json").read_text())["findings"]
    assert [finding["check"] for finding in written] == list(findings)
    assert (tmp_path / "doctor" / "doctor.png").read_bytes().startswith(b"\x89PNG")
    assert {"flips", "normalisation", "gradients", "learning rate", "one batch by heart"} <= findings.keys()
    assert {"labels of labeled", "labels of unlabeled"} & findings.keys() == {
        "pretrain": set(),
        "teacher": {"labels of labeled"},
        "student": {"labels of labeled", "labels of unlabeled"},
    }[stage]
    # Random labels of the student's random teacher, and few images: alignment may not be seen.
    problems = {name for name, finding in findings.items() if finding.level is Level.problem}
    assert problems <= {"labels of unlabeled on their images", "labels of labeled on their images"}
    assert not [path for path in tmp_path.iterdir() if path.name != "doctor"]


def test_training_on_one_batch_is_the_same_each_time_and_leaves_the_start(bench):
    examined, batch = bench()
    first, again = (list(examined.train(batch, steps=3)) for _ in range(2))
    assert first == again
    assert first[-1] < first[0]
    assert first[0] == float(next(examined.train(batch, steps=1)))


def test_a_parameter_without_gradient_is_named(bench):
    examined, batch = bench()
    examined.module.model.decoder.forgotten = torch.nn.Linear(2, 2)
    examined.start = examined.module.state_dict()
    finding = check_gradients(examined, batch)
    assert finding.level is Level.problem
    assert "model.decoder.forgotten" in finding.text
    assert finding.values["without"] == ["model.decoder.forgotten.weight", "model.decoder.forgotten.bias"]


def test_lora_has_all_its_gradients(bench, tiny_teacher):
    finding = check_gradients(*bench("transfer=lora", f"stage.encoder_weights={tiny_teacher}"))
    assert finding.level is Level.ok
    assert finding.values["trained"] < finding.values["parameters"]


@pytest.mark.parametrize(
    ("rate", "level", "words"), [(1e3, Level.problem, "too high"), (1e-9, Level.warning, "too low")]
)
def test_rates_that_are_far_off(bench, rate, level, words):
    finding = check_learning_rate(*bench(f"optim.encoder_lr={rate}"), 12)
    assert finding.level is level, finding
    assert words in finding.text


@pytest.mark.parametrize(
    ("ratios", "level", "words"),
    [
        ((0.9, 0.5, 0.4, 0.6, 3.0), Level.ok, "in the range that learns"),
        ((0.9, 0.5, float("inf"), float("inf"), float("inf")), Level.problem, "diverges"),
        ((0.9, 0.5, 1.3, 4.0, float("inf")), Level.problem, "grows to 130%"),
        ((1.0, 1.0, 0.99, 0.9, 0.5), Level.warning, "encoder 0.1, decoder 1"),
        ((0.9, 0.3, 0.7, 2.0, 2.0), Level.warning, "the rates are high"),
    ],
)
def test_what_a_sweep_means(ratios, level, words):
    sweep = dict(zip((0.01, 0.1, 1.0, 10.0, 100.0), ratios, strict=True))
    finding = judge_rates(sweep, {"encoder": 1e-3, "decoder": 1e-2}, 15)
    assert finding.level is level
    assert words in finding.text


def test_a_network_that_ignores_the_image(bench):
    examined, batch = bench()
    forward = examined.module.model.forward
    examined.module.model.forward = lambda image: forward(torch.zeros_like(image))
    finding = check_overfit(examined, batch, 12, 1.0)
    assert finding.level is Level.problem
    assert "not used" in finding.text


def test_a_loss_that_cannot_fall(bench):
    examined, batch = bench()
    step = examined.module.training_step
    examined.module.training_step = lambda *given: {"loss": 0 * step(*given)["loss"] + 1}
    finding = check_overfit(examined, batch, 4, 1.0)
    assert finding.level is Level.problem
    assert "does not fall (1 to 1 in 4 steps)" in finding.text


def test_rates_that_are_too_high_all_along_say_nothing_of_the_labels(bench):
    examined, batch = bench()
    step = examined.module.training_step
    examined.module.training_step = lambda *given: {"loss": 0 * step(*given)["loss"] + 1}
    finding = check_overfit(examined, batch, 4, 0.01)
    assert finding.level is Level.skipped
    assert "even 0.01 times the rates of the settings is too high" in finding.text


def test_a_video_is_drawn_frame_by_frame():
    clips = torch.randint(0, 255, (2, 3, 3, 24, 32), dtype=torch.uint8)
    one, two = draw_frames(clips[:1]), draw_frames(clips)
    assert two.shape[0] > 1.5 * one.shape[0]
    assert draw_frames(clips[:, 0]).shape[1] < one.shape[1]


def test_a_loss_that_is_not_finite(bench):
    examined, batch = bench()
    step = examined.module.training_step
    examined.module.training_step = lambda *given: {"loss": step(*given)["loss"] * float("nan")}
    assert check_gradients(examined, batch).level is Level.problem
    assert check_overfit(examined, batch, 4, 1.0).level is Level.problem


def test_normalisation_is_read_off_the_way_of_a_batch(bench, tiny_teacher, tmp_path, monkeypatch):
    examined, _ = bench(f"stage.encoder_weights={tiny_teacher}")
    finding = check_normalisation(examined)
    assert finding.level is Level.ok
    assert finding.values["used"]["mean"] == pytest.approx((0.485, 0.456, 0.406), abs=1e-4)
    assert finding.values["used"]["std"] == pytest.approx((0.229, 0.224, 0.225), abs=1e-4)

    half = (0.5, 0.5, 0.5)
    model = examined.config.model
    facts = BundleFacts(content="depth_model", model=model, kind="disparity", short_side=32, mean=half, std=half)
    examined.config.stage.encoder_weights = str(save_bundle(tmp_path / "other", examined.module.model, facts))
    finding = check_normalisation(examined)
    assert finding.level is Level.warning
    assert "expect mean 0.5, 0.5, 0.5" in finding.text

    examined.config.stage.encoder_weights = "timm"  # whose ViT-Ti of 2021 was trained so too
    assert check_normalisation(examined).values["expected"]["mean"] == half
    examined.config.stage.encoder_weights = None
    assert check_normalisation(examined).level is Level.ok


def test_a_check_that_fails_is_a_finding(doctor_config, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 cannot be multiplied")

    monkeypatch.setattr("depthkit.stages.teacher.TeacherModule.training_step", broken)
    findings = {finding.check: finding for finding in examine(doctor_config("teacher", tmp_path))}
    assert "cannot be multiplied" in findings["gradients"].text
    assert findings["gradients"].level is findings["one batch by heart"].level is Level.problem
    assert findings["flips"].level is Level.ok


def test_labelling_is_not_trained(compose, tmp_path):
    settings = ["stage.bundle=b", "stage.images=i", "stage.out=o"]
    with pytest.raises(ConfigError, match="trains nothing"):
        examine(compose("stage=pseudo_label", *settings, config_name="doctor"))


@pytest.mark.slow
def test_from_the_command_line(tiny_settings, tmp_path, capsys):
    settings = tiny_settings("teacher", tmp_path)
    assert main([*settings, *QUICK, "images=24"]) == 0
    shown = capsys.readouterr().out
    assert "one batch by heart" in shown
    assert "nothing to fix" in shown
    command = [sys.executable, "-m", "depthkit", "doctor", *settings, *QUICK, "optim.encoder_lr=1e4"]
    failed = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}, check=False)
    assert failed.returncode == 1, failed.stderr
    assert "FIX" in failed.stdout
    assert "too high" in failed.stdout
