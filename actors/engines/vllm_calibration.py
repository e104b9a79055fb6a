"""Whether drafts pay inside vLLM here: what a step costs with a proposer and without, measured once and kept."""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import math
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from actors.cache import cache_folder
from actors.contract import ConfigError
from actors.engines.vllm_drafts import DraftFolder, numbered

VERSION = 5
"""Counted up when the same machine comes to be measured otherwise: what was kept before is then measured anew."""
LEAST_WITHOUT = 0.97
"""Drafts are out where poor ones would leave less than this of the tokens per second: they may cost 5 % in all."""
LEAST_WITH = 1.1
"""Drafts are out where even right ones would not make the tokens per second this many times as many."""
FAILED_FOR_S = 3600.0
"""How long a failure is kept: for the engines that start beside it or after a death, but not for the next night."""
PROMPT_TOKENS = 129
"""One more than whole cache blocks, of 16 to 128 tokens: those alone are kept, and the last token is run again."""
STEPS = 8
SWEEPS = 4
FALLEN = 0.5
"""Share of the most tokens per second, below which more positions are not looked at."""

Start = Callable[[int], AsyncLLM]
"""Starts vLLM with a proposer of at most so many guesses, or without one for 0."""


class Impossible(ValueError):
    """What is said to have been measured cannot have been."""


@dataclass(frozen=True)
class Calibration:
    """Seconds of a step in which every request of a full engine gets a token.

    Attributes:
        num_requests: `max_num_seqs`.
        plain_s: without a proposer.
        drafting: with one, by the number of requests, one and all of them, and of positions; the fewest make no guess.
    """

    num_requests: int
    plain_s: float
    drafting: Mapping[int, Mapping[int, float]]

    def __post_init__(self) -> None:
        """Raises Impossible."""
        for num, curve in self.drafting.items():
            if min(curve) != num or list(curve) != sorted(curve):
                raise Impossible(f"positions {list(curve)} of {num} requests")
            if not all(0 < seconds < math.inf for seconds in (self.plain_s, *curve.values())):
                raise Impossible(f"seconds {self.plain_s}, {curve}")
        if self.num_requests not in self.drafting:
            raise Impossible(f"nothing of {self.num_requests} requests")

    @property
    def without(self) -> float:
        """Tokens per second of a drafting engine that makes no guess, as a share of the plain engine's."""
        return self.plain_s / self.drafting[self.num_requests][self.num_requests]

    @property
    def most(self) -> float:
        """The same where all guesses are right and as many as are best."""
        curve = self.drafting[self.num_requests]
        return max(self.plain_s / seconds * positions / self.num_requests for positions, seconds in curve.items())

    @property
    def pays(self) -> bool:
        return self.without >= LEAST_WITHOUT and self.most >= LEAST_WITH

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests make {self.num_requests / self.plain_s:.0f} tokens/s, with a proposer "
            f"{self.without:.2f}x by poor drafts and up to {self.most:.2f}x by right ones"
        )


