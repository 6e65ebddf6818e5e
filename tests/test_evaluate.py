"""The evaluation of models on data sets: what the files say, what is skipped, and that nothing is skipped silently."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from depthkit.data.manifest import Manifest, Shard, TargetSpec, save_manifest
from depthkit.data.writer import ShardWriter
from depthkit.evaluation.evaluate import as_lists, doubts, evaluate, short_names
from depthkit.evaluation.outputs import results, save
from depthkit.evaluation.protocols import protocol_id
from depthkit.evaluation.results import Evaluation
from depthkit.evaluation.settings import Alignment, DepthUnit, ProtocolConfig
from depthkit.types import Kind, Prediction

PROTOCOL = ProtocolConfig(name="disparity", max_depth=80, alignment=Alignment.disparity_least_squares)
RELATIVE = replace(PROTOCOL, name="relative", unit=DepthUnit.image_maximum, max_depth=1)
DEPTH = TargetSpec(quantity="depth", codec="npy", extension="depth.npy")
SIZE = (24, 32)


@dataclass
class Stub:
    """A model that computes its prediction from the grey value of the image, which holds the depth (see `sample`)."""

    function: Callable[[np.ndarray], np.ndarray]
    kind: Kind = "disparity"
    unit: str = "relative"
    sha256: str = ""
    name: str = "stub"

    def predict(self, image: np.ndarray, *, flip: bool = False) -> Prediction:
        depth = image[..., 0].astype(np.float32) / 10
        return Prediction(values=self.function(depth).astype(np.float32), kind=self.kind, unit=self.unit)


PERFECT = Stub(lambda depth: 2 / depth + 1, sha256="ab" * 32)
CRUDE = Stub(lambda depth: np.linspace(0, 1, depth.size).reshape(depth.shape), sha256="cd" * 32)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def sample(seed: int) -> dict[str, bytes]:
    """Depth from 1 to 20 m with holes; the image shows ten times the depth as grey."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(10, 200, SIZE, dtype=np.uint8)
    depth = grey.astype(np.float32) / 10
    depth[rng.random(SIZE) < 0.2] = 0
    return {"png": cv2.imencode(".png", grey)[1].tobytes(), "depth.npy": npy(depth)}


def write_dataset(
    folder: Path, samples: list[dict[str, bytes]], target: TargetSpec | None = DEPTH, name: str = "world"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder / "test-000000.tar") as writer:
        for index, members in enumerate(samples):
            writer.add(f"image_{index}", members)
    return write_manifest(folder, writer.close(), target, name)


def write_manifest(folder: Path, shard: Shard, target: TargetSpec | None, name: str = "world") -> Path:
    manifest = Manifest(name=name, split="test", target=target, shards=(shard,), licence="none", source="test")
    save_manifest(manifest, folder / "manifest.json")
    return folder / "manifest.json"


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    near = write_dataset(tmp_path / "near", [sample(i) for i in range(5)], name="near")
    far = write_dataset(tmp_path / "far", [sample(i) for i in range(5, 8)], name="far")
    return evaluate({"perfect": PERFECT, "crude": CRUDE}, [near, far], PROTOCOL)


def test_a_perfect_model_is_perfect_and_a_crude_one_is_not(evaluation: Evaluation):
    perfect, crude = evaluation.means("perfect"), evaluation.means("crude")
    assert perfect["abs_rel"] < 1e-4
    assert perfect["delta1"] == 1
    assert crude["abs_rel"] > 0.2


