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
