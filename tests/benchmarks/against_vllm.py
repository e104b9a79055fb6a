"""Measures what the pipeline loses against the bare vLLM engine, and gains against two chained Ray Data LLM processors.

    python tests/benchmarks/against_vllm.py [bare] [chain] [--model FOLDER] [--repeats 3]

bare: tokens/s of the policy pool inside a job (its aligner costs nothing) over those of the same requests on a bare
AsyncLLM with the same engine arguments. chain: rows/s of policy -> aligner as one job over those of two chained
processors of `ray.data.llm`, with the same model, prompts and engine settings; steady, and with start-up counted.
Every engine has the same KV cache and the same share of all cores but one, on either side: a thread that is pushed off
its core by what is around the engine keeps the engine's others waiting. The two sides take turns; the median of the
ratios is printed with its range. --model tiny is a random Llama of 2.6 M parameters that is made on
the spot.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

UNIT_ROWS = 32
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB of each engine
    "HF_HUB_OFFLINE": "1",
    "RAY_DEDUP_LOGS": "0",
}
Times = list[tuple[float, int]]
"""When rows were finished, and how many tokens or rows each time."""


def steady(times: Times) -> float:
    """What was finished per second between a tenth and nine tenths of it: the slope of a line through all the points,
    as rows of equal length are finished in waves."""
    at, counts = np.array(sorted(times)).T
    done = counts.cumsum()
    inside = (done > done[-1] / 10) & (done <= done[-1] * 9 / 10)
    return float(np.polyfit(at[inside] - at[0], done[inside], 1)[0])


# --- ours -----------------------------------------------------------------------------------------------------------


def job(folder: Path, arguments: argparse.Namespace, aligner: list[str]) -> tuple[Times, float, list[int]]:
    """(when units were committed and their rows, seconds from the command to its exit, tokens of each such unit)."""
    output = folder / f"output-{time.monotonic_ns()}"
    pools = ["policy", "aligner"] if aligner == ["aligner=rewrite_vllm"] else ["policy"]
    settings = {
        "model": arguments.model, "max_tokens": arguments.max_tokens, "max_num_seqs": arguments.max_num_seqs,
        "max_model_len": arguments.max_model_len, "dtype": "float32", "units_in_flight": arguments.units_in_flight,
        "num_gpus": 0, "tensor_parallel_size": 1, "temperature": 0.0, "top_p": 1.0, "num_threads": threads(len(pools)),
    }  # fmt: skip
    overrides = [f"{pool}.{key}={value}" for pool in pools for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "pipelines" / "align_corpus.py"), "policy=vllm", *aligner, *overrides]
    command += [f"input.path={folder / 'prompts.parquet'}", f"output.root={output}", f"run.unit_rows={UNIT_ROWS}"]
    command += ["site.ray_address=local", "output.keep_units=true", "run.max_quarantined_fraction=1"]
    seconds = run(command)
    rows: Times = []
    tokens = []
    for path in (output / "units").glob("*.parquet"):
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"burnish.unit"])
        rows.append((facts["committed_at"], table.num_rows))
        tokens.append(sum(row[0]["num_tokens"] or 0 for row in table["responses"].to_pylist() if row))
    return rows, seconds, tokens


def threads(num_engines: int) -> int:
    """Of each of so many engines on this machine; one core is left to the processes around them."""
    return max(1, ((os.cpu_count() or 1) - 1) // num_engines)


def run(command: list[str]) -> float:
    """Seconds from the command to its exit."""
    begin = time.monotonic()
    completed = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, cwd=ROOT)
    if completed.returncode:
        sys.exit(f"{' '.join(command)} ended with {completed.returncode}:\n{completed.stderr[-4000:]}")
    return time.monotonic() - begin


# --- the others -----------------------------------------------------------------------------------------------------


def engine_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_model_len": arguments.max_model_len, "max_num_seqs": arguments.max_num_seqs, "dtype": "float32",
        "enforce_eager": True, "enable_prefix_caching": True,
    }  # fmt: skip


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": arguments.max_tokens}


def bare(folder: Path, arguments: argparse.Namespace) -> Times:
    """The same prompts through an AsyncLLM of this process; all are asked at once. Prints nothing."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=arguments.model, **engine_arguments(arguments)))
    how = SamplingParams(**sampling(arguments), output_kind=RequestOutputKind.FINAL_ONLY)
    times: Times = []

    async def ask(number: int, prompt: str) -> None:
        chat = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        async for output in llm.generate({"prompt_token_ids": tokens}, how, str(number)):
            (answer,) = output.outputs
            num_made = len(answer.token_ids) - (answer.finish_reason == "stop")  # less the end of sequence, as we count
            times.append((time.time(), num_made))

    async def ask_all() -> None:
        prompts = pq.read_table(folder / "prompts.parquet")["prompt"].to_pylist()
        await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(prompts)))

    asyncio.run(ask_all())
    llm.shutdown()
    return times


