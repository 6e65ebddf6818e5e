"""The benchmarks run from beginning to end; what they measure is not judged here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("benchmark_*.py")), ids=lambda path: path.stem)
def test_benchmark_prints_its_ratio(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--quick"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    last_line = finished.stdout.splitlines()[-1]
    assert re.search(r"ratio .*\d\.\d+$", last_line), last_line
    assert not list(tmp_path.iterdir()), "it leaves files behind"


@pytest.mark.slow
def test_protocol_effects_has_a_number_for_every_choice(tiny_teacher: Path, tiny_world: Path, tmp_path: Path) -> None:
    manifest = tiny_world / "source_val" / "manifest.json"
    command = [sys.executable, str(SCRIPTS / "protocol_effects.py"), str(tiny_teacher), str(manifest)]
    finished = subprocess.run(
        [*command, "--out", "effects.md"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stderr
    rows = [line.split(" | ") for line in (tmp_path / "effects.md").read_text().splitlines() if line.endswith(" |")]
    assert len(rows) > 12
    for _, _, images, before, after, effect in rows[2:]:
        assert int(images) == 8
        assert min(float(before), float(after)) > 0
        assert re.fullmatch(r"[+-]\d+\.\d % \||x .* \|", effect)
