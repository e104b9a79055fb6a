"""OpenRLHF's format of pairs: two whole conversations, which it reads with `--data.apply_chat_template`."""

import pyarrow as pa

from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters.columns import answers, conversation, others

READ = """\
```bash
python -m openrlhf.cli.train_dpo --data.dataset <this folder> --data.apply_chat_template …
```

`openrlhf.cli.train_rm` reads the same rows, and `margin` with `--model.margin_loss_enable`."""


def openrlhf(pairs: pa.Table) -> pa.Table:
    """`chosen` and `rejected`, each the prompt's messages and the answer, `margin`, then the other columns.

    Without a `prompt`, as in OpenRLHF's own sets: its trainers take what precedes the last message of `chosen` for it,
    with no flag but those for the two keys. A null margin is one of 0 to them.
    """
    prompts = whole(pairs["prompt"])
    sides = zip(("chosen", "rejected"), answers(pairs), strict=True)
    made = {name: conversation(prompts, texts) for name, texts in sides}
    return pa.table({**made, **others(pairs, "prompt", *made)})
