"""Memory of a training step per device: what an engine keeps (by formula), what a batch takes (counted)."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from depthkit.config import ModelConfig, TrainConfig
from depthkit.flops import describe
from depthkit.planning.step import bare_module, frozen_encoder, random_batch

REDUCE_BUCKETS = 2 * 200_000_000
"""Numbers in the two buckets in which DeepSpeed sums gradients (Lightning's reduce_bucket_size, overlap_comm)."""
MAX_GATHERED = 1_000_000_000
"""Numbers that ZeRO 3 may hold in whole at a time (DeepSpeed's stage3_max_live_parameters)."""
RESERVED = 2e9
"""Bytes of a GPU that no tensor gets: context, workspaces of cuBLAS and cuDNN, NCCL. Assumed."""
FRAGMENTATION = 0.05
"""Share of the memory lost between tensors. Assumed."""


# --- what an engine keeps --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A way to hold weights, gradients and optimizer state; `zero_stage` 0 is DDP, or a single device."""

    name: str
    zero_stage: int
    offload: bool = False

    @property
    def overrides(self) -> str:
        """What chooses it on the command line."""
        if self.zero_stage == 0:
            return "trainer=ddp"
        return f"trainer=deepspeed_zero{self.zero_stage}{' trainer.offload=true' if self.offload else ''}"


ENGINES = [
    Engine("ddp", 0),
    *(
        Engine(f"zero{stage}{'_offload' if offload else ''}", stage, offload)
        for stage in (1, 2, 3)
        for offload in (False, True)
    ),
]


@dataclass(frozen=True)
class Counts:
    """Numbers in the weights: of the model, of those the trained ones, of an EMA, and of a frozen encoder beside it."""

    all: int
    trained: int
    ema: int = 0
    frozen: int = 0


@dataclass(frozen=True)
class Held:
    """Bytes per device between two steps, and `host`: bytes per process in the memory of the machine."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    buffers: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema + self.buffers


def held_bytes(engine: Engine, counts: Counts, world_size: int) -> Held:
    """What `engine` holds on each of `world_size` devices: weights in float32 (autocast computes in 16 bits), AdamW.

    P trained of A weights, F weights of a frozen encoder, which no engine splits, N devices; ZeRO (Rajbhandari et al.
    2020, section 5) with 4 bytes in the place of 2, since weights and gradients are float32 in every precision here:

    | engine | weights | gradients | optimizer | buffers |
    | --- | --- | --- | --- | --- |
    | ddp | 4 (A + F) | 4 P | 8 P | 4 P (buckets of DDP; none on a single device) |
    | zero1 | 4 (A + F) | 4 P | 12 P / N | two buckets |
    | zero2 | 4 (A + F) | 4 P / N | 12 P / N | two buckets |
    | zero3 | 4 A / N + 4 F | 4 P / N | 8 P / N | two buckets, and up to 10^9 weights gathered at a time |

    12 and not 8: ZeRO 1 and 2 keep a copy of the weights that they update. Offload: the optimizer's share (12 P / N)
    and from ZeRO 2 on the gradients' lie in the memory of the host, from ZeRO 3 on that of the weights too.
    """
    trained, share = 4.0 * counts.trained, 4.0 * counts.trained / world_size
    ema, frozen = 4.0 * counts.ema, 4.0 * counts.frozen
    if engine.zero_stage == 0:
        buckets = trained if world_size > 1 else 0.0
        return Held(4.0 * counts.all + frozen, trained, 2 * trained, ema, buckets)
    gathered = 4.0 * min(counts.all, MAX_GATHERED) if engine.zero_stage == 3 else 0.0
    weights = 4.0 * counts.all / (world_size if engine.zero_stage == 3 else 1)
    gradients = trained if engine.zero_stage == 1 else share
    buffers = 4.0 * REDUCE_BUCKETS + gathered
    if not engine.offload:
        return Held(weights + frozen, gradients, (2 if engine.zero_stage == 3 else 3) * share, ema, buffers)
    host = 3 * share + (gradients if engine.zero_stage > 1 else 0.0) + (weights if engine.zero_stage == 3 else 0.0)
    return Held(
        weights=frozen + (0.0 if engine.zero_stage == 3 else weights),
        gradients=0.0 if engine.zero_stage > 1 else gradients,
        optimizer=0.0,
        ema=ema,
        buffers=buffers,
        host=host,
    )


# --- what a batch takes ----------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that come to be while it is active: `now` those alive, `peak` the most at once.

    A tensor counts from the operation that makes it until nothing refers to its storage, autograd included; tensors
    that an operation is given from outside do not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._meet(tensor, tensor.untyped_storage().nbytes())
        return result

    def _meet(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._add(num_bytes)
            weakref.finalize(storage, self._leave, storage._cdata, num_bytes)

    def _leave(self, storage: int, num_bytes: int) -> None:
        self._known.discard(storage)
        self._add(-num_bytes)

    def _add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def step_bytes(config: TrainConfig, images: dict[str, int]) -> int:
    """Most bytes alive at once in forward and backward pass of a batch with `images` of each stream; gradients of the
    weights apart.

    The step of the stage runs on tensors without memory (`FakeTensorMode`), so that the count needs neither a GPU nor
    the memory it counts; they pose as tensors of a CPU, whose autocast and fused attention keep what those of a GPU
    keep. What a kernel allocates within itself is not seen.
    """
    with torch.device("meta"):
        module = bare_module(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in (module, frozen_encoder(module)):
            network.to_empty(device="cpu")
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        batch = random_batch(config, images, torch.device("cpu"))
        with LiveBytes() as live:
            with autocast(config.trainer.precision, "cpu"):
                output = module.training_step(batch, 0)
            loss: Any = output if isinstance(output, Tensor) or output is None else output["loss"]
            loss.backward()
    return live.peak


@dataclass(frozen=True)
class BatchBytes:
    """Bytes of a step: `fixed`, such as weights in 16 bits, and `per_image`."""

    fixed: float
    per_image: float

    def __call__(self, images: float) -> float:
        return self.fixed + self.per_image * images


def forward_bytes(model: ModelConfig, size: tuple[int, int], precision: str) -> BatchBytes:
    """Bytes of a forward pass without gradients, by the number of images of `size`; counted as `step_bytes` does."""
    peaks = []
    for count in (2, 4):
        network = describe(model)
        with FakeTensorMode(allow_non_fake_inputs=True):
            network.to_empty(device="cpu")
            images = torch.rand(count, 3, *size)
            with LiveBytes() as live, torch.no_grad(), autocast(precision, "cpu"):
                network(images)
        peaks.append(live.peak)
    return line(*peaks, images=2)


def autocast(precision: str, device_type: str) -> torch.autocast:
    """The autocast that Lightning makes of a precision; none for 32-true."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return torch.autocast(device_type, kinds.get(precision, torch.bfloat16), enabled=precision in kinds)


def measure_batch(config: TrainConfig, smallest: dict[str, int]) -> BatchBytes:
    """Bytes by the number of images, a line through the counts of two and of four `smallest` batches."""
    small, large = (step_bytes(config, {name: n * count for name, count in smallest.items()}) for n in (2, 4))
    return line(small, large, images=2 * sum(smallest.values()))


def line(small: float, large: float, *, images: int) -> BatchBytes:
    """The line through the bytes of `images` and of twice as many."""
    per_image = (large - small) / images
    return BatchBytes(small - per_image * images, per_image)


def usable_bytes(memory_gb: float) -> float:
    """Bytes of a device that tensors can get."""
    return memory_gb * 1e9 * (1 - FRAGMENTATION) - RESERVED


def largest_batch(usable: float, held: float, batch: BatchBytes, smallest: dict[str, int]) -> int:
    """Images that fit beside `held`, a multiple of the `smallest` batch; 0 if not even that fits."""
    images = sum(smallest.values())
    return max(0, int((usable - held - batch.fixed) / (batch.per_image * images))) * images
