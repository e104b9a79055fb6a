"""axolotl's formats: `type: chat_template.default` of `rl: dpo`, and `type: chatml.argilla_chat` of `rl: kto`."""

import pyarrow as pa

from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters.columns import answers, conversation, message, others

READ_PAIRS = """\
```yaml
rl: dpo
datasets:
  - path: <this folder>
    split: train
    type: chat_template.default
```"""
READ_UNPAIRED = """\
```yaml
rl: kto
datasets:
  - path: <this folder>
    split: train
    type: chatml.argilla_chat  # for models whose template is ChatML; llama3.argilla_chat for Llama 3's
```"""


def axolotl(table: pa.Table) -> pa.Table:
    """Pairs: `messages`, and `chosen` and `rejected` as one message each. Unpaired: `completion`, the whole
    conversation, and `label`. Then the other columns.

    axolotl has no reader of unpaired conversations that uses a tokenizer's chat template: this one writes ChatML's.
    """
    if "label" in table.column_names:
        chats = conversation(whole(table["prompt"]), whole(table["completion"]))
        return pa.table({"completion": chats, **others(table, "prompt", "completion")})
    chosen, rejected = answers(table)
    made = {"messages": table["prompt"], "chosen": message(chosen), "rejected": message(rejected)}
    return pa.table({**made, **others(table, "prompt", *made)})


def read(strategy: str) -> str:
    return READ_UNPAIRED if strategy == "unpaired" else READ_PAIRS