def test_results_say_what_made_them(evaluation: Evaluation, tmp_path: Path):
    save(evaluation, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["protocol"]["id"] == protocol_id(PROTOCOL)
    assert stored["protocol"]["max_depth"] == 80
    assert stored["protocol"]["alignment"] == "disparity_least_squares"
    assert stored["num_images"] == 8
    assert stored["models"]["perfect"]["sha256"] == "ab" * 32
    assert stored["datasets"]["near/test"]["num_images"] == 5
    assert len(stored["datasets"]["near/test"]["manifest_digest"]) == 64
    assert {"seconds", "depthkit_version", "skipped"} <= stored.keys()


def test_means_are_the_means_of_the_per_image_file(evaluation: Evaluation, tmp_path: Path):
    save(evaluation, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    rows = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    assert len(rows) == 8 * 2
    assert {row["protocol"] for row in rows} == {protocol_id(PROTOCOL)}
    for model in ("perfect", "crude"):
        for metric in PROTOCOL.metrics:
            values = [float(row[metric]) for row in rows if row["model"] == model]
            near = [float(row[metric]) for row in rows if row["model"] == model and row["dataset"] == "near/test"]
            assert stored["models"][model]["overall"][metric] == pytest.approx(np.mean(values), rel=1e-9)
            assert stored["models"][model]["datasets"]["near/test"][metric] == pytest.approx(np.mean(near), rel=1e-9)


def test_broken_samples_are_named_and_do_not_stop_the_others(tmp_path: Path):
    broken_image = sample(1) | {"png": sample(1)["png"][:60]}
    no_depth = sample(2) | {"depth.npy": npy(np.zeros(SIZE, np.float32))}
    few = np.zeros(SIZE, np.float32)
    few[0, :9] = 2.0
    other_view = sample(4) | {"depth.npy": npy(np.ones((32, 24), np.float32))}
    samples = [sample(0), broken_image, no_depth, sample(3) | {"depth.npy": npy(few)}, other_view]
    evaluation = evaluate({"perfect": PERFECT}, [write_dataset(tmp_path, samples)], PROTOCOL)
    assert [image.key for image in evaluation.images] == ["image_0"]
    reasons = {rejection.key: rejection.reason for rejection in evaluation.skipped}
    assert list(reasons) == ["image_1", "image_2", "image_3", "image_4"]
    assert "only 9 pixels" in reasons["image_3"]
    assert "not the same view" in reasons["image_4"]
    assert results(evaluation)["datasets"]["world/test"]["num_skipped"] == 4


def test_all_images_of_a_broken_shard_are_counted(tmp_path: Path):
    good = write_dataset(tmp_path / "good", [sample(0)], name="good")
    broken = write_dataset(tmp_path / "broken", [sample(1), sample(2)], name="broken")
    tar = tmp_path / "broken" / "test-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    evaluation = evaluate({"perfect": PERFECT}, [good, broken], PROTOCOL)
    assert len(evaluation.images) == 1
    assert [rejection.dataset for rejection in evaluation.skipped] == ["broken/test"] * 2


def test_nothing_left_is_an_error_that_lists_the_reasons(tmp_path: Path):
    manifest = write_dataset(tmp_path, [sample(0) | {"png": b"no image"}])
    with pytest.raises(ValueError, match=r"no image could be evaluated:\n.*image_0: "):
        evaluate({"perfect": PERFECT}, [manifest], PROTOCOL)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (None, "no ground truth"),
        (replace(DEPTH, metric=False), "use protocol=affine_disparity_relative"),
        (replace(DEPTH, quantity="stereo_disparity_px", metric=False), "no calibration"),
        (replace(DEPTH, quantity="disparity", metric=False), "up to scale and shift"),
        (replace(DEPTH, aligned=False), "not registered"),
    ],
)
def test_data_sets_that_cannot_give_the_protocol_are_refused_with_the_reason(
    tmp_path: Path, target: TargetSpec | None, reason: str
):
    unusable = write_dataset(tmp_path / "unusable", [sample(0)], target, name="unusable")
    usable = write_dataset(tmp_path / "usable", [sample(0)])
    evaluation = evaluate({"perfect": PERFECT}, [unusable, usable], PROTOCOL)
    assert [(rejection.dataset, rejection.key) for rejection in evaluation.skipped] == [("unusable/test", "")]
    assert reason in evaluation.skipped[0].reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        evaluate({"perfect": PERFECT}, [unusable], PROTOCOL)


@pytest.mark.parametrize("quantity", ["depth", "inverse_depth"])
def test_depth_of_unknown_unit_is_scored_relative_to_its_maximum(tmp_path: Path, quantity: str):
    members = sample(0)
    if quantity == "inverse_depth":
        depth = np.load(io.BytesIO(members["depth.npy"]))
        members["depth.npy"] = npy(np.where(depth > 0, 1 / np.maximum(depth, 1), 0).astype(np.float32))
    target = replace(DEPTH, metric=False, quantity=quantity, scale=37.0)
    evaluation = evaluate({"perfect": PERFECT}, [write_dataset(tmp_path, [members], target)], RELATIVE)
    assert evaluation.means("perfect")["abs_rel"] < 1e-4


def test_a_prediction_that_is_not_finite_stops_the_evaluation(tmp_path: Path):
    manifest = write_dataset(tmp_path, [sample(0)])
    with pytest.raises(ValueError, match="model bad: its prediction for image_0 is not finite"):
        evaluate({"bad": Stub(lambda depth: depth * np.nan)}, [manifest], PROTOCOL)


def test_models_of_the_wrong_kind_are_refused(tmp_path: Path):
    manifest = write_dataset(tmp_path, [sample(0)])
    depth_protocol = replace(PROTOCOL, alignment=Alignment.depth_least_squares)
    with pytest.raises(ValueError, match=r"model perfect: .* predicts disparity"):
        evaluate({"perfect": PERFECT}, [manifest], depth_protocol)
    metric = Stub(lambda depth: depth, kind="depth", unit="metres")
    assert evaluate({"metric": metric}, [manifest], depth_protocol).means("metric")["abs_rel"] < 1e-4


