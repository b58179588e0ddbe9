"""What is said to a server so that the real one and the fake can be compared, and what is kept of its answers."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

RECORDING = Path(__file__).with_name("conversation.json")
SEED = 1
"""Of the model that was served, see `save_tiny`."""

PROMPT, RESPONSE = [3, 4, 5, 13, 6, 7], [8, 9, 15, 20, 33]
SCORE = {
    "input_ids": PROMPT + RESPONSE,
    "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
    "return_logprob": True,
    "logprob_start_len": len(PROMPT) - 1,
    "top_logprobs_num": 3,
}
GENERATE = {
    "rid": "conversation",
    "input_ids": PROMPT,
    "sampling_params": {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_new_tokens": 12, "stop_token_ids": [1]},
    "return_logprob": True,
    "top_logprobs_num": 2,
}
EMPTY_PICKLE = "gARdlC4="
"""An empty list."""
GREEDY = {"input_ids": PROMPT, "sampling_params": {"temperature": 0.0, "max_new_tokens": 6}, "return_logprob": True}

TURNS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("health", "/health", None),
    ("model_info", "/model_info", None),
    ("server_info", "/server_info", None),
    ("score", "/generate", SCORE),
    (
        "score at another temperature",
        "/generate",
        {**SCORE, "sampling_params": {"temperature": 0.5, "max_new_tokens": 0}},
    ),
    ("generate", "/generate", GENERATE),
    ("greedy", "/generate", GREEDY),
    ("too long", "/generate", {**SCORE, "input_ids": [2] * 600}),
    ("too long a response", "/generate", {**GREEDY, "sampling_params": {"max_new_tokens": 5000}}),
    ("nothing", "/generate", {**SCORE, "input_ids": []}),
    ("pause", "/pause_generation", {"mode": "retract"}),
    ("begin", "/begin_weight_update", {}),
    ("end", "/end_weight_update", {}),
    ("flush", "/flush_cache", {}),
    ("continue", "/continue_generation", {}),
    ("tensor outside of a session", "/update_weights_from_tensor", {"serialized_named_tensors": [EMPTY_PICKLE]}),
    ("disk without a model", "/update_weights_from_disk", {"model_path": "/nowhere", "weight_version": "8"}),
    ("abort", "/abort_request", {"rid": "", "abort_all": True}),
    ("unknown endpoint", "/no_such_endpoint", {}),
]


def talk(url: str) -> dict[str, Any]:
    """Status and answer of every turn."""
    return {name: _say(url + path, body) for name, path, body in TURNS}


def _say(url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    try:
        answer = json.loads(content)
    except json.JSONDecodeError:
        answer = content.decode()
    return {"status": status, "answer": answer}


def shape(value: Any) -> Any:
    """A value with its leaves replaced by their types; lists by the shapes in them."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def differences(real: Any, fake: Any, where: str = "") -> list[str]:
    """Where the fake says something that the real server does not; what only the real one says is left out."""
    if isinstance(real, dict) and isinstance(fake, dict):
        found = [f"{where}.{key}: only the fake says it" for key in fake.keys() - real.keys()]
        return found + [
            d for key in fake.keys() & real.keys() for d in differences(real[key], fake[key], f"{where}.{key}")
        ]
    if isinstance(real, list) and isinstance(fake, list):
        if len(real) != len(fake):
            return [f"{where}: {len(real)} entries, {len(fake)} from the fake"]
        pairs = enumerate(zip(real, fake, strict=True))
        return [d for number, (a, b) in pairs for d in differences(a, b, f"{where}[{number}]")]
    return [] if real == fake else [f"{where}: {real!r}, {fake!r} from the fake"]


def comparable(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without what differs from one run to the next, and without what nobody reads."""
    answer = turn["answer"]
    if isinstance(answer, dict):
        answer = dict(answer)
        meta = answer.get("meta_info")
        if isinstance(meta, dict):
            answer["meta_info"] = {
                key: value for key, value in meta.items() if key != "output_top_logprobs" or meta["completion_tokens"]
            }
    return {"status": turn["status"], "answer": answer}
