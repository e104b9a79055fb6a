"""Whatever stands in a config, the job gets one that is whole, or says in one line what is wrong with it."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.contract import ConfigError
from pipelines.config import compose
from pipelines.reference import walk
from pipelines.settings import AlignCorpusConfig

SET = ["policy=stored", "aligner=identity", "input.path=in", "output.root=out", "input.response_column=r"]
KEYS = sorted({entry.key for entry in walk(AlignCorpusConfig)})
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["${input.path}", "${oc.env:HOME}", "${", "???", "../../etc", "/", "s3://", "s3://k:s@b/x"])
)  # fmt: skip
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def composed(argv: list[str]) -> None:
    try:
        config, _ = compose(AlignCorpusConfig, argv, prog="p", description="d", groups=("policy", "aligner", "site"))
        assert isinstance(config, AlignCorpusConfig)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 5000


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_any_value_of_any_key_on_the_command_line(changes: list[tuple[str, object]]) -> None:
    composed([*SET, *(f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in changes)])


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_any_value_of_any_key_in_a_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, object]]
) -> None:
    tree: dict[str, object] = {}
    for key, value in changes:
        section, _, name = key.partition(".")
        if name:
            found = tree.setdefault(section, {})
            if isinstance(found, dict):
                found[name] = value
        else:
            tree[key] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(tree))
    composed(["--config", str(path), *SET])


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200) | st.text("{}[]:,&*!|>%@`'\"#-? \n\tab", max_size=60).map(str.encode))
def test_any_bytes_as_a_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(data)
    composed(["--config", str(path), *SET])
