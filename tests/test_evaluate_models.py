"""What can be evaluated: every format of a model, and predictions that another program left on disk."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_evaluate import PROTOCOL, SIZE, Stub, npy, sample, write_dataset

from depthkit.evaluation.evaluate import evaluate, main, prepare
from depthkit.evaluation.models import load_models, split_options
from depthkit.evaluation.settings import Alignment

METRES = replace(PROTOCOL, name="metres", alignment=Alignment.none)


def depth_of(members: dict[str, bytes]) -> np.ndarray:
    """The true depth, without the holes, that the grey value of the image shows."""
    return cv2.imdecode(np.frombuffer(members["png"], np.uint8), 0).astype(np.float32) / 10


def npz(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, values)
    return file.getvalue()


def store(folder: Path, maps: dict[str, np.ndarray], encode: Callable[[np.ndarray], bytes], extension: str) -> Path:
    for key, values in maps.items():
        path = folder / f"{key}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(values))
    return folder


def stored(folder: Path, **facts: object) -> Path:
    (folder / "predictions.json").write_text(json.dumps(facts))
    return folder


def load(folder: Path) -> dict[str, object]:
    return load_models({"stored": str(folder)}, "cpu")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", [sample(0), sample(1)])


@pytest.fixture
def maps() -> dict[str, np.ndarray]:
    """A disparity of some error for every image."""
    return {f"image_{n}": 2 / depth_of(sample(n)) ** 0.5 for n in range(2)}


ROUGH = Stub(lambda depth: 2 / depth**0.5)


@pytest.mark.parametrize(("encode", "extension"), [(npy, "npy"), (npz, "npz")])
def test_predictions_on_disk_have_the_numbers_of_the_model(manifest, maps, tmp_path, encode, extension):
    folder = stored(store(tmp_path / "p", maps, encode, extension), kind="disparity")
    found = evaluate({"model": ROUGH} | load(folder), [manifest], PROTOCOL)
    assert found.means("stored") == found.means("model")
    assert [image.scores["stored"] for image in found.images] == [image.scores["model"] for image in found.images]


@pytest.mark.parametrize("layout", ["p", "p/world", "p/world/test"])
def test_predictions_may_lie_in_a_folder_of_their_data_set(manifest, maps, tmp_path, layout):
    store(tmp_path / layout, maps, npy, "npy")
    found = evaluate(load(stored(tmp_path / "p", kind="disparity")), [manifest], PROTOCOL)
    assert found.means("stored") == evaluate({"model": ROUGH}, [manifest], PROTOCOL).means("model")


def test_scale_and_kind_are_as_stated(manifest, tmp_path):
    """Millimetres in a 16-bit PNG, as depth."""
    maps = {f"image_{n}": (depth_of(sample(n)) * 1000).astype(np.uint16) for n in range(2)}
    folder = store(tmp_path / "p", maps, lambda values: cv2.imencode(".png", values)[1].tobytes(), "png")
    found = evaluate(load(stored(folder, kind="depth", unit="metres", scale=1000)), [manifest], METRES)
    assert found.means("stored")["abs_rel"] < 1e-6
    assert found.predictors["stored"].kind == "depth"
    by_options = load_models({"stored": f"{folder}:kind=depth:scale=500"}, "cpu")
    assert evaluate(by_options, [manifest], METRES).means("stored")["abs_rel"] == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match="unit of the predictions is relative"):
        evaluate(load(stored(folder, kind="depth", unit="relative", scale=1000)), [manifest], METRES)


@pytest.mark.parametrize("scale", [1, 1e6])
def test_the_unit_of_relative_depth_changes_nothing(manifest, tmp_path, scale):
    maps = {f"image_{n}": depth_of(sample(n)) for n in range(2)}
    folder = stored(store(tmp_path / "p", maps, npy, "npy"), kind="depth", unit="relative", scale=scale)
    assert evaluate(load(folder), [manifest], PROTOCOL).means("stored")["abs_rel"] < 1e-5


def test_predictions_of_another_size_follow_the_resize_rule(manifest, maps, tmp_path):
    doubled = {key: np.kron(values, np.ones((2, 2))) for key, values in maps.items()}
    folder = stored(store(tmp_path / "p", doubled, npy, "npy"), kind="disparity")
    found = evaluate({"model": ROUGH} | load(folder), [manifest], PROTOCOL)
    assert found.means("stored") == pytest.approx(found.means("model"), abs=1e-5)


def test_what_predict_writes_can_be_evaluated(tmp_path):
    """16-bit codes with a scale and offset of their own for each image."""
    from depthkit.inference.depth_files import DepthJob, write_prediction

    manifest = write_dataset(tmp_path / "data", [sample(0), sample(1)])
    predictor = replace(ROUGH, sha256="ef" * 32)
    for n in range(2):
        image = cv2.imdecode(np.frombuffer(sample(n)["png"], np.uint8), cv2.IMREAD_COLOR_RGB)
        job = DepthJob(predictor=predictor)
        write_prediction(predictor.predict(image), tmp_path / "p" / f"image_{n}", Path("x"), job)
    found = evaluate({"model": ROUGH} | load(stored(tmp_path / "p", kind="disparity")), [manifest], PROTOCOL)
    assert found.means("stored") == pytest.approx(found.means("model"), rel=1e-3)
    with pytest.raises(ValueError, match="says disparity"):
        evaluate(load(stored(tmp_path / "p", kind="depth")), [manifest], PROTOCOL)


def test_missing_predictions_are_counted_and_named_before_anything_is_predicted(tmp_path, maps):
    """Not those for images that cannot be used."""
    broken = sample(3) | {"png": b"no image"}
    manifest = write_dataset(tmp_path / "data", [sample(0), sample(1), sample(2), broken])
    folder = stored(store(tmp_path / "p", maps, npy, "npy"), kind="disparity")
    with pytest.raises(ValueError, match=r"model stored: 1 of 4 predictions are missing: .*p/image_2$"):
        prepare(load(folder), [manifest], PROTOCOL)
    store(folder, {"image_2": maps["image_1"]}, npy, "npy")
    found = evaluate(load(folder), [manifest], PROTOCOL)
    assert [image.key for image in found.images] == ["image_0", "image_1", "image_2"]
    assert [rejection.key for rejection in found.skipped] == ["image_3"]


def test_predictions_for_one_data_set_are_not_taken_for_another(tmp_path, maps):
    manifests = [write_dataset(tmp_path / name, [sample(0), sample(1)], name=name) for name in ("near", "far")]
    folder = stored(store(tmp_path / "p", maps, npy, "npy"), kind="disparity")
    with pytest.raises(ValueError, match="near/test, far/test: their predictions would all be read from"):
        evaluate(load(folder), manifests, PROTOCOL)
    store(folder / "far", maps, npy, "npy")
    store(folder / "near", {key: values[::-1] for key, values in maps.items()}, npy, "npy")
    found = evaluate({"model": ROUGH} | load(folder), manifests, PROTOCOL)
    assert found.means("stored", "far/test") == found.means("model", "far/test")
    assert found.means("stored", "near/test")["abs_rel"] > found.means("model", "near/test")["abs_rel"]


def test_what_is_wrong_with_predictions_is_named(manifest, maps, tmp_path):
    folder = store(tmp_path / "p", maps, npy, "npy")
    for facts, message in [
        ({}, "kind: missing"),
        ({"kind": "depht"}, "'depht' is not one of disparity, depth"),
        ({"kind": "depth", "scale": 0.0}, "scale: 0.0"),
        ({"kind": "disparity", "unit": "metres"}, "disparity has no metres"),
        ({"kind": "depth", "scael": 2}, "scael: unknown key"),
    ]:
        with pytest.raises(ValueError, match=f"predictions.json: .*{message}"):
            load(stored(folder, **facts))
    stored(folder, kind="disparity")
    (folder / "image_0.npy").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"image_0\.npy: "):
        evaluate(load(folder), [manifest], PROTOCOL)
    record = {"model_sha256": "", "values": "image_0.npy", "kind": "disparity"}  # as depthkit predict leaves one
    (folder / "image_0.json").write_text(json.dumps(record))
    for content in (b"", b"broken"):
        (folder / "image_0.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"image_0\.npy: "):
            evaluate(load(folder), [manifest], PROTOCOL)
    (folder / "image_0.json").write_text(json.dumps({"model_sha256": "", "values": "image_0.npy"}))
    with pytest.raises(ValueError, match=r"image_0\.json says None"):
        evaluate(load(folder), [manifest], PROTOCOL)
    (folder / "image_0.json").unlink()
    store(folder, maps | {"image_0": maps["image_0"] * np.nan}, npy, "npy")
    with pytest.raises(ValueError, match="image_0 is not finite"):
        evaluate(load(folder), [manifest], PROTOCOL)
    store(folder, maps, npy, "npy")
    store(folder, maps, npz, "npz")
    with pytest.raises(ValueError, match="two predictions for image_0"):
        evaluate(load(folder), [manifest], PROTOCOL)


def test_flip_averaging_is_asked_of_networks_and_stated_by_predictions(manifest, maps, tmp_path):
    asked = []

    class Asked(Stub):
        def predict(self, image, *, flip=False):
            asked.append(flip)
            return super().predict(image)

    flipped = replace(PROTOCOL, flip=True)
    evaluate({"model": Asked(lambda depth: 1 / depth)}, [manifest], flipped)
    assert asked == [True, True]
    folder = stored(store(tmp_path / "p", maps, npy, "npy"), kind="disparity")
    with pytest.raises(ValueError, match=r"model stored: .* averages over mirrored images"):
        evaluate(load(folder), [manifest], flipped)
    evaluate(load(stored(folder, kind="disparity", flip=True)), [manifest], flipped)


def test_a_window_cuts_image_truth_and_stored_prediction(manifest, maps, tmp_path):
    sizes = []

    class Seen(Stub):
        def predict(self, image, *, flip=False):
            sizes.append(image.shape)
            return super().predict(image)

    cut = replace(PROTOCOL, window=[12, 20])
    seen = Seen(lambda depth: 2 / depth**0.5)
    whole = load(stored(store(tmp_path / "p", maps, npy, "npy"), kind="disparity"))["stored"]
    windows = {key: values[SIZE[0] - 12 :, 6:26] for key, values in maps.items()}
    window = load(stored(store(tmp_path / "q", windows, npy, "npy"), kind="disparity"))["stored"]
    found = evaluate({"seen": seen, "whole": whole, "window": window}, [manifest], cut)
    assert sizes == [(12, 20, 3)] * 2
    assert found.means("seen") == found.means("whole") == found.means("window")
    assert {image.num_pixels for image in found.images} < set(range(100, 240))
    again = found.predict(found.images[0])
    np.testing.assert_array_equal(again.predictions["whole"].values, again.predictions["window"].values)
    odd = {key: values[:13] for key, values in maps.items()}
    with pytest.raises(ValueError, match=r"prediction of \(13, 32\)"):
        evaluate(load(stored(store(tmp_path / "o", odd, npy, "npy"), kind="disparity")), [manifest], cut)


def test_options_follow_a_path(tmp_path):
    assert split_options("a/b.pth:taps=v1:max_depth=20") == ("a/b.pth", {"taps": "v1", "max_depth": 20})
    assert split_options("a/b") == ("a/b", {})
    (tmp_path / "x:kind=depth").mkdir()
    assert split_options(f"{tmp_path}/x:kind=depth") == (f"{tmp_path}/x:kind=depth", {})
    with pytest.raises(ValueError, match="colour"):
        load_models({"a": f"{tmp_path}:colour=red"}, "cpu")


def test_predictions_have_a_hash_of_their_content(maps, tmp_path):
    folder = stored(store(tmp_path / "p", maps, npy, "npy"), kind="disparity")
    first = load(folder)["stored"].sha256
    assert first == load(stored(folder, kind="disparity", scale=1.0))["stored"].sha256
    assert first != load(stored(folder, kind="disparity", scale=2.0))["stored"].sha256
    store(stored(folder, kind="disparity"), {"image_0": maps["image_1"]}, npy, "npy")
    assert first != load(folder)["stored"].sha256


# --- formats of models -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_format_of_a_model_side_by_side(tmp_path, monkeypatch):
    """Bundle, Hugging Face folder, .pth and ONNX of one network, and its predictions on disk: one row of numbers."""
    import torch

    from depthkit.bundle import BundleFacts, save_bundle
    from depthkit.formats.huggingface import write_huggingface
    from depthkit.formats.official import published, write_checkpoint
    from depthkit.formats.onnx import export_onnx
    from depthkit.models import build_model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    settings = replace(published(384), encoder_args={"img_size": 70, "depth": 4}, tap_layers=[0, 1, 2, 3])
    model = build_model(settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    facts = BundleFacts(content="depth_model", model=settings, kind="disparity", short_side=518)
    save_bundle(Path("student/bundle"), model, facts)
    write_huggingface(model, facts, Path("exported"), card="")
    write_checkpoint(model, Path("weights.pth"))
    export_onnx(model, facts, Path("small.onnx"))
    manifest = write_dataset(tmp_path / "data", [sample(0)])
    bundle = load_models({"bundle": "student/bundle"}, "cpu")
    found = evaluate(bundle, [manifest], PROTOCOL)
    for image in found.images:
        values = found.predict(image).predictions["bundle"].values
        store(Path("disk"), {image.key: values}, npy, "npy")
    models = "student/bundle,exported,weights.pth:taps=v1,small.onnx,disk:kind=disparity"
    assert main([f"model={models}", f"dataset={manifest}", "out=out", "num_pictures=1"]) == 0
    means = {name: row["overall"] for name, row in json.loads(Path("out/results.json").read_text())["models"].items()}
    assert list(means) == ["student", "exported", "weights.pth", "small.onnx", "disk"]
    for name in means:
        assert means[name] == pytest.approx(means["student"], rel=1e-2), name


def test_a_folder_that_does_not_say_what_it_holds(tmp_path: Path):
    np.save(tmp_path / "image_0.npy", np.ones((2, 2)))
    with pytest.raises(
        ValueError, match=rf"a folder of predictions\? Say what they are, in {tmp_path}/predictions\.json"
    ):
        load_models({"mine": str(tmp_path)}, "cpu")


def test_a_transposed_map_is_not_resized(tmp_path: Path):
    manifest = write_dataset(tmp_path / "data", [sample(0)])
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "image_0.npy", np.ones(SIZE[::-1], np.float32))
    models = load_models({"mine": f"{tmp_path}/maps:kind=disparity"}, "cpu")
    with pytest.raises(ValueError, match=r"model mine: image_0: a map of 32 rows and 24 columns .* is it transposed"):
        evaluate(models, [manifest], PROTOCOL)
