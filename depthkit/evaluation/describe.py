"""A protocol in plain words, for readers who do not know its settings."""

from depthkit.evaluation.settings import (
    IN_DISPARITY,
    Aggregation,
    Alignment,
    Clip,
    DepthUnit,
    Floor,
    GroundTruth,
    ProtocolConfig,
)

FITTED = {
    Alignment.disparity_least_squares: "a scale and a shift, by least squares in disparity (1 / depth)",
    Alignment.depth_least_squares: "a scale and a shift, by least squares in depth",
    Alignment.log_least_squares: "a scale and a shift, by least squares in the logarithm of depth",
    Alignment.disparity_robust: "a scale and a shift, by least absolute deviations in disparity (1 / depth)",
    Alignment.depth_robust: "a scale and a shift, by least absolute deviations in depth",
    Alignment.scale_least_squares: "a scale, by least squares in depth",
    Alignment.scale_median: "a scale, the ratio of the medians",
}
UNITS = {DepthUnit.metres: "m", DepthUnit.image_maximum: "times the largest depth of the image"}
FLOORS = {Floor.cap: "1 / the cap", Floor.image_maximum: "1 / the largest true depth of the image"}
CLIPPED = {Clip.after_alignment: "", Clip.before_alignment: " before the fit"}
AGGREGATED = {
    Aggregation.images: "A metric is a number per image; means are over images.",
    Aggregation.pixels: "A metric is one number over all images together.",
}


def describe(protocol: ProtocolConfig) -> str:
    """What `protocol` does, step by step, in whole sentences; steps that do nothing are not mentioned."""
    sentences = []
    if protocol.window is not None:
        height, width = protocol.window
        sentences.append(f"Images and ground truth are cut to the {height} x {width} pixels at the bottom centre.")
    if protocol.flip:
        sentences.append("A prediction is the mean over the image and its mirror image.")
    is_of_pairs = protocol.ground_truth is GroundTruth.pairs
    sentences += _of_pairs() if is_of_pairs else _of_maps(protocol)
    return " ".join([*sentences, AGGREGATED[protocol.aggregation]])


def _of_pairs() -> list[str]:
    return ["A model is asked which point of each annotated pair is closer to the camera; nothing is fitted."]


def _of_maps(protocol: ProtocolConfig) -> list[str]:
    limits = _limits(protocol)
    sentences = ["Predictions are compared as they are: nothing is fitted to the ground truth."]
    if protocol.alignment in FITTED:
        sentences = [f"Each prediction is fitted to the ground truth of its image with {FITTED[protocol.alignment]}."]
    if protocol.alignment in IN_DISPARITY and protocol.floor in FLOORS:
        sentences.append(f"Fitted disparity below {FLOORS[protocol.floor]} is raised to that.")
    if protocol.clip in CLIPPED and limits:
        sentences.append(f"Predicted depth is clipped to {limits}{CLIPPED[protocol.clip]}.")
    pixels = f"Pixels count where the true depth is {f'within {limits}' if limits else 'known'}"
    if protocol.crop is not None:
        in_pixels = max(protocol.crop) > 1
        top, bottom, left, right = (f"{b:g}" if in_pixels else f"{100 * b:.4g} %" for b in protocol.crop)
        pixels += f", rows {top} to {bottom}, columns {left} to {right}"
    if protocol.max_jump is not None:
        pixels += f", away from edges where depth changes by more than {100 * protocol.max_jump:g} %"
    return [*sentences, pixels + "."]


def _limits(protocol: ProtocolConfig) -> str:
    if protocol.max_depth is None:
        return ""
    return f"{protocol.min_depth:g} to {protocol.max_depth:g} {UNITS[protocol.unit]}"
