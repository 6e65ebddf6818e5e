"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

SAMPLES = Path(os.environ.get("DEPTHKIT_SAMPLES", Path(__file__).parents[2] / "shared" / "samples"))


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """Folder of real RGB-D samples (`index.jsonl` inside)."""
    if not (SAMPLES / "index.jsonl").is_file():
        pytest.skip(f"no real samples at {SAMPLES}; set DEPTHKIT_SAMPLES to a folder with index.jsonl")
    return SAMPLES
