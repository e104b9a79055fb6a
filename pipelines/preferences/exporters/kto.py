"""TRL's conversational format of unpaired preferences, for KTOTrainer."""

import pyarrow as pa

from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters.columns import messages, others

READ = """\
```python
from datasets import load_dataset
from trl import KTOTrainer

trainer = KTOTrainer(model, train_dataset=load_dataset("<this folder>", split="train"))
```"""


def kto(unpaired: pa.Table) -> pa.Table:
    """`prompt` and `completion` as message lists, `label` (true: desirable), then all that is known of the answer.

    The completion is the assistant's one message after the prompt (TRL, "Dataset formats", unpaired preference,
    conversational).
    """
    return pa.table({**others(unpaired), "completion": messages(whole(unpaired["completion"]))})
