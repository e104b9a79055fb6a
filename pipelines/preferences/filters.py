"""Which prompts are used, and in which split: duplicates, contamination with benchmarks, and the split by hash."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.contract import ConfigError
from pipelines.preferences.arrow import whole
from pipelines.preferences.ranked import Bools
from pipelines.preferences.settings import PromptsConfig

NUM_PERMUTATIONS = 128
SHINGLE_WORDS = 3
SCHEME = "affine32"  # of datasketch's permutations: fixed, as signatures are kept
_WORD = re.compile(r"\w+")

Keys = npt.NDArray[np.uint64]


# --- a prompt's text ------------------------------------------------------------------------------------------------


def prompt_texts(prompts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Each chat as one text in lower case, every run of white space one space: what makes two prompts the same."""
    lists = whole(prompts)
    messages = lists.flatten()
    lines = pc.binary_join_element_wise(messages.field("role"), messages.field("content"), ": ")
    lines = pc.utf8_lower(pc.binary_join(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(lines)), " "))
    counts = np.asarray(lists.value_lengths(), np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, lines), "\n")


def prompt_keys(texts: pa.Array) -> Keys:
    """64-bit hash of each text."""
    return pd.util.hash_array(np.asarray(texts.to_numpy(zero_copy_only=False), object), categorize=False)


def split_of(keys: Keys, prompts: PromptsConfig, seed: int) -> pa.Array:
    """The split of each prompt, from its key and the seed alone: prompts of one text are never in two."""
    share = _mixed(keys ^ _mixed(np.full(1, seed, np.int64).view(np.uint64))) / 2.0**64
    bounds = np.cumsum([prompts.test_fraction, prompts.validation_fraction])
    return pa.array(["test", "validation", "train"]).take(pa.array(np.searchsorted(bounds, share, side="right")))


def _mixed(keys: Keys) -> Keys:
    """SplitMix64's finaliser: every bit of the key moves every bit of the result."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


# --- duplicates -----------------------------------------------------------------------------------------------------


def signatures(texts: pa.Array) -> pa.FixedSizeListArray:
    """MinHash of each text's word triples (of its words, where it has fewer): fixed-size lists of uint32."""
    from datasketch import MinHash  # brings scipy along, which takes a second to import

    shingles = [[" ".join(each).encode() for each in grams(words(text), SHINGLE_WORDS)] for text in texts.to_pylist()]
    made = [found.hashvalues for found in MinHash.generator(shingles, num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME)]
    values = np.concatenate(made).astype(np.uint32) if made else np.empty(0, np.uint32)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), NUM_PERMUTATIONS)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without what stands between them."""
    return _WORD.findall(text.lower())


def grams(found: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every `length` words in a row; all of them where there are fewer."""
    for start in range(max(1, len(found) - length + 1)):
        yield tuple(found[start : start + length])


def exact_duplicates(parts: Iterable[pa.Table]) -> Iterator[Bools]:
    """Of each part, in corpus order, which prompts have the key of an earlier one. Holds some 30 bytes per prompt."""
    keys = [np.asarray(part["key"]) for part in parts]
    again = np.ones(sum(map(len, keys)), bool)
    again[np.unique(np.concatenate([*keys, np.empty(0, np.uint64)]), return_index=True)[1]] = False
    yield from np.split(again, np.cumsum([len(each) for each in keys])[:-1])


def near_duplicates(parts: Iterable[pa.Table], overlap: float) -> Iterator[Bools]:
    """Likewise, of prompts whose estimated Jaccard similarity with one that is used is `overlap` or more.

    By datasketch's MinHash LSH; the index holds about 2 KB per used prompt, in the driver.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=overlap, num_perm=NUM_PERMUTATIONS)
    used: dict[int, npt.NDArray[np.uint32]] = {}
    for part in parts:
        lists = whole(part["signature"])
        values = np.asarray(lists.flatten()).reshape(-1, NUM_PERMUTATIONS)
        again = np.zeros(len(values), bool)
        for row, value in enumerate(values):
            found = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME, hashvalues=value.astype(np.uint64))
            near = [used[number] for number in index.query(found)]
            again[row] = any((each == value).mean() >= overlap for each in near)
            if not again[row]:
                index.insert(len(used), found, check_duplication=False)
                used[len(used)] = value
        yield again


# --- contamination --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmarks:
    """The texts that prompts must not share `ngram` words in a row with, as GPT-3 was checked (arXiv:2005.14165, C).

    A benchmark text of fewer words counts where a prompt has all of them in a row. Words are compared in lower case,
    without punctuation. Belongs to the process that read it: another's hashes differ.

    Attributes:
        grams: by their number of words, hashes of the word sequences to look for.
        digest: of the files' bytes; part of the fingerprint.
    """

    grams: dict[int, frozenset[int]]
    digest: str

    def touch(self, text: str) -> bool:
        """Whether a prompt's text holds one of the sequences."""
        found = words(text)
        return any(
            length <= len(found) and not wanted.isdisjoint(map(hash, grams(found, length)))
            for length, wanted in self.grams.items()
        )

    def touched(self, texts: pa.Array) -> Bools:
        return np.array([self.touch(text) for text in texts.to_pylist()], bool)


def benchmarks_of(prompts: PromptsConfig, options: dict[str, Any]) -> Benchmarks | None:
    """The benchmarks that the config names, read once per process; None where it names none."""
    if not prompts.decontaminate:
        return None
    return _read_benchmarks(tuple(prompts.decontaminate), prompts.ngram, json.dumps(options, sort_keys=True))


@functools.lru_cache(1)
def _read_benchmarks(paths: tuple[str, ...], ngram: int, options: str) -> Benchmarks:
    """Read benchmark files: every text in a Parquet or JSON (lines) file, at any depth; every line of another.

    Raises ConfigError for a file that cannot be read.
    """
    found: dict[int, set[int]] = {}
    digest = hashlib.sha256()
    for path in paths:
        try:
            fs, name = fsspec.core.url_to_fs(path, **json.loads(options))
            data = fs.cat_file(name)
            digest.update(hashlib.sha256(data).digest())
            for text in _texts(path, data):
                for gram in grams(words(text), ngram):
                    found.setdefault(len(gram), set()).add(hash(gram))
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"prompts.decontaminate: cannot read {path}: {error}") from None
    found.pop(0, None)
    return Benchmarks({length: frozenset(each) for length, each in found.items()}, digest.hexdigest()[:16])


def _texts(path: str, data: bytes) -> list[str]:
    """Raises ValueError where there is none, or it cannot be told how they are written."""
    if path.endswith((".parquet", ".pq")):
        found = list(_strings(pq.read_table(pa.BufferReader(data)).to_pylist()))
    elif path.endswith(".json"):
        found = list(_strings(json.loads(data)))
    elif path.endswith(".jsonl"):
        found = list(_strings([json.loads(line) for line in data.splitlines() if line.strip()]))
    elif path.endswith(".txt"):
        found = data.decode().splitlines()
    else:
        raise ValueError("it is none of .parquet, .jsonl, .json and .txt")
    if not any(words(text) for text in found):
        raise ValueError("it holds no text")
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
