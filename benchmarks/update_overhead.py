"""CPU time of a learner's update against a bare loop on the same model and the same packed tokens.

Run: python -m benchmarks.update_overhead
"""

import argparse
import asyncio
import functools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.megatron.learner import MegatronLearner
from opd_trainer.megatron.micro_batch import Scoring, prepare
from opd_trainer.megatron.packing import plan
from opd_trainer.megatron.source import load_model
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ArchitectureConfig, ModelConfig
from tests.megatron import training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), arguments.sequences, arguments.rounds))


async def measure(folder: Path, sequences: int, rounds: int) -> None:
    training.save_tokenizer(folder)
    model = ModelConfig(huggingface=str(folder), architecture=ArchitectureConfig())
    spec = training.spec(folder, model=model, vocab_size=22)
    lengths = torch.randint(10, 50, (sequences,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = training.batch((10,) * sequences, lengths)
    batch = batch.replace(weight=batch.mask / batch.mask.sum())
    group = InProcessGroup(functools.partial(MegatronWorker, spec))
    learner = MegatronLearner(group, max_tokens=8192, bucket_bytes=1 << 30)
    await learner.start()
    runtime = group.worker._student.model.runtime
    # A twin: the hooks of the learner's model move gradients into buffers.
    student = load_model(runtime, model, spec.megatron, vocab_size=22, trainable=True).model
    module = student.modules[0]
    scoring = Scoring(1.0, spec.megatron.log_prob_chunk_tokens)
    parts = [batch.take(part) for part in plan(batch.lengths.tolist(), 1, 8192).ranks[0]]
    prepared = [prepare(part, runtime) for part in parts]
    adam = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def bare() -> None:
        adam.zero_grad()
        for part, micro_batch in zip(parts, prepared, strict=True):
            log_probs, _ = scoring(student, student.forward(micro_batch.packed), micro_batch.targets)
            assert part.weight is not None
            (-log_probs * part.weight[micro_batch.index]).sum().backward()
        clip_grad_norm_(module.parameters(), 1.0)
        adam.step()

    bare_s, update_s = [], []
    for number in range(rounds):
        began = time.process_time()
        bare()
        middle = time.process_time()
        await learner.update(batch, NegativeLogLikelihood())
        if number:
            bare_s.append(middle - began)
            update_s.append(time.process_time() - middle)
    await learner.close()
    bare_median, update_median = statistics.median(bare_s), statistics.median(update_s)
    print(
        f"{batch.num_tokens} tokens in {len(parts)} micro-batches: bare {bare_median * 1e3:.1f} ms, "
        f"update {update_median * 1e3:.1f} ms, ratio {update_median / bare_median:.3f}"
    )


if __name__ == "__main__":
    main()
