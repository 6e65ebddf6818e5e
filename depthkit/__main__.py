"""`depthkit VERB ...`: each verb is imported when it is used, so that the help text comes at once."""

import sys
from importlib import import_module

from depthkit import __version__

VERBS = {
    "pack": ("depthkit.data.pack", "files on disk -> shards and manifests"),
    "inspect": ("depthkit.data.inspect", "check shards and labels against their manifest"),
    "train": ("depthkit.train", "train a stage: experiment=NAME and Hydra overrides"),
    "doctor": ("depthkit.doctor.doctor", "would it learn? labels, gradients and rates before step 1: experiment=NAME"),
    "replay": ("depthkit.replay", "one training step again: its samples and losses: RUN_DIR --step N"),
    "plan": ("depthkit.planning.plan", "memory, time and disk of a run before it starts: experiment=NAME cluster=NAME"),
    "launch": ("depthkit.launch", "every stage of a recipe as Slurm jobs: recipe=da_v1 [dry_run=true]"),
    "label": ("depthkit.label", "pseudo-label images: bundle=TEACHER images=MANIFEST out=DIR"),
    "select": ("depthkit.select", "choose images by their labels: labels=MANIFEST out=FILE fraction=0.3"),
    "evaluate": ("depthkit.evaluation.evaluate", "metrics by a named protocol, with a report"),
    "predict": ("depthkit.inference.predict", "depth maps of images and videos: MODEL INPUT --out DIR"),
    "import": ("depthkit.importing", "published weights -> bundle: CHECKPOINT --out BUNDLE"),
    "export": ("depthkit.exporting", "bundle -> Hugging Face folder, ONNX or .pth: BUNDLE --format hf --out DIR"),
    "sweep-report": ("depthkit.sweeps.report", "a sweep as table and pictures, and its best settings: DIR"),
    "demo": ("depthkit.demo", "the whole recipe on a small procedural world, in minutes on a CPU"),
}


def usage() -> str:
    lines = [f"  {verb:<10}{help_text}" for verb, (_, help_text) in VERBS.items()]
    return "\n".join(
        [
            "usage: depthkit VERB ...      (depthkit VERB --help for each)",
            "",
            *lines,
            "",
            f"depthkit {__version__}: training code for monocular depth",
        ]
    )


def main() -> int:
    verb, *argv = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb == "--version":
        print(__version__)
        return 0
    if verb not in VERBS:
        print(f"depthkit: unknown verb {verb!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, _ = VERBS[verb]
    return import_module(module).main(argv)


if __name__ == "__main__":
    sys.exit(main())
