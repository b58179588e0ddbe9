"""Divergence losses and candidates of an inline teacher, against plain softmaxes of the same models in transformers."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.log_prob_memory import peak_bytes
from opd_trainer.divergence.config import DivergenceConfig, DivergenceKind
from opd_trainer.divergence.token import TokenDivergence
from opd_trainer.megatron.evidence import ByRow, candidates
from opd_trainer.megatron.huggingface import export_hf_weights
from opd_trainer.megatron.micro_batch import Scoring
from opd_trainer.megatron.spec import RankUpdate, WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import Family
from opd_trainer.teacher.config import ResidentTeacher
from opd_trainer.teacher.inline import inline_teacher
from opd_trainer.types import TokenBatch, TopK
from opd_trainer.updates import Live, Wants
from tests.gloo import run_gloo
from tests.megatron import models, training
from tests.megatron.training import started

KINDS = [kind for kind in DivergenceKind if kind is not DivergenceKind.sampled]
K = 4
TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Dense:
    """The divergence itself."""

    kind: DivergenceKind

    @property
    def wants(self) -> Wants:
        return Wants(divergence=TokenDivergence(DivergenceConfig(kind=self.kind, beta=0.3, top_k=K)), top_k=K)

    def __call__(self, live: Live, batch: TokenBatch) -> Tensor:
        assert live.divergence is not None
        return torch.where(batch.mask, live.divergence, 0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("evidence")
    return training.write_model(folder / "student"), training.write_model(folder / "teacher", seed=1)


def spec(folders: tuple[Path, Path], **changes: Any) -> WorkerSpec:
    """Weights stay as they are, gradients are not clipped, and there are several chunks."""
    given = {"lr": 0.0, "clip_grad": 0.0, "weight_decay": 0.0, "log_prob_chunk_tokens": 5, **changes}
    plain = training.spec(folders[0], temperature=TEMPERATURE, **given)
    teachers = {
        name: inline_teacher(name, ResidentTeacher(load=str(folders[1])), plain.model, plain.megatron, TEMPERATURE)
        for name in ("default", "other")
    }
    return training.spec(folders[0], temperature=TEMPERATURE, teachers=teachers, **given)


def gradients(worker: MegatronWorker) -> dict[str, Tensor]:
    """Of the last update, under Hugging Face names; collective, only rank 0 has any."""
    assert worker._student is not None
    found = export_hf_weights(worker._student.model, lambda parameter: cast(Any, parameter).main_grad)
    return {name: tensor.clone() for name, tensor in found}


def sharp(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def predictions(model: Any, batch: TokenBatch) -> Tensor:
    """Logits over the temperature that produced each unmasked token, [M, V]."""
    rows = []
    for number in range(batch.num_sequences):
        mine = batch.seq == number
        logits = model(batch.tokens[mine][None]).logits[0] / TEMPERATURE
        rows.append(logits[batch.mask[mine].nonzero().squeeze(1) - 1])
    return torch.cat(rows)


def expected(kind: DivergenceKind, student: Tensor, teacher: Tensor, sampled: Tensor) -> Tensor:
    """By plain sums over softmaxes."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    def bucketed(x: Tensor, ids: Tensor) -> Tensor:
        chosen = x.gather(-1, ids)
        return torch.cat([chosen, torch.log1p(-chosen.exp().sum(-1, keepdim=True))], -1)

    own, theirs = s.topk(K).indices, t.topk(K).indices
    match kind:
        case DivergenceKind.reverse_kl:
            return kl(s, t)
        case DivergenceKind.forward_kl:
            return kl(t, s)
        case DivergenceKind.jsd:
            mixture = (0.3 * t.exp() + 0.7 * s.exp()).log()
            return 0.3 * kl(t, mixture) + 0.7 * kl(s, mixture)
        case DivergenceKind.topk_reverse_kl:
            return kl(bucketed(s, own), bucketed(t, own))
        case DivergenceKind.topk_forward_kl:
            return kl(bucketed(t, theirs), bucketed(s, theirs))
        case _:
            inside = (s.gather(-1, own).exp() * (s.gather(-1, own) - t.gather(-1, own))).sum(-1)
            a, b = (x.gather(-1, sampled[:, None]).squeeze(-1) for x in (s, t))
            return inside + torch.where((own == sampled[:, None]).any(-1), 0.0, (a - b + 1).detach() * a)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_plain_softmaxes(kind: DivergenceKind, folders: tuple[Path, Path]) -> None:
    batch = training.batch()
    assert batch.weight is not None
    student, teacher = sharp(folders[0]), sharp(folders[1])
    with torch.no_grad():
        theirs = predictions(teacher, batch)
    values = expected(kind, predictions(student, batch), theirs, batch.tokens[batch.mask])
    (values * batch.weight[batch.mask]).sum().backward()
    with started(spec(folders)) as worker:
        result = worker.update([batch.take([0, 3]), batch.take([1, 2, 4, 5])], Dense(kind))
        found = gradients(worker)
    assert result.divergence is not None
    first, second = result.divergence
    torch.testing.assert_close(
        torch.cat([first[batch.take([0, 3]).mask], second[batch.take([1, 2, 4, 5]).mask]]),
        torch.cat([values.detach()[batch.seq[batch.mask] == n] for n in (0, 3, 1, 2, 4, 5)]),
        atol=2e-5,
        rtol=1e-4,
    )
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_candidates_agree_as_those_of_plain_softmaxes_do(folders: tuple[Path, Path]) -> None:
    batch = training.batch()
    with torch.no_grad():
        s, t = (predictions(sharp(folder), batch).log_softmax(-1) for folder in folders)
    own, theirs = s.topk(K), t.topk(K)
    shared = (theirs.indices[:, :, None] == own.indices[:, None, :]).any(-1)
    mass = (theirs.values.exp() * shared).sum(-1)
    same = (own.indices[:, 0] == theirs.indices[:, 0]).float()
    with started(spec(folders)) as worker:
        result = worker.update([batch], Dense(DivergenceKind.reverse_kl))
    assert result.overlap is not None
    torch.testing.assert_close(
        result.overlap[0][batch.mask], torch.stack([shared.float().mean(-1), mass, same], -1), atol=1e-5, rtol=1e-4
    )
    assert bool(result.overlap[0][~batch.mask].isnan().all())


