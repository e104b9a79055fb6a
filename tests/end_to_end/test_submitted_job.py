"""A job that is submitted to a cluster from a checkout."""

from pathlib import Path

from tests.end_to_end.conftest import RayHead
from tests.end_to_end.jobs import SCRIPT, CommandLine, corpus, write_shard

UPLOAD_BYTES = 5 << 20


def test_a_submitted_job_makes_the_corpus_and_passes_its_exit_code_on(
    ray_head: RayHead, command_line: CommandLine, tmp_path: Path
) -> None:
    write_shard(tmp_path / "prompts" / "good.parquet", {"prompt": ["How?", "Why?"], "response": ["So.", "Because."]})
    (tmp_path / "prompts" / "bad.parquet").write_bytes(b"no shard")
    arguments = [
        f"input.path={tmp_path / 'prompts'}", "input.response_column=response", f"output.root={tmp_path / 'output'}",
        "input.on_bad_shard=skip", "policy=stored", "aligner=identity",
    ]  # fmt: skip
    ray = ["ray", "job", "submit", "--address", ray_head.dashboard, "--working-dir", "."]
    completed = command_line.start_command([*ray, "--", "python", SCRIPT, *arguments]).wait()
    assert [row["responses"][0]["text"] for row in corpus(tmp_path / "output")] == ["So.", "Because."]
    assert completed.returncode == 1, "Ray's own for a job that failed; its message says what the job's was"
    assert "Job entrypoint command failed with exit code 3" in completed.stdout

    uploads = list(ray_head.folder.glob("session_*/runtime_resources/working_dir_files/*"))
    assert uploads
    for folder in [path for path in uploads if path.is_dir()]:
        assert (folder / SCRIPT).is_file()
        assert not (folder / ".venv").exists()
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < UPLOAD_BYTES
