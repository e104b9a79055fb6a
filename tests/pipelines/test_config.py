"""What a command line becomes: precedence, group files, types, and one clear line for every mistake."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import MISSING, OmegaConf

from actors.contract import ConfigError, option
from pipelines import config as module
from pipelines.config import Flags, changes_rows, compose, resolved
from pipelines.reference import reference_yaml


@dataclass(frozen=True)
class Model:
    model: str = option(MISSING, "folder or hub id", changes_rows=True)
    temperature: float = option(0.0, "of sampling", changes_rows=True)
    top_k: int | None = option(None, "most likely tokens; null: all", changes_rows=True)
    stop: list[str] = option([], "strings that end an answer", changes_rows=True)
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of weights", changes_rows=True)
    batch: int = option(32, "rows at a time")
    weights: dict[str, float] = option({}, "of each rule")

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 or more, got {self.temperature}")


@dataclass(frozen=True)
class Aligner(Model):
    template: str | None = option(None, "text of the request", changes_rows=True)


@dataclass(frozen=True)
class Keep:
    runs: int = option(3, "runs to keep")


@dataclass(frozen=True)
class Site:
    storage: dict[str, Any] = option({"retries": 2}, "options of the file system")
    progress: bool = option(
        True, "show progress, which is a help line that is long enough to be set above its key here"
    )
    keep: Keep = option(Keep(), "what is kept")


@dataclass(frozen=True)
class Job:
    input: str = option(MISSING, "Parquet folder to read")
    seed: int = option(0, "of the run", changes_rows=True)
    policy: Model | None = option(None, "answers prompts")
    policies: list[Model] = option([], "several policies")
    aligner: Aligner = option(Aligner(), "rewrites answers")
    site: Site = option(Site(), "where the job runs")


SET = ["input=in", "aligner.model=a"]


@pytest.fixture(autouse=True)
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "conf"
    for name, text in {
        "policy/small.yaml": "model: small\ntemperature: 0.5\n",
        "policy/big.yaml": "model: big\nbatch: 8\n",
        "policy/broken.yaml": "model: big\nbatsh: 8\n",
        "site/local.yaml": "progress: false\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "CONF", folder)
    return folder


def make(*argv: str, text: str | None = None, tmp: Path | None = None) -> tuple[Job, Flags]:
    arguments = list(argv)
    if text is not None and tmp is not None:
        (tmp / "job.yaml").write_text(text, encoding="utf-8")
        arguments += ["--config", str(tmp / "job.yaml")]
    return compose(Job, arguments, prog="x.py", description="A job.", groups=("policy", "aligner", "site"))


def refusal(*argv: str, text: str | None = None, tmp: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        make(*SET, *argv, text=text, tmp=tmp)
    message = str(error.value)
    assert message == " ".join(message.splitlines())
    return message


# --- layers ---------------------------------------------------------------------------------------------------------


def test_defaults_and_flags() -> None:
    config, flags = make(*SET, "--dry-run", "--limit", "7")
    assert config == Job(input="in", aligner=Aligner(model="a"))
    assert flags == Flags(dry_run=True, limit=7)
    assert make(*SET, "--limit=7")[1] == Flags(dry_run=False, limit=7)


def test_file_beats_group_and_override_beats_file(tmp_path: Path) -> None:
    text = "policy: {preset: small, top_k: 5, batch: 16}"
    config, _ = make(*SET, "policy.batch=4", text=text, tmp=tmp_path)
    assert config.policy == Model(model="small", temperature=0.5, top_k=5, batch=4)


def test_group_on_the_command_line_beats_the_files_choice_but_not_its_own_keys(tmp_path: Path) -> None:
    config, _ = make(*SET, "policy=big", text="policy: {preset: small, top_k: 5}", tmp=tmp_path)
    assert config.policy == Model(model="big", top_k=5, batch=8)
    assert make(*SET, "policy=big", text="policy: small", tmp=tmp_path)[0].policy == Model(model="big", batch=8)
    assert make(*SET, "policy=big", text="policy: null", tmp=tmp_path)[0].policy == Model(model="big", batch=8)


def test_position_of_a_group_among_overrides_does_not_matter() -> None:
    before, after = make(*SET, "policy=small", "policy.batch=1"), make(*SET, "policy.batch=1", "policy=small")
    assert before == after
    assert before[0].policy == Model(model="small", temperature=0.5, batch=1)


def test_presets_in_lists(tmp_path: Path) -> None:
    text = "policies: [small, {preset: big, temperature: 1}, {model: c}]"
    config, _ = make(*SET, "policies.0.batch=1", text=text, tmp=tmp_path)
    assert config.policies == [
        Model(model="small", temperature=0.5, batch=1),
        Model(model="big", temperature=1.0, batch=8),
        Model(model="c"),
    ]
    assert make(*SET, "policies=[big]", text=text, tmp=tmp_path)[0].policies == [Model(model="big", batch=8)]
    assert make(*SET, "policies=[big, big]", "policies.1=small")[0].policies[1] == Model("small", 0.5)


def test_group_by_path(conf: Path) -> None:
    path = conf / "policy" / "small.yaml"
    assert make(*SET, f"policy={path}")[0] == make(*SET, "policy=small")[0]


def test_an_optional_section_is_made_by_its_keys_and_dropped_by_null(tmp_path: Path) -> None:
    assert make(*SET, "policy.model=m")[0].policy == Model(model="m")
    assert make(*SET, "policy=null", text="policy: {model: m}", tmp=tmp_path)[0].policy is None


def test_mappings_merge_and_lists_replace(tmp_path: Path) -> None:
    text = "site: {storage: {region: north}}\naligner: {stop: [a, b]}"
    config, _ = make(*SET, "site.storage.retries=5", "aligner.stop=[c]", text=text, tmp=tmp_path)
    assert config.site.storage == {"retries": 5, "region": "north"}
    assert config.aligner.stop == ["c"]


@pytest.mark.parametrize(
    ("arguments", "text", "weights"),
    [
        (["policy.weights={mine:brevity: 1}"], "", {"mine:brevity": 1.0}),
        ([], "policy: {preset: weighed, weights: {mine:brevity: 1}}", {"mine:brevity": 1.0}),
        (["policy.weights={a: 1}"], "policy: {weights: {b: 1}}", {"a": 1.0}),
        (["policy.weights.length=2"], "", {"length": 2.0, "format": 0.5}),
    ],
)
def test_weights_replace_those_of_the_layer_below_unless_one_is_named_alone(
    arguments: list[str], text: str, weights: dict[str, float], tmp_path: Path, conf: Path
) -> None:
    (conf / "policy/weighed.yaml").write_text("model: m\nweights: {length: 0.5, format: 0.5}\n")
    preset = [] if "preset" in text else ["policy=weighed"]
    config, _ = make(*SET, *preset, *arguments, text=text, tmp=tmp_path)
    assert config.policy is not None and config.policy.weights == weights


def test_unset_marks_in_a_copied_reference_hide_no_preset(tmp_path: Path) -> None:
    text = reference_yaml(Job).replace("policy: null", "policy:").replace("  # model: ???", "  model: ???")
    assert make(*SET, "policy=small", text=text, tmp=tmp_path)[0].policy == Model("small", 0.5)


def test_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_TEST_BATCH", "9")
    config, _ = make(*SET, "seed=5", "aligner.top_k=${seed}", "aligner.batch=${oc.env:BURNISH_TEST_BATCH}")
    assert (config.aligner.top_k, config.aligner.batch) == (5, 9)
    assert make(*SET, r"aligner.template=\${x}")[0].aligner.template == "${x}"
    assert "NO_SUCH" in refusal("seed=${oc.env:NO_SUCH}")
    assert "seed expects an integer, got 'in'" in refusal("seed=${input}")
    assert "Recursive" in refusal("seed=${seed}")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["0123", "1e5", "a # b", "a: {{ b }}", "two\nlines", "[x", "12:30", "yes", "a=b", "'", " padded "]
)
def test_text_on_the_command_line_is_taken_as_written(text: str) -> None:
    assert make(*SET, f"aligner.template={text}")[0].aligner.template == text


def test_text_can_be_null_or_quoted() -> None:
    assert make(*SET, "aligner.template=null")[0].aligner.template is None
    assert make(*SET, "aligner.template='null'")[0].aligner.template == "null"
    assert "aligner.model expects text, got null" in refusal("aligner.model=null")


def test_numbers() -> None:
    config, _ = make(*SET, "aligner.temperature=1", "aligner.top_k=null", "site.progress=no")
    assert repr(config.aligner.temperature) == "1.0"
    assert config.aligner.top_k is None
    assert config.site.progress is False


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("seed=abc", "seed expects an integer, got 'abc'"),
        ("seed=1.5", "seed expects an integer, got 1.5"),
        ("seed=true", "seed expects an integer, got true"),
        ("seed=null", "seed expects an integer, got null"),
        ("aligner.temperature=.nan", "aligner.temperature expects a number, got nan"),
        ("aligner.temperature=[1]", "aligner.temperature expects a number, got [1]"),
        ("aligner.top_k=x", "aligner.top_k expects an integer or null, got 'x'"),
        ("aligner.dtype=int8", "aligner.dtype expects one of bfloat16, float32, got 'int8'"),
        ("aligner.stop=a", "aligner.stop expects a list, each element text, got 'a': write [a]"),
        ("aligner.stop=a, b c", "got 'a, b c': write [a, \"b c\"]"),
        ("policies=big", "policies expects a list, each element a mapping, got 'big': write [big]"),
        ("aligner.weights={a:b:1.0}", "aligner.weights: 'a:b:1.0' lacks a space after its last colon: 'a:b: 1.0'"),
        ("aligner.stop=[a, [b]]", "aligner.stop.1 expects text, got ['b']"),
        ("site.progress=2", "site.progress expects true or false, got 2"),
        ("site.storage=3", "site.storage expects a mapping, got 3"),
        ("policies=[{model: a}, {model: b, top_k: x}]", "policies.1.top_k expects an integer or null, got 'x'"),
        ("aligner=null", "aligner expects a mapping or the name of a preset, got null"),
        ("policies.0.model=x", "there is no policies.0: policies has 0 elements"),
        ("seed=[1", "not YAML"),
    ],
)
def test_a_wrong_value_names_argument_key_type_and_value(argument: str, told: str) -> None:
    message = refusal(argument)
    assert message.startswith(f"argument {argument!r}: ")
    assert told in message


def test_a_number_for_text_in_a_file_is_refused_because_yaml_has_changed_it(tmp_path: Path) -> None:
    message = refusal(text="policy:\n  model: 0123\n", tmp=tmp_path)
    assert message.endswith("job.yaml: policy.model expects text in quotes, got 83")


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("aligner.temperature=-1", "aligner.temperature must be 0 or more, got -1.0"),
        ("policies=[small, {model: b, temperature: -1}]", "policies.1.temperature must be 0 or more, got -1.0"),
    ],
)
def test_a_sections_own_check_is_told_with_the_sections_name(argument: str, told: str) -> None:
    assert refusal(argument) == told


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("aligner.temprature=1", "unknown key 'aligner.temprature'; did you mean aligner.temperature"),
        ("template=x", "unknown key 'template'; did you mean aligner.template?"),
        ("polcy=small", "unknown key 'polcy'; did you mean policy?"),
        ("seed.x=1", "unknown key 'seed.x'; did you mean seed?"),
        ("policies=[{model: a, tempratur: 1}]", "unknown key 'policies.0.tempratur'; did you mean policies.0.temp"),
        ("zzzzzzzz=1", "unknown key 'zzzzzzzz'; see --help"),
        ("=1", "unknown key ''"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(argument: str, told: str) -> None:
    assert refusal(argument).startswith(f"argument {argument!r}: {told}")


def test_an_unknown_key_in_a_file_is_told_with_the_file(tmp_path: Path, conf: Path) -> None:
    assert refusal(text="aligner: {bach: 1}", tmp=tmp_path).startswith(f"{tmp_path / 'job.yaml'}: unknown key")
    assert refusal("policy=broken") == (f"{conf / 'policy' / 'broken.yaml'}: unknown key 'batsh'; did you mean batch?")
    assert "nest it" in refusal(text="aligner.batch: 1", tmp=tmp_path)


@pytest.mark.parametrize("argument", ["policy=smal", "policies=[smal]", "policy={preset: smal}"])
def test_an_unknown_preset_is_told_with_those_there_are(argument: str) -> None:
    message = refusal(argument)
    assert "no preset 'smal'; did you mean small? there are: big, broken, small" in message


def test_required_keys_are_told_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        make("policies=[small, {batch: 1}]")
    assert str(error.value) == (
        "required but not set: input (Parquet folder to read); policies.1.model (folder or hub id); "
        "aligner.model (folder or hub id). Example: input=TEXT policies.1.model=TEXT aligner.model=TEXT"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dry-run"], "argument 'dry-run' is neither a flag nor key=value; did you mean --dry-run?"),
        (["--dryrun"], "unknown flag '--dryrun'; did you mean --dry-run?"),
        (["--seed=1"], "unknown flag '--seed'; overrides have no dashes: 'seed=1'"),
        (["--limit", "0"], "--limit expects a number of rows, 1 or more, got '0'"),
        (["--limit"], "--limit needs a value: --limit N"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["--config", "no/such.yaml"], "cannot read 'no/such.yaml': No such file or directory"),
    ],
)
def test_wrong_flags(arguments: list[str], told: str) -> None:
    assert refusal(*arguments) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\naligner: [1\n", "job.yaml, line 3: not YAML"),
        ("seed: 1\nseed: 2\n", "job.yaml, line 2: not YAML: found duplicate key seed"),
        ("- seed\n", "job.yaml: expects keys with values, got ['seed']"),
    ],
)
def test_bad_yaml_is_told_with_file_and_line(text: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(text=text, tmp=tmp_path)


KEYS = [
    "seed",
    "policy",
    "policies",
    "policies.0",
    "policies.0.stop",
    "aligner.model",
    "aligner.stop.0",
    "site.storage",
]
VALUES = (
    st.text(max_size=12) | st.text("[]{}:,'\"&*!#?$~-. \n0123az", max_size=12) | st.sampled_from(["small", "[small]"])
)


@settings(max_examples=300)
@given(st.lists(st.text(max_size=15) | st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(max_size=5), VALUES)))
def test_any_command_line_gives_a_config_or_one_line(argv: list[str]) -> None:
    try:
        config, _ = make(*SET, *argv)
        assert isinstance(config, Job)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    except SystemExit as stop:
        assert {"-h", "--help"} & set(argv) and stop.code == 0


# --- telling --------------------------------------------------------------------------------------------------------


def keys_of(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of every value that is not a section."""
    keys = []
    for name, value in tree.items():
        nested = isinstance(value, dict) and name != "storage"
        keys += keys_of(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return keys


def test_help_holds_every_key_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    keys = keys_of(resolved(make(*SET, "policy=small")[0]))
    assert len(keys) == 19
    listed = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert set(keys) <= listed
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "of weights (one of bfloat16, float32; default bfloat16)" in text
    assert "Parquet folder to read (text; required)" in text
    assert text.splitlines()[-3].split() == ["policy", "big,", "broken,", "small"]


def test_reference_holds_exactly_the_defaults(tmp_path: Path) -> None:
    text = reference_yaml(Job)
    assert OmegaConf.to_container(OmegaConf.create(text)) == OmegaConf.to_container(OmegaConf.structured(Job))
    assert "python -m pipelines.reference" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert all("#" in line for line in text.splitlines() if line and not line.startswith("  progress:"))
    assert make(*SET, text=text, tmp=tmp_path)[0] == make(*SET)[0]


def test_reference_is_printed_by_the_module() -> None:
    root = Path(module.__file__).parents[1]
    command = [sys.executable, "-m", "pipelines.reference", "actors.recipes:RecipeConfig"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "\n#   python -m pipelines.reference actors.recipes:RecipeConfig\n" in done.stdout
    assert set(OmegaConf.create(done.stdout)) == {"recipe", "template", "aspects"}


def test_changes_rows_is_flat_sorted_and_plain() -> None:
    rows = changes_rows(make(*SET, "policies=[small, big]", "aligner.stop=[x]")[0])
    names = ["dtype", "model", "stop", "temperature", "top_k"]
    assert list(rows) == [
        *(f"aligner.{name}" for name in sorted([*names, "template"])),
        *(f"policies.{index}.{name}" for index in (0, 1) for name in names),
        "seed",
    ]
    assert rows["policies.1.model"] == "big"
    assert json.loads(json.dumps(rows)) == rows


def test_resolved_can_be_given_back_as_a_file(tmp_path: Path) -> None:
    config, _ = make(*SET, "policy=small", "policies=[big]", "aligner.template=a: b")
    assert make(text=json.dumps(resolved(config)), tmp=tmp_path)[0] == config
