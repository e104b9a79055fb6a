"""The presets in conf/: each composes a config, and those of published aligners name what was published."""

from typing import Any

import pytest

from pipelines.config import compose, presets
from pipelines.settings import AlignCorpusConfig

GROUPS = ("policy", "aligner", "reward", "site")
PUBLISHED = {
    "diffpo_2b": ("RuizheChen/DiffPO-2B", "diffpo", "torch", 6),
    "diffpo_8b": ("RuizheChen/DiffPO-8B", "diffpo", "torch", 6),
    "diffpo_9b": ("RuizheChen/DiffPO-9B", "diffpo", "torch", 6),
    "aligner_7b": ("aligner/aligner-7b-v1.0", "aligner", "vllm", None),
    "metaaligner_7b": ("MetaAligner/MetaAligner-UltraFeedback-7B", "metaaligner", "vllm", None),
}


def composed(*arguments: str) -> AlignCorpusConfig:
    given = ["input.path=in", "input.response_column=response", "output.root=out", *arguments]
    return compose(AlignCorpusConfig, given, prog="", description="", groups=GROUPS)[0]


def without_model(group: str, name: str) -> bool:
    return (group, name) in {
        ("policy", "vllm"),
        ("policy", "openai"),
        ("aligner", "rewrite_vllm"),
        ("reward", "vllm"),
        ("reward", "judge"),
    }


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in presets(group)])
def test_every_preset_is_a_config(group: str, name: str) -> None:
    others = [
        f"{other}={preset}" for other, preset in (("policy", "stored"), ("aligner", "identity")) if other != group
    ]
    model = [f"{group}.model=m"] if without_model(group, name) else []
    config: Any = composed(*others, f"{group}={name}", *model)
    assert group == "site" or getattr(config, group).model not in (None, "???")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_aligner_is_one_name(name: str) -> None:
    aligner = composed("policy=stored", f"aligner={name}").aligner
    assert (aligner.model, aligner.recipe, aligner.engine, aligner.max_iterations) == PUBLISHED[name]
    assert aligner.block_size == 256
    assert (aligner.temperature, aligner.num_gpus, aligner.ignores_response) == (0.0, 1, False)


def test_a_diffpo_aligner_goes_to_the_fixed_point_by_one_key() -> None:
    assert composed("policy=stored", "aligner=diffpo_9b", "aligner.max_iterations=null").aligner.ignores_response
