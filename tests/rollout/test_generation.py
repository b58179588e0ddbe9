import pytest
import torch

from opd_trainer.errors import TrainingDiverged
from opd_trainer.rollout.embedded import generation
from opd_trainer.types import Finish, Prompt, Request
from tests.rollout.models import (
    CONFIGS,
    EOS,
    by_request,
    finish,
    loaded_worker,
    random_model,
    reference_log_probs,
    requests,
    sampling,
    tensors,
)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIGS["qwen3"])


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_those_of_transformers(name: str):
    other = random_model(CONFIGS[name])
    samples = finish(loaded_worker(other, batch_size=5), requests(), sampling(temperature=0.8))
    assert len(samples) == 12
    for sample in samples:
        torch.testing.assert_close(sample.log_probs, reference_log_probs(other, sample, 0.8), atol=1e-4, rtol=0)


def test_greedy_equals_transformers_generate(model):
    asked = requests(prompts=4, siblings=1)
    found = by_request(finish(loaded_worker(model), asked, sampling(temperature=0.0, max_response_tokens=30)))
    for request in asked:
        tokens = request.prompt.tokens[None]
        expected = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert found[request.prompt.id, 0].response.tolist() == expected[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("slack", [1, 128])
def test_a_sample_depends_on_its_request_only(model, monkeypatch: pytest.MonkeyPatch, slack: int):
    monkeypatch.setattr(generation, "_SLACK_TOKENS", slack)
    asked, how = requests(prompts=9, siblings=3), sampling(max_response_tokens=60)
    expected = by_request(finish(loaded_worker(model), asked, how))
    shuffled = [asked[i] for i in torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()]
    for sizes, order in [({"batch_size": 1}, asked), ({"batch_size": 4}, shuffled), ({"prefill_tokens": 1}, shuffled)]:
        found = by_request(finish(loaded_worker(model, **sizes), order, how))
        assert found.keys() == expected.keys()
        for key, sample in found.items():
            assert sample.response.tolist() == expected[key].response.tolist()
            torch.testing.assert_close(sample.log_probs, expected[key].log_probs, atol=1e-5, rtol=0)
    lengths = {len(sample.response) for sample in expected.values()}
    assert len(lengths) > 5, "rows must finish at different times, or nothing was packed"


def test_the_same_batch_gives_the_same_bits(model):
    worker, asked = loaded_worker(model, batch_size=7), requests()
    first, second = (by_request(finish(worker, asked, sampling())) for _ in range(2))
    assert all(torch.equal(first[key].log_probs, second[key].log_probs) for key in first)


def test_siblings_differ(model):
    samples = finish(loaded_worker(model), requests(prompts=1, siblings=8), sampling())
    assert len({tuple(sample.response.tolist()) for sample in samples}) > 4


def test_prompts_are_told_apart_by_their_tokens_not_their_names(model):
    tokens = [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])]
    asked = [Request(prompt=Prompt(id="same", tokens=t, text=""), index=i, seed=3) for i, t in enumerate(tokens)]
    for sample in finish(loaded_worker(model), asked, sampling()):
        assert sample.prompt.tokens.tolist() == tokens[sample.index].tolist()
        torch.testing.assert_close(sample.log_probs, reference_log_probs(model, sample), atol=1e-4, rtol=0)


def test_candidates_follow_their_tokens_through_packing(model):
    asked = requests(prompts=9, siblings=3)
    samples = finish(loaded_worker(model, batch_size=4), asked, sampling(log_prob_top_k=5, temperature=0.7))
    for sample in samples:
        tokens = torch.cat([sample.prompt.tokens, sample.response])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, len(sample.prompt.tokens) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).topk(5)
        assert sample.topk is not None
        torch.testing.assert_close(sample.topk.log_probs, expected.values, atol=1e-4, rtol=0)
        assert (sample.topk.ids == expected.indices).float().mean() > 0.99
    plain = by_request(finish(loaded_worker(model, batch_size=4), asked, sampling(temperature=0.7)))
    assert all(torch.equal(plain[key].response, sample.response) for key, sample in by_request(samples).items())
    assert {sample.topk for sample in plain.values()} == {None}


def test_a_stop_token_ends_the_response_and_is_kept(model):
    samples = finish(loaded_worker(model), requests(prompts=10), sampling(stop_token_ids=(4,), max_response_tokens=40))
    reasons = {sample.finish for sample in samples}
    assert reasons == {Finish.stop, Finish.length}
    for sample in samples:
        tokens = sample.response.tolist()
        assert not {EOS, 4} & set(tokens[:-1])
        if sample.finish is Finish.stop:
            assert tokens[-1] in {EOS, 4}
        else:
            assert len(tokens) == 40
            assert tokens[-1] not in {EOS, 4}


def test_text_is_without_special_tokens(model):
    for sample in finish(loaded_worker(model), requests(), sampling(max_response_tokens=60)):
        assert sample.text.split() == [str(token) for token in sample.response.tolist() if token != EOS]


def test_one_token_responses(model):
    samples = finish(loaded_worker(model, batch_size=4), requests(), sampling(max_response_tokens=1))
    assert len(samples) == 12
    assert {len(sample.response) for sample in samples} == {1}


def test_samples_can_be_used_under_autograd(model):
    sample = finish(loaded_worker(model), requests(1, 1), sampling())[0]
    weight = torch.ones(len(sample.log_probs), requires_grad=True)
    (weight * sample.log_probs).sum().backward()
    torch.testing.assert_close(weight.grad, sample.log_probs)


def test_weights_that_are_not_finite_are_named_and_leave_no_trace(model):
    worker, asked = loaded_worker(model), requests()
    expected = by_request(finish(worker, asked, sampling()))
    broken = [(name, tensor * torch.nan if name == "model.norm.weight" else tensor) for name, tensor in tensors(model)]
    broken = [(n, t * torch.nan if n == "model.layers.0.self_attn.v_proj.weight" else t) for n, t in broken]
    worker.load_bucket(broken)
    worker.commit(8)
    with pytest.raises(TrainingDiverged, match="version 8"):
        finish(worker, asked, sampling())
    worker.load_bucket(tensors(model))
    worker.commit(9)
    found = by_request(finish(worker, asked, sampling()))
    assert all(torch.equal(found[key].log_probs, expected[key].log_probs) for key in expected)
    assert {sample.version for sample in found.values()} == {9}
