"""The decoder's benchmark runs, and in float32 what it times is the same text on every side."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

SCRIPT = Path(__file__).with_name("diffpo_decoder.py")


def test_all_sides_make_the_same_tokens_and_the_figures_are_drawn(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.jsonl", tmp_path / "picture.svg"
    options = "--random tiny --dtypes float32 --threads 1 --device cpu --repeats 1 --batches 1 4 --overlaps 0 0.5 1"
    sizes = f"--max-tokens 24 --official-tokens 8 --block-size 8 --json {figures} --plot {picture}"
    command = [
        sys.executable,
        str(SCRIPT),
        "official",
        "generate",
        "refilled",
        "plot",
        *options.split(),
        *sizes.split(),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    official, *rest = [json.loads(line) for line in figures.read_text().splitlines()]
    assert official["agree"] == official["rows"] == 32
    assert [(each["part"], each["batch"], each["overlap"]) for each in rest] == [
        (part, batch, overlap) for part in ("generate", "refilled") for batch in (1, 4) for overlap in (0, 0.5, 1)
    ]
    assert all(each["agree"] == each["rows"] for each in rest)
    lines = ElementTree.parse(picture).findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3 * (2 + 3)  # ours, the limit and generate: by overlap a batch each, by batch an overlap each
