"""Training code for monocular depth: teacher on labeled mixes, pseudo-labels for unlabeled images, student on both.

    import depthkit
    prediction = depthkit.load("runs/demo/student/bundle").predict("photo.jpg")

Importing the package is cheap: torch and Lightning come in only with the module that needs them.
"""

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")  # OpenCV reads it when it is first imported

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from depthkit.inference.loading import load
else:

    def __getattr__(name: str) -> Any:
        if name != "load":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from depthkit.inference.loading import load

        return load
