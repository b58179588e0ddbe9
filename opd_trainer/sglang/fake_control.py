"""What the fake server answers beside /generate: information, weights, memory."""

import asyncio
import base64
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_trainer.sglang import process_group
from opd_trainer.sglang.fake_state import OLD_VERSION, VERSION, Crashed, FakeState, Refused


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
    if "weights" in state.released:
        raise Crashed
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


MEMORY = {"kv_cache", "weights", "cuda_graph"}


def _release(state: FakeState, body: dict[str, Any]) -> None:
    if state.running:
        # An assertion in SGLang's scheduler.
        raise Crashed
    state.released |= set(body.get("tags") or MEMORY)
    if "weights" in state.released:
        state.weight_version = "released"


def _resume(state: FakeState, body: dict[str, Any]) -> None:
    tags = set(body.get("tags") or MEMORY)
    if not tags <= state.released:
        raise Crashed
    state.released -= tags


def _flush(state: FakeState, body: dict[str, Any]) -> str:
    if state.running:
        raise Refused("Flush cache failed.")
    return "Cache flushed.\n"


CONTROLS: dict[str, Callable[[FakeState, dict[str, Any]], Any]] = {
    "/health": lambda state, body: "",
    "/get_model_info": _model_info,
    "/get_server_info": _server_info,
    "/flush_cache": _flush,
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
"""By path."""
NEWER: dict[str, Callable[[FakeState, dict[str, Any]], Any]] = {
    "/model_info": _model_info,
    "/server_info": _server_info,
    "/begin_weight_update": _begin,
    "/end_weight_update": _end,
}
"""Those that older versions lack."""
