"""Measures build_preferences: rows/s from a scored corpus to published pairs, and what the driver and its workers hold.

    python tests/benchmarks/preferences.py [--rows 1000000] [--candidates 2] [key=value ...]

The corpus is made up: per row one prompt, responses and aligned texts of about 200 bytes, one reward. Figures are
printed; nothing is asserted. Overrides go to the job.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from actors.contract import ALIGNED, PROMPT, RESPONSE
from pipelines.corpus.schema import CORPUS, SOURCE
from tests.pipelines.preferences.fabricate import publish_corpus

NUM_PARTS = 10
GROUP_ROWS = 16_384  # about the 32 MiB that the corpus's publisher makes of such rows
TEXT_BYTES = 200
JOB = ["site.ray_address=local", "build=pairs", "build.reward=quality", "export=trl"]


def make_corpus(root: Path, num_rows: int, num_candidates: int) -> Path:
    each = num_rows // NUM_PARTS
    parts = [part(number * each, each, num_candidates) for number in range(NUM_PARTS)]
    return publish_corpus(root, *parts, row_group_size=GROUP_ROWS)


def part(first: int, num_rows: int, num_candidates: int) -> pa.Table:
    """Rows whose texts all differ, and whose aligned texts are mostly longer and better."""
    rng = np.random.default_rng(first)
    numbers = pc.cast(pa.array(np.arange(first, first + num_rows)), pa.string())
    rewards = [rng.normal(side / 2, 1, num_rows * num_candidates) for side in (0, 1)]
    starts = pa.array(np.arange(num_rows + 1, dtype=np.int32))
    bounds = pa.array(np.arange(0, num_rows * num_candidates + 1, num_candidates, dtype=np.int32))
    messages = pa.StructArray.from_arrays(
        [pa.repeat("user", num_rows), padded(numbers, "Prompt number", TEXT_BYTES)], fields=list(PROMPT.value_type)
    )
    scores = pa.StructArray.from_arrays(
        [
            pa.repeat("quality", num_rows),
            *(pa.ListArray.from_arrays(bounds, pa.array(side)) for side in rewards),
        ],
        fields=list(CORPUS.field("rewards").type.value_type),
    )
    columns = {
        "prompt_id": numbers,
        "prompt": pa.ListArray.from_arrays(starts, messages),
        "responses": pa.ListArray.from_arrays(bounds, candidates(RESPONSE, first, num_rows, num_candidates, 0)),
        "aligned": pa.ListArray.from_arrays(bounds, candidates(ALIGNED, first, num_rows, num_candidates, 20)),
        "source": pa.StructArray.from_arrays(
            [pa.repeat("prompts.parquet", num_rows), pa.repeat(pa.scalar(0, pa.int32()), num_rows),
             pa.array(np.arange(first, first + num_rows))],
            fields=list(SOURCE),
        ),
        "rewards": pa.ListArray.from_arrays(starts, scores),
    }  # fmt: skip
    return pa.table({name: columns[name] for name in CORPUS.names}).cast(CORPUS)


def candidates(kind: pa.StructType, first: int, num_rows: int, num_candidates: int, more: int) -> pa.StructArray:
    count = num_rows * num_candidates
    numbers = pc.cast(pa.array(np.arange(first * num_candidates, first * num_candidates + count)), pa.string())
    values: dict[str, Any] = {
        "text": padded(numbers, "Answer number" if more else "Response number", TEXT_BYTES + more),
        "model": pa.repeat("aligner" if more else "policy", count),
        "status": pa.repeat("ok", count),
        "finish_reason": pa.repeat("stop", count),
        "num_tokens": pa.array(np.full(count, (TEXT_BYTES + more) // 4, np.int32)),
        "seed": pa.array(np.arange(count)),
    }
    arrays = [values.get(field.name, pa.nulls(count, field.type)) for field in kind]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def padded(numbers: pa.Array, before: str, width: int) -> pa.Array:
    filler = "and some more words that nobody has to read. " * (width // 40)
    return pc.utf8_slice_codeunits(pc.binary_join_element_wise(before, numbers, filler, " "), 0, width)


def measure(folder: Path, num_rows: int, num_candidates: int, overrides: list[str]) -> None:
    source = make_corpus(folder / "corpus", num_rows, num_candidates)
    size = sum(path.stat().st_size for path in source.rglob("*.parquet")) >> 20
    command = [sys.executable, str(ROOT / "pipelines" / "build_preferences.py"), *JOB]
    command += [f"input.path={source}", f"output.root={folder / 'dataset'}", *overrides]
    begin = time.monotonic()
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    driver = psutil.Process(job.pid)
    memory: list[tuple[float, int, int]] = []
    while job.poll() is None:
        with contextlib.suppress(psutil.Error):
            memory.append((time.monotonic() - begin, driver.memory_info().rss, largest_worker(driver)))
        time.sleep(0.2)
    seconds = time.monotonic() - begin
    out, err = job.communicate()
    if job.returncode:
        sys.exit(f"the job ended with {job.returncode}: {err[-3000:]}")
    print(out)
    built = re.search(r"in ([0-9.]+) s \(", out)
    assert built is not None
    quarters = [
        [max((each[at] for each in memory if each[0] <= seconds * part / 4), default=0) >> 20 for part in (1, 2, 3, 4)]
        for at in (1, 2)
    ]
    print(
        f"preferences: {num_rows} rows of {num_candidates} + {num_candidates} candidates ({size} MiB of Parquet), "
        f"{os.cpu_count()} CPUs: {num_rows / seconds:.0f} rows/s from command to exit ({seconds:.1f} s), "
        f"{num_rows / float(built[1]):.0f} rows/s while building; largest so far at each quarter, MiB: driver "
        f"{quarters[0]}, worker {quarters[1]}",
        flush=True,
    )


def largest_worker(driver: psutil.Process) -> int:
    """Resident bytes of the largest of Ray's worker processes."""
    found = 0
    for child in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("ray::"):
                found = max(found, child.memory_info().rss)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--candidates", type=int, default=2, help="responses of a row, and aligned texts")
    parser.add_argument("overrides", nargs="*", help="key=value of the job")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), arguments.rows, arguments.candidates, arguments.overrides)


if __name__ == "__main__":
    main()
