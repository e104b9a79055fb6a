"""Weights of pairs by a sentence encoder: a tiny random one, whose embeddings differ from text to text."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel

from actors.contract import PROMPT, ConfigError
from pipelines.build_preferences import main
from pipelines.preferences.semantic import semantic_weights
from tests.pipelines.preferences.fabricate import publish_corpus, row, table
from tests.tiny_models import build_tokenizer

TEXTS = ["Name three rivers.", "The quick brown fox jumps over the lazy dog, and the dog does not mind.", "No."]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def chats(texts: list[str]) -> pa.Array:
    return pa.array([[{"role": "user", "content": text}] for text in texts], PROMPT)


def test_the_weight_is_one_for_the_same_text_and_falls_with_the_distance(encoder: str) -> None:
    prompts, answers = chats(TEXTS), pa.array(TEXTS)
    assert semantic_weights(encoder, prompts, answers, 2.0).to_pylist() == pytest.approx([1, 1, 1])
    other = np.array(semantic_weights(encoder, prompts, pa.array(TEXTS[::-1]), 1.0))
    assert (other[[0, 2]] < 0.999).all()
    assert np.array(semantic_weights(encoder, prompts, pa.array(TEXTS[::-1]), 2.0)) == pytest.approx(other**2)


def test_the_weight_does_not_depend_on_what_else_is_in_the_batch(encoder: str) -> None:
    together = semantic_weights(encoder, chats(TEXTS), pa.array(TEXTS[::-1]), 1.0).to_pylist()
    alone = [
        semantic_weights(encoder, chats([prompt]), pa.array([answer]), 1.0)[0].as_py()
        for prompt, answer in zip(TEXTS, TEXTS[::-1], strict=True)
    ]
    assert together == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("strategy", ["pairs", "steps", "refinement"])
@pytest.mark.usefixtures("in_this_process")
def test_rows_are_weighted_and_another_encoder_is_another_dataset(strategy: str, encoder: str, tmp_path: Path) -> None:
    corpus = publish_corpus(tmp_path / "corpus", table([row(text, ["worse"], [f"{text} Yes."]) for text in TEXTS]))
    given = [f"input.path={corpus}", f"output.root={tmp_path / 'out'}", f"build={strategy}"]
    assert main([*given, f"build.semantic_encoder={encoder}"]) == 0
    made = pq.read_table(tmp_path / "out/preferences/run=000001/train-00000.parquet", partitioning=None)
    wanted = semantic_weights(encoder, chats(TEXTS), pa.array([f"{text} Yes." for text in TEXTS]), 1.0)
    assert made["weight"].to_pylist() == pytest.approx(wanted.to_pylist(), abs=1e-6)
    assert main(given) == 2


def test_a_folder_without_an_encoder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["input.path=in", "output.root=out", f"build.semantic_encoder={tmp_path}"]) == 2
    assert "holds no encoder (config.json and *.safetensors)" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"build\.semantic_encoder: no encoder in"):
        semantic_weights(str(tmp_path), chats(["a"]), pa.array(["b"]), 1.0)
