"""Images and targets: every quantity against values known from elsewhere, real samples decoded twice, damage named."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from depthkit.data.codecs import CODECS
from depthkit.data.decode import decode_target, encode_disparity, target_size
from depthkit.data.manifest import TargetSpec
from depthkit.data.quarantine import SampleError

DEPTH_M = np.array([[0.5, 1.0, 2.5], [4.0, 8.0, 16.0]])


def make_spec(**changes: Any) -> TargetSpec:
    return TargetSpec(**{"quantity": "depth", "codec": "npy", "extension": "depth.npy", **changes})


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def save(array: np.ndarray, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, image_format, **options)
    return file.getvalue()


# Quantities


@pytest.mark.parametrize(
    ("spec", "stored", "facts"),
    [
        (make_spec(scale=4), DEPTH_M * 4, {}),
        (make_spec(quantity="inverse_depth", scale=10), 10 / DEPTH_M, {}),
        (
            make_spec(quantity="stereo_disparity_px", scale=2),
            2 * (0.25 * 700 / DEPTH_M - 3),
            {"intrinsics_px": [700, 690, 320, 240], "baseline_m": 0.25, "doffs_px": 3},
        ),
    ],
    ids=["depth", "inverse depth", "calibrated stereo"],
)
def test_quantity_to_depth_and_disparity(spec: TargetSpec, stored: np.ndarray, facts: dict[str, Any]) -> None:
    depth, valid_mask = decode_target(npy(stored), spec, facts, "depth")
    np.testing.assert_allclose(depth, DEPTH_M, rtol=1e-6)
    assert (depth.dtype, valid_mask.dtype, valid_mask.all()) == (np.float32, bool, True)
    disparity, _ = decode_target(npy(stored), spec, facts, "disparity")
    np.testing.assert_allclose(disparity, 1 / DEPTH_M, rtol=1e-6)


def test_ray_distance_of_a_wall_is_constant_depth() -> None:
    """A wall at 3 m facing the camera; the ray of pixel (i, j) leaves through its centre."""
    rows, cols = np.mgrid[:6, :8] + 0.5
    distance = 3 * np.sqrt(((cols - 4.2) / 5) ** 2 + ((rows - 2.9) / 6) ** 2 + 1)
    spec, facts = make_spec(quantity="ray_distance"), {"intrinsics_px": [5, 6, 4.2, 2.9]}
    depth, _ = decode_target(npy(distance), spec, facts, "depth")
    np.testing.assert_allclose(depth, np.full((6, 8), 3), rtol=1e-6)
    crop, _ = decode_target(npy(distance), spec, facts, "depth", rows=np.array([5, 1]), cols=np.array([0, 7, 3]))
    np.testing.assert_allclose(crop, np.full((2, 3), 3), rtol=1e-6)


def test_uncalibrated_stereo_stays_in_pixels() -> None:
    spec = make_spec(quantity="stereo_disparity_px", scale=4, metric=False)
    disparity, _ = decode_target(npy(DEPTH_M * 4), spec, {}, "disparity")
    np.testing.assert_allclose(disparity, DEPTH_M, rtol=1e-6)


@pytest.mark.parametrize("quantity", ["depth", "stereo_disparity_px", "disparity"])
def test_data_without_a_unit_cannot_give_metres(quantity: str) -> None:
    with pytest.raises(ValueError, match=f"{quantity} without a unit") as error:
        decode_target(npy(DEPTH_M), make_spec(quantity=quantity, metric=False), {}, "depth")
    assert not isinstance(error.value, SampleError)  # a wrong setting, not a broken sample


@pytest.mark.parametrize(
    ("quantity", "facts", "missing"),
    [
        ("ray_distance", {"baseline_m": 1}, "'intrinsics_px'; they hold baseline_m"),
        ("stereo_disparity_px", {"intrinsics_px": [1, 1, 1, 1]}, "'baseline_m'"),
        ("stereo_disparity_px", {"baseline_m": 1}, "'intrinsics_px'"),
    ],
)
def test_missing_facts_are_named(quantity: str, facts: dict[str, Any], missing: str) -> None:
    with pytest.raises(SampleError, match=missing):
        decode_target(npy(DEPTH_M), make_spec(quantity=quantity), facts, "depth")


# Masks


def test_what_is_no_measurement() -> None:
    stored = np.array([[np.nan, np.inf, -np.inf, 0], [-1, 7, 65535, 2]], np.float32)
    for kind, expected in (("depth", 2), ("disparity", 0.5)):
        target, valid_mask = decode_target(npy(stored), make_spec(invalid_values=(7, 65535)), {}, kind)
        np.testing.assert_array_equal(valid_mask, [[0, 0, 0, 0], [0, 0, 0, 1]])
        np.testing.assert_array_equal(target, [[0, 0, 0, 0], [0, 0, 0, expected]])


def test_a_conversion_without_a_positive_finite_result_is_masked() -> None:
    facts = {"intrinsics_px": [100, 100, 0, 0], "baseline_m": 1, "doffs_px": -5}
    spec = make_spec(quantity="stereo_disparity_px")
    with np.errstate(divide="ignore"):
        depth, valid_mask = decode_target(npy(np.array([[4.0, 5.0, 10.0]])), spec, facts, "depth")
    np.testing.assert_array_equal(valid_mask, [[False, False, True]])
    np.testing.assert_allclose(depth, [[0, 0, 20]])


@pytest.mark.parametrize("stored", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.full((4, 4), 9.0)])
def test_no_valid_pixel(stored: np.ndarray) -> None:
    with pytest.raises(SampleError, match="no valid pixel: all 16 stored numbers"):
        decode_target(npy(stored), make_spec(invalid_values=(9,)), {}, "disparity")


def test_an_empty_crop_of_a_good_label_is_no_error() -> None:
    stored = np.zeros((4, 4))
    stored[3, 3] = 1
    crop = np.array([0, 1])
    target, valid_mask = decode_target(npy(stored), make_spec(), {}, "disparity", rows=crop, cols=crop)
    assert not valid_mask.any()
    assert not target.any()
    only_sky = save((stored > 0).astype(np.uint8), "PNG")
    decode_target(npy(np.zeros((4, 4))), make_spec(), {}, "disparity", rows=crop, cols=crop, sky=only_sky)


@pytest.mark.parametrize("kind", ["depth", "disparity"])
def test_chosen_pixels_are_those_of_the_whole_map(kind: str) -> None:
    rng = np.random.default_rng(0)
    stored = np.where(rng.random((20, 30)) < 0.3, 0, rng.integers(1, 9000, (20, 30))).astype(np.uint16)
    data, spec = save(stored, "PNG"), make_spec(codec="png16", scale=1000)
    sky = save((rng.random((20, 30)) < 0.5).astype(np.uint8), "PNG")
    rows, cols = np.array([3, 3, 19, 0]), np.arange(30)[::-2]
    whole = decode_target(data, spec, {}, kind, sky=sky)
    part = decode_target(data, spec, {}, kind, sky=sky, rows=rows, cols=cols)
    for full_map, part_map in zip(whole, part, strict=True):
        np.testing.assert_array_equal(part_map, full_map[np.ix_(rows, cols)])


def test_sky_is_disparity_zero_where_nothing_was_measured() -> None:
    stored = np.array([[0, 0], [4, 4]], np.float32)
    sky = save(np.array([[255, 0], [1, 0]], np.uint8), "PNG")
    disparity, valid_mask = decode_target(npy(stored), make_spec(), {}, "disparity", sky=sky)
    np.testing.assert_array_equal(disparity, [[0, 0], [0.25, 0.25]])
    np.testing.assert_array_equal(valid_mask, [[1, 0], [1, 1]])
    _, valid_mask = decode_target(npy(stored), make_spec(), {}, "depth", sky=sky)
    np.testing.assert_array_equal(valid_mask, [[0, 0], [1, 1]])
    with pytest.raises(SampleError, match=r"sky mask is \(2, 2\), the label \(2, 3\)"):
        decode_target(npy(DEPTH_M), make_spec(), {}, "disparity", sky=sky)


# Pseudo-labels

PSEUDO_LABEL = make_spec(quantity="disparity", codec="png16", extension="disparity.png", metric=False)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1, 5000])
def test_pseudo_label_error_is_at_most_half_a_code(scale: float) -> None:
    disparity = (np.random.default_rng(0).random((40, 50)) * scale + 0.1 * scale).astype(np.float32)
    data, facts = encode_disparity(disparity)
    decoded, valid_mask = decode_target(data, PSEUDO_LABEL, json.loads(json.dumps(facts)), "disparity")
    bound = np.ptp(disparity.astype(np.float64)) / 65535 / 2 + np.spacing(disparity.max())
    assert np.abs(decoded.astype(np.float64) - disparity).max() <= bound
    assert valid_mask.all()


@pytest.mark.parametrize("value", [0, 0.3, 17])
def test_constant_pseudo_label_is_exact(value: float) -> None:
    disparity = np.full((3, 4), value, np.float32)
    data, facts = encode_disparity(disparity)
    decoded, valid_mask = decode_target(data, PSEUDO_LABEL, facts, "disparity")
    np.testing.assert_array_equal(decoded, disparity)
    assert valid_mask.all()


def test_pseudo_label_refuses_what_it_cannot_hold() -> None:
    for bad in (np.array([[1, np.nan]]), np.array([[1, np.inf]]), np.ones((1, 2, 2))):
        with pytest.raises(ValueError, match="one finite"):
            encode_disparity(bad)
    data, facts = encode_disparity(DEPTH_M)
    with pytest.raises(SampleError, match="'scale' and 'offset', found scale"):
        decode_target(data, PSEUDO_LABEL, {"scale": facts["scale"]}, "disparity")


# Real samples, decoded a second time by the rules of their README


def real_values(path: Path, row: dict[str, Any]) -> np.ndarray:
    """Metres or pixels in float64; 0, NaN or inf where nothing was measured."""
    codec = row["codec"]
    if codec == "npy":
        return np.load(path).astype(np.float64).squeeze()
    if codec == "pfm":
        content = path.read_bytes()
        width, height = map(int, content.split(b"\n")[1].split())
        return np.frombuffer(content[-4 * width * height :], "<f4").reshape(height, width)[::-1].astype(np.float64)
    stored = np.asarray(Image.open(path))
    if codec == "pgm16_nyu_raw":
        metres = 351.3 / (1092.5 - stored.astype(np.uint16).byteswap())
        return np.where((metres > 0) & (metres <= 10), metres, 0)
    if codec == "png16_sunrgbd":
        wide = stored.astype(np.int64)
        stored = (wide // 8 + wide * 8192) % 65536
    invalid = np.isin(stored, row.get("invalid_also", []))
    return np.where(invalid, 0, stored / np.float64(row["scale"]))


def real_spec(row: dict[str, Any]) -> TargetSpec:
    return TargetSpec(
        quantity="depth" if row["target"] == "depth" else "stereo_disparity_px",
        codec=row["codec"],
        extension="label",
        scale=row["scale"] or 1,
        metric=row["metric"],
        invalid_values=tuple(row.get("invalid_also", [])),
        aligned=row["aligned"],
    )


def test_every_real_sample(samples_dir: Path) -> None:
    rows = [json.loads(line) for line in (samples_dir / "index.jsonl").read_text().splitlines()]
    assert {row["codec"] for row in rows} >= set(CODECS) - {"pgm16", "npz", "exr"}
    for row in rows:
        data = (samples_dir / row["label"]).read_bytes()
        facts = {"intrinsics_px": row["K"], "baseline_m": row.get("baseline_m"), "doffs_px": row.get("doffs")}
        facts = {name: fact for name, fact in facts.items() if fact is not None}
        values = real_values(samples_dir / row["label"], row)
        measured = np.isfinite(values) & (values > 0)
        values = np.where(measured, values, 1)
        is_depth = row["target"] == "depth"
        depth = (
            values
            if is_depth
            else row.get("baseline_m", 0) * facts.get("intrinsics_px", [0])[0] / (values + row.get("doffs", 0))
        )
        calibrated = is_depth or "baseline_m" in row
        wanted = {"disparity": 1 / depth if calibrated else values} | ({"depth": depth} if row["metric"] else {})
        for kind, expected in wanted.items():
            target, valid_mask = decode_target(data, real_spec(row), facts, kind)
            np.testing.assert_array_equal(valid_mask, measured, err_msg=row["id"])
            np.testing.assert_allclose(target[measured], expected[measured], rtol=2e-6, err_msg=row["id"])
        assert target_size(data, row["codec"]) == values.shape, row["id"]


@pytest.mark.parametrize("scale", ["many", {}, [1], None, 10**400, float("nan")])
def test_facts_of_a_wrong_type_reject_the_sample(scale: object) -> None:
    """`KEY.json` is a file like others: what stands there may be anything."""
    png, facts = encode_disparity(np.array([[0.5, 1.0], [2.0, 4.0]], np.float32))
    spec = TargetSpec(quantity="disparity", codec="png16", extension="disparity.png", metric=False)
    with pytest.raises(SampleError, match="scale"):
        decode_target(png, spec, facts | {"scale": scale}, "disparity")
