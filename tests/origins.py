"""Provenance written by hand, for tests of licences and cards."""

from typing import Any

TEACHER = "7e" * 32


def data_row(name: str = "rooms", licence: str = "MIT", **more: Any) -> dict[str, Any]:
    return {"name": name, "split": "train", "digest": name.encode().hex().ljust(64, "0"), "licence": licence, **more}


def trained_on(*licences: str, **more: Any) -> dict[str, Any]:
    """Provenance of a model on one data set, `set0`, `set1`, ..., for each licence; the encoder was random."""
    data = {f"labeled.{i}": data_row(f"set{i}", licence) for i, licence in enumerate(licences)}
    return {"stage": "teacher", "data": data, "encoder_weights": None, **more}


def with_teacher(licence: str) -> dict[str, Any]:
    provenance = trained_on("MIT")
    provenance["data"]["labeled.0"]["teacher_sha256"] = TEACHER
    return provenance | {"teachers": {TEACHER: {"forests/train": licence}}}


def with_encoder(licence: str) -> dict[str, Any]:
    encoder = {"name": "timm vit", "sha256": "", "sources": {"forests/train": licence}}
    return trained_on("MIT", encoder_weights=encoder)


def with_weights(licence: str | None) -> dict[str, Any]:
    return {"stage": "imported", "source": "forests/train", "source_sha256": "aa", "licence": licence}


def with_labels(licence: str) -> dict[str, Any]:
    provenance = trained_on("MIT")
    provenance["data"]["labeled.0"] |= {"name": "forests/train", "labels_licence": licence}
    return provenance


ORIGINS = [with_teacher, with_encoder, with_weights, with_labels]
"""Licence -> provenance in which `forests/train` has it, in each part that a source can have in a model."""

UNRECORDED: list[dict[str, Any]] = [
    {},
    {"stage": "imported", "source": "weights.pth", "licence": None},
    {"stage": "imported"},
    {"data": {"labeled.a": data_row()}},  # says nothing about the encoder
    {"stage": "teacher", "data": {}, "encoder_weights": None},
    trained_on("MIT", encoder_weights="timm"),  # as bundles said it first
    trained_on("MIT", encoder_weights="runs/pretrain/bundle"),
    {**with_teacher("MIT"), "teachers": {TEACHER: {}}},
    {**with_teacher("MIT"), "teachers": {}},
    {"data": {"labeled.a": {"name": "rooms"}}, "encoder_weights": None},
]
"""Provenance that leaves something out."""
