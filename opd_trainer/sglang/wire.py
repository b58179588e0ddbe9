"""The JSON of SGLang's native API: what is asked and how answers are read. Only token ids cross, never text.

P = prompt tokens, R = response tokens, k = candidates per position. SGLang answers with lists of [log-prob, id, text].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.types import Finish, Sampling, ScoreStatus, TopK

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A server's opinion of a given response.

    Attributes:
        log_probs: f32[R].
        topk: the k likeliest tokens at each of the R positions, None unless asked for.
        cached_tokens: prompt tokens that the server found in its cache.
    """

    log_probs: Tensor
    topk: TopK | None
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A response that a server sampled.

    Attributes:
        tokens: i64[R], a stop token included.
        log_probs: f32[R] at the sampling temperature.
        topk: the k likeliest tokens at each of the R positions, None unless asked for.
        finish: why it ended.
        weight_version: what the server calls the weights that sampled it.
    """

    tokens: Tensor
    log_probs: Tensor
    topk: TopK | None
    finish: Finish
    weight_version: str


def score_body(tokens: Sequence[int], prompt_length: int, top_k: int = 0, temperature: float = 1.0) -> dict[str, Any]:
    """Asks for the log-probs of tokens[prompt_length:].

    `logprob_start_len` is the position of the last prompt token: its entry is null and is dropped, so that exactly R
    remain; an earlier start would keep the server from using its prefix cache. No token is generated. SGLang ignores
    the temperature here; a patched server may not.
    """
    return {
        "input_ids": list(tokens),
        "sampling_params": {"temperature": temperature, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": max(prompt_length - 1, 0),
        "top_logprobs_num": top_k,
    }


def generate_body(
    tokens: Sequence[int], sampling: Sampling, stop_token_ids: Sequence[int], *, seed: int, rid: str
) -> dict[str, Any]:
    """Asks for a response to a prompt."""
    return {
        "rid": rid,
        "input_ids": list(tokens),
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_new_tokens": sampling.max_response_tokens,
            "stop_token_ids": list(stop_token_ids),
            "skip_special_tokens": False,
            "sampling_seed": seed,
        },
        "return_logprob": True,
        "top_logprobs_num": sampling.log_prob_top_k,
    }


def read_scored(answer: Any, response: Sequence[int], top_k: int = 0) -> Scored:
    """Reads the answer to `score_body`.

    Raises:
        RequestFailed: `misaligned` (other tokens than were asked about, too few or too many), `nonfinite`.
    """
    meta = _meta(answer)
    entries = _drop_first(meta, "input_token_logprobs", len(response))
    log_probs, ids = _columns(entries)
    if not _echoes(ids, response):
        raise RequestFailed(ScoreStatus.misaligned, "the server scored other tokens than it was sent")
    topk = read_topk(_drop_first(meta, "input_top_logprobs", len(response)), top_k) if top_k else None
    return Scored(log_probs=log_probs, topk=topk, cached_tokens=int(meta.get("cached_tokens") or 0))


def read_generated(answer: Any, top_k: int = 0) -> Generated:
    """Reads the answer to `generate_body`.

    Raises:
        RequestFailed: `misaligned` (lists that do not fit each other), `nonfinite`, `http_error` (aborted by the server
            for a reason of its own).
    """
    meta = _meta(answer)
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != meta.get("completion_tokens"):
        count = len(entries) if isinstance(entries, list) else "no"
        raise RequestFailed(
            ScoreStatus.misaligned, f"{count} log-probs for {meta.get('completion_tokens')} generated tokens"
        )
    log_probs, ids = _columns(entries)
    topk = None
    if top_k:
        tops = meta.get("output_top_logprobs")
        if not isinstance(tops, list) or len(tops) != len(entries):
            raise RequestFailed(ScoreStatus.misaligned, "the candidates do not fit the generated tokens")
        topk = read_topk(tops, top_k)
    return Generated(
        tokens=torch.tensor(ids, dtype=torch.int64),
        log_probs=log_probs,
        topk=topk,
        finish=_finish(meta.get("finish_reason")),
        weight_version=str(meta.get("weight_version")),
    )


def read_topk(positions: Sequence[Any], k: int) -> TopK:
    """[R] lists of [log-prob, id, text] -> ids and log-probs [R, k], likeliest first.

    Raises:
        RequestFailed: `misaligned`, a position without k candidates; `nonfinite`.
    """
    if any(not isinstance(position, list) or len(position) < k for position in positions):
        raise RequestFailed(ScoreStatus.misaligned, f"a position came without its {k} candidates")
    log_probs, ids = _columns([entry for position in positions for entry in position[:k]])
    return TopK(ids=torch.tensor(ids, dtype=torch.int64).view(-1, k), log_probs=log_probs.view(-1, k))


def _meta(answer: Any) -> Json:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise RequestFailed(ScoreStatus.misaligned, "the answer has no meta_info: this is no SGLang /generate endpoint")
    return meta


def _drop_first(meta: Json, key: str, length: int) -> list[Any]:
    entries = meta.get(key)
    count = len(entries) if isinstance(entries, list) else 0
    if not isinstance(entries, list) or count != length + 1:
        raise RequestFailed(ScoreStatus.misaligned, f"{key} has {count} entries, not {length + 1}")
    return entries[1:]


def _echoes(ids: Sequence[int], sent: Sequence[int]) -> bool:
    """Whether the server scored what it was sent.

    SGLang 0.5.23 tells the last id of its vocabulary as 0, as it does with the placeholders of images
    (logprob_result_processor.py); the log-prob is that of the token that was sent.
    """
    if ids == sent:
        return True
    differing = {(told, own) for told, own in zip(ids, sent, strict=True) if told != own}
    return differing == {(0, max(sent))}


def _columns(entries: Sequence[Any]) -> tuple[Tensor, list[int]]:
    """Log-probs f32 and ids of entries [log-prob, id, text]."""
    # Whole lists at once: this is most of what a sample costs the controller.
    try:
        values, ids = [entry[0] for entry in entries], [entry[1] for entry in entries]
    except (TypeError, KeyError, IndexError) as error:
        raise RequestFailed(ScoreStatus.misaligned, "an entry is no [log-prob, id, text]") from error
    if not set(map(type, ids)) <= {int}:
        raise RequestFailed(ScoreStatus.misaligned, "an entry is no [log-prob, id, text]")
    # SGLang writes NaN as null, and an impossible token as the lowest float32.
    if not set(map(type, values)) <= {int, float}:
        raise RequestFailed(ScoreStatus.nonfinite, "a log-prob is null")
    # Whatever is not finite, or as low, makes the sum so; log-probs have one sign, and cannot make up for each other.
    if not abs(sum(values)) < 1e30:
        raise RequestFailed(ScoreStatus.nonfinite, "a log-prob is not finite")
    return torch.from_numpy(np.asarray(values, dtype=np.float32)), ids


def _finish(reason: Any) -> Finish:
    kind = reason.get("type") if isinstance(reason, dict) else reason
    try:
        return Finish(str(kind))
    except ValueError as error:
        raise RequestFailed(ScoreStatus.misaligned, f"unknown finish reason {reason!r}") from error
