import pytest
import torch

from opd_trainer.types import Finish, Prompt, Sample


@pytest.fixture
def make_sample():
    def make(text="", label="", *, prompt_id="p", index=0, length=3, metadata=None):
        prompt = Prompt(id=prompt_id, tokens=torch.tensor([1]), text="q", answer=label, metadata=metadata or {})
        return Sample(
            prompt=prompt,
            index=index,
            response=torch.zeros(length, dtype=torch.int64),
            log_probs=torch.zeros(length),
            finish=Finish.stop,
            version=0,
            text=text,
        )

    return make
