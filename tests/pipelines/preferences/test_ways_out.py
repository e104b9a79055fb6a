"""The summary's advice."""

import re
from pathlib import Path

from pipelines.preferences import build, picks, strategies
from pipelines.preferences.ranked import REASONS
from pipelines.preferences.report import WAYS_OUT

SOURCES = [Path(build.__file__), Path(picks.__file__), *Path(strategies.__file__).parent.glob("*.py")]


def test_every_cause_for_which_prompts_are_dropped_has_a_way_out() -> None:
    told = {cause for path in SOURCES for cause in re.findall(r'\] = \(?\s*"([a-z_]+)"', path.read_text())}
    assert told > {"tie", "aligned_lost", "duplicate_prompt"}, "as they are written in the code"
    assert {*told, *REASONS, "no_candidate", "one_candidate"} - {""} == WAYS_OUT.keys()
