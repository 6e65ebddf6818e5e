"""Loss curves of the tiny recipe, stored beside this file. Write them again, when a change of numbers is meant:

python tests/golden/renew.py
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER.parent / "test_golden.py")]
    environment = os.environ | {"DEPTHKIT_RENEW_GOLDEN": "1", "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run(command, env=environment, cwd=FOLDER.parents[1]).returncode)
