"""Finding shards, telling their versions apart, and refusing those of which no row can be read."""

import dataclasses
import errno
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import ConfigError, TransientError
from pipelines.corpus import schema
from pipelines.corpus.shards import BadShard, Input, InputConfig, shard_of, shard_record
from pipelines.corpus.storage import Storage
from tests.pipelines.corpus.fabricate import fake_shard, only_shard, plan_of, write_shard

CONFIG = InputConfig(path="in")


def _reasons(folder: Path, config: InputConfig = CONFIG) -> dict[str, str]:
    source = Input(str(folder))
    _, bad, _ = source.footers(source.listing(), config, {})
    return {shard.path: shard.reason for shard in bad}


def _paths(url: str | Path) -> list[str]:
    return [shard.path for shard in Input(str(url)).listing()]


# --- listing --------------------------------------------------------------------------------------------------------


def test_folder_file_and_glob_name_a_shard_alike(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", 2)
    listings = [Input(f"{tmp_path}{end}").listing() for end in ("", "/", "/a.parquet", "/*.parquet", "/a.*")]
    assert {shard.path for shard in listings[0]} == {"a.parquet"}
    assert all(listing == listings[0] for listing in listings)


def test_folder_file_and_glob_on_s3_name_a_shard_and_its_version_alike(s3_output: Storage, tmp_path: Path) -> None:
    local = write_shard(tmp_path / "a.parquet", 2)
    s3_output.put("in/a.parquet", local.read_bytes())
    s3_output.put("in/deep/b.parquet", local.read_bytes())
    options = {"endpoint_url": s3_output.fs.raw.endpoint_url}
    folder, file, glob, deep = (
        Input(f"{s3_output.url}/in{end}", options).listing()
        for end in ("", "/a.parquet", "/*.parquet", "/**/*.parquet")
    )
    assert [shard.path for shard in folder] == ["a.parquet", "deep/b.parquet"]
    assert file == glob == folder[:1]
    assert deep == folder
    assert folder[0].size == local.stat().st_size
    assert len(folder[0].tag) == 32  # the ETag of an object that was put at once, without its quotes


def test_the_root_of_a_glob_is_its_longest_literal_folder(tmp_path: Path) -> None:
    for name in ("x/1/a.parquet", "x/2/a.parquet", "y/1/a.parquet"):
        write_shard(tmp_path / "in" / name, 1)
    assert _paths(tmp_path / "in" / "x" / "*" / "a.parquet") == ["1/a.parquet", "2/a.parquet"]
    assert _paths(tmp_path / "in" / "?" / "1" / "*.parquet") == ["x/1/a.parquet", "y/1/a.parquet"]
    assert _paths(tmp_path / "in" / "[x]" / "**" / "*.parquet") == ["x/1/a.parquet", "x/2/a.parquet"]
    assert _paths(tmp_path / "in") == ["x/1/a.parquet", "x/2/a.parquet", "y/1/a.parquet"]


def test_hidden_files_folders_and_other_kinds_of_file_are_no_shards(tmp_path: Path) -> None:
    for name in ("a.parquet", "_a.parquet", ".a.parquet", "_temporary/a.parquet", ".old/a.parquet", "b.pq"):
        write_shard(tmp_path / name, 1)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "readme.txt").write_text("no shard")
    assert _paths(tmp_path) == ["a.parquet", "b.pq"]
    assert _paths(tmp_path / "*.parquet") == ["a.parquet"]


def test_a_file_that_is_named_is_a_shard_even_where_a_search_would_pass_over_it(tmp_path: Path) -> None:
    for name in ("_a.parquet", ".a.parquet"):
        write_shard(tmp_path / name, 1)
        assert _paths(tmp_path / name) == [name]


def test_a_hidden_folder_above_the_root_hides_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / ".cache" / "_in" / "a.parquet", 1)
    assert _paths(tmp_path / ".cache" / "_in") == ["a.parquet"]


def test_a_folder_named_like_a_file_is_searched(tmp_path: Path) -> None:
    write_shard(tmp_path / "out.parquet" / "part-0.parquet", 1)
    assert _paths(tmp_path / "out.parquet") == ["part-0.parquet"]


@pytest.mark.parametrize("end", ["none", "*.parquet", "empty"])
def test_an_input_without_shards_is_the_users_mistake(tmp_path: Path, end: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"input\.path"):
        Input(str(tmp_path / end)).listing()


def test_the_order_of_the_stores_listing_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write_shard(tmp_path / f"{number}.parquet", 1)
    source = Input(str(tmp_path))
    expected = source.listing()
    find = source.fs.find

    def shuffled(*args: Any, **kwargs: Any) -> Any:
        found = list(find(*args, **kwargs).items())
        random.Random(1).shuffle(found)
        return dict(found)

    monkeypatch.setattr(source.fs, "find", shuffled)
    assert source.listing() == expected
    assert [shard.path for shard in expected] == sorted(shard.path for shard in expected)