def processor() -> str:
    """The CPU's own name, as far as the system tells it: two of one architecture differ by more than drafts gain."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


class NotMeasured(Exception):
    """vLLM did not start with a proposer, or not at all, and how long that is kept: one line."""


def calibrated(key: dict[str, Any], measure: Callable[[], Calibration]) -> Calibration:
    """The calibration of what `key` says in full: the kept one, or else a new one, which is told and kept.

    Of several processes of a node that want one, the first measures it, while the others wait.

    Raises NotMeasured where `measure` raises ConfigError, RuntimeError, OSError (no memory left for drafts) or
    Impossible, and FAILED_FOR_S seconds long.
    """
    key = json.loads(json.dumps(key | {"version": VERSION}, default=str))  # as it is read again
    folder = cache_folder() / "calibration"
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # where nothing can be kept, it is measured each time
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
            kept = json.loads(path.read_text())
            if kept.pop("key") == key:
                if "failure" not in kept:
                    return Calibration(**kept | {"drafting": numbered(kept["drafting"])})
                if 0 <= time.time() - float(kept["failed_at"]) < FAILED_FOR_S:
                    raise NotMeasured(_kept_failure(str(kept["failure"]), path))
        try:
            found = measure()
        except (ConfigError, RuntimeError, OSError, Impossible) as error:
            (failure, *_) = str(error).splitlines() or [type(error).__name__]
            _keep(path, {"key": key, "failure": failure, "failed_at": time.time()})
            raise NotMeasured(_kept_failure(failure, path)) from error
        print(f"decoder auto: {found}; {'drafts' if found.pays else 'no drafts'} ({path})", file=sys.stderr, flush=True)
        _keep(path, {"key": key, **asdict(found)})
    return found


def _kept_failure(failure: str, path: Path) -> str:
    return f"{failure[:400]} (tried again after {FAILED_FOR_S / 60:g} minutes, or once {path} is removed)"


def _keep(path: Path, values: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        hidden = path.with_suffix(".part")
        hidden.write_text(json.dumps(values, indent=1))
        hidden.rename(path)


def measure(start: Start, *, num_requests: int, max_guesses: int, max_model_len: int, num_words: int) -> Calibration:
    """Start vLLM three times, for some seconds each: without a proposer, with one whose guesses are all wrong, without.

    Plain vLLM is measured on both sides, or else a drift of the machine's pace would seem to be the proposer's.

    Guesses that are wrong cost a step what right ones do. The positions rise until tokens per second are FALLEN of the
    most there were, even if all guesses were right: a step of two positions may be slower than one of four.
    """
    generator = np.random.default_rng(0)
    length = max(1, min(PROMPT_TOKENS, max_model_len - STEPS - max_guesses - 2))
    prompts = generator.integers(0, num_words, (num_requests, length)).tolist()
    drafts = generator.integers(0, num_words, (num_requests, STEPS + max_guesses + 2)).tolist()
    numbers = sorted({min(2**n - 1, max_guesses) for n in range(max_guesses.bit_length() + 1)})

    def curves(most: int, counts: list[int], numbers: list[int], **how: Any) -> dict[int, dict[int, float]]:
        llm = start(most)
        try:
            return asyncio.run(_step_costs(partial(_elapsed, llm, prompts, **how), counts=counts, numbers=numbers))
        finally:
            llm.shutdown(timeout=1)

    def plain_s() -> float:
        return curves(0, [num_requests], [0])[num_requests][num_requests]

    before_s = plain_s()
    with contextlib.closing(DraftFolder(None)) as folder:
        drafting = curves(max_guesses, sorted({1, num_requests}), numbers, drafts=drafts, folder=folder)
    return Calibration(num_requests, (before_s + plain_s()) / 2, drafting)


async def _step_costs(
    elapsed: Callable[..., Awaitable[float]], *, counts: Sequence[int], numbers: Sequence[int]
) -> dict[int, dict[int, float]]:
    """Seconds of a step with so many requests, by its positions, which are as many guesses at each request allow.

    It is what STEPS more steps take, each side the least of SWEEPS over all shapes: what else the machine does only
    ever makes one slower, and a minute of it does not fall on the same shape each time.
    """
    shorts: defaultdict[tuple[int, int], float] = defaultdict(lambda: math.inf)
    longs: defaultdict[tuple[int, int], float] = defaultdict(lambda: math.inf)
    found: dict[int, dict[int, float]] = {count: {} for count in counts}
    await elapsed(max(counts), 0, 2)  # reads the prompts, which are cached from now on
    for _ in range(SWEEPS):
        for count in counts:
            most = 0.0
            for num in numbers:
                shape, positions = (count, num), count * (1 + num)
                shorts[shape] = min(shorts[shape], await elapsed(*shape, 1))
                longs[shape] = min(longs[shape], await elapsed(*shape, 1 + STEPS))
                found[count][positions] = (longs[shape] - shorts[shape]) / STEPS
                pace = positions / found[count][positions]
                most = max(most, pace)
                if pace < FALLEN * most:
                    break
    return found


async def _elapsed(
    llm: AsyncLLM,
    prompts: Sequence[list[int]],
    count: int,
    num_guesses: int,
    max_tokens: int,
    *,
    drafts: Sequence[list[int]] = (),
    folder: DraftFolder | None = None,
) -> float:
    """Seconds in which the first `count` prompts get so many tokens each, with so many wrong guesses in each step."""

    async def make(number: int) -> None:
        how = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        with contextlib.ExitStack() as held:
            outcome = None
            if folder is not None:
                draft = folder.holding(prompts[number], drafts[number], max_tokens=1 << 20, max_guesses=num_guesses)
                outcome = held.enter_context(draft)
            async for _ in llm.generate(tokens_input(prompts[number]), how, f"{number} {time.monotonic_ns()}"):
                pass
            if outcome and max_tokens > 1 and outcome.counts(max_tokens)[0] is None:
                raise Impossible("the proposer saw no guesses: what steps cost with some is not known")

    begin = time.perf_counter()
    await asyncio.gather(*map(make, range(count)))
    return time.perf_counter() - begin
