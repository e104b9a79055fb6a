"""vLLM's pooling scores as the plain Hugging Face call does. A real engine on the CPU: its start takes about 25 s."""

import asyncio
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.contract import ConfigError, RowError
from actors.engines.base import Request
from actors.engines.hosted import HostedEngine
from actors.reward import RewardConfig
from actors.rewards import build_reward
from tests.actors.rewards.test_classifier import CHATS, plain, scores_of
from tests.processes import assert_gone
from tests.tiny_models import build_tiny_llama, build_tiny_reward


def config_of(folder: Path, **settings: Any) -> RewardConfig:
    return RewardConfig(engine="vllm", model=str(folder), dtype="float32", device="cpu", **settings)


@pytest.mark.long
def test_scores_are_those_of_the_plain_call(tmp_path: Path) -> None:
    folder = build_tiny_reward(tmp_path / "reward", pad_token_id=0)
    engine = build_reward(config_of(folder, max_model_len=256), 2)
    assert isinstance(engine, HostedEngine)
    family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    assert scores_of(engine, CHATS[:-1]) == pytest.approx(plain(folder, CHATS[:-1]), abs=1e-4)
    with pytest.raises(RowError, match="prompt_too_long"):
        asyncio.run(engine.generate(Request((("user", "word " * 300), ("assistant", "no")), 0)))
    engine.close()
    assert_gone(family)


@pytest.mark.long
def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path / "headless")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "R"}, "label2id": {"R": 0}}))
    with pytest.raises(ConfigError, match=r"is no reward model: its files hold no score\.weight"):
        build_reward(config_of(folder), 2)