@pytest.mark.parametrize(
    ("input_path", "root"),
    [
        ("d", "d/aligned"),
        ("d/", "d"),
        ("d/**/*.parquet", "d/aligned"),
        ("d/*/*/*.parquet", "d/aligned"),
        ("d/[a-c]*/**", "d/aligned/v2"),
        ("d/aligned/corpus", "d/aligned"),
        ("link", "d/aligned"),
        ("d", "link/aligned"),
    ],
)
def test_an_output_that_the_search_for_shards_would_find_is_refused_before_it_is_there(
    tmp_path: Path, input_path: str, root: str
) -> None:
    write_shard(tmp_path / "d" / "a.parquet", 1)
    write_shard(tmp_path / "d" / "aligned" / "corpus" / "a.parquet", 1)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    source, output = Input(str(tmp_path / input_path)), Storage(str(tmp_path / root))
    with pytest.raises(ConfigError, match=r"lies where input\.path .* is searched") as refusal:
        source.refuse_own_output(output)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("input_path", "root"),
    [
        ("d", "aligned"),
        ("d", "d-aligned"),
        ("d/a.parquet", "d"),
        ("d/*", "d/aligned"),
        ("d/*.parquet", "d/aligned"),
        ("d", "d/_aligned"),
        ("d", "d/.old/aligned"),
        ("d/aligned/corpus", "d/aligned/v2"),
    ],
)
def test_an_output_beside_the_input_or_hidden_in_it_is_not_refused(tmp_path: Path, input_path: str, root: str) -> None:
    write_shard(tmp_path / "d" / "a.parquet", 1)
    write_shard(tmp_path / "d" / "aligned" / "corpus" / "a.parquet", 1)
    assert plan_of(Input(str(tmp_path / input_path)), CONFIG, Storage(str(tmp_path / root))).num_rows >= 1


def test_an_output_in_the_input_is_refused_on_s3_and_one_on_another_store_is_not(
    s3_output: Storage, tmp_path: Path
) -> None:
    path = write_shard(tmp_path / "a.parquet", 1)
    s3_output.put("in/a.parquet", path.read_bytes())
    options = {"endpoint_url": s3_output.fs.raw.endpoint_url}
    source = Input(f"{s3_output.url}/in", options)
    with pytest.raises(ConfigError, match="is searched"):
        source.refuse_own_output(Storage(f"{s3_output.url}/in/aligned", options))
    source.refuse_own_output(Storage(f"{s3_output.url}/in-aligned", options))
    source.refuse_own_output(Storage(f"/{source.root}/aligned"))


# --- versions -------------------------------------------------------------------------------------------------------


def test_a_version_is_path_size_tag_and_footer(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.parquet", 4)
    source = Input(str(tmp_path))
    shard = only_shard(source, CONFIG)
    assert only_shard(Input(str(tmp_path)), CONFIG) == shard

    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5_000_000_000))  # another tag
    touched = only_shard(source, CONFIG)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"parquet-cpp-arrow", b"parquet-cpp-errow"))  # the footer's, of the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rewritten = only_shard(source, CONFIG)
    path.rename(tmp_path / "b.parquet")
    renamed = only_shard(source, CONFIG)

    assert rewritten.listed == shard.listed
    assert len({each.key for each in (shard, touched, rewritten, renamed)}) == 4


def test_a_shard_record_gives_back_the_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", 10, row_group_size=4)
    shard = only_shard(Input(str(tmp_path)), CONFIG)
    assert shard.row_groups == (4, 4, 2)
    assert shard_of(shard_record(shard)) == shard


def test_a_row_is_found_in_the_row_group_that_holds_it_and_never_in_an_empty_one() -> None:
    shard = fake_shard(row_groups=(0, 3, 0, 2, 1, 0))
    assert [shard.row_group_of(row) for row in range(6)] == [1, 1, 1, 3, 3, 4]
    assert (shard.bounds, shard.num_rows) == ((0, 0, 3, 3, 5, 6, 6), 6)


