"""Ending a trial early that others were ahead of at the same step."""

from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from depthkit.stages.base import DepthModule, val_name
from depthkit.sweeps.study import NAME, load_study


class Pruning(L.Callback):
    """Reports each validation to the study; ends the run, and the trial as pruned, where the study's pruner says so.

    The search adds it to the callbacks of a trial. Rank 0 talks to the study, and all ranks stop at the same step.
    """

    def __init__(self, journal: str, trial: int) -> None:
        self.journal = Path(journal)
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.global_step >= trainer.max_steps:
            return  # all that a pruner could save is done
        assert isinstance(pl_module, DepthModule)
        value = float(trainer.callback_metrics[val_name(pl_module.protocol, "abs_rel")])
        is_bad = trainer.is_global_zero and report(self.journal, self.trial, trainer.global_step, value)
        if trainer.strategy.broadcast(is_bad):
            trainer.should_stop = True


def report(journal: Path, number: int, step: int, value: float) -> bool:
    """Put a validation value into the study; True if the trial ends here, and it is then recorded as pruned."""
    import optuna

    study = load_study(journal)
    storage = study._storage
    trial_id = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(NAME), number)
    storage.set_trial_intermediate_value(trial_id, step, value)
    chosen = study.user_attrs["pruner"]
    pruner: optuna.pruners.BasePruner = getattr(optuna.pruners, chosen["name"])(**chosen["args"])
    is_bad = pruner.prune(study, storage.get_trial(trial_id))
    if is_bad:
        study.tell(number, state=optuna.trial.TrialState.PRUNED)
    return is_bad
