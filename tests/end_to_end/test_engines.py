"""The engines of production through the command line: vLLM, and a tensor parallel group on logical GPUs."""

import contextlib
from pathlib import Path

import psutil

from tests.end_to_end.conftest import RayHead, Reference, tiny_pool
from tests.end_to_end.jobs import CommandLine, corpus, num_units
from tests.processes import killed

NUM_UNITS = 9  # of `job`


def test_vllm_answers_what_torch_answers(
    command_line: CommandLine, prompts: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    torch = ", ".join(key.removeprefix("policy.").replace("=", ": ") for key in tiny_pool("policy", tiny_llama))
    command_line.run(
        f"input.path={prompts}", f"output.root={tmp_path}", "policy=vllm", *tiny_pool("policy", tiny_llama),
        "policy.num_gpus=0", "policy.temperature=0", "policy.top_p=1", "policy.max_num_seqs=16",
        "policy.kv_cache_tokens=8192", f"policies=[{{{torch}}}]", "aligner=identity", "run.unit_rows=4",
    ).expect(0)  # fmt: skip
    rows = corpus(tmp_path)
    by_vllm, by_torch = ([row["responses"][number]["text"] for row in rows] for number in (0, 1))
    assert by_vllm == by_torch
    assert len(set(by_torch)) == len(rows) == 36


def test_a_tensor_parallel_aligner_says_what_one_process_says_though_a_rank_is_killed(
    ray_head: RayHead, command_line: CommandLine, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    shards = ["aligner.tensor_parallel_size=2", "aligner.num_gpus=2"]
    running = command_line.start(*job, f"output.root={tmp_path}", *shards)
    running.until(lambda: num_units(tmp_path), "the first unit was committed")
    (rank,) = followers(ray_head)
    (actor,) = running.actors("aligner")
    assert killed(rank)
    assert num_units(tmp_path) < NUM_UNITS, "it was over before the rank died"
    running.until(lambda: set(followers(ray_head)) - {rank}, "rank 0 had another beside it again")
    assert running.actors("aligner") == [actor]
    running.wait().expect(0)
    assert corpus(tmp_path) == reference.rows


def followers(head: RayHead) -> list[psutil.Process]:
    """The ranks but the first of the tensor parallel groups on a head."""
    found = []
    for process in psutil.Process(head.raylet).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("follow(" in word for word in process.cmdline()):
                found.append(process)
    return found
