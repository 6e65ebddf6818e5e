"""`depthkit launch recipe=da_v1 ...`: submit every stage of a recipe to Slurm at once, each after those it reads from.

    depthkit launch recipe=da_v1 dry_run=true
    depthkit launch recipe=da_v1 sbatch.partition=gpu teacher.trainer.num_nodes=4 label.sbatch.array=0-63

The experiments RECIPE_pretrain (if there is one), RECIPE_teacher, RECIPE_label and RECIPE_student are composed and
checked here, before anything is submitted. KEY=VALUE is a setting of all stages, STAGE.KEY=VALUE of one;
sbatch.OPTION=VALUE and STAGE.sbatch.OPTION=VALUE are options of sbatch. Each unlabeled data set of the student is
labeled by a job of its own, or an array of any size.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from depthkit.checks import validate
from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, PACKAGE, ConfigError, PseudoLabelConfig, TrainConfig

TEMPLATES = next(d for d in (PACKAGE / "slurm", PACKAGE.parent / "scripts" / "slurm") if d.is_dir())
"""The batch scripts: inside the package in a wheel, beside it in a checkout."""
STAGES = ("pretrain", "teacher", "label", "student")
GEOMETRY = {"nodes": "trainer.num_nodes", "ntasks-per-node": "trainer.devices"}


@dataclass(kw_only=True)
class Request:
    """The command line, by stage."""

    recipe: str = ""
    dry_run: bool = False
    settings: dict[str, list[str]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    options: dict[str, dict[str, str]] = field(default_factory=lambda: {stage: {} for stage in STAGES})


@dataclass(kw_only=True)
class Job:
    """One call of sbatch. `after` are the variables of the jobs that have to end well, `once_ended` to end at all."""

    variable: str
    options: dict[str, str]
    script: str
    settings: list[str]
    after: list[str]
    once_ended: list[str] = field(default_factory=list)

    def command(self, ids: dict[str, str]) -> list[str]:
        """The arguments of sbatch, with `ids` of the jobs before it."""
        conditions = [
            f"{kind}:{':'.join(ids[name] for name in names)}"
            for kind, names in (("afterok", self.after), ("afterany", self.once_ended))
            if names
        ]
        if self.script == "train.sbatch":
            conditions.append("singleton")  # two runs in one folder: the second waits, and finds the work of the first
        options = self.options | ({"dependency": ",".join(conditions)} if conditions else {})
        written = [f"--{name}={value}" for name, value in options.items()]
        return [
            "sbatch",
            "--parsable",
            "--kill-on-invalid-dep=yes",
            *written,
            str(TEMPLATES / self.script),
            *self.settings,
        ]


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        launch(argv)
    except (ValueError, OSError) as error:
        print(f"depthkit launch: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def launch(argv: list[str]) -> dict[str, str]:
    """Submit the stages, or print what would be submitted; job ids by stage."""
    request = parse(argv)
    jobs = plan(request)
    python = os.environ.get("DEPTHKIT_PYTHON", sys.executable)
    if request.dry_run:
        print(f"export DEPTHKIT_PYTHON={shlex.quote(python)}")
        for job in jobs:
            words = job.command({each.variable: f"${each.variable}" for each in jobs})
            line = " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in words)
            print(f"{job.variable}=$({line})")
        return {}
    if shutil.which("sbatch") is None:
        raise FileNotFoundError("no sbatch here: launch on a login node of a Slurm cluster, or look with dry_run=true")
    return submit(jobs, python)


def submit(jobs: list[Job], python: str) -> dict[str, str]:
    ids: dict[str, str] = {}
    for job in jobs:
        output = Path(job.options["output"])
        output.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"DEPTHKIT_PYTHON": python}
        done = subprocess.run(job.command(ids), capture_output=True, text=True, env=environment)
        if done.returncode:
            before = ", ".join(f"{name} {number}" for name, number in ids.items()) or "none"
            raise OSError(f"{job.variable}: {done.stderr.strip()} (submitted before it: {before})")
        ids[job.variable] = done.stdout.strip().split(";")[0]
        print(f"{job.variable}: job {ids[job.variable]}, log {output}")
    return ids


def parse(argv: list[str]) -> Request:
    request = Request()
    for item in argv:
        first, _, rest = item.partition(".")
        stages, setting = ((first,), rest) if first in STAGES else (STAGES, item)
        key, _, value = setting.partition("=")
        if key == "recipe":
            request.recipe = value
        elif key == "dry_run":
            if value not in ("true", "false"):
                raise ConfigError(f"dry_run={value}: must be true or false")
            request.dry_run = value == "true"
        elif key.startswith("sbatch."):
            option = key.removeprefix("sbatch.")
            if option in GEOMETRY:
                raise ConfigError(f"{item}: give {GEOMETRY[option]}, which sbatch and the training both read")
            for stage in stages:
                request.options[stage][option] = value
        else:
            for stage in stages:
                request.settings[stage].append(setting)
    return request


def composed(request: Request) -> dict[str, TrainConfig]:
    """The settings of the recipe's trainings, by stage."""
    there = [stage for stage in STAGES if (CONF_DIR / "experiment" / f"{request.recipe}_{stage}.yaml").is_file()]
    if not {"teacher", "label", "student"} <= set(there):
        recipes = [path.stem.removesuffix("_label") for path in sorted(CONF_DIR.glob("experiment/*_label.yaml"))]
        raise ConfigError(f"recipe={request.recipe}: must be one of {recipes}")
    return {stage: compose(stage, settings_of(request, stage)) for stage in there if stage != "label"}


