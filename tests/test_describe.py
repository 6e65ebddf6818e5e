"""A protocol in plain words."""

from dataclasses import replace
from typing import Any

import pytest

from depthkit.evaluation.describe import describe
from depthkit.evaluation.settings import Alignment, Clip, Floor, ProtocolConfig

PROTOCOL = ProtocolConfig(name="disparity", max_depth=80, alignment=Alignment.disparity_least_squares)


def test_a_protocol_is_told_in_words():
    text = describe(PROTOCOL)
    assert "a scale and a shift, by least squares in disparity" in text
    assert "Fitted disparity below 1 / the cap is raised" in text
    assert "clipped to 0.001 to 80 m." in text
    assert "means are over images" in text
    assert not {"window", "mirror", "rows", "edges"} & set(text.split())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"alignment": Alignment.none}, "nothing is fitted"),
        ({"alignment": Alignment.scale_median}, "the ratio of the medians"),
        ({"window": [352, 1216]}, "352 x 1216 pixels at the bottom centre"),
        ({"flip": True}, "mirror image"),
        ({"crop": [0.5, 1, 0, 0.25]}, "rows 50 % to 100 %, columns 0 % to 25 %"),
        ({"max_jump": 0.1}, "changes by more than 10 %"),
        ({"clip": Clip.before_alignment, "alignment": Alignment.scale_median}, "before the fit"),
        ({"floor": Floor.image_maximum}, "largest true depth of the image"),
    ],
)
def test_every_choice_is_told(changed: dict[str, Any], said: str):
    assert said not in describe(PROTOCOL)
    assert said in describe(replace(PROTOCOL, **changed))


def test_a_crop_in_pixels_is_told_in_pixels():
    assert "rows 45 to 471, columns 41 to 601" in describe(replace(PROTOCOL, crop=[45, 471, 41, 601]))
    assert "rows 25 % to 100 %, columns 0 % to 50 %" in describe(replace(PROTOCOL, crop=[0.25, 1, 0, 0.5]))
