"""What networks and stores do to requests changes no row: through the real command line, against a clean run."""

import re
import time

import pytest

from tests.end_to_end.jobs import LIMIT_S
from tests.faults.proxy import Head, Kind, Rule
from tests.faults.storage.conftest import Site

UNITS = r"/units/.*\.parquet"
WHENEVER = 10_000


@pytest.mark.long
def test_every_fault_of_a_bad_night_together_changes_no_row(site: Site) -> None:
    """All kinds at once, a tenth of the requests each at most, and certainly at those that matter most."""
    site.proxy.rules = [
        Rule("lost_answer", "PUT", UNITS, first=2, times=3),
        Rule("lost_answer", "PUT", r"/plan\.json"),
        Rule("lost_answer", "PUT", r"/part-00000\.parquet"),
        Rule("lost_answer", "PUT", r"/leases/000001\.json"),
        Rule("lost_answer", "PUT", r"/runs/000001\.json"),
        Rule("reset", "GET", r"/prompts/.*\.parquet", first=4, times=3),
        Rule("truncated", "GET", UNITS, first=2, times=3),
        Rule("slow_down", "PUT", UNITS, first=4, times=12),  # a burst
        *(Rule(kind, times=WHENEVER, share=0.03) for kind in ("slow_down", "internal", "reset", "truncated")),
        Rule("stall", times=4, share=0.02, stall_s=2),
    ]
    site.run().expect(0)
    site.check()
    assert {"lost_answer", "reset", "truncated", "slow_down", "internal"} <= set(site.proxy.counts)
    assert site.proxy.counts["lost_answer"] == 7


@pytest.mark.parametrize("kind", ["expired", "skewed"])
@pytest.mark.long
def test_refused_credentials_in_the_middle_of_a_run_are_told_and_the_same_command_goes_on(
    site: Site, kind: Kind
) -> None:
    site.proxy.rules = [Rule(kind, "PUT", UNITS, first=4, times=WHENEVER)]
    completed = site.run().expect(2)
    code = {"expired": "token has expired", "skewed": "request time and the server's"}[kind]
    assert any(code in line for line in completed.errors), completed.errors
    site.proxy.rules = []
    site.run().expect(0)
    site.check()


def test_expired_credentials_are_one_line_and_exit_code_2(site: Site) -> None:
    site.proxy.rules = [Rule("expired", times=WHENEVER)]
    completed = site.run().expect(2)
    (line,) = completed.errors
    assert re.match(r"error: s3://.* refuses: .*token has expired", line)


@pytest.mark.long
def test_an_outage_that_outlasts_the_jobs_patience_is_exit_code_5_and_nothing_is_lost(site: Site) -> None:
    site.proxy.rules = [Rule("slow_down", "PUT", UNITS, first=6, times=WHENEVER)]
    site.run("site.storage_retry_s=2").expect(5)
    site.proxy.rules = []
    site.run().expect(0)
    site.check()


@pytest.mark.long
def test_the_store_killed_in_the_middle_of_a_run_and_of_publishing_changes_no_row(site: Site) -> None:
    """kill -9 upon the tenth unit and upon the first part; it is away for a second each time."""
    killed: list[str] = []

    def kill_at(method: str, path: str, count: int) -> None:
        seen = 0

        def on_request(head: Head) -> None:
            nonlocal seen
            if head.method == method and re.search(path, head.path):
                seen += 1
                if seen == count:
                    killed.append(path)
                    site.server.kill()

        site.proxy.on_request = on_request

    try:
        for method, path, count in (("PUT", UNITS, 10), ("PUT", r"/part-0", 1)):
            kill_at(method, path, count)
            if not killed:
                running = site.start()
            running.until(lambda: path in killed, f"the store was killed at {path}")  # noqa: B023
            time.sleep(1)
            site.server.start()
        running.wait(LIMIT_S).expect(0)
    finally:
        site.proxy.on_request = lambda head: None
        site.server.kill()
        site.server.start()
    site.check()


@pytest.mark.long
@pytest.mark.parametrize(
    "rule",
    [
        Rule("slow_down", times=60, share=0.5),
        Rule("internal", times=60, share=0.3),
        Rule("reset", "GET", times=60, share=0.3),
        Rule("truncated", "GET", times=60, share=0.3),
        Rule("stall", times=3, share=0.05, stall_s=30),
        Rule("lost_answer", "PUT|POST", times=60, share=0.5),
        Rule("lost_answer", "POST", r"\?delete", times=60),
    ],
    ids=lambda rule: f"{rule.kind}-{rule.method}",
)
def test_a_fault_alone_and_often_changes_no_row(site: Site, rule: Rule) -> None:
    site.proxy.rules = [rule]
    site.run().expect(0)
    site.check()
    assert site.proxy.counts[rule.kind]
