"""Near-duplicate texts: MinHash and banding (datasketch) propose pairs, exact Jaccard similarity decides.

A shingle is a pair of neighbouring words of the text in lower case (a character of Chinese, Japanese or Thai
counts as a word). One word changed among twenty leaves a similarity of 0.81. A text of one word is one
shingle, so is a text without a letter or digit ("?!") as a whole; an empty text has none and is near nothing.

Source: Broder 1997, "On the resemblance and containment of documents"; banding as in Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import polars as pl
import xxhash
from datasketch import MinHash, MinHashLSH

from common.console import progress

SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
WORD = rf"[{SPACELESS}]|[\w--[{SPACELESS}]]+"
NUM_HASHES = 128
RECALL_AT_THRESHOLD = 0.99
"""Least chance that a pair just at the threshold is proposed; it grows with the similarity."""
TEXTS_PER_CHUNK = 5_000
PAIRS_PER_CHUNK = 250_000
SHINGLES_PER_CHUNK = 10_000_000
"""What one comparison of candidates holds at most, 4 bytes each, several times."""


def shingles(texts: pl.Series) -> pl.Series:
    """The set of shingles of each text, as 32-bit hashes: the same in every process and version.

    Args:
        texts: Strings, no nulls.

    Returns:
        List(UInt32), each list sorted and without repeats.
    """
    chunks = [pl.Series("shingles", [], dtype=pl.List(pl.UInt32))]
    with progress("shingling", len(texts), "texts") as advance:
        for start in range(0, len(texts), TEXTS_PER_CHUNK):
            chunk = texts[start : start + TEXTS_PER_CHUNK]
            words = chunk.str.normalize("NFKC").str.to_lowercase().str.extract_all(WORD)
            sets = [_shingles_of(*pair) for pair in zip(words.to_list(), chunk, strict=True)]
            chunks.append(pl.Series("shingles", sets, dtype=pl.List(pl.UInt32)))
            advance(len(chunk))
    return pl.concat(chunks)


def _shingles_of(words: list[str], text: str) -> list[int]:
    if len(words) > 1:
        parts = {f"{first} {second}" for first, second in pairwise(words)}
    else:
        parts = set(words or [text.strip()]) - {""}
    return sorted({xxhash.xxh32_intdigest(part.encode()) for part in parts})


def near_pairs(sets: pl.Series, *, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of sets whose Jaccard similarity is at least `threshold`, each pair once, in chunks.

    Every pair given is truly near; of those that are, a few just above the threshold may be missed
    (`RECALL_AT_THRESHOLD`). Memory does not grow with the number of pairs, time does: n texts alike are
    n (n - 1) / 2 pairs.

    Args:
        sets: List(UInt32) of shingles; empty sets are near nothing.
        threshold: From 0.2 to 1.

    Yields:
        (left, right, similarity): int64 positions in `sets`, left < right, and float64, all [pairs].
    """
    sizes = sets.list.len().to_numpy().astype(np.int64)
    for left, right in _candidates(sets, rows_per_band(threshold)):
        smaller, larger = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
        may_be = smaller >= threshold * larger  # else even the smaller one whole is too little
        left, right = left[may_be], right[may_be]
        similarity = jaccard(sets, left, right)
        near = similarity >= threshold
        if near.any():
            yield left[near], right[near], similarity[near]


def _candidates(sets: pl.Series, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (left < right) that share a band of `rows` hashes, in chunks of at least `PAIRS_PER_CHUNK`."""
    index = MinHashLSH(num_perm=NUM_HASHES, params=(NUM_HASHES // rows, rows))
    first = MinHash(num_perm=NUM_HASHES, hashfunc=int)  # the shingles are hashes already
    lefts, rights, num_pairs = [], [], 0
    with progress("comparing", len(sets), "texts") as advance:
        for right, values in enumerate(sets):
            advance(1)
            if values.is_empty():
                continue
            signature = MinHash(
                num_perm=NUM_HASHES, hashfunc=int, permutations=first.permutations, scheme=first.scheme
            )
            signature.update_batch(values.to_numpy())
            left = index.query(signature)
            index.insert(right, signature, check_duplication=False)
            lefts.append(np.array(left, dtype=np.int64))
            rights.append(np.full(len(left), right))
            num_pairs += len(left)
            if num_pairs >= PAIRS_PER_CHUNK:
                yield np.concatenate(lefts), np.concatenate(rights)
                lefts, rights, num_pairs = [], [], 0
    if num_pairs:
        yield np.concatenate(lefts), np.concatenate(rights)


def jaccard(sets: pl.Series, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Shared / all shingles of each pair (left[i], right[i]), exactly, float64 [pairs]."""
    sizes = sets.list.len().to_numpy().astype(np.int64)
    ends = np.cumsum(sizes[left] + sizes[right])
    cuts = np.flatnonzero(np.diff(ends // SHINGLES_PER_CHUNK)) + 1
    shared = [np.zeros(0, dtype=np.int64)]
    for lefts, rights in zip(np.split(left, cuts), np.split(right, cuts), strict=True):
        pairs = pl.DataFrame({"left": sets.gather(lefts), "right": sets.gather(rights)})
        common = pairs.select(pl.col("left").list.set_intersection("right").list.len())
        shared.append(common.to_series().to_numpy().astype(np.int64))
    count = np.concatenate(shared)
    return count / np.maximum(sizes[left] + sizes[right] - count, 1)


def rows_per_band(threshold: float) -> int:
    """The most hashes a band may have, so that a pair at the threshold is found often enough.

    Two texts of similarity s share a band of r hashes with chance s^r; 0.8 -> 6, 0.5 -> 3. There are at
    least two bands, as datasketch wants it. Its own choice weighs misses against needless candidates; here
    the exact similarity sorts those out, so that only misses count.
    """
    rows = range(1, NUM_HASHES // 2 + 1)
    fitting = [r for r in rows if 1 - (1 - threshold**r) ** (NUM_HASHES // r) >= RECALL_AT_THRESHOLD]
    return max(fitting, default=1)
