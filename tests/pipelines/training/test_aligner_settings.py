"""The keys of train_aligner: what is documented, what is refused, and that the presets of models are configs."""

from pathlib import Path

import pytest

from actors.contract import ConfigError
from pipelines.config import compose
from pipelines.reference import reference_yaml
from pipelines.train_aligner import main
from pipelines.training.aligner_settings import TrainAlignerConfig

CONF = Path(__file__).resolve().parents[3] / "conf"
GIVEN = ["input.path=in", "output.root=out", "training.model=m"]


def composed(*arguments: str) -> TrainAlignerConfig:
    return compose(TrainAlignerConfig, list(arguments), prog="", description="", groups=("reward", "site"))[0]


def test_the_documented_config_is_the_schema() -> None:
    assert (CONF / "train_aligner.yaml").read_text() == reference_yaml(TrainAlignerConfig)


def test_help_tells_every_key_and_the_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "usage: python pipelines/train_aligner.py" in told
    for key in ("training.omega", "evaluation.num_prompts", "run.parallel", "reward.rules", "input.path"):
        assert f"  {key} " in told
    assert "rules, skywork_06b" in told


def test_the_training_of_the_embedded_aligner_is_a_config() -> None:
    config = composed("--config", str(CONF / "train_smollm2.yaml"), "input.path=in", "output.root=out")
    assert config.training.model.endswith("SmolLM2-135M-Instruct")
    # A and B of seven matrices in 30 layers, in float32, are to stay below 16 MB.
    sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    assert 30 * 4 * config.training.lora_rank * sum(map(sum, sizes)) < 16e6
    assert config.reward is not None and config.evaluation.every


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["training.omega=-1"], "training.omega must be 0 or more"),
        (["training.seed=-1"], "training.seed must be 0 or more"),
        (["training.batch_size=0"], "training.batch_size must be more than 0"),
        (["training.max_tokens=1"], "training.max_tokens must be 2 or more"),
        (["training.warmup_fraction=2"], "training.warmup_fraction must be in [0, 1]"),
        (["training.lora_rank=0", "training.lora_alpha=8"], "lora_alpha has no effect with lora_rank=0"),
        (["training.omega=0", "training.curriculum=true"], "curriculum has no effect with omega=0"),
        (["evaluation.num_prompts=0"], "evaluation.num_prompts must be 1 or more"),
        (["run.num_workers=3"], "run.num_workers is 3, which does not divide training.batch_size of 32"),
        (["run.parallel=fsdp"], "parallel=fsdp has no effect with num_workers=1"),
        (["run.max_failures=-1"], "run.max_failures must be 0 or more"),
        (["reward=rules", "evaluation.every=0"], "reward has no effect with evaluation.every=0"),
        (["reward=judge", "reward.model=m"], "reward.engine=openai compares two answers"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*GIVEN, *arguments)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
