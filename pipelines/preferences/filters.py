"""Which prompts are used, and in which split: duplicates, contamination with benchmarks, and the split by hash."""

import functools
import hashlib
import json
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
from actors.words import words
from pipelines.preferences.arrow import whole
from pipelines.preferences.ranked import Bools
from pipelines.preferences.settings import PromptsConfig

NUM_PERMUTATIONS = 128
SHINGLE_WORDS = 3
NUM_SHINGLES = 1024
FOUND = 0.95
ROW_WORDS, MESSAGE_WORDS = 8, 4
SCHEME = "affine32"  # of datasketch's permutations: fixed, as signatures are kept

Keys = npt.NDArray[np.uint64]
Hashes = npt.NDArray[np.uint32]


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


def shingled(texts: pa.Array) -> dict[str, pa.Array]:
    """Of each text's word triples (of its words, where it has fewer): `signature`, their MinHash, fixed-size lists of
    uint32, and `shingles`, lists of uint32: hashes of them in ascending order, the NUM_SHINGLES smallest."""
    from datasketch import MinHash  # brings scipy along, which takes a second to import

    triples = [[" ".join(each) for each in grams(words(text.lower()), SHINGLE_WORDS)] for text in texts.to_pylist()]
    hashes = pd.util.hash_array(np.array([each for one in triples for each in one], object), categorize=False)
    ends = np.cumsum([len(one) for one in triples], dtype=np.int64)
    found = [np.unique(each) for each in np.split(hashes.astype(np.uint32), ends)[:-1]]
    made = MinHash.generator(
        (each.tolist() for each in found), num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME, hashfunc=int
    )
    signatures = np.concatenate([np.empty(0, np.uint64), *(each.hashvalues for each in made)]).astype(np.uint32)
    return {
        "signature": pa.FixedSizeListArray.from_arrays(pa.array(signatures), NUM_PERMUTATIONS),
        "shingles": pa.array([each[:NUM_SHINGLES] for each in found], pa.list_(pa.uint32())),
    }


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
    """Likewise, which have a Jaccard similarity of `overlap` or more with an earlier one that was no duplicate itself.

    datasketch's MinHash LSH finds at least the share FOUND of those that are just so similar, and more of the others.
    What it finds is compared by all shingles; of two prompts with more than NUM_SHINGLES together by so many of them,
    which tells their similarity to 0.013 (one standard deviation). The index holds some 6 KB per prompt that is no
    duplicate, in the driver.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=bands(overlap))
    blank = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME)
    used: list[Hashes] = []
    for part in parts:
        lists = whole(part["signature"])
        values = np.asarray(lists.flatten()).reshape(-1, NUM_PERMUTATIONS)
        shingles = whole(part["shingles"])
        bounds, hashes = np.asarray(shingles.offsets), np.asarray(shingles.values)
        again = np.zeros(len(values), bool)
        for row, value in enumerate(values):
            found = blank.copy()
            found.hashvalues = value
            own = hashes[bounds[row] : bounds[row + 1]]
            again[row] = any(jaccard(own, used[number]) >= overlap for number in index.query(found))
            if not again[row]:
                index.insert(len(used), found, check_duplication=False)
                used.append(own.copy())
        yield again


def bands(overlap: float) -> tuple[int, int]:
    """Number of bands and rows of each, as long as may be for a share of FOUND at this similarity or more."""
    for rows in range(NUM_PERMUTATIONS // 2, 1, -1):
        if 1 - (1 - overlap**rows) ** (NUM_PERMUTATIONS // rows) >= FOUND:
            return NUM_PERMUTATIONS // rows, rows
    return NUM_PERMUTATIONS, 1


def jaccard(one: Hashes, other: Hashes) -> float:
    """Similarity of two sets of hashes, each the NUM_SHINGLES smallest of it (k minimum values)."""
    both = np.intersect1d(one, other, assume_unique=True)
    together = np.union1d(one, other)[:NUM_SHINGLES]
    return float(np.searchsorted(both, together[-1], side="right")) / len(together)


# --- contamination --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmarks:
    """The texts that prompts must not share `ngram` words in a row with, as GPT-3 was checked (arXiv:2005.14165, C).

    What counts is in one message, whoever speaks, in lower case and without punctuation. A text of fewer words, but
    ROW_WORDS or more, counts where a message has all of them in a row; a shorter one, of MESSAGE_WORDS or more, where a
    message is nothing else; one that is shorter still tells nothing: as "Yes" or "2", the choices of many benchmarks.
    Belongs to the process that read it: another's hashes differ.

    Attributes:
        grams: by their number of words, hashes of the word sequences to look for.
        messages: hashes of the word sequences that no message must be.
        digest: of the files' bytes; part of the fingerprint.
        num_texts: in the files.
    """

    grams: dict[int, frozenset[int]]
    messages: frozenset[int]
    digest: str
    num_texts: int

    def touch(self, text: str) -> bool:
        """Whether a message is one of the sequences, or holds one."""
        found = words(text.lower())
        return hash(tuple(found)) in self.messages or any(
            length <= len(found) and not wanted.isdisjoint(map(hash, grams(found, length)))
            for length, wanted in self.grams.items()
        )

    def touched(self, prompts: pa.Array | pa.ChunkedArray) -> Bools:
        """Which chats have a message that is one of the sequences, or holds one."""
        lists = whole(prompts)
        row = np.repeat(np.arange(len(lists)), np.asarray(lists.value_lengths(), np.int64))
        found = np.zeros(len(lists), bool)
        found[row[[self.touch(text) for text in lists.flatten().field("content").to_pylist()]]] = True
        return found


def benchmarks_of(prompts: PromptsConfig, options: dict[str, Any]) -> Benchmarks | None:
    """The benchmarks that the config names, read once per process; None where it names none."""
    if not prompts.decontaminate:
        return None
    return _read_benchmarks(tuple(prompts.decontaminate), prompts.ngram, json.dumps(options, sort_keys=True))


@functools.lru_cache(1)
def _read_benchmarks(paths: tuple[str, ...], ngram: int, options: str) -> Benchmarks:
    """Read benchmark files: every text in a Parquet or JSON (lines) file, at any depth, but roles of messages; every
    line of another.

    Raises ConfigError for a file that cannot be read.
    """
    found: dict[int, set[int]] = {}
    messages: set[int] = set()
    num_texts = 0
    digest = hashlib.sha256()
    for path in paths:
        try:
            fs, name = fsspec.core.url_to_fs(path, **json.loads(options))
            data = fs.cat_file(name)
            digest.update(hashlib.sha256(data).digest())
            texts = _texts(path, data)
            num_texts += len(texts)
            for text in texts:
                wanted = words(text.lower())
                if len(wanted) >= min(ngram, ROW_WORDS):
                    length = min(ngram, len(wanted))
                    found.setdefault(length, set()).update(map(hash, grams(wanted, length)))
                elif len(wanted) >= MESSAGE_WORDS:
                    messages.add(hash(tuple(wanted)))
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"prompts.decontaminate: cannot read {path}: {error}") from None
    wanted_grams = {length: frozenset(each) for length, each in found.items()}
    return Benchmarks(wanted_grams, frozenset(messages), digest.hexdigest()[:16], num_texts)


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
        yield from _strings([item for key, item in value.items() if key != "role"])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
