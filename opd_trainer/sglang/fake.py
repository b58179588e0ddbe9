"""A server that speaks SGLang's protocol without SGLang: for tests, for trying things out, and for failures on demand.

`python -m opd_trainer.sglang.fake --model-path FOLDER --port PORT` serves a small Hugging Face folder on CPU, one
request at a time; `table:<vocabulary>:<seed>` in place of the folder is a random table. SGLang's other flags are
accepted and ignored. A recorded conversation of the real server is checked against this one.
"""

import argparse
import asyncio
import base64
import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from opd_trainer.sglang import process_group
from opd_trainer.sglang.fake_model import FakeModel, open_model
from opd_trainer.sglang.faults import Fault, Faults, hang_up, respond

VERSION = "0.5.23"
OLD_VERSION = "0.5.3"
"""What an older API (without weight-update sessions) reports."""


class Refused(Exception):
    """A request that SGLang answers with 400."""


class Crashed(Exception):
    """A request that SGLang 0.5.23 dies of: a token id beyond the vocabulary."""


@dataclass(slots=True)
class Running:
    """A generation under way; set `aborted` to end it."""

    aborted: bool = False


@dataclass(slots=True)
class FakeState:
    """What the server knows.

    Attributes:
        make_model: builds the model of a fresh process.
        model_path: what it says it serves.
        sessions: weight updates from tensors need /begin_weight_update (newer SGLang).
        honour_temperature: scores prompts at the request's temperature, which SGLang does not.
        token_s: seconds that a generated token takes.
        breaking: paths of control requests; the connection of the next one to each breaks before an answer.
    """

    make_model: Callable[[], FakeModel]
    model_path: str = "fake"
    sessions: bool = True
    honour_temperature: bool = False
    token_s: float = 0.0
    breaking: set[str] = field(default_factory=set)
    faults: Faults = field(default_factory=Faults)
    weight_version: str = "default"
    calls: list[str] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    updating: bool = False
    released: bool = False
    groups: dict[str, Any] = field(default_factory=dict)
    unpaused: asyncio.Event = field(default_factory=asyncio.Event)
    model: FakeModel = field(init=False)
    serial: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Back to the state of a fresh process: initial weights, no groups, nothing running."""
        self.model, self.weight_version = self.make_model(), "default"
        self.updating = self.released = False
        self.groups.clear()
        self.unpaused.set()


def application(state: FakeState) -> web.Application:
    """The server as an aiohttp application."""
    app = web.Application(client_max_size=2**34)

    async def generate(request: web.Request) -> web.StreamResponse:
        state.calls.append("/generate")
        body = await request.json()
        fault, seconds = state.faults.next()
        await state.unpaused.wait()
        try:
            answer = await _generate(state, body)
        except Refused as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        except Crashed:
            state.restart()
            answer, fault, seconds = {}, Fault.reset, 0.0
        return await respond(request, lambda: answer, fault, seconds)

    async def inject(request: web.Request) -> web.Response:
        body = await request.json()
        state.faults.add(Fault(body["kind"]), body.get("times", 1), body.get("seconds", 0.0))
        return web.json_response({"success": True})

    def control(path: str, action: Callable[[FakeState, dict[str, Any]], Any]) -> None:
        async def handle(request: web.Request) -> web.Response:
            state.calls.append(path)
            if path in state.breaking:
                state.breaking.discard(path)
                return hang_up(request)
            body = await request.json() if request.can_read_body else {}
            try:
                result = action(state, body)
                answer = await result if asyncio.iscoroutine(result) else result
            except Refused as error:
                return web.json_response({"success": False, "message": str(error)}, status=400)
            if isinstance(answer, str):
                return web.Response(text=answer)
            return web.json_response(answer)

        app.router.add_route("*", path, handle)

    app.router.add_post("/generate", generate)
    app.router.add_post("/fake/fault", inject)
    for path, action in {**_CONTROLS, **(_SESSIONS if state.sessions else {})}.items():
        control(path, action)
    app.router.add_route("*", "/{rest:.*}", _not_found)
    return app


async def _not_found(request: web.Request) -> web.Response:
    return web.json_response({"detail": "Not Found"}, status=404)


async def _generate(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    if state.released:
        raise Refused("the memory is released")
    tokens, sampling = body.get("input_ids") or [], body.get("sampling_params") or {}
    _check(state.model, tokens, body, sampling)
    rid = body.get("rid") or f"fake-{next(state.serial)}"
    running = state.running.setdefault(rid, Running())
    top_k = body.get("top_logprobs_num") or 0
    try:
        output, finish = await _sample(state, tokens, sampling, running, top_k)
    finally:
        state.running.pop(rid, None)
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": finish,
        "prompt_tokens": len(tokens),
        "completion_tokens": len(output),
        "cached_tokens": 0,
        "weight_version": state.weight_version,
        "e2e_latency": 0.0,
    }
    if body.get("return_logprob"):
        scored, tops = _score(state, tokens, body, sampling, top_k)
        meta |= {"input_token_logprobs": scored, "output_token_logprobs": [entry for entry, _ in output]}
        if top_k:
            meta |= {"input_top_logprobs": tops, "output_top_logprobs": [top for _, top in output]}
    return {"output_ids": [entry[1] for entry, _ in output], "meta_info": meta}


def _check(model: FakeModel, tokens: list[int], body: dict[str, Any], sampling: dict[str, Any]) -> None:
    if not tokens:
        raise Refused("input_ids cannot be empty.")
    if any(not 0 <= token < model.vocab_size for token in tokens):
        raise Crashed
    limit = model.max_length
    if len(tokens) >= limit:
        raise Refused(f"The input ({len(tokens)} tokens) is longer than the model's context length ({limit} tokens).")
    total = len(tokens) + sampling.get("max_new_tokens", 128)
    if total > limit:
        raise Refused(f"Requested token count exceeds the model's maximum context length of {limit} tokens. ({total})")
    start = body.get("logprob_start_len")
    if start is not None and start > len(tokens):
        raise Refused(f"logprob_start_len={start} is higher than the number of input tokens {len(tokens)}.")


def _score(
    state: FakeState, tokens: list[int], body: dict[str, Any], sampling: dict[str, Any], top_k: int
) -> tuple[list[Any], list[Any]]:
    """Entries of the prompt's tokens from `logprob_start_len` on; the first is unknown."""
    start = body.get("logprob_start_len")
    if start is None or start < 0 or start >= len(tokens):
        return [], []
    temperature = sampling.get("temperature", 1.0) if state.honour_temperature else 1.0
    rows = (state.model.logits(tokens)[start:-1] / temperature).log_softmax(-1)
    # As SGLang 0.5.23 has it, which takes the last id for the placeholder of an image.
    told = [token if token < state.model.vocab_size - 1 else 0 for token in tokens[start:]]
    entries: list[Any] = [[None, told[0], None]]
    scored = zip(rows, tokens[start + 1 :], told[1:], strict=True)
    entries += [[float(row[token]), echo, None] for row, token, echo in scored]
    return entries, [None, *(_top(row, top_k) for row in rows)] if top_k else []


