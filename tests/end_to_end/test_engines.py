"""The engines of production through the command line: vLLM, and a tensor parallel group on logical GPUs."""

import contextlib
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import RayHead, Reference, tiny_pool
from tests.end_to_end.jobs import STAGES, CommandLine, corpus, followers, num_units
from tests.processes import assert_gone, killed

NUM_UNITS = 9  # of `job`


def test_vllm_in_both_pools_makes_the_rows_that_torch_makes_and_leaves_no_process(
    command_line: CommandLine, lone_command_line: CommandLine, prompts: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Greedy in float32: two candidates a prompt, each rewritten. Every field of a row, but what its decoding took."""
    job = [
        f"input.path={prompts}", "input.id_column=id", *tiny_pool("policy", tiny_llama), "policy.temperature=0",
        "policy.num_candidates=2", *tiny_pool("aligner", tiny_llama), "aligner.recipe=rewrite", "run.unit_rows=4",
    ]  # fmt: skip
    by_torch = lone_command_line.start(*job, f"output.root={tmp_path / 'torch'}")
    vllm = [f"{pool}.{value}" for pool in STAGES for value in ("engine=vllm", "num_gpus=0", "kv_cache_tokens=8192")]
    running = command_line.start(*job, *vllm, f"output.root={tmp_path / 'vllm'}")

    def family(pool: str) -> list[psutil.Process]:
        """The pool's actor, its engine, what watches that, vLLM's core and its worker; [] while one is missing."""
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for actor in running.actors(pool):
                found += [actor, *actor.children(recursive=True)]
        return found if len(found) >= 5 else []

    families = [running.until(lambda pool=pool: family(pool), f"the {pool}'s engine was whole") for pool in STAGES]
    running.until(lambda: num_units(tmp_path / "vllm"), "the first unit was committed")
    families += [family(pool) for pool in STAGES]
    running.wait().expect(0)
    assert_gone([process for family in families for process in family])
    by_torch.wait().expect(0)

    rows = corpus(tmp_path / "vllm")
    assert rows == corpus(tmp_path / "torch")
    assert [len(row["aligned"]) for row in rows] == [2] * 36
    assert len({row["aligned"][0]["text"] for row in rows}) > 30


@pytest.mark.long
def test_a_tensor_parallel_aligner_says_what_one_process_says_though_a_rank_is_killed(
    ray_head: RayHead, command_line: CommandLine, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    shards = ["aligner.tensor_parallel_size=2", "aligner.num_gpus=2"]
    running = command_line.start(*job, f"output.root={tmp_path}", *shards)
    running.until(lambda: num_units(tmp_path), "the first unit was committed")
    raylet = psutil.Process(ray_head.raylet)
    (rank,) = followers(raylet)
    (actor,) = running.actors("aligner")
    assert killed(rank)
    assert num_units(tmp_path) < NUM_UNITS, "it was over before the rank died"
    running.until(lambda: set(followers(raylet)) - {rank}, "rank 0 had another beside it again")
    assert running.actors("aligner") == [actor]
    running.wait().expect(0)
    assert corpus(tmp_path) == reference.rows
