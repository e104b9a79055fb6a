"""The output root: create-if-absent, whole objects only, and what a killed writer leaves behind."""

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientPayloadError

from actors.contract import ConfigError, TransientError
from pipelines.corpus.publish import OutputConfig, publish
from pipelines.corpus.storage import SCRATCH, SCRATCH_LIFE_S, Storage
from tests.pipelines.corpus.fabricate import check_exactly_once, commit_units, fake_shard, rows_of

KB = 1024


def test_of_sixteen_racing_writers_exactly_one_creates_and_its_object_is_whole(output: Storage) -> None:
    barrier = threading.Barrier(16)
    payloads = [bytes([writer]) * (64 * KB + writer) for writer in range(16)]

    def write(payload: bytes) -> bool:
        barrier.wait()
        return output.create("units/raced", payload)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, payloads))

    assert won.count(True) == 1
    assert output.read("units/raced") == payloads[won.index(True)]
    assert list(output.sizes("units")) == ["raced"]


def test_racing_processes_create_a_local_object_once(local_output: Storage) -> None:
    program = (
        "import sys; from pipelines.corpus.storage import Storage\n"
        "sys.stdin.readline()\n"
        "print(Storage(sys.argv[1]).create('units/raced', sys.argv[2].encode() * 100_000))"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, local_output.root, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3],
        )
        for number in range(3)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.communicate(timeout=60)[0].strip() for writer in writers]

    assert sorted(said) == ["False", "False", "True"]
    assert local_output.read("units/raced") == str(said.index("True")).encode() * 100_000


def test_create_never_replaces_what_is_there(output: Storage) -> None:
    assert output.create("units/a", b"first")
    assert not output.create("units/a", b"second")
    assert output.read("units/a") == b"first"


def test_create_file_leaves_nothing_when_the_callback_fails(output: Storage) -> None:
    def write(scratch: Path) -> None:
        scratch.write_bytes(b"half")
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        output.create_file("units/a", write)
    assert not output.exists("units/a")
    assert output.sizes("units") == {}
    assert output.sizes(SCRATCH) == {}


def test_a_writer_killed_in_the_middle_leaves_no_visible_object(local_output: Storage) -> None:
    program = (
        "import os, signal, sys; from pipelines.corpus.storage import Storage\n"
        "def write(path):\n"
        "    path.write_bytes(b'half of it')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Storage(sys.argv[1]).create_file('units/a', write)"
    )
    done = subprocess.run([sys.executable, "-c", program, local_output.root], cwd=Path(__file__).parents[3], timeout=60)

    assert done.returncode == -signal.SIGKILL
    assert local_output.sizes("units") == {}
    assert not local_output.exists("units/a")
    assert len(local_output.sizes(SCRATCH)) == 1  # what is left is swept later
    assert local_output.create("units/a", b"whole")


def test_put_replaces_and_readers_see_the_old_or_the_new_but_never_a_part(local_output: Storage) -> None:
    versions = [bytes([number]) * (512 * KB) for number in range(2)]
    local_output.put("README.md", versions[0])
    stop = threading.Event()
    torn: list[int] = []

    def read() -> None:
        while not stop.is_set():
            data = local_output.read("README.md")
            if data not in versions:
                torn.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(60):
        local_output.put("README.md", versions[turn % 2])
    stop.set()
    reader.join()

    assert not torn
    assert local_output.sizes(SCRATCH) == {}


def test_put_overwrites(output: Storage) -> None:
    output.put("leases/1.heartbeat", b"one, and longer")
    output.put("leases/1.heartbeat", b"two")
    assert output.read("leases/1.heartbeat") == b"two"


def test_sizes_and_folders_tell_files_from_folders_and_see_only_their_own_level(output: Storage) -> None:
    for path in ("corpus/run=000002/b", "corpus/run=000002/a", "corpus/run=000001/plan.json", "corpus/c"):
        output.create(path, path.encode())

    assert output.sizes("corpus") == {"c": 8}
    assert list(output.sizes("corpus/run=000002").items()) == [("a", 19), ("b", 19)]
    assert output.folders("corpus") == ["run=000001", "run=000002"]
    assert output.sizes("no such folder") == {}
    assert output.folders("no such folder") == []


def test_a_listing_sees_what_another_process_has_just_written(output: Storage) -> None:
    other = pickle.loads(pickle.dumps(output))
    other.fs.raw.clear_instance_cache()
    assert output.sizes("units") == {}
    other.create("units/a", b"1")
    assert output.sizes("units") == {"a": 1}
    assert output.exists("units/a")
    other.delete(["units/a"])
    assert not output.exists("units/a")
    assert output.sizes("units") == {}


