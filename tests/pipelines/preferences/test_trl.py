"""TRL's own trainers on what `trl` and `kto` export: they train, and they read what the policy read and wrote."""

import math
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from actors.candidates import as_messages
from actors.engines.prompts import encode_draft, encode_prompt, end_of_turn, render_prompt
from pipelines.preferences.exporters import EXPORTERS
from tests.pipelines.preferences import examples
from tests.tiny_models import build_tiny_llama

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}<|im_start|>\n\n"
    "{{ message['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
"""Llama 3's template with the tiny tokenizer's special tokens: it writes the BOS that the tokenizer would add again."""
DPO_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
DPO_LOSSES += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
TRAINING |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
TRAINING |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["chatml", "llama3"])
def tokenizer(model: Path, request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(model)
    if request.param == "llama3":
        loaded.chat_template = LLAMA3
        special = [(loaded.bos_token, loaded.bos_token_id)]
        single = f"{loaded.bos_token} $A"
        loaded.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
        assert loaded("a")["input_ids"][0] == loaded.bos_token_id
    return loaded


def exported(name: str, table: pa.Table, folder: Path) -> datasets.Dataset:
    pq.write_table(EXPORTERS[name].convert(table), folder / "part.parquet")
    files = str(folder / "part.parquet")
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))


def train(trainer: Any) -> None:
    """Two steps, which must change the weights by a finite loss."""
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    result = trainer.train()
    assert result.global_step == 2 and math.isfinite(result.training_loss)
    after = list(trainer.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_every_loss_for_pairs_is_tried() -> None:
    offered = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(DPO_LOSSES) == set(re.findall(r"`'(\w+)'`", offered))


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_dpo_trains(loss: str, model: Path, tmp_path: Path) -> None:
    extra = {"label_smoothing": 1e-3} if loss in ("exo_pair", "robust") else {}
    config = DPOConfig(str(tmp_path / "out"), loss_type=[loss], **extra, **TRAINING)
    rows = exported("trl", examples.pairs(), tmp_path)
    train(DPOTrainer(str(model), args=config, train_dataset=rows))


@pytest.mark.parametrize("strategy", ["curriculum", "steps", "triple"])
def test_dpo_trains_on_other_strategies(strategy: str, model: Path, tmp_path: Path) -> None:
    config = DPOConfig(str(tmp_path / "out"), **TRAINING)
    rows = exported("trl", getattr(examples, strategy)(), tmp_path)
    train(DPOTrainer(str(model), args=config, train_dataset=rows))


@pytest.mark.parametrize("loss", ["simpo", "sigmoid"])
def test_cpo_trains(loss: str, model: Path, tmp_path: Path) -> None:
    """SimPO has no trainer of its own: it is a loss of this one."""
    config = CPOConfig(str(tmp_path / "out"), loss_type=loss, **TRAINING)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    rows = exported("trl", examples.pairs(), tmp_path)
    train(CPOTrainer(loaded, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model)))


def test_tpo_trains_with_the_best_answer_as_reference(model: Path, tmp_path: Path) -> None:
    rows = exported("trl", examples.triple(), tmp_path)
    trainer = TPOTrainer(str(model), args=TPOConfig(str(tmp_path / "out"), **TRAINING), train_dataset=rows)
    best = examples.triple()["best"].to_pylist()
    assert [trainer.processing_class.decode(ids) for ids in trainer.train_dataset["reference_ids"]] == [
        f"{text}<|im_end|>\n" for text in best
    ]
    train(trainer)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_trains(loss: str, model: Path, tmp_path: Path) -> None:
    rows = exported("kto", examples.unpaired(), tmp_path)
    train(KTOTrainer(str(model), args=KTOConfig(str(tmp_path / "out"), loss_type=loss, **TRAINING), train_dataset=rows))


@pytest.mark.parametrize("with_reward", [True, False])
def test_reward_model_trains_with_the_margin_if_there_is_a_reward(
    with_reward: bool, model: Path, tmp_path: Path
) -> None:
    pairs = examples.pairs()
    if not with_reward:
        for name in ("chosen_reward", "rejected_reward", "margin"):
            place = pairs.column_names.index(name)
            pairs = pairs.set_column(place, name, pa.nulls(len(pairs), pa.float64()))
    trainer = RewardTrainer(
        str(model),
        args=RewardConfig(str(tmp_path / "out"), **TRAINING),
        train_dataset=exported("trl", pairs, tmp_path),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["margin"].tolist() == (pairs["margin"].to_pylist() if with_reward else [0.0] * len(pairs))
    tokenizer = trainer.processing_class
    for pair, row in zip(pairs.to_pylist(), trainer.train_dataset, strict=True):
        ids = encode_prompt(tokenizer, as_messages(pair["prompt"]))
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"][: len(ids)] == ids
            assert tokenizer.decode(row[f"{side}_ids"][len(ids) :]) == f"{pair[side]}<|im_end|>\n"
    train(trainer)


@pytest.mark.parametrize("export", ["trl", "ultrafeedback"])
def test_dpo_reads_what_the_policy_read_and_wrote(
    export: str, tokenizer: PreTrainedTokenizerBase, model: Path, tmp_path: Path
) -> None:
    table = examples.pairs()
    rows = exported(export, table, tmp_path)
    trainer = DPOTrainer(
        str(model),
        args=DPOConfig(str(tmp_path / "out"), **TRAINING),
        train_dataset=rows if export == "trl" else rows.remove_columns("prompt"),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    seen = list(zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True))
    for number, pair in enumerate(table.to_pylist()):
        for side, row in (("chosen", number), ("rejected", number + len(table))):
            ids, read, completion = seen[row]
            check(tokenizer, pair["prompt"], pair[side], ids[(read == 1) & (completion == 0)], ids[completion == 1])


def test_kto_reads_what_the_policy_read_and_wrote(
    tokenizer: PreTrainedTokenizerBase, model: Path, tmp_path: Path
) -> None:
    table = examples.unpaired()
    trainer = KTOTrainer(
        str(model),
        args=KTOConfig(str(tmp_path / "out"), **TRAINING),
        train_dataset=exported("kto", table, tmp_path),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["label"].tolist() == table["label"].to_pylist()
    seen = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    for row, (ids, read, completion) in zip(table.to_pylist(), seen, strict=True):
        prompt = ids[(read == 1) & (completion == 0)]
        check(tokenizer, row["prompt"], row["completion"], prompt, ids[completion == 1])


def check(
    tokenizer: PreTrainedTokenizerBase,
    chat: examples.Chat,
    answer: str,
    prompt_ids: torch.Tensor,
    completion_ids: torch.Tensor,
) -> None:
    """The prompt's tokens are those that a policy of burnish reads; the completion's are those of the answer that it
    writes and of the end of its turn, behind which the template may begin a new line."""
    assert prompt_ids.tolist() == encode_prompt(tokenizer, as_messages(chat)), render_prompt(tokenizer, prompt_ids)
    wrote = [*encode_draft(tokenizer, answer), end_of_turn(tokenizer)]
    assert completion_ids.tolist()[: len(wrote)] == wrote
    assert tokenizer.decode(completion_ids[len(wrote) :]).strip() == ""
