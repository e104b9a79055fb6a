"""TRL's conversational preference format, for DPOTrainer, CPOTrainer, TPOTrainer and RewardTrainer."""

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters.columns import answers, messages, others

READ = """\
```python
from datasets import load_dataset
from trl import DPOTrainer

trainer = DPOTrainer(model, train_dataset=load_dataset("<this folder>", split="train"))
```

`RewardTrainer` reads the same rows and subtracts `margin` in its loss; without that column it takes the plain one."""


def trl(pairs: pa.Table) -> pa.Table:
    """`prompt`, `chosen` and `rejected` as message lists, `margin` (where there is no reward 0, which is none to
    RewardTrainer), of `triple` the best answer as `reference`, then the other columns.

    Chosen and rejected are the assistant's one message after the prompt (TRL, "Dataset formats", preference,
    conversational, explicit prompt).
    """
    chosen, rejected = answers(pairs)
    made = {"prompt": pairs["prompt"], "chosen": messages(chosen), "rejected": messages(rejected)}
    made["margin"] = pc.fill_null(pairs["margin"], 0.0)
    if "best" in pairs.column_names:
        made["reference"] = messages(whole(pairs["best"]))
    return pa.table({**made, **others(pairs, *made, "best")})
