"""The claims' script runs, on a random model and made-up data: what it says of a real one is in the README."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.benchmarks.diffpo_claims import REFERENCE, UNSEEN, edit_distance, interval
from tests.tiny_models import build_tiny_llama

SCRIPT = Path(__file__).with_name("diffpo_claims.py")


def stored(folder: Path) -> None:
    models = [REFERENCE, *UNSEEN]
    rows = [
        {"prompt_id": f"p{number}", "prompt": f"What is number {number}?", "model": model,
         "response": f"{model} says that it is {number}.", "win_rate": None if model == REFERENCE else rank / 10}
        for number in range(6)
        for rank, model in enumerate(models)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "alpaca_eval_responses.parquet")


def test_every_arm_is_made_judged_and_drawn(tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "model")
    stored(tmp_path)
    picture = tmp_path / "picture.svg"
    options = f"--data {tmp_path} --base {model} --aligner {model} --control {model} --encoder {model} --plot {picture}"
    sizes = f"--prompts 4 --iterated 2 --max-tokens 8 --work {tmp_path / 'work'}"
    command = [sys.executable, str(SCRIPT), *options.split(), *sizes.split()]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in first.stdout.splitlines()}
    assert rows["identity"][1] == "+0.000 (+0.000 to +0.000)"
    assert rows["fixed point"][0] == rows["control, fixed point"][0] == rows["fixed point, without response"][0]
    assert "1.00x fewer (95%: 1.00 to 1.00)" in first.stdout  # aligner and control are one here
    assert ElementTree.parse(picture).findall(".//{http://www.w3.org/2000/svg}circle")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("a b c", "a b c", 0), ("a b c", "a x c", 1 / 3), ("b c", "a b c d", 1 / 2), ("a", "b", 1), ("", "", 0)],
)
def test_the_edit_distance_counts_words(a: str, b: str, distance: float) -> None:
    assert edit_distance(a.split(), b.split()) == distance


def test_the_interval_holds_the_mean_and_narrows_with_more_prompts() -> None:
    few, many = (np.random.default_rng(1).normal(0.5, 1, count) for count in (25, 2500))
    spans = []
    for values in (few, many):
        mean, low, high = (
            float(part) for part in interval(values).replace("(", "").replace(")", "").split() if part != "to"
        )
        assert low < mean < high
        spans.append(high - low)
    assert spans[0] / spans[1] == pytest.approx(10, rel=0.4)
