"""What the rewards of a partition come to: their means before aligning and after it."""

from collections import defaultdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.corpus.storage import Storage

ROWS_AT_ONCE = 1 << 12


def mean_rewards(output: Storage, parts: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By reward, over the candidates of which both texts have a score: `num_candidates`, and the means of `response`
    and of `aligned`. A reward without such a candidate is not there."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for part in parts:
        with output.fs.open(output.path(part["path"])) as file:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=["rewards"]):
                _add(sums, batch["rewards"].flatten())
    return {
        name: {"num_candidates": num, "response": before / num, "aligned": after / num}
        for name, (num, before, after) in sums.items()
        if num
    }


def _add(sums: dict[str, list[float]], rewards: pa.StructArray) -> None:
    names = rewards.field("name")
    for name in pc.unique(names).to_pylist():
        found = rewards.filter(pc.equal(names, name))
        response, aligned = found.field("response").flatten(), found.field("aligned").flatten()
        both = pc.and_(response.is_valid(), aligned.is_valid())
        sums[name][0] += pc.sum(both).as_py() or 0
        for place, scores in ((1, response), (2, aligned)):
            sums[name][place] += pc.sum(scores.filter(both)).as_py() or 0.0