def settings_of(request: Request, stage: str) -> list[str]:
    return [f"experiment={request.recipe}_{stage}", *request.settings[stage]]


def plan(request: Request) -> list[Job]:
    """The jobs in an order in which each comes after those it waits for; ConfigError for settings that cannot work."""
    trainings = composed(request)
    student = trainings.pop("student")
    bundles = [f"{config.run_dir}/bundle" for config in trainings.values()]
    jobs: list[Job] = []
    for stage, config in trainings.items():
        with naming(stage):
            validate(config, pending=bundles)
        before = [job.variable for job in jobs]
        jobs.append(job_of(stage, config, request.options[stage], settings_of(request, stage), before))
    before = [job.variable for job in jobs]

    label_sets = {name: data for name, data in student.data.unlabeled.items() if data.labels is not None}
    for name, data in label_sets.items():
        bundle = f"{trainings['teacher'].run_dir}/bundle"
        places = {"bundle": bundle, "images": data.manifest, "out": Path(str(data.labels)).parent}
        settings = [*(f"stage.{key}='{value}'" for key, value in places.items()), *settings_of(request, "label")]
        config = compose("label", settings)
        jobs.append(job_of(f"label_{name}", config, request.options["label"], settings, before))
        print(f"not checked, as the label stage writes it: data.unlabeled.{name}.labels={data.labels}", file=sys.stderr)

    with naming("student"):
        validate(student, pending=[*bundles, *(str(data.labels) for data in label_sets.values())])
    last = job_of("student", student, request.options["student"], settings_of(request, "student"), before)
    last.once_ended = [f"label_{name}" for name in label_sets]
    return [*jobs, last]


def compose(stage: str, settings: list[str]) -> TrainConfig:
    GlobalHydra.instance().clear()
    register_schemas()
    with naming(stage), initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config: TrainConfig = to_config(hydra.compose("train", settings))
    return config


@contextmanager
def naming(stage: str) -> Iterator[None]:
    """Errors in the settings of a stage say of which."""
    try:
        yield
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{stage}: {error}") from error


def job_of(variable: str, config: TrainConfig, options: dict[str, str], settings: list[str], after: list[str]) -> Job:
    """The job of a stage. One task for each device, with a CPU for each of its loaders and one for itself."""
    is_label = isinstance(config.stage, PseudoLabelConfig)
    trainer = config.trainer
    workers = config.stage.num_workers if isinstance(config.stage, PseudoLabelConfig) else config.data.num_workers
    number = "%A_%a" if "array" in options else "%j"
    resources = {
        "job-name": config.run_name if not is_label else f"{config.run_name}_{variable.removeprefix('label_')}",
        "output": f"{config.paths.runs}/slurm/%x-{number}.out",
        "nodes": str(1 if is_label else trainer.num_nodes),
        "ntasks-per-node": str(trainer.devices),
        "cpus-per-task": str(workers + 1),
    }
    if trainer.accelerator in ("gpu", "cuda"):
        resources["gpus-per-node"] = str(trainer.devices)
    script = "label.sbatch" if is_label else "train.sbatch"
    return Job(variable=variable, options=resources | options, script=script, settings=settings, after=after)
