"""`task=convert`: between formats, dtypes and layouts, always checked, never half written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_trainer.cli.entry import main
from opd_trainer.megatron import conversion
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.conversion import Comparison, ConversionSpec
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import CheckpointKind, inspect
from tests.gloo import run_gloo
from tests.megatron import foreign, training
from tests.megatron.models import started
from tests.runs.runs import ROOT, save_model


def convert(output: Path, source: Path, target: Path, *overrides: str) -> int:
    return main(
        ROOT / "conf",
        ["task=convert", f"task.source={source}", f"task.target={target}", f"output_dir={output}", *overrides],
    )


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "conversion.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("source") / "model", 1)


def test_there_and_back_is_bit_exact_and_loads_in_transformers(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert convert(tmp_path / "there", source, tmp_path / "megatron") == 0
    assert inspect(tmp_path / "megatron").kind is CheckpointKind.torch_dist
    assert convert(tmp_path / "back", tmp_path / "megatron", tmp_path / "model", "task.format=huggingface") == 0
    assert same(tensors(tmp_path / "model"), tensors(source))
    for output in ("there", "back"):
        found = report(tmp_path / output)
        assert (found["wrong"], found["changed"], found["max_abs_difference"]) == ([], 0, 0.0)
        assert found["tensors"] == len(tensors(source))
    rows = torch.arange(12).reshape(1, 12) % AutoTokenizer.from_pretrained(tmp_path / "model").vocab_size
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "model")]
    with torch.no_grad():
        assert torch.equal(models[0](rows).logits, models[1](rows).logits)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial")] == []


def test_another_dtype_reports_what_it_costs(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    assert convert(tmp_path / "out", source, target, "task.format=huggingface", "task.dtype=bfloat16") == 0
    wide, narrow = tensors(source), tensors(target)
    assert all(narrow[name].equal(tensor.to(torch.bfloat16)) for name, tensor in wide.items())
    worst = max(float((narrow[name].float() - tensor).abs().max()) for name, tensor in wide.items())
    found = report(tmp_path / "out")
    assert (found["dtypes"], found["dtype"], found["wrong"]) == (["float32"], "bfloat16", [])
    assert found["changed"] > 0
    assert found["max_abs_difference"] == worst > 0
    # Without task.dtype the source's dtype is kept.
    assert convert(tmp_path / "again", target, tmp_path / "megatron") == 0
    assert (report(tmp_path / "again")["dtype"], report(tmp_path / "again")["changed"]) == ("bfloat16", 0)


def test_a_training_checkpoint_becomes_a_model(tmp_path: Path) -> None:
    student, saved = training.write_model(tmp_path / "student"), tmp_path / "iter_0000001"
    saved.mkdir()
    with training.started(training.spec(student)) as worker:
        worker.update([training.batch()], training.WeightedNll())
        worker.save(saved)
        expected = training.weights(worker)
    assert convert(tmp_path / "out", saved, tmp_path / "model", "task.format=huggingface") == 0
    assert same(tensors(tmp_path / "model"), expected)
    assert not same(tensors(tmp_path / "model"), tensors(student))


def test_rank_files_need_a_folder_with_the_config(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opd_trainer.megatron.families.registry import architecture_from_hf
    from opd_trainer.model.folder import load_config

    architecture = architecture_from_hf(load_config(source))
    with started(tmp_path) as runtime:
        state = foreign.loaded(runtime, architecture, source).modules[0].state_dict()
    foreign.save_rank_file(tmp_path / "old", "mp_rank_00", [state], transformer_engine=True)
    assert convert(tmp_path / "out", tmp_path / "old", tmp_path / "model", "task.format=huggingface") == 2
    assert "model.huggingface" in capsys.readouterr().err
    arguments = ("task.format=huggingface", f"model.huggingface={source}")
    assert convert(tmp_path / "again", tmp_path / "old", tmp_path / "model", *arguments) == 0
    assert same(tensors(tmp_path / "model"), tensors(source))


def test_an_existing_target_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target").mkdir()
    assert convert(tmp_path / "out", source, tmp_path / "target") == 2
    assert "overwrites nothing" in capsys.readouterr().err
    assert list((tmp_path / "target").iterdir()) == []


def test_what_is_missing_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ROOT / "conf", ["task=convert", f"output_dir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert "task.source" in message
    assert "task.target" in message


def test_a_defect_of_the_writer_is_found_and_nothing_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoiled(model: MegatronModel, *rest: Any) -> None:
        with torch.no_grad():
            model.modules[0].decoder.final_layernorm.weight[0] += 1e-6
        original(model, *rest)

    original = conversion.save_hf_folder
    monkeypatch.setattr(conversion, "save_hf_folder", spoiled)
    assert convert(tmp_path / "out", source, tmp_path / "target", "task.format=huggingface") == 1
    assert "1 of" in (message := capsys.readouterr().err)
    assert "model.norm.weight" in message
    assert report(tmp_path / "out")["wrong"] == ["model.norm.weight"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def over_two_ranks(rank: int, world_size: int, rendezvous: str, folders: tuple[Path, Path]) -> Any:
    source, target = folders
    layouts = [MegatronConfig(tensor_parallel=2, timeout_s=300), MegatronConfig(pipeline_parallel=2, timeout_s=300)]
    found = []
    for number, layout in enumerate(layouts):
        kind = CheckpointKind.torch_dist if number == 0 else CheckpointKind.huggingface
        read = source if number == 0 else target / "0"
        spec = ConversionSpec(model=ModelConfig(load=str(read)), megatron=layout, format=kind)
        worker = spec.make_worker(rank, world_size, f"{rendezvous}{number}")
        worker.start()
        directory = target / str(number)
        if rank == 0:
            directory.mkdir(parents=True)
        torch.distributed.barrier()
        worker.write(directory)
        torch.distributed.barrier()
        found.append(worker.compare(directory))
        worker.close()
    return found


def test_from_one_layout_to_another(source: Path, tmp_path: Path) -> None:
    ranks = run_gloo(over_two_ranks, 2, (source, tmp_path))
    assert ranks[1] == [None, None]
    for comparison in ranks[0]:
        assert isinstance(comparison, Comparison)
        assert (comparison.wrong, comparison.changed) == ((), 0)
    assert same(tensors(tmp_path / "1"), tensors(source))
