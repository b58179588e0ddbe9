"""Each preset reads the rows of its dataset in the forms in which it is published."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from opd_trainer.data.config import DataConfig
from opd_trainer.data.prompts import load_prompts

CONF = Path(__file__).parents[2] / "conf" / "data"
MESSAGES = [{"role": "user", "content": "What is 1+1? End with Answer: X"}]
ROWS = {
    "gsm8k": [
        {
            "question": "Tom has 2 bags of 3 apples. How many?",
            "answer": "He has 2*3 = <<2*3=6>>6 apples.\n#### 6",
        },
    ],
    "dapo_math_17k": [
        {"prompt": MESSAGES, "label": "2"},
        {
            "data_source": "math_dapo",
            "prompt": MESSAGES,
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a"},
        },
    ],
    "math_500": [
        {
            "problem": "What is $\\frac{1}{2}+1$?",
            "solution": "It is $\\boxed{\\frac{3}{2}}$.",
            "answer": "\\frac{3}{2}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        },
        {"prompt": MESSAGES, "label": "\\frac{3}{2}"},
    ],
}
CASES = [(name, row) for name, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize(("name", "row"), CASES)
def test_preset(name, row, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    option = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del option["defaults"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), option, {"path": str(path)}))
    assert isinstance(config, DataConfig)
    (prompt,) = load_prompts(config, tokenizer, name="train", max_prompt_tokens=1000).prompts
    question = row.get("question") or row.get("problem") or MESSAGES[0]["content"]
    assert prompt.text.startswith(f"[user]{question}")
    assert prompt.text.endswith("[assistant]")
    assert prompt.answer == {"gsm8k": row.get("answer"), "dapo_math_17k": "2", "math_500": "\\frac{3}{2}"}[name]
    if isinstance(row.get("prompt"), list):
        assert prompt.text == f"[user]{question}[assistant]"
    else:
        # The instruction names the form that the matching reward looks for.
        assert {"gsm8k": "#### NUMBER", "math_500": "\\boxed{}"}[name] in prompt.text