def chain(folder: Path, arguments: argparse.Namespace) -> Times:
    """Two processors of ray.data.llm, one after the other, each as its documentation builds it."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from actors.recipes import RecipeConfig, aligner_input

    ray.init(num_cpus=16, include_dashboard=False, logging_level="ERROR")
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads(2))}

    def processor(messages: Any, kept: list[str], answer: str) -> Any:
        config = vLLMEngineProcessorConfig(
            model_source=arguments.model, engine_kwargs=engine_arguments(arguments), concurrency=1,
            batch_size=UNIT_ROWS, max_concurrent_batches=arguments.units_in_flight,
            placement_group_config={"bundles": [{"CPU": 1}]}, runtime_env={"env_vars": environment},
        )  # fmt: skip
        return build_processor(
            config,
            preprocess=lambda row: {"messages": messages(row), "sampling_params": sampling(arguments)},
            postprocess=lambda row: {**{name: row[name] for name in kept}, answer: row["generated_text"]},
        )

    def rewritten(row: dict[str, Any]) -> list[dict[str, str]]:
        found = aligner_input(RecipeConfig(recipe="rewrite"), (("user", row["prompt"]),), row["response"])
        return [{"role": role, "content": content} for role, content in found]

    policy = processor(lambda row: [{"role": "user", "content": row["prompt"]}], ["prompt"], "response")
    aligner = processor(rewritten, ["prompt", "response"], "aligned")
    dataset = ray.data.read_parquet(str(folder / "prompts.parquet"))
    dataset = aligner(policy(dataset.repartition(target_num_rows_per_block=UNIT_ROWS)))
    times: Times = []
    num_rows = 0
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        times.append((time.time(), len(batch["aligned"])))
        num_rows += len(batch["aligned"])
    assert num_rows == arguments.rows, f"{num_rows} rows came out of the chain"
    return times


def elsewhere(what: str, folder: Path, arguments: argparse.Namespace) -> tuple[Times, float]:
    """`bare` or `chain` in a process of its own: (times, seconds from the command to its exit)."""
    told = folder / f"{what}.json"
    keys = ("model", "rows", "max_tokens", "max_num_seqs", "max_model_len", "units_in_flight")
    options = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in keys]
    seconds = run([sys.executable, __file__, f"only-{what}", "--folder", str(folder), *options])
    return [(at, count) for at, count in json.loads(told.read_text())], seconds


# --- comparing ------------------------------------------------------------------------------------------------------


def summary(name: str, ratios: list[float], unit: str, target: float) -> None:
    median = statistics.median(ratios)
    told = "met" if median >= target else "missed"
    print(
        f"{name}: {median:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) {unit}; target {target:g}: {told}", flush=True
    )


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    label = f"{Path(arguments.model).name}, {arguments.rows} rows, up to {arguments.max_tokens} tokens"
    if "bare" in arguments.parts:
        ratios = []
        for _ in range(arguments.repeats):
            theirs, _ = elsewhere("bare", folder, arguments)
            rows, _, tokens = job(folder, arguments, ["aligner=identity"])
            ours = [(at, count) for (at, _), count in zip(rows, tokens, strict=True)]
            print(f"  tokens/s: job {steady(ours):.0f}, bare AsyncLLM {steady(theirs):.0f}", flush=True)
            ratios.append(steady(ours) / steady(theirs))
        summary(f"policy pool over bare AsyncLLM ({label})", ratios, "tokens/s, steady", 0.95)
    if "chain" in arguments.parts:
        ratios, whole = [], []
        for _ in range(arguments.repeats):
            theirs, their_s = elsewhere("chain", folder, arguments)
            ours, our_s, _ = job(folder, arguments, ["aligner=rewrite_vllm"])
            print(
                f"  rows/s: job {steady(ours):.1f} steady, {arguments.rows / our_s:.1f} in all ({our_s:.0f} s); "
                f"chain {steady(theirs):.1f} steady, {arguments.rows / their_s:.1f} in all ({their_s:.0f} s)",
                flush=True,
            )
            ratios.append(steady(ours) / steady(theirs))
            whole.append(their_s / our_s)
        summary(f"job over two chained Ray Data LLM processors ({label})", ratios, "rows/s, steady", 1.5)
        summary(f"job over two chained Ray Data LLM processors ({label})", whole, "rows/s, start-up counted", 2.0)


def make_prompts(folder: Path, num_rows: int) -> None:
    things = ["a lake", "the number seven", "rain", "a letter", "an old clock", "bread", "a bridge", "the colour red"]
    prompts = [f"Number {row}: what would you say about {things[row % 8]}, in a few words?" for row in range(num_rows)]
    pq.write_table(pa.table({"prompt": prompts}), folder / "prompts.parquet")


def make_tiny(folder: Path) -> str:
    """A random Llama of 2.6 M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_models import SHAPE, build_tokenizer

    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
    LlamaForCausalLM(LlamaConfig(**{**shape, "head_dim": 64, "max_position_embeddings": 1024})).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["bare", "chain"], help="bare, chain; both unless given")
    parser.add_argument("--model", default="tiny", help="folder of the model, for both pools; or tiny")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--units-in-flight", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for what, measure in (("bare", bare), ("chain", chain)):
        if f"only-{what}" in arguments.parts:
            os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads(1)))
            times = measure(arguments.folder, arguments)
            (arguments.folder / f"{what}.json").write_text(json.dumps(times))
            return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_prompts(folder, arguments.rows)
        if arguments.model == "tiny":
            arguments.model = make_tiny(folder / "tiny")
        compare(arguments, folder)


if __name__ == "__main__":
    main()