def test_an_input_travels_between_processes(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", 3)
    source = Input(str(tmp_path))
    listing = source.listing()
    copy: Input = pickle.loads(pickle.dumps(source))
    with copy.open(listing[0]) as file:
        assert file.read(4) == b"PAR1"


# --- refusals -------------------------------------------------------------------------------------------------------


def test_files_that_are_not_whole_parquet_are_bad_shards_and_do_not_touch_the_good_ones(tmp_path: Path) -> None:
    good = write_shard(tmp_path / "good.parquet", 5).read_bytes()
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "text.parquet").write_text("prompt\nhello, this is a table of prompts, though not in Parquet\n")
    (tmp_path / "cut.parquet").write_bytes(good[:-20])
    length = int.from_bytes(good[-8:-4], "little")
    (tmp_path / "footer.parquet").write_bytes(good[: -8 - length] + b"\xff" * length + good[-8:])
    (tmp_path / "length.parquet").write_bytes(good[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1")
    (tmp_path / "magic.parquet").write_bytes(b"PAR1" + b"PAR1")

    source = Input(str(tmp_path))
    shards, bad, _ = source.footers(source.listing(), CONFIG, {})

    assert [shard.listed.path for shard in shards] == ["good.parquet"]
    assert {shard.path: shard.reason.split(":")[0] for shard in bad} == dict.fromkeys(
        ["cut.parquet", "empty.parquet", "footer.parquet", "length.parquet", "magic.parquet", "text.parquet"],
        "broken_footer",
    )


def test_a_footer_larger_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    columns: dict[str, Any] = {f"column_{number:04d}": [number] for number in range(800)}
    path = write_shard(tmp_path / "wide.parquet", pa.table({"prompt": ["hi"], **columns}))
    assert pq.read_metadata(path).serialized_size > 1 << 16
    assert only_shard(Input(str(tmp_path)), CONFIG).row_groups == (1,)


def test_a_store_error_while_reading_footers_is_no_bad_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.parquet", 5)
    source = Input(str(tmp_path), retry_s=0)
    listing = source.listing()

    def unreachable(*args: Any, **kwargs: Any) -> bytes:
        raise OSError(errno.ETIMEDOUT, "the store is away")

    monkeypatch.setattr(source.fs.raw, "cat_file", unreachable)
    with pytest.raises(TransientError, match="the store is away"):
        source.footers(listing, CONFIG, {})


@pytest.mark.parametrize(
    ("columns", "config", "reason"),
    [
        ({"text": ["a"]}, {}, "missing_column: there is no column 'prompt' among text"),
        ({"promt": ["a"]}, {}, "missing_column: there is no column 'prompt' among promt; did you mean 'promt'?"),
        ({"prompt": [1]}, {}, "wrong_type: 'prompt' is int64"),
        ({"prompt": [b"a"]}, {}, "wrong_type: 'prompt' is binary"),
        ({"prompt": [["a"]]}, {}, "wrong_type: 'prompt' is list"),
        ({"prompt": [[{"role": "user"}]]}, {}, "wrong_type: 'prompt' is list"),
        ({"prompt": [[{"role": "user", "content": 1}]]}, {}, "wrong_type: 'prompt' is list"),
        ({"prompt": [{"role": "user", "content": "a"}]}, {}, "wrong_type: 'prompt' is struct"),
        ({"prompt": ["a"]}, {"id_column": "id"}, "missing_column: there is no column 'id'"),
        ({"prompt": ["a"], "id": [0.5]}, {"id_column": "id"}, "wrong_type: 'id' is double"),
        ({"prompt": ["a"], "id": [["x"]]}, {"id_column": "id"}, "wrong_type: 'id' is list"),
        ({"prompt": ["a"], "answer": [1]}, {"response_column": "answer"}, "wrong_type: 'answer' is int64"),
        ({"prompt": ["a"]}, {"keep_columns": ["topic"]}, "missing_column: there is no column 'topic'"),
    ],
)
def test_a_shard_without_the_columns_that_are_needed_is_bad_and_says_why(
    tmp_path: Path, columns: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    write_shard(tmp_path / "a.parquet", pa.table(columns))
    found = _reasons(tmp_path, dataclasses.replace(CONFIG, **config))
    assert found["a.parquet"].startswith(reason)


def test_a_column_name_that_is_used_must_be_there_once(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"], [1], [2]], names=["prompt", "prompt", "x", "x"])
    write_shard(tmp_path / "a.parquet", table)
    assert _reasons(tmp_path) == {"a.parquet": "schema_mismatch: there are two columns 'prompt'"}


def test_a_kept_column_of_another_type_than_the_first_shards_is_a_mismatch(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", pa.table({"prompt": ["x"], "score": [1]}))
    write_shard(tmp_path / "b.parquet", pa.table({"prompt": ["x"], "score": ["1"]}))
    config = dataclasses.replace(CONFIG, keep_columns=["score"])
    source = Input(str(tmp_path))

    shards, bad, types = source.footers(source.listing(), config, {})
    assert [shard.listed.path for shard in shards] == ["a.parquet"]
    assert bad == [
        BadShard("b.parquet", "schema_mismatch: column 'score' is string here and int64 in the shards before")
    ]
    assert types == {"score": "int64"}

    shards, bad, types = source.footers(source.listing(), config, {"score": "string"})  # an earlier run fixed it
    assert [shard.listed.path for shard in shards] == ["b.parquet"]
    assert types == {"score": "string"}


def test_a_bad_first_shard_does_not_fix_the_kept_types(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", pa.table({"prompt": [1], "score": ["1"]}))
    write_shard(tmp_path / "b.parquet", pa.table({"prompt": ["x"], "score": [1]}))
    source = Input(str(tmp_path))
    shards, _, types = source.footers(source.listing(), dataclasses.replace(CONFIG, keep_columns=["score"]), {})
    assert [shard.listed.path for shard in shards] == ["b.parquet"]
    assert types == {"score": "int64"}


@pytest.mark.parametrize("name", [*schema.UNIT.names, "unit", "shard", "stored", "run"])
def test_kept_columns_may_not_take_a_name_that_the_unit_or_the_corpus_needs(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        InputConfig(path="in", keep_columns=["topic", name])


def test_kept_columns_are_named_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        InputConfig(path="in", keep_columns=["topic", "topic"])
