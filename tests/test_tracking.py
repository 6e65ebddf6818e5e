"""What wandb gets: read from the files that it writes without a network."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from depthkit.bundle import read_facts
from depthkit.label import label
from depthkit.runtime import tracking
from depthkit.runtime.tracking import artifact_name, bundle_artifact, manifest_artifact, run_id, use, wandb_logger
from depthkit.train import run


def records(run_dir: Path) -> list:
    """Everything in the offline files of a run, oldest file first.

    The format is that of LevelDB's log: after 7 bytes, blocks of 32 KiB with pieces of records, each piece behind 4
    bytes of checksum, 2 of length and 1 that says whether it is whole (1), first (2), middle (3) or last (4).
    """
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        data, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole = (b"" if kind in (1, 2) else whole) + data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):
                found.append(pb.Record.FromString(whole))
    return found


def of_kind(found: list, kind: str) -> list:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def history(found: list) -> list[dict]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in of_kind(found, "history")
    ]


@pytest.fixture(scope="module")
def lineage(tiny_config, tmp_path_factory):
    """Folders of a teacher, of the labelling with it, and of a student, which was stopped once."""
    import lightning as L

    from depthkit.data.manifest import load_manifest

    class StopAt(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        root = tmp_path_factory.mktemp("chain")
        run(tiny_config("teacher", root / "teacher", "logger=wandb", "run_name=my teacher"))
        student = tiny_config("student", root / "student", "logger=wandb", "callbacks.checkpoint.every_n_train_steps=3")
        images = student.data.unlabeled["target"].manifest
        settings = ["stage=pseudo_label", f"stage.bundle={root / 'teacher' / 'bundle'}", f"stage.images={images}"]
        labels = tiny_config(
            "teacher", root / "labels", "logger=wandb", *settings, "stage.num_workers=0", f"stage.out={root / 'labels'}"
        )
        student.data.unlabeled["target"].labels = str(label(labels))
        run(student, [StopAt()])
        run(student)
    assert load_manifest(root / "labels" / "manifest.json").labels_of is not None
    return root


pytestmark = pytest.mark.slow


def test_settings_group_and_kind_of_job(lineage):
    (started,) = of_kind(records(lineage / "teacher"), "run")[:1]
    assert (started.display_name, started.job_type) == ("my teacher", "teacher")
    assert started.run_group == lineage.name
    assert list(started.tags) == ["vit_tiny_patch16_224"]
    config = {
        (item.key or "/".join(item.nested_key)): item.value_json
        for each in of_kind(records(lineage / "teacher"), "config")
        for item in each.update
    }
    assert json.loads(config["optim"])["encoder_lr"] == 1e-3


def test_samples_seen_is_the_x_axis_of_everything(lineage):
    found = records(lineage / "teacher")
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in of_kind(found, "metric")}
    assert axes["*"] == "samples_seen"
    rows = history(found)
    assert [row["samples_seen"] for row in rows if "loss" in row] == [6, 12, 18, 24, 30, 36]
    measured = [row for row in rows if any(name.startswith("val/affine") for name in row)]
    assert measured
    assert all("samples_seen" in row for row in measured)


def test_a_continued_run_is_the_same_run(lineage):
    found = records(lineage / "student")
    assert {each.run_id for each in of_kind(found, "run")} == {(lineage / "student" / "wandb_run_id").read_text()}
    assert len(list((lineage / "student").glob("wandb/offline-run-*"))) == 2
    assert [row["samples_seen"] for row in history(found) if "loss" in row] == [6, 12, 18, 24, 30, 36]


def test_the_graph_goes_from_the_teacher_over_its_labels_to_the_student(lineage):
    """Artifacts are the same node where type, name and digest are the same."""
    made, used = {}, {}
    for stage in ("teacher", "labels", "student"):
        artifacts = of_kind(records(lineage / stage), "artifact")
        made[stage] = {(a.type, a.name, a.digest) for a in artifacts if not a.use_after_commit}
        used[stage] = {(a.type, a.name, a.digest) for a in artifacts if a.use_after_commit}
    (teacher,), (labels,), (student,) = made["teacher"], made["labels"], made["student"]
    assert (teacher[:2], labels[0], student[:2]) == (("model", "my-teacher"), "labels", ("model", "student"))
    assert teacher in used["labels"]
    assert labels in used["student"]
    assert {kind for kind, _, _ in used["student"]} == {"dataset", "labels"}
    (artifact,) = (a for a in of_kind(records(lineage / "teacher"), "artifact") if not a.use_after_commit)
    assert set(artifact.aliases) == {"latest", "best"}


def test_pictures_say_their_unit(lineage):
    rows = [row for row in history(records(lineage / "teacher")) if "val/panels/captions" in row]
    assert [row["samples_seen"] for row in rows] == [36]
    (caption,) = rows[-1]["val/panels/captions"]
    assert caption.startswith("affine_disparity@")
    assert "metres, planar z" in caption


def test_no_shard_is_uploaded(lineage):
    artifact = manifest_artifact(str(lineage / "labels" / "manifest.json"))
    assert list(artifact.manifest.entries) == ["manifest.json"]
    assert artifact.metadata["teacher_sha256"] == read_facts(lineage / "teacher" / "bundle").sha256
    moved = lineage / "moved.json"
    moved.write_bytes((lineage / "labels" / "manifest.json").read_bytes())
    assert manifest_artifact(str(moved)).digest == artifact.digest
    assert set(bundle_artifact(str(lineage / "teacher" / "bundle")).manifest.entries) == {
        "model.json",
        "model.safetensors",
    }


# --- without a run ---------------------------------------------------------------------------------------------------


def test_online_artifacts_are_used_by_the_public_way():
    used = []
    use(SimpleNamespace(offline=False, use_artifact=used.append), ["a", "b"])
    assert used == ["a", "b"]


def test_the_id_of_an_agent_goes_first_and_other_ranks_make_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.rank_zero_only, "rank", 1)
    assert run_id(tmp_path) is None
    monkeypatch.setattr(tracking.rank_zero_only, "rank", 0)
    first = run_id(tmp_path)
    assert first
    assert run_id(tmp_path) == first
    monkeypatch.setattr(tracking.rank_zero_only, "rank", 1)
    assert run_id(tmp_path) == first
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    assert run_id(tmp_path) is None


def test_group_and_names(tmp_path):
    assert wandb_logger(str(tmp_path / "a"), project="p")._wandb_init["group"] == tmp_path.name
    assert wandb_logger(str(tmp_path / "a"), project="p", group="mine")._wandb_init["group"] == "mine"
    assert artifact_name("my run/7", "", "labels") == "my-run-7-labels"