def test_delete_takes_a_list_in_which_some_are_gone_already(output: Storage) -> None:
    output.create("units/a", b"1")
    output.create("units/b", b"2")
    output.delete(["units/a", "units/never", "units/b"])
    output.delete(["units/a"])
    output.delete([])
    assert output.sizes("units") == {}


def test_reading_an_absent_object_is_file_not_found(output: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        output.read("units/none")


@pytest.mark.parametrize("path", ["../else", "units/../../else", "/etc/else", "units/.."])
def test_paths_that_climb_out_of_the_root_are_refused(local_output: Storage, path: str) -> None:
    for call in (local_output.read, local_output.exists, local_output.sizes, local_output.folders):
        with pytest.raises(ValueError, match="not a path below"):
            call(path)
    for call in (local_output.create, local_output.put):
        with pytest.raises(ValueError, match="not a path below"):
            call(path, b"")
    with pytest.raises(ValueError, match="not a path below"):
        local_output.delete([path])


def test_sweep_deletes_old_scratch_files_and_spares_those_in_use(local_output: Storage) -> None:
    local_output.create("units/a", b"1")
    folder = Path(local_output.path(SCRATCH))
    old, young = folder / "old", folder / "young"
    old.write_bytes(b"")
    young.write_bytes(b"")
    long_ago = time.time() - SCRATCH_LIFE_S - 60
    os.utime(old, (long_ago, long_ago))

    local_output.sweep()

    assert list(local_output.sizes(SCRATCH)) == ["young"]
    assert local_output.read("units/a") == b"1"


def test_sweep_of_a_root_that_is_not_there_yet_does_nothing(output: Storage) -> None:
    output.sweep()
    assert output.folders("") == []


def test_an_unknown_protocol_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="nosuchstore"):
        Storage("nosuchstore://bucket/out")


# --- an answer that is lost on the way back -------------------------------------------------------------------------


def _break_puts(output: Storage, monkeypatch: pytest.MonkeyPatch, store: bytes | None, times: int = 1 << 30) -> None:
    """Make conditional puts fail after `store`, or the caller's own bytes for b"", came to be there; None: nothing."""
    put_file = output.fs.raw.put_file
    failures = iter(range(times))

    def lossy(local: str, remote: str, **kwargs: Any) -> None:
        if next(failures, None) is None:
            put_file(local, remote, **kwargs)
            return
        if store is not None:
            if store:
                output.fs.raw.pipe_file(remote, store)
            else:
                put_file(local, remote, **kwargs)
        raise ClientPayloadError("connection reset by peer")  # which is no OSError

    monkeypatch.setattr(output.fs.raw, "put_file", lossy)


