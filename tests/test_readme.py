"""The README's code runs, its keys exist, and its links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.config import compose
from pipelines.corpus.publish import OutputConfig, publish
from pipelines.corpus.storage import Storage
from pipelines.preferences.exporters import EXPORTERS
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.reference import reference_yaml
from pipelines.settings import AlignCorpusConfig, ScoreCorpusConfig
from pipelines.training.aligner_settings import TrainAlignerConfig
from pipelines.training.reward_settings import TrainRewardConfig
from tests.pipelines.corpus.fabricate import commit_units, fake_shard

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_ways_to_read_a_corpus_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Storage(str(tmp_path / "out" / "sample"))
    commit_units(output, fake_shard())
    publish(output, OutputConfig(root=output.url))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert len(blocks("python")) == 2
    num_rows = []
    for code in blocks("python"):
        names: dict[str, object] = {}
        exec(code, names)
        found = names["table"] if "table" in names else names["rows"]
        num_rows.append(len(found))  # type: ignore[arg-type]
    assert num_rows == [12, 12]


def test_every_key_in_the_readme_exists() -> None:
    schemas = (AlignCorpusConfig, BuildPreferencesConfig, TrainAlignerConfig, TrainRewardConfig)
    known = set().union(*(_dotted(reference_yaml(schema)) for schema in schemas))
    sections = "input|output|policy|aligner|build|prompts|training|evaluation|run|site"
    named = set(re.findall(rf"\b((?:{sections})\.\w+)", README))
    assert named - known - {"policy.py", "aligner.py", "training.json"} == set()
    assert len(named) > 10


Config = AlignCorpusConfig | ScoreCorpusConfig | BuildPreferencesConfig | TrainAlignerConfig | TrainRewardConfig
JOBS: dict[str, tuple[type[Config], tuple[str, ...]]] = {
    "align_corpus.py": (AlignCorpusConfig, ("policy", "aligner", "reward", "site")),
    "score_corpus.py": (ScoreCorpusConfig, ("reward", "site")),
    "build_preferences.py": (BuildPreferencesConfig, ("build", "site")),
    "train_aligner.py": (TrainAlignerConfig, ("reward", "site")),
    "train_reward.py": (TrainRewardConfig, ("site",)),
}


def commands() -> list[tuple[str, list[str]]]:
    """Script and arguments of every command of the README that runs a job."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [(job, line.partition(job)[2]) for line in lines for job in JOBS if job in line]
    return [(job, shlex.split(rest.partition(">>")[0])) for job, rest in found]


@pytest.mark.parametrize(("job", "arguments"), commands())
def test_every_command_is_a_config(job: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    schema, groups = JOBS[job]
    config, _ = compose(schema, arguments, prog=job, description="", groups=groups)
    assert config.output.root
    assert {job for job, _ in commands()} == JOBS.keys()


def test_the_night_is_added_to_what_cron_does_already(tmp_path: Path) -> None:
    crontab = tmp_path / "crontab"
    crontab.write_text('#!/bin/sh\nif [ "$1" = -l ]; then echo "5 4 * * * true"; else cat > "$0.new"; fi\n')
    crontab.chmod(0o755)
    (command,) = [block for block in blocks("bash") if "crontab" in block]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", command], cwd=ROOT, env={"PATH": path}, check=True, timeout=10)
    before, line = (tmp_path / "crontab.new").read_text().splitlines()
    assert before == "5 4 * * * true"
    *when, does = line.split(maxsplit=5)
    assert when == ["0", "1", "*", "*", "*"]
    assert does.startswith(f"cd {ROOT} && .venv/bin/python pipelines/align_corpus.py policy=vllm ")
    assert "%" not in does, "which to cron is the end of the line"
    assert shlex.split(does)[5:-3] in [arguments for _, arguments in commands()]


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_exporters_take_the_strategies_that_the_table_says() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`\w+` ?)+) \|$", README, re.MULTILINE)
    told = {name: set(re.findall(r"\w+", takes)) for names, takes in rows for name in re.findall(r"\w+", names)}
    assert told == {name: exporter.strategies for name, exporter in EXPORTERS.items()}


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)`|\$ make ([\w-]+)", README)):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
    assert shutil.which("make")


def _dotted(text: str) -> set[str]:
    import yaml

    loaded = yaml.safe_load(text.replace("???", "null"))
    return {f"{section}.{key}" for section, keys in loaded.items() if isinstance(keys, dict) for key in keys}
