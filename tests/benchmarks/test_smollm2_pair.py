from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.smollm2_pair import make_pair
from tests.megatron import training


def test_the_student_is_the_teacher_without_some_layers(tmp_path):
    source = tmp_path / "source"
    training.save_tokenizer(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=22, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(source)
    make_pair(str(source), tmp_path / "pair", dropped=(1, 3))
    teacher, student = (
        LlamaForCausalLM.from_pretrained(tmp_path / "pair" / name, dtype=torch.float32)
        for name in ("teacher", "student")
    )
    assert (len(teacher.model.layers), len(student.model.layers)) == (5, 3)
    # Without its dropped layers, the teacher says what the student says.
    for index in (3, 1):
        del teacher.model.layers[index]
    layer: Any
    for index, layer in enumerate(teacher.model.layers):
        layer.self_attn.layer_idx = index
    tokens = torch.arange(2, 12)[None]
    teacher.config.num_hidden_layers = 3
    assert torch.equal(teacher(tokens).logits, student(tokens).logits)
    assert not torch.equal(model(tokens).logits, student(tokens).logits)