def test_a_put_whose_answer_is_lost_still_counts_as_ours(s3_output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_puts(s3_output, monkeypatch, store=b"")
    assert s3_output.create("units/a", b"ours")
    assert s3_output.read("units/a") == b"ours"


def test_a_put_whose_answer_is_lost_while_anothers_object_is_there_is_anothers(
    s3_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_puts(s3_output, monkeypatch, store=b"another's")
    assert not s3_output.create("units/a", b"ours")
    assert s3_output.read("units/a") == b"another's"


def test_anothers_object_of_another_size_is_not_read_to_tell_that_it_is_not_ours(
    s3_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_output.create("units/a", b"first")

    def unread(*args: Any, **kwargs: Any) -> bytes:
        raise AssertionError("the object was read")

    for name in ("cat_file", "open"):
        monkeypatch.setattr(s3_output.fs.raw, name, unread)
    assert not s3_output.create("units/a", b"second")


@pytest.mark.parametrize("at", [0, 9 * KB * KB - 1])
def test_objects_of_one_size_are_compared_to_their_last_byte_a_few_mib_at_once(
    s3_output: Storage, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    ours = bytes(9 * KB * KB)
    s3_output.create("units/ours", ours)
    s3_output.create("units/anothers", ours[:at] + b"x" + ours[at + 1 :])

    def whole(*args: Any, **kwargs: Any) -> bytes:
        raise AssertionError("the object was read at once")

    monkeypatch.setattr(s3_output.fs.raw, "cat_file", whole)
    assert s3_output.create("units/ours", ours)
    assert not s3_output.create("units/anothers", ours)


def test_puts_that_store_nothing_are_an_outage(s3_output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_puts(s3_output, monkeypatch, store=None)
    with pytest.raises(TransientError) as told:
        s3_output.within(0.5).create("units/a", b"ours")
    assert re.fullmatch(
        rf"{s3_output.url} is out \([2-9] tries, site.storage_retry_s 0.5\): writing units/a: connection reset by peer",
        str(told.value),
    )
    assert not s3_output.exists("units/a")


def test_a_put_that_stored_nothing_is_made_again(s3_output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_puts(s3_output, monkeypatch, store=None, times=2)
    assert s3_output.create("units/a", b"ours")
    assert s3_output.read("units/a") == b"ours"


def test_a_put_that_arrives_after_it_was_given_up_still_counts_as_ours(
    s3_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file, tries = s3_output.fs.raw.put_file, []

    def late(local: str, remote: str, **kwargs: Any) -> None:
        tries.append(remote)
        if len(tries) == 1:
            raise TimeoutError  # nothing is there when it is read back,
        if len(tries) == 2:
            put_file(local, remote, **kwargs)  # and then the first one arrives
        put_file(local, remote, **kwargs)

    monkeypatch.setattr(s3_output.fs.raw, "put_file", late)
    assert s3_output.create("units/a", b"ours")
    assert len(tries) == 2


class _Precondition(Exception):
    """As botocore raises it; s3fs makes an OSError, or of AWS's answer a FileExistsError, of it."""

    response = {"Error": {"Code": "PreconditionFailed"}, "ResponseMetadata": {"HTTPStatusCode": 412}}  # noqa: RUF012


@pytest.mark.parametrize("refusal", [OSError(22, "Invalid Argument"), FileExistsError("it is there")], ids=repr)
@pytest.mark.parametrize("ends_in", ["info", "open"])
def test_a_refused_put_whose_object_cannot_be_read_at_first_is_looked_at_again(
    s3_output: Storage, monkeypatch: pytest.MonkeyPatch, refusal: Exception, ends_in: str
) -> None:
    """The store was asked twice, by its client; the first answer was lost, and it is out when we look, or clears up."""
    s3_output.create("units/a", b"ours")
    failures: list[Exception] = [FileNotFoundError("gone"), ConnectionResetError("out")]
    real = getattr(s3_output.fs.raw, ends_in)

    def out(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise refusal from _Precondition()

    monkeypatch.setattr(s3_output.fs.raw, "put_file", refused)
    monkeypatch.setattr(s3_output.fs.raw, ends_in, out)
    assert s3_output.create("units/a", b"ours")
    assert not failures


def test_wrong_credentials_are_a_mistake_and_not_a_lost_race(
    s3_output: Storage, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    stranger = Storage(s3_output.url, {"endpoint_url": s3_endpoint, "skip_instance_cache": True})
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=f"{s3_output.url} refuses: writing units/a"):
        stranger.create("units/a", b"x")
    assert time.monotonic() - begun < 5
    assert not s3_output.exists("units/a")


# --- large and many -------------------------------------------------------------------------------------------------


def test_of_racing_writers_of_many_parts_one_that_creates_is_there_whole(
    s3_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above twice SENT_AT_ONCE an object goes up in parts, and is created where they are put together.

    SeaweedFS sometimes lets two in a race do that, one after the other: what is there is then one's of them, whole.
    """
    monkeypatch.setattr("pipelines.corpus.storage.SENT_AT_ONCE", 5 << 20)
    payloads = [bytes([writer]) * ((11 << 20) + writer) for writer in range(4)]
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda payload: s3_output.create("corpus/part", payload), payloads))
    assert s3_output.read("corpus/part") in [payload for payload, mine in zip(payloads, won, strict=True) if mine]


def test_units_are_listed_by_their_first_digit_all_of_them_and_nothing_else(output: Storage) -> None:
    names = [f"{digit}{number}" for digit in "0123456789abcdef" for number in range(3)]
    for path in (*(f"units/{name}" for name in names), "units/notes.txt", "units/fa/below", "units.old/00"):
        output.create(path, path.encode())
    assert list(output.sizes_by_hex("units").items()) == [(name, len(f"units/{name}")) for name in sorted(names)]
    assert output.sizes_by_hex("none") == {}


def test_nothing_is_renamed_or_copied_on_an_object_store(s3_output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an object store has no rename")

    for name in ("mv", "mv_file", "rename", "copy", "cp_file", "_cp_file", "_copy_basic", "_copy_managed"):
        monkeypatch.setattr(s3_output.fs.raw, name, forbidden, raising=False)
    shard = fake_shard(row_groups=(8,))
    commit_units(s3_output, shard, quarantined=[1])
    publish(s3_output, OutputConfig(root="out"))
    check_exactly_once(s3_output, rows_of(shard))


class _NoSuchUpload(Exception):
    """As botocore raises it; s3fs makes a FileNotFoundError of it."""

    response = {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}  # noqa: RUF012


def test_an_upload_that_the_store_forgot_is_made_again(s3_output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put_file, forgotten = s3_output.fs.raw.put_file, [1, 2]

    def forgetful(*args: Any, **kwargs: Any) -> None:
        if forgotten:
            forgotten.pop()
            raise FileNotFoundError("The specified multipart upload does not exist") from _NoSuchUpload()
        put_file(*args, **kwargs)

    monkeypatch.setattr(s3_output.fs.raw, "put_file", forgetful)
    assert s3_output.create("corpus/part", b"x")
    assert not forgotten
