"""The columns of UltraFeedback-binarized, which many recipes for DPO and reward models expect."""

import pyarrow as pa

from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters.columns import answers, conversation, last_content, others

READ = """\
```python
from datasets import load_dataset

rows = load_dataset("<this folder>", split="train").remove_columns("prompt")  # for TRL: it is in the conversations
```"""


def ultrafeedback(pairs: pa.Table) -> pa.Table:
    """`prompt` (the last user message, a string), `prompt_id`, `chosen`, `rejected` and `messages` (whole
    conversations; `messages` is the chosen one), `score_chosen`, `score_rejected`, then the other columns.

    As there, whoever reads the conversations must leave `prompt` aside: it is one message of them, not a prefix.
    """
    prompts = whole(pairs["prompt"])
    chosen, rejected = (conversation(prompts, texts) for texts in answers(pairs))
    made = {
        "prompt": last_content(prompts),
        "prompt_id": pairs["prompt_id"],
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": pairs["chosen_reward"],
        "score_rejected": pairs["rejected_reward"],
    }
    return pa.table({**made, **others(pairs, *made, "chosen_reward", "rejected_reward")})
