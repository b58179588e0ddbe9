"""A server that speaks SGLang's protocol without SGLang: for tests, for trying things out, and for failures on demand.

`python -m opd_trainer.sglang.fake --model-path FOLDER --port PORT` serves a small Hugging Face folder on CPU, one
request at a time; `table:<vocabulary>:<seed>` in place of the folder is a random table. SGLang's other flags are
accepted and ignored. A recorded conversation of the real server is checked against this one.
"""

import argparse
import asyncio
from collections.abc import Callable
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from opd_trainer.sglang.fake_control import CONTROLS, NEWER
from opd_trainer.sglang.fake_model import FakeModel, open_model
from opd_trainer.sglang.fake_state import Crashed, FakeState, Refused, Running
from opd_trainer.sglang.faults import Fault, hang_up, respond


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
            except Crashed:
                state.restart()
                return hang_up(request)
            if isinstance(answer, str):
                return web.Response(text=answer)
            return web.json_response(answer)

        app.router.add_route("*", path, handle)

    app.router.add_post("/generate", generate)
    app.router.add_post("/fake/fault", inject)
    for path, action in {**CONTROLS, **(NEWER if state.sessions else {})}.items():
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


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--old-api", action="store_true", help="without weight-update sessions and newer names")
    parser.add_argument("--load-format", default="auto")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    path, dummy = options.model_path, options.load_format == "dummy"

    async def serve() -> web.Application:
        return application(
            FakeState(make_model=lambda: open_model(path, dummy=dummy), model_path=path, sessions=not options.old_api)
        )

    web.run_app(serve(), host=options.host, port=options.port, shutdown_timeout=0.5)


if __name__ == "__main__":
    main()
