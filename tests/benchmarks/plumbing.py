"""Measures everything but the models: rows/s from read to publish, resume, and the time to the first prompt.

    python tests/benchmarks/plumbing.py [--rows 1000000]

The engines echo (policy=stored, aligner=identity), so what is left is reading, Ray Data, the stages' own Python,
committing and publishing. Figures are printed; nothing is asserted.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.plan import make_plan
from pipelines.corpus.shards import Input, InputConfig
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit

ROW_BYTES = 200
JOB = ["policy=stored", "aligner=identity", "input.response_column=response", "site.ray_address=local"]


def make_input(folder: Path, num_rows: int, *, num_shards: int, group_rows: int) -> Path:
    """Shards whose prompts and responses hold ROW_BYTES together per row."""
    folder.mkdir(parents=True)
    each = num_rows // num_shards
    for shard in range(num_shards):
        prompts = [f"prompt {shard} {row} ".ljust(ROW_BYTES // 2, "p") for row in range(each)]
        responses = [f"response {shard} {row} ".ljust(ROW_BYTES // 2, "r") for row in range(each)]
        table = pa.table({"prompt": prompts, "response": responses})
        pq.write_table(table, folder / f"shard-{shard:04d}.parquet", row_group_size=group_rows)
    return folder


def start(source: Path, output: Path, *overrides: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(ROOT / "pipelines" / "align_corpus.py"), *JOB]
    command += [f"input.path={source}", f"output.root={output}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def throughput(folder: Path, num_rows: int, task_mib: float) -> None:
    """Read to publish; the driver's memory at every quarter, to show that it is flat."""
    source = make_input(folder / "rows", num_rows, num_shards=10, group_rows=100_000)
    output = folder / f"out-{task_mib:g}"
    begin = time.monotonic()
    job = start(source, output, f"run.task_mib={task_mib:g}")
    driver = psutil.Process(job.pid)
    memory: list[tuple[float, int]] = []
    first = None
    while job.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory.append((time.monotonic() - begin, driver.memory_info().rss))
        if first is None and (output / "units").is_dir() and any((output / "units").iterdir()):
            first = time.monotonic()
        time.sleep(0.2)
    seconds = time.monotonic() - begin
    if job.returncode:
        sys.exit(f"the job ended with {job.returncode}: {job.stderr.read().decode()[-2000:] if job.stderr else ''}")
    steady = num_rows / (time.monotonic() - (first or begin))
    quarters = [max((rss for at, rss in memory if at <= seconds * part / 4), default=0) >> 20 for part in (1, 2, 3, 4)]
    print(
        f"throughput: {num_rows} rows of {ROW_BYTES} bytes, unit_rows=256, task_mib={task_mib:g}: "
        f"{num_rows / seconds:.0f} rows/s from command to exit ({seconds:.1f} s), {steady:.0f} rows/s from the first "
        f"commit on; driver memory at each quarter, MiB: {quarters}",
        flush=True,
    )


def subtraction(folder: Path, num_units: int) -> None:
    """Seconds to subtract committed units from the plan: their listing, and nothing of what is in them."""
    source = Input(str(make_input(folder / "committed", 2 * num_units, num_shards=1, group_rows=num_units // 10)))
    output = Storage(str(folder / "out-committed"))
    config = InputConfig(path=source.url)
    shards, _, _ = source.footers(source.listing(), config, {})
    units = Path(output.root) / "units"
    units.mkdir(parents=True)
    for row in range(0, 2 * num_units, 2):
        (units / f"{Unit(shards[0].key, row, row + 1).name}.parquet").touch()
    begin = time.monotonic()
    plan = make_plan(source, config, output, read_state(output), unit_rows=256)
    seconds = time.monotonic() - begin
    print(f"resume: {num_units} committed units subtracted in {seconds:.1f} s; {plan.num_units} units left", flush=True)


def first_prompt(folder: Path, num_units: int) -> None:
    """Seconds from the command to the first committed unit, with many pending."""
    source = make_input(folder / "pending", num_units, num_shards=10, group_rows=1000)
    output = folder / "out-pending"
    begin = time.monotonic()
    job = start(source, output, "run.unit_rows=1")
    while job.poll() is None and not ((output / "units").is_dir() and any((output / "units").iterdir())):
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    peak = psutil.Process(job.pid).memory_info().rss >> 20
    os.kill(job.pid, signal.SIGTERM)
    job.wait()
    print(f"first commit: {seconds:.1f} s after the command, {num_units} units pending; driver {peak} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the throughput run")
    parser.add_argument("--units", type=int, default=100_000, help="units of the resume and first-prompt runs")
    parser.add_argument("--task-mib", type=float, default=4.0, help="run.task_mib of the throughput run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subtraction(folder, arguments.units)
        first_prompt(folder, arguments.units)
        throughput(folder, arguments.rows, arguments.task_mib)


if __name__ == "__main__":
    main()
