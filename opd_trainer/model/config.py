"""Which model a role (student, teacher, reference) uses."""

from dataclasses import dataclass, field
from enum import StrEnum, auto


class Family(StrEnum):
    """Model families that we build in Megatron-core and map to Hugging Face names."""

    llama = auto()
    qwen2 = auto()
    qwen3 = auto()
    qwen3_moe = auto()


class AttentionBackend(StrEnum):
    """Who computes core attention."""

    auto = "auto"
    """Transformer Engine where it is installed and a GPU is there, otherwise `torch`."""
    torch = "torch"
    """Our packed attention on torch's own kernels."""
    te = "te"
    """Transformer Engine."""


class Dtype(StrEnum):
    """Number format of the weights in forward and backward; main parameters are always fp32."""

    float32 = auto()
    bfloat16 = auto()


@dataclass(slots=True)
class ExpertsConfig:
    """The experts in each layer of a mixture of experts trained from scratch."""

    count: int = 8
    """Experts of a layer."""
    per_token: int = 2
    """Experts that compute a token: those with the largest router probabilities."""
    intermediate_size: int = 96
    """Width of an expert's SwiGLU hidden layer."""
    normalize: bool = True
    """Whether the probabilities of a token's experts are divided by their sum."""


@dataclass(slots=True)
class ArchitectureConfig:
    """The shape of a model trained from scratch; a loaded model brings its own."""

    family: Family = Family.qwen3
    """Model family: llama, qwen2 (also Qwen2.5), qwen3 (dense) or qwen3_moe (mixture of experts)."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads (grouped-query attention)."""
    head_dim: int = 32
    """Width of one head."""
    intermediate_size: int = 384
    """Width of the SwiGLU hidden layer of a dense family."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Of family qwen3_moe."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    max_length: int = 256
    """Context length in tokens."""
    tie_embeddings: bool = True
    """Whether the output head shares the embedding's weights."""


@dataclass(slots=True)
class ModelConfig:
    """A model: where its weights and tokenizer come from and how it computes."""

    load: str | None = None
    """Hugging Face folder or Megatron checkpoint (ours, Megatron-LM's, slime's; torch_dist or torch) with the weights;
    null trains `architecture` from scratch."""
    ckpt_step: int | None = None
    """Step to load from a directory of checkpoints; null takes the latest."""
    huggingface: str | None = None
    """Folder with config.json and tokenizer when `load` holds neither (a Megatron checkpoint that is not ours)."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """The shape when there is nothing to load."""
    attention_backend: AttentionBackend = AttentionBackend.auto
    """auto, torch or te."""
    dtype: Dtype = Dtype.float32
    """float32 or bfloat16."""