def test_a_prediction_of_the_wrong_kind_is_warned_of_with_the_evidence(tmp_path: Path):
    flat = sample(3) | {"depth.npy": npy(np.full(SIZE, 2.0, np.float32))}  # without an order, which hides no other
    manifest = write_dataset(tmp_path, [*(sample(n) for n in range(3)), flat])
    swapped = Stub(lambda depth: depth)
    found = evaluate({"perfect": PERFECT, "swapped": swapped}, [manifest], PROTOCOL)
    (warning,) = found.warnings
    assert warning.startswith("swapped is said to predict disparity, but its order is reversed: median rank corr")
    assert "-1.00; is it depth passed as disparity?" in warning
    assert results(found)["warnings"] == [warning]


def test_seeds_of_one_recipe_are_not_taken_for_recipes(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch):
    recorded = {name: {"steps": 6, "seed": seed, "run_name": name} for seed, name in enumerate(["perfect", "crude"])}
    by_model = {id(model): recorded[name] for name, model in evaluation.predictors.items()}
    monkeypatch.setattr("depthkit.evaluation.evaluate.provenance_of", lambda model: by_model[id(model)])
    assert any(text.startswith("perfect, crude are one recipe with several seeds") for text in doubts(evaluation))
    recorded["crude"]["steps"] = 7
    assert not any("seeds" in text for text in doubts(evaluation))


def test_two_data_sets_of_one_name_are_refused(tmp_path: Path):
    manifests = [write_dataset(tmp_path / name, [sample(0)]) for name in "ab"]
    with pytest.raises(ValueError, match="world/test"):
        evaluate({"perfect": PERFECT}, manifests, PROTOCOL)


def test_models_get_short_names_that_differ():
    assert short_names(["runs/demo/student/bundle"]) == ["student"]
    assert short_names(["runs/teacher/bundle", "runs/student/bundle/"]) == ["teacher", "student"]
    assert short_names(["a/student", "b/student"]) == ["a/student", "b/student"]
    with pytest.raises(ValueError, match="given twice"):
        short_names(["a/x", "a/x/"])


def test_commas_make_lists():
    overrides = as_lists(["model=a/b,c=d", "dataset=x", "protocol=affine_disparity", "protocol.crop=[0,1,0,1]"])
    assert overrides == [
        'models=["a/b", "c=d"]',
        'datasets=["x"]',
        "protocol=affine_disparity",
        "protocol.crop=[0,1,0,1]",
    ]


def test_verb_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    from depthkit.evaluation import evaluate as module
    from depthkit.evaluation import models

    manifest = write_dataset(tmp_path / "data", [sample(0), sample(1)])
    monkeypatch.setattr(models, "load", lambda path, device: {"a": PERFECT, "b": CRUDE}[Path(path).name])
    out = tmp_path / "out"
    overrides = [f"model={tmp_path}/a,{tmp_path}/b", f"dataset={manifest}", "num_pictures=1", f"out={out}"]
    assert module.main(overrides) == 0
    assert {"results.json", "per_image.csv", "report.html", "grid.png"} <= {path.name for path in out.iterdir()}
    assert "affine_disparity@" in capsys.readouterr().out


def test_wrong_setting_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    from depthkit.evaluation.evaluate import main

    manifest = write_dataset(tmp_path / "data", [sample(0)])
    with pytest.raises(SystemExit):
        main([f"model={tmp_path}/none", f"dataset={manifest}", f"out={tmp_path}/out"])
    error = capsys.readouterr().err
    assert "none is not a bundle" in error
    assert "Traceback" not in error


def test_a_prediction_of_another_size_is_resized_to_the_ground_truth(tmp_path: Path):
    """A prediction at twice the size of the ground truth, constant in 2x2 blocks, scores the same."""
    manifest = write_dataset(tmp_path, [sample(0)])
    doubled = Stub(lambda depth: np.kron(2 / depth + 1, np.ones((2, 2))))
    evaluation = evaluate({"perfect": PERFECT, "doubled": doubled}, [manifest], PROTOCOL)
    assert evaluation.means("doubled") == pytest.approx(evaluation.means("perfect"), abs=1e-5)


def test_a_shard_that_is_gone_is_named_before_anything_is_scored(tmp_path: Path):
    manifest = write_dataset(tmp_path, [sample(0)])
    (tmp_path / "test-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"world/test: 1 of 1 shards are not there: .*test-000000\.tar"):
        evaluate({"perfect": PERFECT}, [manifest], PROTOCOL)


def test_a_folder_is_no_manifest(tmp_path: Path):
    write_dataset(tmp_path, [sample(0)])
    with pytest.raises(ValueError, match=rf"is a folder; give the manifest in it, {tmp_path}/manifest\.json"):
        evaluate({"perfect": PERFECT}, [str(tmp_path)], PROTOCOL)


def test_one_value_everywhere_is_warned_of(tmp_path: Path):
    flat = Stub(lambda depth: np.ones_like(depth))
    evaluation = evaluate({"flat": flat}, [write_dataset(tmp_path, [sample(0), sample(1)])], PROTOCOL)
    assert any("flat has no order of depth on any image" in warning for warning in evaluation.warnings)
