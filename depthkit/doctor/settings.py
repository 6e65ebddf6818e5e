"""Settings of `depthkit doctor`: those of training, and how closely to look."""

from dataclasses import dataclass

from depthkit.config import TrainConfig, check


@dataclass(kw_only=True)
class DoctorConfig(TrainConfig):
    """`depthkit doctor experiment=NAME`: any settings of training, and these."""

    images: int = 32  # of each stream, whose labels are looked at
    steps: int = 60  # in which one batch is to be learned by heart
    sweep_steps: int = 15  # at each of the learning rates that are tried
    out: str = "${run_dir}/doctor"  # folder for doctor.json and doctor.png

    def __post_init__(self) -> None:
        for name in ("images", "steps", "sweep_steps"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