async def _sample(
    state: FakeState, prompt: list[int], sampling: dict[str, Any], running: Running, top_k: int
) -> tuple[list[tuple[list[Any], list[Any]]], dict[str, Any]]:
    longest = sampling.get("max_new_tokens", 128)
    stops = set(sampling.get("stop_token_ids") or ())
    if not sampling.get("ignore_eos"):
        stops |= state.model.eos_token_ids
    generator = torch.Generator().manual_seed(sampling.get("sampling_seed") or 42)
    output: list[tuple[list[Any], list[Any]]] = []
    tokens = list(prompt)
    while len(output) < longest:
        await asyncio.sleep(state.token_s)
        await state.unpaused.wait()
        if running.aborted:
            return output, {"type": "abort", "message": "Aborted"}
        log_probs, token = _draw(state.model.logits(tokens)[-1], sampling, generator)
        output.append(([float(log_probs[token]), token, None], _top(log_probs, top_k)))
        tokens.append(token)
        if token in stops:
            return output, {"type": "stop", "matched": token}
    return output, {"type": "length", "length": longest}


def _draw(logits: Tensor, sampling: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, int]:
    temperature = sampling.get("temperature", 1.0)
    greedy = temperature == 0.0
    log_probs = (logits if greedy else logits / temperature).log_softmax(-1)
    order = log_probs.argsort(descending=True)
    probs = log_probs[order].exp()
    keep = (probs.cumsum(0) - probs) <= sampling.get("top_p", 1.0)
    top_k = 1 if greedy else sampling.get("top_k", -1)
    if top_k > 0:
        keep[top_k:] = False
    return log_probs, int(order[torch.multinomial(torch.where(keep, probs, 0.0), 1, generator=generator)])


def _top(log_probs: Tensor, k: int) -> list[list[Any]]:
    values, ids = log_probs.topk(min(k, len(log_probs)))
    return [[value, number, None] for value, number in zip(values.tolist(), ids.tolist(), strict=True)]


