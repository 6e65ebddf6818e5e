"""An installed depthkit works outside a checkout: configs, manifests and templates travel in the wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the checkout without a network, so with the build backend of this environment."""
    pytest.importorskip("hatchling", reason="the wheel is built without a network: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    arguments = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *arguments, ROOT], check=True, timeout=200)
    (path,) = folder.glob("depthkit-*.whl")
    return path


def test_wheel_holds_what_a_checkout_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = (("depthkit", "*.py"), ("depthkit", "*.j2"), ("conf", "*.yaml"), ("data_manifests", "*.json"))
    for folder, pattern in (*kinds, ("hydra_plugins", "*.py")):
        prefix = "depthkit/" if folder in ("conf", "data_manifests") else ""
        for path in (ROOT / folder).rglob(pattern):
            assert f"{prefix}{path.relative_to(ROOT)}" in names
    report = {f"depthkit/evaluation/report{part}" for part in (".html.j2", ".css", "_viewer.js")}
    assert {"depthkit/slurm/train.sbatch", *report} <= names
    assert not [name for name in names if name.startswith(("tests", "conf/")) or "__pycache__" in name]


def test_wheel_trains_in_an_empty_folder(wheel, tmp_path):
    site, cwd = tmp_path / "site", tmp_path / "cwd"
    zipfile.ZipFile(wheel).extractall(site)
    cwd.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = [sys.executable, "-c", "import depthkit.config as c; print(c.__file__, c.CONF_DIR)"]
    printed = subprocess.run(where, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(site / "depthkit" / "config.py"), str(site / "depthkit" / "conf")]

    settings = ["experiment=tiny_teacher", "trainer.max_steps=2", "optim.warmup_steps=0", "data.crop_size=[32,32]"]
    for name in ("labeled.source", "val.source"):
        settings += [f"data.{name}.world.num_images=8", f"data.{name}.world.size=[32,40]"]
    command = [sys.executable, "-m", "depthkit", "train", *settings, "data.batch_size=4"]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert (cwd / "runs" / "tiny_teacher" / "bundle" / "model.json").is_file()
    assert sorted(path.name for path in cwd.iterdir()) == ["data", "runs"]
