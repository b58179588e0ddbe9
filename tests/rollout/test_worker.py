import pickle

import pytest
import torch

from opd_trainer.errors import OpdError, ShapeMismatch, UserError
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded.shape import DecoderShape
from opd_trainer.rollout.embedded.slots import bytes_per_slot
from opd_trainer.rollout.embedded.worker import EmbeddedSpec, EmbeddedWorker
from opd_trainer.types import Prompt, Request
from tests.rollout.models import (
    CONFIGS,
    VOCAB_SIZE,
    by_request,
    finish,
    loaded_worker,
    random_model,
    requests,
    sampling,
    spec,
    tensors,
)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIGS["qwen3"])


def one(tokens: list[int]) -> list[Request]:
    return [Request(prompt=Prompt(id="p7", tokens=torch.tensor(tokens, dtype=torch.int64), text=""), index=0, seed=0)]


def test_polls_give_what_finished_until_nothing_is_left(model):
    worker = loaded_worker(model, batch_size=4)
    worker.begin(requests(), sampling())
    samples, polls = [], 0
    while not (progress := worker.poll(0.0)).done:
        samples += progress.samples
        polls += 1
    samples += progress.samples
    assert polls > 20
    assert by_request(samples).keys() == by_request(finish(worker, requests(), sampling())).keys()


def test_no_requests_are_done_at_once(model):
    assert finish(loaded_worker(model), [], sampling()) == []


def test_it_cannot_generate_before_it_has_weights(model):
    worker = EmbeddedWorker(spec(model.config))
    with pytest.raises(OpdError, match="not started"):
        worker.begin(requests(), sampling())
    worker.start()
    with pytest.raises(OpdError, match="no complete weights"):
        worker.begin(requests(), sampling())


def versions(worker: EmbeddedWorker) -> set[int]:
    """Of the weights that its samples are from."""
    return {sample.version for sample in finish(worker, requests(), sampling())}


def test_a_torn_weight_sync_leaves_nothing_to_generate_with(model):
    worker = loaded_worker(model, version=4)
    worker.load_bucket(tensors(model)[:3])
    with pytest.raises(ShapeMismatch, match="did not come"):
        worker.commit(5)
    with pytest.raises(OpdError, match="no complete weights"):
        worker.begin(requests(), sampling())
    worker.load_bucket(tensors(model))
    worker.commit(6)
    assert versions(worker) == {6}


def test_a_refused_tensor_does_not_spoil_the_next_sync(model):
    worker = loaded_worker(model)
    with pytest.raises(ShapeMismatch, match="unknown"):
        worker.load_bucket([*tensors(model)[:2], ("x", torch.zeros(1))])
    worker.load_bucket(tensors(model))
    worker.commit(2)
    assert versions(worker) == {2}


def test_a_sync_without_tensors_is_refused(model):
    with pytest.raises(OpdError, match="no tensor came"):
        loaded_worker(model).commit(2)


def test_weights_do_not_change_while_it_generates(model):
    worker = loaded_worker(model)
    worker.begin(requests(), sampling())
    worker.poll(0.0)
    with pytest.raises(OpdError, match="while it generates"):
        worker.load_bucket(tensors(model))
    with pytest.raises(OpdError, match="while it generates"):
        worker.begin(requests(), sampling())
    worker.cancel()
    worker.load_bucket(tensors(model))


def test_it_cannot_be_used_after_close(model):
    worker = loaded_worker(model)
    worker.close()
    worker.close()
    with pytest.raises(OpdError, match="closed"):
        worker.begin(requests(), sampling())


@pytest.mark.parametrize(
    ("asked", "how", "message"),
    [
        (one([2]), {"max_response_tokens": 0}, "max_response_tokens=0"),
        (one([2]), {"temperature": -1.0}, "temperature -1.0"),
        (one([2]), {"top_p": 0.0}, "top_p 0.0"),
        (one([2]), {"log_prob_top_k": 38}, "log_prob_top_k=38.*37 tokens"),
        (one([2]), {"stop_token_ids": (VOCAB_SIZE,)}, r"\[37\] are not in the model's vocabulary of 37"),
        (one([]), {}, "p7 has no tokens"),
        (one([2] * 250), {}, "p7 has 250 tokens.*max_response_tokens=20.*256"),
        (one([VOCAB_SIZE]), {}, "p7 has token ids beyond"),
        (one([-1]), {}, "p7 has token ids beyond"),
    ],
)
def test_what_cannot_be_served_is_refused(model, asked: list[Request], how: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        loaded_worker(model).begin(asked, sampling(**how))


def test_the_cache_limit_lowers_the_batch_not_the_samples(model):
    asked, how = requests(), sampling()
    expected = by_request(finish(loaded_worker(model), asked, how))
    row = bytes_per_slot(DecoderShape.from_config(model.config), torch.float32, 0) * (11 + 40)
    small = by_request(finish(loaded_worker(model, kv_cache_bytes=3 * row), asked, how))
    assert all(torch.equal(small[key].response, expected[key].response) for key in expected)
    with pytest.raises(UserError, match=r"rollout\.kv_cache_bytes=100"):
        loaded_worker(model, kv_cache_bytes=100).begin(asked, how)


def test_the_room_is_reused_and_outgrown(model):
    worker = loaded_worker(model)
    for longest, response in [(11, 20), (5, 20), (30, 20), (5, 60), (11, 20)]:
        asked, how = requests(longest=longest), sampling(max_response_tokens=response)
        found, expected = (by_request(finish(w, asked, how)) for w in (worker, loaded_worker(model)))
        assert all(torch.equal(found[key].response, expected[key].response) for key in expected)


def test_a_spec_travels(model):
    copy = pickle.loads(pickle.dumps(spec(model.config)))
    worker = copy.make_worker(0, 1, "")
    worker.start()
    worker.load_bucket(tensors(model))
    worker.commit(1)
    assert len(finish(worker, requests(), sampling())) == 12


def test_any_of_several_end_tokens_ends_a_response(model):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "w0")), eos_token="w1")
    spec = EmbeddedSpec(config=model.config, tokenizer=tokenizer, eos_token_ids=(1, 9), rollout=EmbeddedRollout())
    worker = spec.make_worker(0, 1, "")
    worker.start()
    worker.load_bucket(tensors(model))
    worker.commit(1)
    for sample in finish(worker, requests(prompts=8), sampling(max_response_tokens=40)):
        assert sample.text.split() == [f"w{token}" for token in sample.response.tolist() if token != 1]
        assert 9 not in sample.response[:-1]
