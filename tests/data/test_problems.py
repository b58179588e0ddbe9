import pytest

from opd_trainer.data.config import DataConfig, MixtureData
from opd_trainer.data.problems import data_problems


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        (DataConfig(offset=-1), "data.offset", "0 or more"),
        (DataConfig(n_rows=0), "data.n_rows", "1 or more"),
        (DataConfig(weight=0.0), "data.weight", "positive share"),
        (DataConfig(prompt_template="Think."), "data.prompt_template", "no {prompt}"),
        (DataConfig(chat_template_kwargs={"tokenize": True}), "data.chat_template_kwargs.tokenize", "no template"),
        (MixtureData(path="x"), "data.path", "each of its datasets"),
        (MixtureData(datasets={"a": DataConfig(), "b": DataConfig(n_rows=-1)}), "data.datasets.b.n_rows", "1 or more"),
    ],
)
def test_settings_that_cannot_work(config: DataConfig, key: str, message: str) -> None:
    (problem,) = data_problems(config, "data")
    assert problem.key == key
    assert message in str(problem)


def test_settings_that_can() -> None:
    config = DataConfig(offset=3, n_rows=1, prompt_template="Q: {prompt}", chat_template_kwargs={"thinking": True})
    assert list(data_problems(MixtureData(datasets={"a": config}), "data")) == []
