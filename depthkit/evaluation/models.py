"""What is evaluated: networks, and predictions that any other program left on disk.

A folder of predictions holds `predictions.json` (`PredictionFacts`) and one map per image, `DATASET/SPLIT/KEY.EXT`,
`DATASET/KEY.EXT` or, where a single data set is evaluated, `KEY.EXT`; the extensions are those of `CODEC_OF`. What
`depthkit predict` writes is read with the scale and offset of its own JSON files.

Options of a model follow its path, as in `weights.pth:taps=v1` (those of `depthkit.load`) or, in the place of
`predictions.json`, `folder:kind=depth:scale=1000`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf

from depthkit.data.codecs import CODECS
from depthkit.data.manifest import Codec, parse
from depthkit.evaluation.ground_truth import EvaluationSet
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.inference.depth_files import read_record, read_values
from depthkit.inference.loading import load
from depthkit.inference.predictor import Predictor
from depthkit.types import Kind, Prediction

FACTS = "predictions.json"
CODEC_OF: dict[str, Codec] = {
    "npy": "npy",
    "npz": "npz",
    "png": "png16",
    "pfm": "pfm",
    "tiff": "tiff32f",
    "tif": "tiff32f",
    "exr": "exr",
}
"""Extension of a stored prediction -> how its numbers are read (`data/codecs.py`)."""


@dataclass(frozen=True, kw_only=True)
class PredictionFacts:
    """The content of `predictions.json`: what the stored numbers are.

    A stored number divided by `scale` is a disparity or a depth. Depth is in metres unless `unit` is "relative".
    `flip` says that each map is already the mean of the predictions for the image and its mirror image.
    """

    kind: Kind
    unit: Literal["metres", "relative", ""] = ""
    scale: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: {self.scale!r} is not a positive number")
        if self.kind == "disparity" and self.unit == "metres":
            raise ValueError("unit: disparity has no metres; leave the unit out")


class StoredPredictions:
    """Predictions on disk, by `predictions.json` or by `options` of the same names; ValueError names what is wrong."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.folder = folder
        self.name = str(folder)
        try:
            stated = json.loads((folder / FACTS).read_bytes()) if (folder / FACTS).is_file() else {}
            self.facts: PredictionFacts = parse(PredictionFacts, {**stated, **options}, "")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / FACTS}: {error}") from error
        self.kind: Kind = self.facts.kind
        self.unit = self.facts.unit or ("metres" if self.kind == "depth" else "relative")

    @cached_property
    def sha256(self) -> str:
        """Of what the predictions are said to be, and the names and contents of all files that may be some."""
        total = sha256(repr(self.facts).encode())
        for path in sorted(self.folder.rglob("*")):
            if path.suffix[1:] in CODEC_OF:
                with path.open("rb") as file:
                    total.update(path.relative_to(self.folder).as_posix().encode())
                    total.update(file_digest(file, "sha256").digest())
        return total.hexdigest()

    def folder_of(self, dataset: str) -> Path:
        """Where the predictions for the data set NAME/SPLIT lie: the most specific folder there is."""
        places = (self.folder / dataset, self.folder / dataset.partition("/")[0])
        return next((place for place in places if place.is_dir()), self.folder)

    def find(self, dataset: str, key: str) -> Path | None:
        """The file for an image; None when there is none, ValueError when there are several."""
        base = self.folder_of(dataset)
        found = [path for extension in CODEC_OF if (path := base / f"{key}.{extension}").is_file()]
        if len(found) > 1:
            raise ValueError(f"two predictions for {key}: {' and '.join(map(str, found))}; leave one of them")
        return found[0] if found else None

    def read(self, dataset: str, key: str) -> Prediction:
        """ValueError names the file that cannot be read or is of another kind than stated."""
        path = self.find(dataset, key)
        if path is None:
            raise ValueError(f"{self.folder_of(dataset)} holds no prediction for {key}")
        record = read_record(path.with_suffix(".json"))
        if record and record.get("kind") != self.kind:
            raise ValueError(f"{path.with_suffix('.json')} says {record.get('kind')}, {FACTS} says {self.kind}")
        try:
            if record:
                values = read_values(path, record)
            else:
                values = CODECS[CODEC_OF[path.suffix[1:]]](path.read_bytes()).astype(np.float32) / self.facts.scale
            return Prediction(values=values.reshape(values.shape[:2]), kind=self.kind, unit=self.unit)
        except KeyError as error:
            raise ValueError(f"{path.with_suffix('.json')}: {error} is missing; predict again") from error
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from error

    def check(self, datasets: Sequence[EvaluationSet], protocol: ProtocolConfig) -> None:
        """ValueError when these predictions cannot be evaluated by `protocol`, or one data set's taken for another's.

        Whether there is one for every image shows when the images are read (`scoring.check_complete`).
        """
        if protocol.flip != self.facts.flip:
            wanted = "averages over" if protocol.flip else "does not average over"
            raise ValueError(
                f"protocol {protocol.name} {wanted} mirrored images, {FACTS} says flip={str(self.facts.flip).lower()}: "
                f"predict again (and state flip in {FACTS}), or change protocol.flip, which changes the id"
            )
        folders = {dataset.name: self.folder_of(dataset.name) for dataset in datasets}
        shared = [name for name, folder in folders.items() if list(folders.values()).count(folder) > 1]
        if shared:
            raise ValueError(
                f"{', '.join(shared)}: their predictions would all be read from {folders[shared[0]]}; of several data "
                f"sets, put those of each into a folder of its own, {self.folder / shared[0]}"
            )


Model = Predictor | StoredPredictions


def load_models(models: Mapping[str, str], device: str) -> dict[str, Model]:
    """Models by name, from their paths with options: whatever `depthkit.load` takes, and folders of predictions."""
    return {name: load_model(*split_options(model), device) for name, model in models.items()}


def load_model(path: str, options: Mapping[str, Any], device: str) -> Model:
    if (Path(path) / FACTS).is_file() or "kind" in options:
        return StoredPredictions(Path(path), options)
    is_model = any((Path(path) / name).exists() for name in ("model.json", "config.json"))
    if not is_model and any(file.suffix[1:] in CODEC_OF for file in Path(path).rglob("*")):
        raise ValueError(
            f"model={path}: a folder of predictions? Say what they are, in {path}/{FACTS} or as {path}:kind=disparity"
        )
    try:
        return load(path, device, **options)
    except TypeError as error:
        raise ValueError(f"{path}: {', '.join(options)} cannot be options of it: {error}") from error


def split_options(model: str) -> tuple[str, dict[str, Any]]:
    """`PATH:KEY=VALUE:...` as path and options; a path that exists is a path, whatever it is called."""
    path, *options = model.split(":")
    if Path(model).exists() or not all("=" in option for option in options):
        return model, {}
    return path, dict(OmegaConf.from_dotlist(options))


def provenance_of(model: Model) -> dict[str, Any]:
    """What a model says of its origin; empty for predictions on disk."""
    return model.facts.provenance if isinstance(model, Predictor) else {}