def _model_info(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_path": state.model_path,
        "tokenizer_path": state.model_path,
        "is_generation": True,
        "weight_version": state.weight_version,
    }


def _server_info(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_path": state.model_path,
        "version": VERSION if state.sessions else OLD_VERSION,
        "tp_size": 1,
        "skip_tokenizer_init": True,
        "max_total_num_tokens": 20000,
        "max_req_input_len": state.model.max_length - 6,
        "context_length": None,
    }


def _done(message: str = "Success") -> dict[str, Any]:
    return {"success": True, "message": message}


def _pause(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    state.unpaused.clear()
    return {"status": "ok"}


def _continue(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    state.unpaused.set()
    return {"status": "ok"}


def _abort(state: FakeState, body: dict[str, Any]) -> str:
    for rid, running in state.running.items():
        if body.get("abort_all") or rid == body.get("rid"):
            running.aborted = True
    return ""


def _begin(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    if state.updating:
        raise Refused("a weight-update session is already open; call end_weight_update() first")
    state.updating = True
    return _done()


def _end(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    if not state.updating:
        raise Refused("end_weight_update() without begin_weight_update()")
    state.updating = False
    return _done()


def _take(state: FakeState, named: Sequence[tuple[str, Tensor]], body: dict[str, Any]) -> dict[str, Any]:
    try:
        state.model.load(named)
    except (KeyError, RuntimeError) as error:
        raise Refused(f"Failed to update weights: {error}.") from error
    if body.get("weight_version") is not None:
        state.weight_version = body["weight_version"]
    return _done()


def _check_session(state: FakeState, what: str) -> None:
    if state.sessions and not state.updating:
        raise Refused(f"{what} must run between begin_weight_update() and end_weight_update()")


def _from_tensor(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    _check_session(state, "update_weights_from_tensor")
    return _take(state, pickle.load(io.BytesIO(base64.b64decode(body["serialized_named_tensors"][0]))), body)


def _from_disk(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted(Path(body["model_path"]).glob("*.safetensors"))
    if not files:
        raise Refused(f"Failed to get weights iterator: {body['model_path']}.")
    return _take(state, [item for file in files for item in load_file(file).items()], body)


async def _join_group(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    state.groups[body["group_name"]] = await asyncio.to_thread(
        process_group.join,
        body["backend"],
        body["master_address"],
        body["master_port"],
        rank=body["rank_offset"],
        size=body["world_size"],
        name=body["group_name"],
        timeout_s=60.0,
    )
    return _done()


async def _from_distributed(state: FakeState, body: dict[str, Any]) -> dict[str, Any]:
    _check_session(state, "update_weights_from_distributed")
    group = state.groups.get(body["group_name"])
    if group is None:
        raise Refused(f"Group {body['group_name']} not in {list(state.groups)}.")
    tensors = [
        torch.empty(shape, dtype=getattr(torch, dtype))
        for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
    ]
    await asyncio.to_thread(process_group.broadcast, group, tensors)
    return _take(state, list(zip(body["names"], tensors, strict=True)), body)


def _release(state: FakeState, body: dict[str, Any]) -> None:
    state.released = True


def _resume(state: FakeState, body: dict[str, Any]) -> None:
    state.released = False


_CONTROLS: dict[str, Callable[[FakeState, dict[str, Any]], Any]] = {
    "/health": lambda state, body: "",
    "/model_info": _model_info,
    "/get_model_info": _model_info,
    "/server_info": _server_info,
    "/flush_cache": lambda state, body: "Cache flushed.\n",
    "/pause_generation": _pause,
    "/continue_generation": _continue,
    "/abort_request": _abort,
    "/update_weights_from_tensor": _from_tensor,
    "/update_weights_from_disk": _from_disk,
    "/init_weights_update_group": _join_group,
    "/update_weights_from_distributed": _from_distributed,
    "/release_memory_occupation": _release,
    "/resume_memory_occupation": _resume,
}
_SESSIONS: dict[str, Callable[[FakeState, dict[str, Any]], Any]] = {
    "/begin_weight_update": _begin,
    "/end_weight_update": _end,
}


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--old-api", action="store_true", help="without weight-update sessions")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    path = options.model_path

    async def serve() -> web.Application:
        return application(
            FakeState(make_model=lambda: open_model(path), model_path=path, sessions=not options.old_api)
        )

    web.run_app(serve(), host=options.host, port=options.port, shutdown_timeout=0.5)


if __name__ == "__main__":
    main()
