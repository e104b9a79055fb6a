"""A whole job on an object store: prompts, config, model and corpus by URL, killed, resumed, and no key told."""

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import yaml

from pipelines.corpus.storage import Storage
from tests.end_to_end.conftest import RayHead, tiny_pool
from tests.end_to_end.jobs import CommandLine
from tests.faults.proxy import Head
from tests.faults.storage.conftest import Clean, Site
from tests.faults.store import published, upload
from tests.s3_server import BUCKET, ENVIRONMENT, S3Server
from tests.tiny_models import build_tiny_llama

SECRETS = [ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], "planted-endpoint-key-8261"]


def damage(site: Site, name: str, change: Callable[[bytes], bytes]) -> None:
    root = Storage(site.root, {"endpoint_url": site.server.endpoint})
    root.put(f"units/{name}", change(root.read(f"units/{name}")))


@pytest.mark.long
def test_a_job_that_is_killed_on_an_object_store_goes_on_where_it_was_though_units_are_damaged(site: Site) -> None:
    """Of what it has committed one unit loses its end, which is seen before a plan is made, and one has a byte flipped
    in a page, which is seen when it is read for a part that a plan counts on. Both are made again."""
    running = site.start()
    committed: list[str] = []

    def on_request(head: Head) -> None:
        if head.method == "PUT" and re.search(r"/units/.*\.parquet", head.path):
            committed.append(head.path)
            if len(committed) == 8:  # it is on its way, with others perhaps
                running.process.kill()

    site.proxy.on_request = on_request
    assert running.process.wait(120) == -9
    site.proxy.on_request = lambda head: None
    first, second = sorted(Storage(site.root, {"endpoint_url": site.server.endpoint}).sizes("units"))[:2]
    damage(site, first, lambda data: data[:-40])
    damage(site, second, lambda data: data[:60] + bytes([data[60] ^ 0xFF]) + data[61:])
    resumed = site.run().expect(0)
    assert "waiting" not in resumed.stderr, "a dead job's lease is taken over at once"
    assert resumed.stderr.count("1 unit files are damaged or gone and are made again") == 2
    site.check()
    made = re.search(r"made: ([0-9]+) units", resumed.stdout)
    assert made is not None
    assert int(made[1]) <= 24 - 7 + 2


@pytest.fixture
def by_environment(head: RayHead, s3_server: S3Server, new_folder: Callable[[], Path]) -> Iterator[CommandLine]:
    """Jobs that know where the store is by the usual variable alone."""
    environment = {**head.environment, "AWS_ENDPOINT_URL": s3_server.endpoint}
    with CommandLine(environment, head.raylet, new_folder) as jobs:
        yield jobs


@pytest.mark.long
def test_the_config_and_everything_it_names_may_be_on_the_store(
    by_environment: CommandLine, clean: Clean, prompts: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    base = f"s3://{BUCKET}/{tmp_path.name}"
    upload(prompts, f"{base}/prompts", s3_server.endpoint)
    job = {
        "input": {"path": f"{base}/prompts", "id_column": "id", "response_column": "response"},
        "output": {"root": f"{base}/output"},
        "policy": "stored", "aligner": "identity", "run": {"unit_rows": 5}, "site": "s3",
    }  # fmt: skip
    Storage(base, {"endpoint_url": s3_server.endpoint}).create("job.yaml", yaml.safe_dump(job).encode())
    by_environment.run("--config", f"{base}/job.yaml").expect(0)
    assert published(f"{base}/output", s3_server.endpoint) == clean.rows


def test_a_config_that_is_not_there_is_one_line(by_environment: CommandLine) -> None:
    completed = by_environment.run("--config", f"s3://{BUCKET}/none/job.yaml").expect(2)
    (line,) = completed.stderr.splitlines()
    assert line.startswith(f"error: cannot read 's3://{BUCKET}/none/job.yaml': ")


@pytest.mark.long
def test_a_model_on_the_store_answers_as_the_folder_that_it_was(
    by_environment: CommandLine, prompts: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_tiny_llama(tmp_path / "tiny")
    url = f"s3://{BUCKET}/{tmp_path.name}/tiny"
    fs, root = fsspec.core.url_to_fs(url, endpoint_url=s3_server.endpoint)
    for path in folder.iterdir():
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    rows = []
    for number, model in enumerate((str(folder), url)):
        pool = [*tiny_pool("policy", folder), f"policy.model={model}", "aligner=identity", "site=s3"]
        arguments = [f"input.path={prompts}", "input.id_column=id", f"output.root={tmp_path / str(number)}", *pool]
        assert "<|im_start|>user" in by_environment.run(*arguments, "--dry-run").expect(0).stdout
        by_environment.run(*arguments).expect(0)
        rows.append(published(str(tmp_path / str(number))))
    assert rows[0] == rows[1]


def test_no_secret_is_written_anywhere(site: Site, head: RayHead, new_folder: Callable[[], Path]) -> None:
    """Neither by a run that ends well nor by those that fail: to the store, the terminal, Ray's logs or its records."""
    said = [str(site.run().expect(0))]
    environment = {**head.environment, "OPENAI_API_KEY": SECRETS[1]}
    with CommandLine(environment, head.raylet, new_folder) as jobs:
        arguments = [*site.arguments, "policy=openai", "policy.model=m", "policy.base_url=http://127.0.0.1:9/v1"]
        root = f"output.root={site.root}-failing"
        said.append(str(jobs.run(*arguments, root, "policy.retry_s=1").expect(5)))
        said.append(str(jobs.run(*arguments, root, "site.storage_options.secret=x").expect(2)))
    wrong = {**head.environment, "AWS_SECRET_ACCESS_KEY": SECRETS[1]}
    with CommandLine(wrong, head.raylet, new_folder) as jobs:
        said.append(str(jobs.run(*site.arguments, f"output.root={site.root}-wrong").expect(2)))
    written = {f"what run {number} said": text.encode() for number, text in enumerate(said)}
    fs, folder = fsspec.core.url_to_fs(site.root.removesuffix("/output"), endpoint_url=site.server.endpoint)
    fs.invalidate_cache()
    written |= {path: fs.cat_file(path) for path in fs.find(folder)}
    written |= {
        str(path): path.read_bytes() for path in head.folder.rglob("*") if path.is_file() and "sock" not in str(path)
    }
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    written["the records of jobs"] = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).read()
    assert json.loads(written["the records of jobs"])
    assert len(written) > 50
    for where, data in written.items():
        for secret in SECRETS:
            assert secret.encode() not in data, where
