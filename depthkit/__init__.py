"""Training code for monocular depth: teacher on labeled mixes, pseudo-labels for unlabeled images, student on both.

    import depthkit
    prediction = depthkit.load("runs/demo/student/bundle").predict("photo.jpg")

Importing the package is cheap: torch and Lightning come in only with the module that needs them.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from depthkit.inference import Predictor


def load(path: str, device: str = "auto") -> "Predictor":
    """Load a model for prediction; see `depthkit.inference.load`."""
    from depthkit.inference import load as load_predictor

    return load_predictor(path, device=device)
