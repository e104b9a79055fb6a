"""LLaMA-Factory's, OpenRLHF's and axolotl's own code on what is exported for them: every pair gets through, as it was.

What they pin shares no environment with burnish: their wheels lie without their dependencies in a folder of their own
(`make test` puts them there), and what runs here is the code that reads a dataset and makes prompts or token ids of it.
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from actors.candidates import as_messages
from actors.engines.prompts import encode_prompt, render_prompt
from pipelines.build_preferences import main
from pipelines.preferences.exporters import EXPORTERS
from tests.pipelines.preferences import examples, fabricate
from tests.tiny_models import build_tokenizer

CONSUMERS = Path(sys.prefix) / "consumers"
END = "<|im_end|>"


@pytest.fixture(scope="module", autouse=True)
def consumers() -> Iterator[None]:
    assert CONSUMERS.is_dir(), "pip install --no-deps --target .venv/consumers -r conf/consumers.txt"
    # LLaMA-Factory imports torchaudio, whose builds want CUDA, for what it hears: no text gets there.
    audio = ModuleType("torchaudio")
    audio.__spec__ = ModuleSpec("torchaudio", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", audio)
        patch.setattr(sys, "path", [*sys.path, str(CONSUMERS)])
        patch.setenv("DISABLE_VERSION_CHECK", "1")  # LLaMA-Factory refuses to be imported beside later versions
        yield


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> Path:
    """The dataset of an (export, strategy) as the job writes it: two partitions in two splits, with their card."""
    export, strategy = request.param
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number, names in ((1, list(examples.CHATS)[:3]), (2, list(examples.CHATS)[3:])):
        fabricate.publish_corpus(
            tmp_path / "corpus", fabricate.table([corpus_row(name) for name in names]), number=number
        )
        job = [f"input.path={tmp_path / 'corpus'}", f"output.root={tmp_path / 'root'}", f"export={export}"]
        job += ["build.reward=q", f"build={strategy}", "prompts.test_fraction=0.4", "output.jsonl=true"]
        assert main(job) == 0
    return tmp_path / "root"


def corpus_row(name: str) -> fabricate.Row:
    chosen, rejected = examples.ANSWERS[name]
    chat = [(message["role"], message["content"]) for message in examples.CHATS[name]]
    return fabricate.row(chat, [rejected], [chosen], name, q=([-len(name) / 4], [1.25]))


def of_split(root: Path, made: pa.Table, split: str = "train") -> list[dict[str, Any]]:
    """Those of the examples that the dataset has in a split, in its order."""
    ids = datasets.load_dataset(str(root), split=split)["prompt_id"]
    assert 0 < len(set(ids)) < len(examples.CHATS)
    rows = [row for name in dict.fromkeys(ids) for row in made.to_pylist() if row["prompt_id"] == name]
    assert len(rows) == len(ids)
    return rows


def policy_read(tokenizer: PreTrainedTokenizerFast, chat: examples.Chat) -> str:
    return render_prompt(tokenizer, encode_prompt(tokenizer, as_messages(chat)))


@pytest.mark.parametrize("root", [("llamafactory", "pairs")], indirect=True)
@pytest.mark.parametrize("split", ["train", "test"])
def test_llamafactory_reads_pairs(root: Path, split: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = llamafactory_rows(root, split, "rm", tokenizer)
    for pair, row in zip(of_split(root, examples.pairs(), split), rows, strict=True):
        for side in ("chosen", "rejected"):
            labels = [token for token in row[f"{side}_labels"] if token >= 0]
            assert tokenizer.decode(labels) == f"{pair[side]}{END}\n"
            prompt = row[f"{side}_input_ids"][: -len(labels)]
            assert tokenizer.decode(prompt) == policy_read(tokenizer, pair["prompt"])


@pytest.mark.parametrize("root", [("llamafactory", "unpaired")], indirect=True)
def test_llamafactory_reads_unpaired(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = llamafactory_rows(root, "train", "kto", tokenizer)
    for single, row in zip(of_split(root, examples.unpaired()), rows, strict=True):
        labels = [token for token in row["labels"] if token >= 0]
        assert row["kto_tags"] == single["label"]
        assert tokenizer.decode(labels) == f"{single['completion']}{END}\n"
        assert tokenizer.decode(row["input_ids"][: -len(labels)]) == policy_read(tokenizer, single["prompt"])


def llamafactory_rows(root: Path, split: str, stage: str, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """What its trainers get of the dataset named after the split; it finds the rest in `dataset_info.json`."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments

    data = DataArguments(template="chatml", dataset=split, dataset_dir=str(root))
    template = get_template_and_fix_tokenizer(tokenizer, data)
    training = TrainingArguments(str(root.parent / "out"), use_cpu=True, report_to="none")
    model = ModelArguments(model_name_or_path=str(root))
    return list(get_dataset(template, model, data, training, stage=stage, tokenizer=tokenizer)["train_dataset"])


