import pytest

from opd_trainer.cli.aliases import KEYS, expand


@pytest.mark.parametrize(("theirs", "ours"), sorted((k, v) for k, v in KEYS.items() if v not in ("opd", "reward.path")))
def test_each_key_in_both_spellings(theirs: str, ours: str) -> None:
    dashed = "--" + theirs.replace("_", "-")
    assert expand([f"{theirs}=5"]).argv == [f"{ours}=5"]
    assert expand([f"{dashed}=5"]).argv == [f"{ours}=5"]
    if theirs != "opd_only_reward":
        assert expand([dashed, "5"]).argv == [f"{ours}=5"]


def test_flags_without_a_value() -> None:
    found = expand(["--use-opd", "--opd-type", "megatron", "--opd-only-reward", "seed=1"])
    assert found.argv == ["opd.only_reward=true", "seed=1", "opd=megatron"]
    assert found.use_opd


def test_other_arguments_stay() -> None:
    argv = ["-m", "--cfg", "job", "opd.kl_coef=1", "+a=b", "--info"]
    assert expand(argv).argv == argv


def test_sweeps_stay_sweeps() -> None:
    assert expand(["-m", "opd_kl_coef=0.25,0.5", "opd_type=off,megatron"]).argv == [
        "-m",
        "opd.kl_coef=0.25,0.5",
        "opd=off,megatron",
    ]


def test_type_sglang_implies_an_external_server() -> None:
    assert "teacher=sglang_external" in expand(["opd_type=sglang", "rm_url=http://host:1"]).argv
    named = expand(["opd_type=sglang", "teacher=mine"]).argv
    assert [token for token in named if token.startswith("teacher=")] == ["teacher=mine"]


def test_custom_reward_implies_its_option() -> None:
    assert expand(["custom_rm_path=a.b:c"]).argv == ["reward.path=a.b:c", "reward=custom"]


def test_off() -> None:
    assert expand(["use_opd=false"]).argv == ["opd=off"]
    assert expand(["use_opd=false", "opd_type=megatron"]).problems
    assert expand(["use_opd=maybe"]).problems
