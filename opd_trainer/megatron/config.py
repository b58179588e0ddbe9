"""How Megatron-core runs the student: parallel layout, micro-batches, optimizer."""

from dataclasses import dataclass, field
from enum import StrEnum, auto


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    constant = auto()
    linear = auto()
    cosine = auto()


class Recompute(StrEnum):
    """Which activations the backward pass computes anew instead of keeping them."""

    none = auto()
    """None."""
    selective = auto()
    """Those inside of the feed-forward layers, most of the memory, for about a fifth more computation."""
    full = auto()
    """All but the input of each layer, for about a third more computation."""


class Placement(StrEnum):
    """Where the weights of a model that scores beside the student are."""

    resident = auto()
    """On the device."""
    offload = auto()
    """On the host, and on the device while it scores."""
    swap = auto()
    """On the host, and exchanged with the student's in its own module while it scores."""


@dataclass(slots=True)
class OptimizerConfig:
    """Adam with fp32 main parameters, and the learning-rate schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a decaying schedule."""
    schedule: Schedule = Schedule.constant
    """constant, linear or cosine."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Optimizer steps until `min_lr` is reached; null means the run's length."""
    weight_decay: float = 0.01
    """Decoupled weight decay (not on norms and biases)."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.98
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global L2 norm at which gradients are clipped; 0 switches clipping off."""


@dataclass(slots=True)
class CriticConfig:
    """The critic of estimators that need values: a second Megatron model, in the student's parallel layout."""

    load: str | None = None
    """Hugging Face folder or checkpoint, of a language model (its head is replaced by one that gives 0) or of a value
    model; null takes the student's initial weights."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Adam and schedule; one step for each optimizer step of the student."""


@dataclass(slots=True)
class MegatronConfig:
    """Parallel layout, micro-batching and optimizer of the student's Megatron workers."""

    tensor_parallel: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_parallel: int = 1
    """Ranks that share the layers."""
    pipeline_layers: list[int] | None = None
    """Layers of each pipeline stage; null spreads them evenly, like those of a teacher of another depth."""
    context_parallel: int = 1
    """Ranks that share each sequence."""
    expert_parallel: int = 1
    """Ranks of a pipeline stage that share the experts, whatever else they share; an expert itself is never cut."""
    sequence_parallel: bool = False
    """Shard norms and the residual stream over tensor-parallel ranks; a mixture of experts needs it there."""
    recompute: Recompute = Recompute.none
    """none, selective or full: activations that the backward pass computes anew."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    max_tokens_per_device: int = 8192
    """Budget of a packed micro-batch, tokens; one longer sequence gets a micro-batch of its own."""
    log_prob_chunk_tokens: int = 128
    """Tokens whose vocabulary row is in fp32 at a time: of whole distributions that are compared, and of log-probs on a
    CPU; on a GPU a kernel computes those without copies."""
    timeout_s: float = 1800.0
    """Limit on any one call to a worker, and on collectives."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam and schedule."""
