"""The numbers of the tiny recipe are those that are stored: a change of them must be meant.

`python tests/golden/renew.py` stores new ones.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from test_train import logged

from depthkit.config import TrainConfig
from depthkit.train import run

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = {
    "teacher": [],
    # Layer scale and drop path take the student's features so far from the frozen ones that the margin matters.
    "student": ["model.encoder_args.init_values=10.0", "+model.encoder_args.drop_path_rate=0.5"],
}
NUM_EXACT = 3
"""Steps whose losses hold over machines and versions of torch to a thousandth. Then rounding may have exchanged the
pixel that is a median, or the sign of a gradient near zero, and the curves part: by up to 10% in 20 steps when the
first weights were changed by 1e-6 of themselves."""


def curves(config: TrainConfig) -> dict[str, list[float]]:
    """The losses of every step and the validation at the end, by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(config)
    finally:
        torch.set_num_threads(threads)
    found: dict[str, list[float]] = {}
    for row in logged(Path(config.run_dir)):
        for name, value in row.items():
            if name in ("loss", "loss/labeled", "loss/unlabeled", "loss/feature") or name.endswith("/abs_rel"):
                found.setdefault(name, []).append(float(value))
    return found


def differences(found: dict[str, list[float]], stored: dict[str, list[float]]) -> list[str]:
    """What is not as it was."""
    assert {name: len(values) for name, values in found.items()} == {name: len(v) for name, v in stored.items()}
    return [
        f"{name}, step {step}: was {before}, is {now}"
        for name in stored
        for step, (before, now) in enumerate(zip(stored[name], found[name], strict=True))
        if now != pytest.approx(before, rel=1e-3 if step < NUM_EXACT and name.startswith("loss") else 0.3)
    ]


@pytest.fixture
def tiny_curves(tiny_config, tmp_path):
    """`tiny_curves(stage, *overrides)`: twenty steps at a rate at which rounding does not take over at once."""

    def run_tiny(stage: str, *overrides: str) -> dict[str, list[float]]:
        settings = ["trainer.max_steps=20", "optim.encoder_lr=5e-5", "optim.warmup_steps=2", "~callbacks.panels"]
        settings += ["trainer.gradient_clip_val=1.0", *SETTINGS[stage]]
        return curves(tiny_config(stage, tmp_path / stage, *settings, *overrides))

    return run_tiny


@pytest.mark.parametrize("stage", SETTINGS)
def test_losses_are_those_that_are_stored(tiny_curves, stage):
    found, path = tiny_curves(stage), GOLDEN / f"{stage}.json"
    if os.environ.get("DEPTHKIT_RENEW_GOLDEN"):
        path.write_text(json.dumps({name: [float(f"{v:.7g}") for v in vs] for name, vs in found.items()}, indent=1))
    changed = differences(found, json.loads(path.read_text()))
    assert not changed, "\n".join([*changed, "If this is meant: python tests/golden/renew.py"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("teacher", "optim.encoder_lr=5.5e-5"),
        ("student", "optim.encoder_lr=5.5e-5"),
        ("student", "stage.tolerance_margin=0.2"),
        ("student", "data.augment.horizontal_flip=0"),
    ],
)
def test_one_changed_setting_is_seen(tiny_curves, stage, override):
    assert differences(tiny_curves(stage, override), json.loads((GOLDEN / f"{stage}.json").read_text()))