def test_candidates_need_no_copy_of_the_logits_in_fp32(tmp_path: Path) -> None:
    """They are found in chunks, like log-probs: at a vocabulary of 151,936 a whole copy is 5 GiB for 8192 tokens."""
    architecture = models.tiny(Family.llama, vocab_size=4096)
    logits = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found: list[TopK] = []
    with models.started(tmp_path) as runtime:
        model = models.build(runtime, architecture, trainable=False)
        peak = peak_bytes(lambda: found.append(candidates(model, logits, K, Scoring(TEMPERATURE, 32))))
    assert peak < 0.25 * logits.numel() * 4
    expected = (logits.float() / TEMPERATURE).log_softmax(-1).topk(K)
    torch.testing.assert_close(found[0].log_probs, expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits.gather(1, found[0].ids), logits.gather(1, expected.indices))


def test_each_sequence_has_the_distribution_of_its_own_teacher(folders: tuple[Path, Path]) -> None:
    batch = training.batch()
    mixed = batch.replace(teacher_name=("default", "other", "other", "default", "nobody", "other"))
    with started(spec(folders)) as worker:
        alone = worker.update([batch], Dense(DivergenceKind.forward_kl)).divergence
        shared = worker.update([mixed], Dense(DivergenceKind.forward_kl)).divergence
    assert alone is not None
    assert shared is not None
    taught = batch.mask & (batch.seq != 4)
    torch.testing.assert_close(shared[0][taught], alone[0][taught], atol=1e-6, rtol=1e-5)
    assert not bool(shared[0][batch.mask & (batch.seq == 4)].any())


LAYOUTS = ({"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2})


def one_step(
    rank: int, world_size: int, rendezvous: str, folders: tuple[Path, Path], layouts: tuple[dict[str, int], ...]
) -> bytes:
    """An update with each divergence, in each layout."""
    found: list[tuple[bool, list[tuple[RankUpdate, dict[str, Tensor]]]]] = []
    batch = training.batch()
    for number, layout in enumerate(layouts):
        worker = MegatronWorker(spec(folders, **layout), rank, world_size, f"{rendezvous}{number}")
        worker.start()
        try:
            parts = [batch.take([0, 3]), batch.take([1, 2, 4, 5])]
            steps = [(worker.update(parts, Dense(kind)), gradients(worker)) for kind in KINDS]
            found.append((worker.place().reports, steps))
        finally:
            worker.close()
    return pickle.dumps(found)


def test_layouts_agree(folders: tuple[Path, Path], tmp_path: Path) -> None:
    ((_, alone),) = pickle.loads(one_step(0, 1, (tmp_path / "alone").as_uri(), folders, ({},)))
    ranks = [pickle.loads(result) for result in run_gloo(one_step, 2, folders, LAYOUTS)]
    for number, layout in enumerate(LAYOUTS):
        (reported,) = (steps for reports, steps in (rank[number] for rank in ranks) if reports)
        leading = ranks[0][number][1]
        for kind, (ours, gradient), (theirs, _), (_, exported) in zip(KINDS, alone, reported, leading, strict=True):
            for name in ("divergence", "overlap", "log_probs"):
                for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                    close = torch.isclose(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)
                    assert bool(close.all()), f"{layout} {kind} {name}"
            for name, expected_gradient in gradient.items():
                difference = float((exported[name] - expected_gradient).abs().max())
                assert difference < 1e-5, f"{layout} {kind} {name}: {difference}"


def test_rows_that_do_not_count_pass_no_gradient_however_wild_their_own() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    scale = torch.tensor([1.0, torch.inf])
    values = ByRow.apply(logits, torch.tensor([0, 2]), lambda x, rows: x.square().sum(-1) * scale[rows], 1)
    assert values.tolist() == [5.0, torch.inf]
    (2 * values.where(scale.isfinite(), 0.0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[4.0, 8.0], [0.0, 0.0], [0.0, 0.0]]