@examples.needs_hh_harmless
def test_llamafactory_keeps_every_real_pair_in_which_roles_take_turns(tmp_path: Path) -> None:
    """It skips the others, which no corpus of burnish holds, with a warning."""
    from llamafactory.data.converter import align_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams import DataArguments

    rows = datasets.Dataset(EXPORTERS["llamafactory"].convert(examples.hh_harmless()))
    described = json.loads(EXPORTERS["llamafactory"].files("pairs")["dataset_info.json"])
    (attributes,) = get_dataset_list(["train"], described)
    read = align_dataset(
        rows, attributes, DataArguments(dataset_dir=str(tmp_path)), SimpleNamespace(local_process_index=0)
    )
    num_kept = 0
    for pair, row in zip(examples.hh_harmless().to_pylist(), read, strict=True):
        if [message["role"] for message in pair["prompt"][::2]] == ["user"] * (len(pair["prompt"]) // 2 + 1):
            answers = [{"role": "assistant", "content": pair[side]} for side in ("chosen", "rejected")]
            assert (row["_prompt"], row["_response"], row["_system"]) == (pair["prompt"], answers, "")
            num_kept += 1
    assert num_kept == 1397


@examples.needs_hh_harmless
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="OpenRLHF has no wheel for it")
def test_openrlhf_renders_real_pairs_as_the_policy_does(tokenizer: PreTrainedTokenizerFast) -> None:
    from openrlhf.datasets.reward_dataset import preprocess_data

    real = examples.hh_harmless()
    for pair, row in zip(real.to_pylist()[::4], EXPORTERS["openrlhf"].convert(real).to_pylist()[::4], strict=True):
        prompt, *sides, margin = preprocess_data(row, apply_chat_template=tokenizer.apply_chat_template, is_dpo=True)
        assert prompt == policy_read(tokenizer, pair["prompt"])
        assert (sides, margin) == ([f"{pair[side]}{END}\n" for side in ("chosen", "rejected")], 0)


@examples.needs_hh_harmless
def test_axolotl_renders_real_pairs_as_the_policy_does(tokenizer: PreTrainedTokenizerFast) -> None:
    """All but empty answers, which no dataset of burnish holds: axolotl looks for the answer in the rendered text."""
    from axolotl.prompt_strategies.dpo import load

    transform, _ = load("chat_template.default", {"datasets": [{}]})
    real = examples.hh_harmless()
    for pair, row in zip(real.to_pylist()[::4], EXPORTERS["axolotl"].convert(real).to_pylist()[::4], strict=True):
        if pair["chosen"] and pair["rejected"]:
            read = transform(row, tokenizer=tokenizer)
            assert read["prompt"] == policy_read(tokenizer, pair["prompt"])
            assert (read["chosen"], read["rejected"]) == (f"{pair['chosen']}{END}", f"{pair['rejected']}{END}")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="OpenRLHF has no wheel for it")
@pytest.mark.parametrize("root", [("openrlhf", "pairs"), ("ultrafeedback", "pairs")], indirect=True)
@pytest.mark.parametrize("is_dpo", [True, False])
def test_openrlhf_reads_pairs(root: Path, is_dpo: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    """With the defaults of its command line and `--data.apply_chat_template`."""
    from openrlhf.datasets import RewardDataset
    from openrlhf.datasets.utils import blending_datasets

    data = SimpleNamespace(prompt_key=None, chosen_key="chosen", rejected_key="rejected", apply_chat_template=True)
    arguments = SimpleNamespace(data=data, use_ms=False)
    strategy = SimpleNamespace(args=arguments, print=lambda *_: None, is_rank_0=lambda: False)
    rows = blending_datasets(str(root), None, strategy, dataset_split="train")
    read = RewardDataset(rows, tokenizer, 512, strategy, is_dpo=is_dpo, num_processors=None)
    pairs = of_split(root, examples.pairs())
    for pair, (chosen, _, rejected, _, extra) in zip(pairs, (read[i] for i in range(len(read))), strict=True):
        prompt = policy_read(tokenizer, pair["prompt"])
        for side, (ids,) in (("chosen", chosen), ("rejected", rejected)):
            assert tokenizer.decode(ids) == f"{prompt}{pair[side]}{END}"
            if is_dpo:
                assert tokenizer.decode(ids[:extra]) == prompt
        if not is_dpo:
            assert extra == pair["margin"]


@pytest.mark.parametrize("root", [("axolotl", "pairs")], indirect=True)
def test_axolotl_reads_pairs(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = axolotl_rows(root, tokenizer)
    for pair, row in zip(of_split(root, examples.pairs()), rows, strict=True):
        assert row["prompt"] == policy_read(tokenizer, pair["prompt"])
        assert (row["chosen"], row["rejected"]) == (f"{pair['chosen']}{END}", f"{pair['rejected']}{END}")


@pytest.mark.parametrize("root", [("axolotl", "unpaired")], indirect=True)
def test_axolotl_reads_unpaired(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = axolotl_rows(root, tokenizer)
    for single, row in zip(of_split(root, examples.unpaired()), rows, strict=True):
        assert row["prompt"] == policy_read(tokenizer, single["prompt"])
        assert (row["completion"], row["label"]) == (f"{single['completion']}{END}", single["label"])


def axolotl_rows(root: Path, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """What its trainers get of the dataset that the card's YAML describes."""
    from axolotl.prompt_strategies import dpo, kto

    (told,) = re.findall(r"```yaml\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    config = yaml.safe_load(told.replace("<this folder>", str(root)))
    (described,) = config["datasets"]
    load = {"dpo": dpo.load, "kto": kto.load}[config["rl"]]
    made = load(described["type"], config, dataset_idx=0)
    transform, options = made if isinstance(made, tuple) else (made, {})
    if config["rl"] == "dpo":
        transform = partial(transform, tokenizer=tokenizer)
    rows = datasets.load_dataset(described["path"], split=described["split"])
    return list(rows.map(transform, **options))
