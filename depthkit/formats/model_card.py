"""The model card: the README.md of a published model, with the metadata that the Hugging Face hub reads from its head.

It says what the bundle's provenance says, calls unrecorded what that leaves out, and never guesses.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from depthkit.bundle import BundleFacts
from depthkit.config import DPTConfig, ModelConfig
from depthkit.licences import (
    OTHER,
    UNKNOWN,
    Licence,
    check_declared,
    derived_licence,
    encoder_of,
    name_of,
    read_licences,
    teachers_of,
)
from depthkit.metrics import METRICS

FEW_IMAGES = 10_000
"""A card calls the training set small below it; the published mixes have 10^5 to 10^7 images."""

GENERATED = "depthkit.data.procedural"
"""Source of the data sets that depthkit renders itself."""

GROUPS = {"stage": "losses", "optim": "optimizer (AdamW)", "augment": "augmentation"}
"""Group of hyper-parameters -> what the card calls it."""

VALIDATION_METRIC = re.compile(r"val/(?P<protocol>[^/]+@[0-9a-f]+)/(?P<metric>\w+)")


@dataclass
class Scores:
    """The table of one protocol: rows of (data, number of images, metric name -> value)."""

    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, dict[str, float]]] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for _, _, values in self.rows for name in values))


def model_card(facts: BundleFacts, *, results: Sequence[Path] = (), licence: str | None = None) -> str:
    """The card of a depth model, as Markdown.

    `results` are `results.json` files of `depthkit evaluate`, of which the lines of this model are taken; numbers
    without a protocol are left out. `licence` is what the publisher declares; without it the card carries the one that
    follows from data, teachers and initial weights (`licences.derived_licence`).

    ValueError when the bundle holds an encoder alone, when a file of `results` is none or says nothing about this
    model (by its sha256), and when `licence` allows what the licence of a source forbids.
    """
    if facts.content != "depth_model":
        raise ValueError(f"the bundle {facts.sha256} holds an encoder alone: a model card describes a depth model")
    provenance = facts.provenance
    derived = derived_licence(provenance)
    if licence is not None:
        check_declared(licence, derived)
    data = list((provenance.get("data") or {}).items())
    environment = Environment(
        loader=PackageLoader("depthkit.formats", "."), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # JSON is YAML too, and quotes whatever a name may hold.
    environment.filters |= {"cell": cell, "settings": settings_text, "json": partial(json.dumps, ensure_ascii=False)}
    return environment.get_template("model_card.md.j2").render(
        front_matter=front_matter(facts, licence, derived),
        title=provenance.get("run_name") or provenance.get("source") or "Monocular depth model",
        is_metric=facts.model.unit.startswith("metres"),
        unit=facts.model.unit,
        facts=facts,
        architecture=architecture(facts.model),
        provenance=provenance,
        is_imported=provenance.get("stage") == "imported",
        data=[{"stream": key.split(".")[0], **row} for key, row in data],
        groups=GROUPS,
        teachers=teacher_facts(provenance),
        encoder=encoder_of(provenance),
        is_encoder_recorded="encoder_weights" in provenance,
        scores=all_scores(facts, results),
        arrows={name: "↓" if metric.is_lower_better else "↑" for name, metric in METRICS.items()},
        declared=licence,
        derived=derived,
        generated=[name_of(row) for _, row in data if row.get("source") == GENERATED],
        num_images=sum(row.get("num_images") or 0 for _, row in data),
        few_images=FEW_IMAGES,
    )


def front_matter(facts: BundleFacts, declared: str | None, derived: Licence) -> dict[str, Any]:
    """What the hub shows, searches and filters by."""
    rows = (facts.provenance.get("data") or {}).values()
    datasets = list(dict.fromkeys(row["name"] for row in rows if row.get("name")))
    return {
        **hub_licence(declared, derived),
        "library_name": "transformers",
        "pipeline_tag": "depth-estimation",
        "tags": [
            "depthkit",
            "monocular-depth-estimation",
            "metric-depth" if facts.model.unit.startswith("metres") else "relative-depth",
            facts.model.architecture,
            facts.model.title,
        ],
        **({"datasets": datasets} if datasets else {}),
    }


def hub_licence(declared: str | None, derived: Licence) -> dict[str, str]:
    """`license` and, where the hub has no identifier, `license_name`."""
    if declared is None:
        return {"license": derived.id} | ({"license_name": "non-commercial"} if derived.id == OTHER else {})
    ids = read_licences(declared)
    if len(ids) == 1 and ids[0] not in (OTHER, UNKNOWN):
        return {"license": ids[0]}
    return {"license": OTHER, "license_name": re.sub(r"[^a-z0-9.]+", "-", declared.lower()).strip("-") or UNKNOWN}


def architecture(model: ModelConfig) -> str:
    """The network in a sentence."""
    if not isinstance(model, DPTConfig):
        return f"{model.title}: {settings_text({**asdict(model), 'architecture': model.architecture})}"
    arguments = f" with {settings_text(model.encoder_args)}" if model.encoder_args else ""
    stem = ", convolutional stem" if model.conv_stem else ""
    taps = ", ".join(map(str, model.tap_layers))
    decoder = f"DPT decoder of width {model.features}" if model.decoder == "dpt" else "linear decoder"
    return f"encoder `{model.encoder}` of timm{arguments}{stem}; {decoder} on layers {taps}"


def teacher_facts(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each teacher its hash, the data that it labeled, what it was made from, and the licence that follows."""
    rows = (provenance.get("data") or {}).values()
    return [
        {
            "sha256": sha256,
            "labeled": [name_of(row) for row in rows if row.get("teacher_sha256") == sha256],
            "sources": sources,
        }
        for sha256, sources in teachers_of(provenance).items()
    ]


