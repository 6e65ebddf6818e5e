"""How good a label is, as it is stored: an 8-bit grey PNG of its uncertainty, and two numbers among its facts."""

from typing import Any, NamedTuple

import cv2
import numpy as np

from depthkit.data.codecs import read_png8

UNCERTAINTY = "uncertainty.png"
"""Its member, beside the label."""
MAX_CODE = 255


class Quality(NamedTuple):
    """Of one label, as `ensembling.Ensemble` has them: `uncertainty` (H, W), and `disagreement` of the whole."""

    uncertainty: np.ndarray
    disagreement: float

    def encode(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The members and the facts to store beside the label."""
        png, scale = encode_uncertainty(self.uncertainty)
        return {UNCERTAINTY: png}, {"uncertainty_scale": scale, "disagreement": self.disagreement}


def encode_uncertainty(uncertainty: np.ndarray) -> tuple[bytes, float]:
    """Uncertainty (H, W) >= 0 to an 8-bit PNG and its `uncertainty_scale`, the largest value.

    `code = round(uncertainty / uncertainty_scale * 255)`, so the error is at most `uncertainty_scale / 510`.
    """
    scale = float(uncertainty.max())
    codes = np.rint(uncertainty * (MAX_CODE / scale if scale > 0 else 0)).astype(np.uint8)
    written, png = cv2.imencode(".png", codes)
    assert written
    return png.tobytes(), scale


def decode_uncertainty(data: bytes, scale: float) -> np.ndarray:
    """(H, W) float32 from the PNG and the `uncertainty_scale` of its sample; SampleError when it is damaged."""
    return read_png8(data).astype(np.float32) * np.float32(scale / MAX_CODE)
