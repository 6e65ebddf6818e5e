"""Keeps back what libraries say to a user who can do nothing about it, so that what remains is worth reading."""

import logging
import warnings

NOT_ACTIONABLE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning calling an older torch
    r"You passed in a `val_dataloader` but have no `validation_step`",  # pre-training has nothing to validate
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen encoder belongs in eval mode
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the order of the data starts at the step
    r"Checkpoint directory .* exists and is not empty",  # every continued run
    r"Total length of `list` across ranks is zero",  # a run without validation images
    r"Couldn't infer the batch indices fetched from your dataloader",  # chunks name their own images
    r"The `srun` command is available on your system but is not used",  # on a login node; docs/cluster.md has jobs
    r".*does not have many workers which may be a bottleneck",  # throughput/data_wait measures it
)
"""Warnings that are wrong here, each with its reason."""

ADVERTISEMENT = "Tip: For seamless"
"""Lightning's way to propose another package, in a log message."""


def keep_back_noise() -> None:
    """Filter these warnings and advertisements in this process, and in those that it forks."""
    for message in NOT_ACTIONABLE:
        warnings.filterwarnings("ignore", message=message)
    # It says at every checkpoint that no argument was given which Lightning itself does not pass on.
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: ADVERTISEMENT not in record.getMessage())