# --- metrics ---------------------------------------------------------------------------------------------------------


def all_scores(facts: BundleFacts, results: Sequence[Path]) -> dict[str, Scores]:
    """Protocol id -> its table, from the validation at the end of training and from evaluations."""
    tables: dict[str, Scores] = {}
    of_validation: dict[str, dict[str, float]] = {}
    for name, value in (facts.provenance.get("metrics") or {}).items():
        if found := VALIDATION_METRIC.fullmatch(name):
            of_validation.setdefault(found["protocol"], {})[found["metric"]] = value
    names = [name_of(row) for row in (facts.provenance.get("validation") or {}).values()]
    for protocol, values in of_validation.items():
        row = (f"validation at the end of training: {', '.join(names) or 'data not recorded'}", "-", values)
        tables[protocol] = Scores(rows=[row])
    for path in results:
        try:
            protocol, table = read_scores(path, facts)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a results.json of `depthkit evaluate`: {error!r}") from error
        into = tables.setdefault(protocol, Scores())
        into.settings = table.settings
        into.rows += table.rows
    return tables


def read_scores(path: Path, facts: BundleFacts) -> tuple[str, Scores]:
    """Protocol id and the rows of this model in a `results.json`; data that it was trained on are marked."""
    content = json.loads(path.read_text(encoding="utf-8"))
    models, datasets = content["models"], content["datasets"]
    own = next((model for model in models.values() if model["sha256"] == facts.sha256), None)
    if own is None:
        others = ", ".join(f"{name} ({model['sha256']})" for name, model in models.items())
        raise ValueError(f"{path} is about {others}, not about this model ({facts.sha256}): evaluate this bundle")
    trained_on = {row.get("digest") for row in (facts.provenance.get("data") or {}).values()}
    settings = {name: value for name, value in content["protocol"].items() if name not in ("id", "name", "metrics")}
    scores = Scores(settings=settings)
    for name, values in own["datasets"].items():
        mark = ", **trained on these images**" if datasets[name]["manifest_digest"] in trained_on else ""
        skipped = f" ({datasets[name]['num_skipped']} skipped)" if datasets[name]["num_skipped"] else ""
        digest = datasets[name]["manifest_digest"][:8]
        scores.rows.append((f"{name} ({digest}){mark}", f"{datasets[name]['num_images']}{skipped}", values))
    if len(own["datasets"]) > 1:
        scores.rows.append(("all images", str(content["num_images"]), own["overall"]))
    return content["protocol"]["id"], scores


# --- text ------------------------------------------------------------------------------------------------------------


def cell(value: object) -> str:
    """A value as the text of a table cell: one line without column borders."""
    text = "" if value is None else re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
    return text or "not recorded"


def settings_text(settings: Mapping[str, Any]) -> str:
    """`name value, name value`, without what is not set."""
    parts = []
    for name, value in settings.items():
        if value is not None:
            shown = f"({settings_text(value)})" if isinstance(value, Mapping) else value
            parts.append(f"{name} {shown:g}" if isinstance(shown, float) else f"{name} {shown}")
    return ", ".join(parts)
