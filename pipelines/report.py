"""What the job prints besides its progress: the dry run's plan, bad shards, and the summary at the end."""

import sys
import textwrap
from typing import Any

import pyarrow.parquet as pq

from actors.candidates import as_messages
from actors.engines.base import Messages
from actors.engines.identity import weight_bytes
from actors.policy import policy_prompt
from actors.pool import PoolConfig
from actors.recipes import aligner_input
from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import Published
from pipelines.corpus.read import read_checked
from pipelines.corpus.shards import Input
from pipelines.corpus.state import manifests
from pipelines.corpus.storage import Storage
from pipelines.progress import PoolTotals, Tally
from pipelines.settings import AlignCorpusConfig, pools

SHOWN_ROWS = 2


def say(text: str) -> None:
    """A line for the person, apart from what the job prints as its result."""
    print(text, file=sys.stderr, flush=True)


def print_bad_shards(plan: Plan) -> None:
    for shard in plan.bad_shards:
        say(f"error: shard {shard.path}: {shard.reason}")
    say("error: nothing was done; input.on_bad_shard=skip aligns the other shards")


def print_throughput(totals: dict[str, PoolTotals], tally: Tally, seconds: float) -> None:
    """Rows and tokens per second of each pool, over the whole of the job, start-up included."""
    for name, pool in totals.items():
        print(f"{name}: {pool.num_rows / seconds:.2f} rows/s, {pool.num_tokens / seconds:.0f} tokens/s")
    changed = tally.num_changed / tally.num_candidates if tally.num_candidates else 0.0
    print(f"made: {tally.num_units} units, {tally.num_rows} rows in {seconds:.1f} s; {changed:.1%} of answers changed")


def print_summary(config: AlignCorpusConfig, output: Storage, plan: Plan, published: Published) -> None:
    """Counts, where the corpus is, and two of its rows."""
    for shard in plan.bad_shards:
        say(f"warning: shard {shard.path} was skipped: {shard.reason}")
    if published.withheld:
        say(f"error: {published.withheld}")
        return
    found = manifests(output)
    new = [manifest for manifest in found if manifest["number"] in published.partitions]
    if not new:
        num_rows = sum(manifest["num_ok"] for manifest in found)
        print(f"nothing new: {num_rows} rows in {len(found)} partitions at {output.url}/corpus")
        return
    for manifest in new:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(manifest["causes"].items()))
        print(
            f"published: run={manifest['number']:06d}: {manifest['num_rows']} rows in = {manifest['num_ok']} ok + "
            f"{manifest['num_quarantined']} quarantined{f' ({causes})' if causes else ''}"
        )
    print(f"corpus: {output.url}/corpus ({sum(each['num_ok'] for each in found)} rows in {len(found)} partitions)")
    for manifest in new[-1:]:
        _print_rows(output, manifest)


def _print_rows(output: Storage, manifest: dict[str, Any]) -> None:
    if not manifest["corpus"]:
        return
    with output.fs.open(output.path(manifest["corpus"][0]["path"]), "rb") as file:
        batch = next(
            pq.ParquetFile(file).iter_batches(SHOWN_ROWS, columns=["prompt_id", "prompt", "responses", "aligned"])
        )
    for row in batch.to_pylist():
        print(f"\n{row['prompt_id']}")
        _print_text("prompt", row["prompt"][-1]["content"])
        _print_text("response", row["responses"][0]["text"])
        _print_text("aligned", row["aligned"][0]["text"])


def _print_text(name: str, text: str) -> None:
    short = textwrap.shorten(text, 400, placeholder=" …")
    print(textwrap.fill(short, 116, initial_indent=f"  {name:9}", subsequent_indent=" " * 11))


# --- the dry run ----------------------------------------------------------------------------------------------------


def print_dry_run(config: AlignCorpusConfig, source: Input, plan: Plan) -> None:
    """The plan, the pools, and the first prompts exactly as each model will see them. Nothing is written or started."""
    print(
        f"input: {plan.num_shards} shards, {plan.num_finished} of them published before; {plan.num_done_rows} rows done"
    )
    print(f"to do: {plan.num_units} units, {plan.num_rows} rows, in {len(plan.spans)} row groups")
    for shard in plan.bad_shards:
        print(f"bad shard: {shard.path}: {shard.reason}")
    for name, pool in pools(config).items():
        print(f"{name}: {_pool_line(pool)}")
    for row in _first_prompts(config, source, plan):
        _print_as_seen(config, row)


def _pool_line(pool: PoolConfig) -> str:
    weights = weight_bytes(pool)
    memory = f", weights {weights / 2**20:.0f} MiB per replica" if weights else ""
    return f"{pool.replicas} x {pool.engine} {pool.model} ({pool.num_gpus} GPUs, {pool.num_cpus:g} CPUs each{memory})"


def _first_prompts(config: AlignCorpusConfig, source: Input, plan: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for span in plan.spans:
        for _, unit in read_checked(source, config.input, span):
            names = [name for name in ("prompt_id", "prompt", "stored", "problem") if name in unit.column_names]
            rows.extend(row for row in unit.select(names).to_pylist() if row["problem"] is None)
            if len(rows) >= SHOWN_ROWS:
                return rows[:SHOWN_ROWS]
    return rows


def _print_as_seen(config: AlignCorpusConfig, row: dict[str, Any]) -> None:
    answer = (row.get("stored") or ["(the policy's answer)"])[0]
    seen: list[tuple[str, PoolConfig, Messages | str]] = [
        ("policy", config.policy, policy_prompt(config.policy, row["prompt"])),
        ("aligner", config.aligner, aligner_input(config.aligner, as_messages(row["prompt"]), answer)),
    ]
    for name, pool, prompt in seen:
        print(f"\n{row['prompt_id']} as the {name} sees it:")
        print(textwrap.indent(as_seen(pool, prompt), "  "))


def as_seen(pool: PoolConfig, prompt: Messages | str) -> str:
    """The prompt's tokens, decoded again with special tokens visible; for `stored`, the chat as it is."""
    if pool.engine == "stored":
        return prompt if isinstance(prompt, str) else "\n".join(f"{role}: {content}" for role, content in prompt)
    from actors.engines.prompts import encode_prompt, load_tokenizer, render_prompt

    tokenizer = load_tokenizer(pool.model, pool.revision)
    return render_prompt(tokenizer, encode_prompt(tokenizer, prompt))
