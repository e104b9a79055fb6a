"""What must not change the corpus does not: pools, batches, units, the order of writing, and how often it is run."""

import asyncio
import itertools
import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.decoding.loop
import actors.policy
import actors.pool
from actors.aligner import AlignerStage
from actors.contract import unpack
from actors.engines.torch_engine import TorchEngine
from actors.policy import PolicyStage
from pipelines.config import compose
from pipelines.corpus import plan as planning
from pipelines.corpus.attempts import Attempts
from pipelines.corpus.plan import make_plan
from pipelines.corpus.read import read_spans
from pipelines.corpus.shards import Input
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.settings import AlignCorpusConfig, pin_models
from tests.end_to_end.conftest import RayHead, Reference, write_prompts
from tests.end_to_end.jobs import CommandLine, Row, by_place, corpus, manifests, plain_environment, promised

# The run differs from `reference` in all that may differ; `test_nothing_else...` below tells which of it mattered.
VARIED = [
    "run.unit_rows=5", "run.task_mib=0", "policy.num_gpus=1", "policy.units_in_flight=3", "policy.max_num_seqs=7",
    "aligner.num_gpus=1", "aligner.replicas=2", "aligner.max_num_seqs=2", "aligner.kv_cache_tokens=300",
]  # fmt: skip
LIMIT = 14
ONE_BY_ONE = [
    *VARIED, "policy.replicas=2", "policy.max_num_seqs=1", "aligner.units_in_flight=1", "policy.num_threads=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def varied(command_line: CommandLine, job: list[str], new_folder: Callable[[], Path]) -> Path:
    """The root of a run that is unlike the reference, its shards written in another order, after one on a few rows."""
    folder = new_folder()
    prompts = write_prompts(folder / "prompts", order=(2, 0, 1))
    arguments = [*job, f"input.path={prompts}", f"output.root={folder / 'output'}", *VARIED]
    command_line.run(*arguments, "run.unit_rows=3", f"--limit={LIMIT}").expect(0)
    command_line.run(*arguments).expect(0)
    return folder / "output"


def test_nothing_that_must_not_change_a_row_does(varied: Path, reference: Reference) -> None:
    assert corpus(varied) == reference.rows


def test_a_run_after_a_limited_one_makes_the_rest(varied: Path) -> None:
    limited, rest = (manifest["num_rows"] for manifest in manifests(varied))
    assert LIMIT <= limited < LIMIT + 3  # units are made whole
    assert rest == 36 - limited


@pytest.mark.long
@pytest.mark.parametrize("override", ONE_BY_ONE)
def test_nothing_else_than_the_rows_recipe_changes_a_row(
    override: str, command_line: CommandLine, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    command_line.run(*job, f"output.root={tmp_path}", override).expect(0)
    assert corpus(tmp_path) == reference.rows


@pytest.mark.long
def test_a_sampled_aligner_after_a_greedy_policy_is_as_invariant(
    command_line: CommandLine, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    swapped = [*job, "policy.temperature=0", "policy.num_candidates=1", "aligner.temperature=0.8", "aligner.top_p=0.9"]
    command_line.run(*swapped, f"output.root={tmp_path / 'one'}").expect(0)
    command_line.run(*swapped, f"output.root={tmp_path / 'other'}", *VARIED).expect(0)
    rows = corpus(tmp_path / "one")
    assert len({row["aligned"][0]["text"] for row in rows}) == len(rows)
    assert corpus(tmp_path / "other") == rows
    assert [row["responses"][0]["text"] for row in rows] != [row["responses"][0]["text"] for row in reference.rows]


@pytest.mark.usefixtures("varied")
def test_pools_with_gpus_are_given_them(ray_head: RayHead) -> None:
    token = Path(ray_head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{ray_head.dashboard}/api/v0/actors?detail=1&limit=10000")
    request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        found = json.load(answer)["data"]["result"]["result"]
    gpus = [
        actor["required_resources"]["GPU"]
        for actor in found
        if "Stage" in actor["class_name"] and "GPU" in actor["required_resources"]
    ]
    assert gpus.count(1.0) >= 3  # a policy replica and two aligners


def test_rows_differ_from_each_other(reference: Reference) -> None:
    """Else the comparisons above would compare nothing."""
    responses = [response["text"] for row in reference.rows for response in row["responses"]]
    aligned = [response["text"] for row in reference.rows for response in row["aligned"]]
    seeds = [response["seed"] for row in reference.rows for response in (*row["responses"], *row["aligned"])]
    assert len(reference.rows) == 36
    assert len(set(responses)) == len(set(aligned)) == 72
    assert len(set(seeds)) == 144
    assert {"stop", "length"} <= {each["finish_reason"] for row in reference.rows for each in row["responses"]}


# --- the same comparison finds what it is there to find ---------------------------------------------------------------


class Silent:
    """Stands for `actors.board.Reporter` where there is no board."""

    def __init__(self, *arguments: Any) -> None: ...

    def report(self) -> "Silent":
        return self

    def __await__(self) -> Iterator[None]:
        return iter(())


@dataclass(frozen=True)
class Cut:
    """One of the ways to run a job that must come to the same."""

    unit_rows: int
    max_num_seqs: int
    backwards: bool = False


CUTS = [Cut(4, 32), Cut(5, 3, backwards=True)]


@pytest.fixture
def rows_of(job: list[str], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Makes the rows of the first shard of `job` in this process, through the same plan, reader and stages: cut as the
    first argument says, with the others as overrides."""
    monkeypatch.setattr(actors.pool, "Reporter", Silent)
    monkeypatch.setattr(actors.pool, "units_before", lambda board, pool: ())
    monkeypatch.setattr(  # in this process, where a mutation reaches it
        actors.pool, "build_engine", lambda config, num_threads, *_: TorchEngine(config, num_threads)
    )

    def make(cut: Cut, *overrides: str) -> list[Row]:
        extra = [f"input.path={prompts / 'shard-0.parquet'}", f"output.root={tmp_path}"]
        extra += [f"run.unit_rows={cut.unit_rows}", f"policy.max_num_seqs={cut.max_num_seqs}"]
        config, _ = compose(AlignCorpusConfig, [*job, *extra, *overrides], prog="", description="")
        config = pin_models(config)
        source, output = Input(config.input.path), Storage(config.output.root)
        plan = make_plan(source, config.input, output, read_state(output), unit_rows=config.run.unit_rows)
        units = list(read_spans(source, config.input, list(plan.spans)))
        return by_place(asyncio.run(aligned(config, units[::-1] if cut.backwards else units)))

    return make


async def aligned(config: AlignCorpusConfig, units: list[Any]) -> list[Row]:
    notes = Attempts(Storage(config.output.root))
    shared = {"run_seed": config.run.seed, "board": None, "sharers": 2, "notes": notes, "max_attempts": 3}
    policy = PolicyStage(config=config.policy, name="policy", **shared)
    aligner = AlignerStage(config=config.aligner, name="aligner", **shared)
    rows: list[Row] = []
    for unit in units:
        async for answered in policy(unit):
            async for done in aligner(answered):
                rows.extend(unpack(done).to_pylist())
    for stage in (policy, aligner):
        stage._engine.close()
    names = ("prompt_id", "prompt", "responses", "aligned", "source", "topic")
    return [promised({**{name: row[name] for name in names}, "rewards": None}) for row in rows]


def test_stages_in_this_process_make_the_same_rows(rows_of: Callable[[Cut], list[Row]], reference: Reference) -> None:
    for cut in CUTS:
        assert rows_of(cut) == reference.rows[:12]


HUB_ID, COMMIT = "someone/tiny-llama", "c0ffee" + "0" * 34
FROM_HUB = [f"policy.model={HUB_ID}", f"aligner.model={HUB_ID}"]


@pytest.fixture
def hub_cache(tiny_llama: Path, tmp_path: Path) -> Path:
    """What a hub's cache holds once HUB_ID has been fetched: an older commit without a model, and `main`."""
    cache = tmp_path / "home" / "hub"
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(tiny_llama, repository / "snapshots" / COMMIT)
    (repository / "snapshots" / ("0" * 40)).mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return cache


def relabelled(rows: list[Row], model: str) -> list[Row]:
    """The rows, were this their models' name."""
    columns = ("responses", "aligned")
    return [{**row, **{name: [{**each, "model": model} for each in row[name]] for name in columns}} for row in rows]


def test_a_hub_id_makes_the_rows_of_its_folder(
    rows_of: Callable[..., list[Row]], hub_cache: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = rows_of(CUTS[0], *FROM_HUB)
    assert rows == relabelled(reference.rows[:12], HUB_ID)


@pytest.mark.long
def test_a_hub_id_does_the_same_job_as_its_folder(
    hub_cache: Path, job: list[str], reference: Reference, new_folder: Callable[[], Path], tmp_path: Path
) -> None:
    environment = {**plain_environment(), "HF_HOME": str(hub_cache.parent)}
    environment.pop("HF_HUB_CACHE", None)
    with CommandLine(environment, None, new_folder) as alone:  # the engines of the session's head look elsewhere
        alone.run(*job, *FROM_HUB, f"output.root={tmp_path / 'output'}").expect(0)
    assert corpus(tmp_path / "output") == relabelled(reference.rows, HUB_ID)
    made_of = json.loads((tmp_path / "output" / "runs" / "000001.json").read_bytes())["fingerprint"]
    assert made_of["policy.model"] == f"{HUB_ID} ({COMMIT})"


def seeds_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate's seed is its position in the unit."""
    columns = PolicyStage.columns
    counter = itertools.count()

    async def counted(self: PolicyStage, name: str, unit: Any) -> Any:
        nonlocal counter
        counter = itertools.count()
        return await columns(self, name, unit)

    monkeypatch.setattr(PolicyStage, "columns", counted)
    monkeypatch.setattr(actors.policy, "candidate_seed", lambda *_: next(counter))


def seeds_by_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate's seed says how many came before it."""
    counter = itertools.count()
    monkeypatch.setattr(actors.policy, "candidate_seed", lambda *_: next(counter))


def one_random_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates draw from one generator, one after the other, whatever their seeds."""
    stream = np.random.default_rng(0)
    monkeypatch.setattr(actors.decoding.loop, "uniforms", lambda seed, count: stream.random(count))


def rows_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan forgets the units that would not be full."""
    cut = planning.units.cut

    def full(start: int, stop: int, unit_rows: int) -> list[tuple[int, int]]:
        return [(first, last) for first, last in cut(start, stop, unit_rows) if last - first == unit_rows]

    monkeypatch.setattr(planning.units, "cut", full)


@pytest.mark.parametrize("mutate", [seeds_by_position, seeds_by_arrival, one_random_stream, rows_left_over])
def test_the_comparison_finds(
    mutate: Callable[[pytest.MonkeyPatch], None],
    rows_of: Callable[[Cut], list[Row]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    for cut in CUTS:
        with monkeypatch.context() as patch:
            mutate(patch)
            made.append(rows_of(cut))
    assert made[0] != made[1]
