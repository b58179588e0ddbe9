"""The decoder's weights: fused buffers, filled through views under their Hugging Face names.

Query, key and value share one matrix, gate and up another. Rows of queries and keys are stored in interleaved order
(Hugging Face: the two rotary halves of a head one after the other), so that rotary pairs are neighbours and rotation is
one complex product; attention scores do not depend on the order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_trainer.errors import ShapeMismatch
from opd_trainer.rollout.embedded.projection import Projection
from opd_trainer.rollout.embedded.shape import DecoderShape

_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """A SwiGLU; H = hidden, F = intermediate size.

    Attributes:
        gate_up: [2F, H] fused projections.
        down: [H, F].
    """

    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The experts of a layer.

    Attributes:
        router: [experts, H].
        experts: a SwiGLU each.
    """

    router: Projection
    experts: tuple[MlpWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer; H = hidden, A = heads * head_dim, K = KV heads * head_dim.

    Attributes:
        input_norm: [H] RMSNorm before attention.
        qkv: [A + 2K, H] fused projections.
        qk_norm: [heads + KV heads, head_dim], the two head norms repeated for each head, or None.
        output: [H, A] attention output projection.
        mlp_norm: [H] RMSNorm before the feed-forward layer.
        feed_forward: a SwiGLU, or experts.
    """

    input_norm: Tensor
    qkv: Projection
    qk_norm: Tensor | None
    output: Projection
    mlp_norm: Tensor
    feed_forward: MlpWeights | ExpertWeights


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a tensor of this `size` goes; `pairs` > 0 interleaves the rotary halves of heads with that many pairs."""

    view: Tensor
    size: torch.Size
    pairs: int = 0

    def fill(self, tensor: Tensor) -> None:
        if self.pairs:
            tensor = tensor.unflatten(0, (-1, 2, self.pairs)).transpose(1, 2).flatten(0, 2)
        self.view.copy_(tensor)


class DecoderWeights:
    """Preallocated weights of one decoder.

    Args:
        shape: sizes and switches of the model.
        dtype: number format of the weights and of the forward pass.
        device: where they live.
    """

    def __init__(self, shape: DecoderShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._options = {"dtype": dtype, "device": device}
        self._slots: dict[str, _Slot] = {}
        self._missing: set[str] = set()
        self._projections: list[Projection] = []
        self.embedding = self._tensor("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size)
        self.layers = [self._layer(f"model.layers.{index}") for index in range(shape.num_layers)]
        self.final_norm = self._tensor("model.norm.weight", shape.hidden_size)
        if shape.tie_embeddings:
            self.head = self._projection(self.embedding, shared=True)
        else:
            self.head = self._projection(self._tensor("lm_head.weight", shape.vocab_size, shape.hidden_size))

    @property
    def names(self) -> frozenset[str]:
        """The Hugging Face names of all tensors of the model."""
        return frozenset(self._slots)

    def begin(self) -> None:
        """Expects every tensor anew; until `finish` there is nothing to compute with."""
        self._missing = set(self._slots)
        for projection in self._projections:
            projection.unpack()

    def fill(self, bucket: Iterable[tuple[str, Tensor]]) -> None:
        """Copies named tensors in; a name may come once between `begin` and `finish`.

        Raises:
            ShapeMismatch: a tensor that this model does not have, that came twice, or that has another shape.
        """
        for name, tensor in bucket:
            if name not in self._missing:
                state = "came twice" if name in self._slots else "is unknown to this model"
                raise ShapeMismatch(f"weight sync: the tensor {name} {state}: the engine cannot tell what it is for")
            slot = self._slots[name]
            if tensor.shape != slot.size:
                raise ShapeMismatch(
                    f"weight sync: {name} has shape {tuple(tensor.shape)} where the engine's model has "
                    f"{tuple(slot.size)}: engine and trainer do not use the same model"
                )
            slot.fill(tensor)
            self._missing.remove(name)

    def finish(self) -> None:
        """Checks that every tensor came, and makes them ready for use.

        Raises:
            ShapeMismatch: some did not; they are named.
        """
        if self._missing:
            names = sorted(self._missing)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ShapeMismatch(
                f"weight sync: {len(names)} tensors did not come: {', '.join(names[:_SHOWN])}{more}: "
                "the engine would mix two versions of the weights"
            )
        for projection in self._projections:
            projection.pack()

    def _projection(self, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> Projection:
        self._projections.append(Projection(weight, bias, shared=shared))
        return self._projections[-1]

    def _tensor(self, name: str, *size: int) -> Tensor:
        view = torch.zeros(size, **self._options)
        self._slots[name] = _Slot(view, view.shape)
        return view

    def _fused(self, parts: list[tuple[str, int, int]], *columns: int) -> Tensor:
        whole = torch.zeros((sum(rows for _, rows, _ in parts), *columns), **self._options)
        for (name, _, pairs), view in zip(parts, whole.split([rows for _, rows, _ in parts]), strict=True):
            self._slots[name] = _Slot(view, view.shape, pairs)
        return whole

    def _qk_norm(self, prefix: str) -> Tensor:
        counts, size = [self.shape.num_heads, self.shape.num_kv_heads], self.shape.head_dim
        whole = torch.zeros((sum(counts), size), **self._options)
        for name, view in zip(("q_norm", "k_norm"), whole.split(counts), strict=True):
            self._slots[f"{prefix}.{name}.weight"] = _Slot(view, torch.Size([size]), size // 2)
        return whole

    def _layer(self, prefix: str) -> LayerWeights:
        shape, attention = self.shape, f"{prefix}.self_attn"
        hidden, pairs = shape.hidden_size, shape.head_dim // 2
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

        def qkv(kind: str, *columns: int) -> Tensor:
            parts = [("q_proj", query, pairs), ("k_proj", key, pairs), ("v_proj", key, 0)]
            return self._fused([(f"{attention}.{name}.{kind}", rows, pair) for name, rows, pair in parts], *columns)

        return LayerWeights(
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._projection(qkv("weight", hidden), qkv("bias") if shape.qkv_bias else None),
            qk_norm=self._qk_norm(attention) if shape.qk_norm else None,
            output=self._projection(
                self._tensor(f"{attention}.o_proj.weight", hidden, query),
                self._tensor(f"{attention}.o_proj.bias", hidden) if shape.output_bias else None,
            ),
            mlp_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            feed_forward=self._feed_forward(f"{prefix}.mlp"),
        )

    def _feed_forward(self, prefix: str) -> MlpWeights | ExpertWeights:
        shape, experts = self.shape, self.shape.experts
        if experts is None:
            return self._mlp(prefix, shape.intermediate_size)
        return ExpertWeights(
            router=self._projection(self._tensor(f"{prefix}.gate.weight", experts.count, shape.hidden_size)),
            experts=tuple(
                self._mlp(f"{prefix}.experts.{index}", experts.intermediate_size) for index in range(experts.count)
            ),
        )

    def _mlp(self, prefix: str, inner: int) -> MlpWeights:
        hidden, bias = self.shape.hidden_size, self.shape.mlp_bias

        def gate_up(kind: str, *columns: int) -> Tensor:
            return self._fused([(f"{prefix}.{name}.{kind}", inner, 0) for name in ("gate_proj", "up_proj")], *columns)

        return MlpWeights(
            gate_up=self._projection(gate_up("weight", hidden), gate_up("bias") if bias else None),
            down=self._projection(
                self._tensor(f"{prefix}.down_proj.weight", hidden, inner),
                self._tensor(f"{prefix}.down_proj.bias", hidden) if bias else None,
            ),
        )
