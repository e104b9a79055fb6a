"""The benchmark of drafts inside vLLM runs, and in float32 what it times is the same text on every side."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tiny_models import build_tiny_llama

SCRIPT = Path(__file__).with_name("vllm_drafts.py")


@pytest.mark.long
def test_all_sides_make_the_same_texts(tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path)
    options = f"--model {model} --dtype float32 --device cpu --batches 2 --overlaps 1 --decoders parallel"
    sizes = "--recipes rewrite aligner metaaligner --max-tokens 16 --max-model-len 512 --repeats 1"
    command = [sys.executable, str(SCRIPT), *options.split(), *sizes.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^  (\w+) .* agree (\d+)/(\d+)", done.stdout, re.MULTILINE)
    optional = {"ngram": "numba", "suffix": "arctic_inference"}
    assert {name for name, _, _ in told} == {"parallel", *(name for name in optional if find_spec(optional[name]))}
    assert all(agree == rows == "16" for _, agree, rows in told)
    assert re.findall(r"recipe (\w+):", done.stdout) == ["rewrite", "aligner", "metaaligner"]
