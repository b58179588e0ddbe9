from benchmarks.log_prob_memory import measure
from opd_trainer.megatron.config import MegatronConfig

TOKENS, VOCAB_SIZE, SMALLER = 4096, 151_936, 64


def test_log_probs_take_less_than_a_quarter_of_a_log_softmax_in_fp32():
    """With 64 times fewer tokens, and chunks as much smaller, the ratio is that of the full size."""
    chunk = MegatronConfig().log_prob_chunk_tokens
    peaks = measure(TOKENS // SMALLER, VOCAB_SIZE, chunk // SMALLER)
    assert peaks.forward_ratio < 0.25
    assert peaks.ratio < 0.25
