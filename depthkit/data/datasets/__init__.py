"""Public data sets as their authors ship them: one function for each layout, which finds the files of each split.

A converter is `find(root) -> {split: pairs}`. It reads names, file lists and calibration, never pixels; how a label is
stored and in which unit stands in `data_manifests/NAME.yaml`, once. FileNotFoundError names what is not where the
layout says.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path

from depthkit.data.facts import load_facts
from depthkit.data.pairs import Pair, PairSet, PairStream, in_order

Splits = Mapping[str, Iterable[Pair]]


def read_dataset(name: str, root: Path) -> list[PairSet]:
    """The splits of a public data set below `root`, with what is known about it.

    The first split is called NAME, the others NAME_SPLIT; one of which there is no image yet is left out. ValueError
    for an unknown name and for a root without any image of it, FileNotFoundError for what is missing.
    """
    facts = load_facts(name)
    module, function = facts.converter.rsplit(".", 1)
    find: Callable[[Path], Splits] = getattr(import_module(f"{__name__}.{module}"), function)
    if not root.is_dir():
        raise FileNotFoundError(f"root={root}: no such folder; {name} is expected as\n{facts.layout}")
    splits = {split: found if isinstance(found, PairStream) else in_order(found) for split, found in find(root).items()}
    first = next(iter(splits))
    sets = [
        PairSet(
            name=name if split == first else f"{name}_{split}",
            target=facts.target,
            pairs=pairs,
            licence=facts.licence,
            source=facts.source,
            description=facts.title,
            citation=facts.citation,
            split=split,
            expected=facts.splits[split].images if split in facts.splits else None,
        )
        for split, pairs in splits.items()
        if next(iter(pairs), None) is not None
    ]
    if not sets:
        raise ValueError(f"root={root}: no image of {name} there; expected\n{facts.layout}")
    return sets
