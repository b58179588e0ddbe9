"""Tokens per second of the embedded engine, beside a bare loop and beside transformers' own `generate`.

    python -m benchmarks.rollout [--model demo|smollm] [--dtype float32|bfloat16] [--threads N] [--clock wall|cpu]
        [--json FILE]

All contestants decode the same random model and the same prompts, and are measured in turns, best of `--repeats`:

* engine: stop tokens, log-probs, a seed for each request, packing of finished rows;
* bare loop: our decoder over a preallocated cache with `multinomial`; fixed length, nothing else, no prompts (their
  slots are there, and zero): an upper bound;
* transformers loop: the same bare loop around the transformers model and its StaticCache;
* generate: `model.generate` with sampling and left padding.

The first table has responses of fixed length, which isolates the engine's bookkeeping from what it decodes; in the
second responses end by themselves, where packing pays off. On a busy machine use `--threads 1 --clock cpu`.

What was tried on a CPU and did not help (one thread, demo model, 256 rows): separate gate and up products, transposed
weights, and oneDNN instead of MKL products (all within 10 %); keys stored transposed (no faster);
SDPA for decoding (10x slower than two batched products); letting requests in only when most of the batch is free (25 %
slower), or at every eighth of it (5 % slower); batches of 64 instead of 256 (30 % slower).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config, StaticCache
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.machine import measuring
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded import decoder
from opd_trainer.rollout.embedded.shape import DecoderShape
from opd_trainer.rollout.embedded.slots import Slots
from opd_trainer.rollout.embedded.weights import DecoderWeights
from opd_trainer.rollout.embedded.worker import EmbeddedSpec, EmbeddedWorker
from opd_trainer.types import Prompt, Request, Sampling

EOS = 1
DEMO = Qwen3Config(
    vocab_size=32,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    eos_token_id=EOS,
    bos_token_id=None,
    pad_token_id=0,
)
SMOLLM = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    eos_token_id=EOS,
    bos_token_id=None,
    pad_token_id=0,
)
WORKLOADS = {"demo": (DEMO, 128, 4, 40), "smollm": (SMOLLM, 32, 1, 64)}
"""Model, prompts, samples of each, tokens of a response."""


class Numbers:
    """A tokenizer whose tokens are their numbers."""

    def batch_decode(self, responses: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, tokens)) for tokens in responses]


def make_requests(config: Any, prompts: int, siblings: int, shortest: int, longest: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(prompts):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        tokens = torch.randint(2, config.vocab_size, (length,), generator=generator)
        prompt = Prompt(id=str(number), tokens=tokens, text="")
        made += [Request(prompt=prompt, index=i, seed=number * siblings + i) for i in range(siblings)]
    return made


def engine(model: Any, requests: list[Request], response: int, eos: tuple[int, ...]) -> Callable[[], int]:
    spec = EmbeddedSpec(model.config, Numbers(), eos, EmbeddedRollout(), model.dtype)
    worker = EmbeddedWorker(spec)
    worker.start()
    worker.load_bucket([(name, parameter.detach()) for name, parameter in model.named_parameters()])
    worker.commit(0)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=response, stop_token_ids=())

    def run() -> int:
        worker.begin(requests, sampling)
        return sum(len(sample.response) for sample in worker.poll(1e9).samples)

    return run


def bare_loop(model: Any, requests: list[Request], response: int) -> Callable[[], int]:
    shape = DecoderShape.from_config(model.config)
    weights = DecoderWeights(shape, model.dtype, torch.device("cpu"))
    weights.begin()
    weights.fill([(name, parameter.detach()) for name, parameter in model.named_parameters()])
    weights.finish()
    batch, width = EmbeddedRollout().batch_size, len(requests[0].prompt.tokens)
    rotations = decoder.rotations(shape, width + response, torch.device("cpu"))

    @torch.inference_mode()
    def run() -> int:
        for first in range(0, len(requests), batch):
            chunk = requests[first : first + batch]
            slots = Slots(
                shape,
                rows=len(chunk),
                length=width + response,
                response=1,
                candidates=0,
                dtype=model.dtype,
                device=torch.device("cpu"),
            )
            slots.count, slots.end = len(chunk), width
            tokens = torch.stack([request.prompt.tokens[-1] for request in chunk])
            for position in range(width, width + response):
                hidden = decoder.forward(weights, tokens, rotations[position].expand(len(chunk), -1), slots.attend)
                slots.end += 1
                tokens = torch.multinomial(decoder.logits(weights, hidden).softmax(-1), 1).squeeze(1)
        return len(requests) * response

    return run


def transformers_loop(model: Any, requests: list[Request], response: int) -> Callable[[], int]:
    batch, width = EmbeddedRollout().batch_size, len(requests[0].prompt.tokens)

    @torch.inference_mode()
    def run() -> int:
        for first in range(0, len(requests), batch):
            tokens = torch.stack([request.prompt.tokens for request in requests[first : first + batch]])
            cache = StaticCache(config=model.config, max_cache_len=width + response)
            for _ in range(response):
                logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
                tokens = torch.multinomial(logits.float().softmax(-1), 1)
        return len(requests) * response

    return run


def generate(model: Any, requests: list[Request], response: int, eos: int | None) -> Callable[[], int]:
    batch = EmbeddedRollout().batch_size

    def run() -> int:
        count = 0
        for first in range(0, len(requests), batch):
            prompts = [request.prompt.tokens for request in requests[first : first + batch]]
            width = max(len(prompt) for prompt in prompts)
            tokens = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
            found = model.generate(
                tokens,
                attention_mask=(tokens != 0).long(),
                do_sample=True,
                top_k=0,
                max_new_tokens=response,
                min_new_tokens=None if eos is not None else response,
                eos_token_id=eos,
                pad_token_id=0,
            )[:, width:]
            count += count_tokens(found, eos)
        return count

    return run


def count_tokens(responses: Tensor, eos: int | None) -> int:
    if eos is None:
        return responses.numel()
    ended = (responses == eos).cumsum(-1)
    return int(((ended == 0) | ((responses == eos) & (ended == 1))).sum())


def compare(title: str, contestants: dict[str, Callable[[], int]], settings: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of each, the best of its rounds."""
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    best = dict.fromkeys(contestants, 0.0)
    for _ in range(settings.repeats):
        for name, run in contestants.items():
            torch.manual_seed(0)
            start = clock()
            tokens = run()
            best[name] = max(best[name], tokens / (clock() - start))
    print(title)
    for name, speed in best.items():
        print(f"  {name:18} {speed:10.0f} tokens/s   engine / this {best['engine'] / speed:6.2f}")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, default="demo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    write = measuring()
    torch.set_num_threads(settings.threads)
    config, prompts, siblings, response = WORKLOADS[settings.model]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype)).eval()
    even = make_requests(config, prompts, siblings, 12, 12)
    fixed = {
        "engine": engine(model, even, response, ()),
        "bare loop": bare_loop(model, even, response),
        "transformers loop": transformers_loop(model, even, response),
        "generate": generate(model, even, response, None),
    }
    title = f"{settings.model}, {settings.dtype}: {len(even)} responses of {response} tokens"
    found = {"fixed": compare(title, fixed, settings)}
    if settings.model == "demo":
        mixed = make_requests(config, prompts, siblings, 8, 16)
        free = {
            "engine": engine(model, mixed, 2 * response, (EOS,)),
            "generate": generate(model, mixed, 2 * response, EOS),
        }
        title = f"demo, {settings.dtype}: {len(mixed)} responses that end by themselves"
        found["free"] = compare(title, free, settings)
    if settings.json:
        write(settings.json, found)


if __name__ == "__main__":
    main()
