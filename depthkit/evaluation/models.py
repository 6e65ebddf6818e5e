"""What is evaluated: networks, and predictions that any other program left on disk.

A folder of predictions holds `predictions.json` (`PredictionFacts`) and one map per image, `DATASET/SPLIT/KEY.EXT`,
`DATASET/KEY.EXT` or, where a single data set is evaluated, `KEY.EXT`; the extensions are those of `CODEC_OF`. What
`depthkit predict` writes is read with the scale and offset of its own JSON files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from depthkit.data.codecs import CODECS
from depthkit.data.manifest import Codec, parse
from depthkit.data.quarantine import SampleError
from depthkit.evaluation.ground_truth import EvaluationSet
from depthkit.evaluation.settings import Alignment, ProtocolConfig
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
    unit: Literal["metres", "relative"] | None = None
    scale: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: {self.scale!r} is not a positive number")
        if self.kind == "disparity" and self.unit == "metres":
            raise ValueError("unit: disparity has no metres; leave the unit out")


class StoredPredictions:
    """Predictions on disk; ValueError names what `predictions.json` lacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        try:
            self.facts: PredictionFacts = parse(PredictionFacts, json.loads((folder / FACTS).read_bytes()), "")
        except ValueError as error:
            raise ValueError(f"{folder / FACTS}: {error}") from error
        self.kind: Kind = self.facts.kind
        self.unit = self.facts.unit or ("metres" if self.kind == "depth" else "relative")

    @cached_property
    def sha256(self) -> str:
        """Of the names and contents of all files that may be predictions, and of `predictions.json`."""
        total = sha256((self.folder / FACTS).read_bytes())
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
        if record and record["kind"] != self.kind:
            raise ValueError(f"{path.with_suffix('.json')} says {record['kind']}, {FACTS} says {self.kind}")
        try:
            if record:
                values = read_values(path, record)
            else:
                values = CODECS[CODEC_OF[path.suffix[1:]]](path.read_bytes()).astype(np.float32) / self.facts.scale
            return Prediction(values=values.reshape(values.shape[:2]), kind=self.kind, unit=self.unit)
        except SampleError as error:
            raise ValueError(f"{path}: {error}") from error

    def check(self, datasets: Sequence[EvaluationSet], protocol: ProtocolConfig) -> None:
        """ValueError when these predictions cannot be evaluated by `protocol`, or one data set's taken for another's.

        Whether there is one for every image shows when the images are read (`scoring.check_complete`).
        """
        if protocol.flip != self.facts.flip:
            wanted = "averages over" if protocol.flip else "does not average over"
            raise ValueError(
                f"protocol {protocol.name} {wanted} mirrored images, {FACTS} says flip={str(self.facts.flip).lower()}: "
                "predict again, or change protocol.flip, which changes the id of the protocol"
            )
        if protocol.alignment is Alignment.none and self.unit != "metres":
            raise ValueError(
                f"protocol {protocol.name} compares metres, and the unit of the predictions is {self.unit}"
            )
        folders = {dataset.name: self.folder_of(dataset.name) for dataset in datasets}
        shared = [name for name, folder in folders.items() if list(folders.values()).count(folder) > 1]
        if shared:
            raise ValueError(
                f"{', '.join(shared)}: their predictions would all be read from {folders[shared[0]]}; of several data "
                f"sets, put those of each into a folder of its own, {self.folder / shared[0]}"
            )


Model = Predictor | StoredPredictions


def load_models(paths: Mapping[str, str], device: str) -> dict[str, Model]:
    """Models by name: whatever `depthkit.load` takes, and folders of predictions."""
    return {
        name: StoredPredictions(Path(path)) if (Path(path) / FACTS).is_file() else load(path, device)
        for name, path in paths.items()
    }


def provenance_of(model: Model) -> dict[str, Any]:
    """What a model says of its origin; empty for predictions on disk."""
    return model.facts.provenance if isinstance(model, Predictor) else {}
