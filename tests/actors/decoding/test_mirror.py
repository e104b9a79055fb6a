"""What the first rank tells is all that another needs to hold the same cache."""

import pickle

import pytest
import torch
from transformers import PreTrainedModel

from actors.decoding.forward import Forward, SlotCache
from actors.decoding.loop import DecodeLoop, Row
from actors.decoding.mirror import Command, MirroredCache, MirroredForward, obey


@pytest.fixture(scope="module")
def told(llama: PreTrainedModel) -> tuple[MirroredForward, list[Command]]:
    """A first rank that has decoded rows which came, shared prompts, guessed, were cancelled, ended; what it told."""
    sent: list[bytes] = []
    forward = MirroredForward(llama, lambda command: sent.append(pickle.dumps(command)))
    loop = DecodeLoop(forward, str, eos=[2], block_size=6, max_num_seqs=5, kv_cache_tokens=1 << 16)
    drafts = [None, [], list(range(10, 30))] * 8
    rows = [
        Row((3, *range(10, 10 + 7 * (i % 6))), max_tokens=4 + 9 * (i % 7), seed=i, draft=draft)
        for i, draft in enumerate(drafts)
    ]
    for row in rows:
        loop.submit(row)
    for _ in range(6):
        loop.step()
    loop.cancel(loop.active[0])
    loop.submit(Row(tuple(range(3, 200)), max_tokens=5, seed=99))
    while loop.busy:
        loop.step()
    commands = [pickle.loads(data) for data in sent]
    assert {command[0] for command in commands} == {"forward", "resize", "copy"}
    assert sum(command[0] == "resize" for command in commands) > 1
    return forward, commands


def follows(llama: PreTrainedModel, commands: list[Command], leader: Forward) -> bool:
    """Whether a rank that obeys `commands` ends up with the leader's cache, to the bit."""
    forward = Forward(llama)
    try:
        for command in commands:
            obey(forward, command)
    except (IndexError, RuntimeError):  # a cache too small for what comes next
        return False
    ours, theirs = ([*cache.keys, *cache.values] for cache in (forward.cache, leader.cache))
    return all(map(torch.equal, ours, theirs))


def test_a_rank_that_obeys_holds_the_same_cache(
    llama: PreTrainedModel, told: tuple[MirroredForward, list[Command]]
) -> None:
    leader, commands = told
    assert leader.cache.keys[0].any()
    assert follows(llama, commands, leader)


@pytest.mark.parametrize("kind", ["forward", "resize", "copy"])
def test_a_rank_that_skips_one_command_does_not(
    llama: PreTrainedModel, told: tuple[MirroredForward, list[Command]], kind: str
) -> None:
    leader, commands = told
    last = max(i for i, command in enumerate(commands) if command[0] == kind)
    assert not follows(llama, commands[:last] + commands[last + 1 :], leader)


def test_nothing_is_done_to_a_cache_that_is_not_told() -> None:
    inside_a_forward = {"aim", "update"}
    public = {name for name in vars(SlotCache) if not name.startswith("_")} - inside_a_forward
    assert public == {name for name in vars(MirroredCache) if not name.startswith("_")}


def test_a_command_that_is_not_known_is_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no rank can shrink"):
        obey(Forward(llama), ("shrink", 1))
