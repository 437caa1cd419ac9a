"""Near-duplicate texts: MinHash signatures propose pairs, the exact Jaccard similarity of shingles decides.

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

from common.console import progress

SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
WORD = rf"[{SPACELESS}]|[\w--[{SPACELESS}]]+"
NUM_HASHES = 128
RECALL_AT_THRESHOLD = 0.99
"""Least chance that a pair just at the threshold is proposed; it grows with the similarity."""
TEXTS_PER_CHUNK = 5_000
PAIRS_PER_CHUNK = 250_000
SHINGLES_PER_CHUNK = 10_000_000
"""What one comparison of candidates holds at most, 8 bytes each, several times."""


def shingles(texts: pl.Series) -> pl.Series:
    """The set of shingles of each text, as 64-bit hashes: the same in every process and version.

    Args:
        texts: Strings, no nulls.

    Returns:
        List(UInt64), each list sorted and without repeats.
    """
    chunks = []
    with progress("shingling", len(texts), "texts") as advance:
        for start in range(0, len(texts), TEXTS_PER_CHUNK):
            chunk = texts[start : start + TEXTS_PER_CHUNK]
            words = chunk.str.normalize("NFKC").str.to_lowercase().str.extract_all(WORD)
            sets = [_shingles_of(*pair) for pair in zip(words.to_list(), chunk, strict=True)]
            chunks.append(pl.Series("shingles", sets, dtype=pl.List(pl.UInt64)))
            advance(len(chunk))
    return pl.concat(chunks) if chunks else pl.Series("shingles", [], dtype=pl.List(pl.UInt64))


def _shingles_of(words: list[str], text: str) -> list[int]:
    if len(words) > 1:
        parts = {f"{first} {second}" for first, second in pairwise(words)}
    else:
        parts = set(words or [text.strip()]) - {""}
    return sorted({xxhash.xxh3_64_intdigest(part.encode()) for part in parts})


def near_pairs(sets: pl.Series, *, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of sets whose Jaccard similarity is at least `threshold`, each pair once, in chunks.

    Every pair given is truly near; of those that are, a few just above the threshold may be missed
    (`RECALL_AT_THRESHOLD`). Memory does not grow with the number of pairs, time does: n texts alike are
    n (n - 1) / 2 pairs.

    Args:
        sets: List(UInt64) of shingles; empty sets are near nothing.
        threshold: From 0.2 to 1.

    Yields:
        (left, right, similarity): int64 positions in `sets`, left < right, and float64, all [pairs].
    """
    sizes = sets.list.len().to_numpy().astype(np.int64)
    used = np.flatnonzero(sizes)
    if len(used) < 2:
        return
    bands = _band_hashes(sets, used, rows_per_band(threshold))
    total = sum(int(_partners(np.sort(band)).sum()) for band in bands)
    with progress("comparing", total, "candidate pairs") as advance:
        for k, band in enumerate(bands):
            for left, right in _pairs_in_buckets(band):
                advance(len(left))
                is_new = np.ones(len(left), dtype=bool)
                for earlier in bands[:k]:  # a pair counts in the first band that proposes it
                    is_new &= earlier[left] != earlier[right]
                left, right = used[left[is_new]], used[right[is_new]]
                left, right = np.minimum(left, right), np.maximum(left, right)
                smaller, larger = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
                may_be = smaller >= threshold * larger  # else even the smaller one whole is too little
                left, right = left[may_be], right[may_be]
                similarity = jaccard(sets, left, right)
                near = similarity >= threshold
                if near.any():
                    yield left[near], right[near], similarity[near]


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

    Two texts of similarity s share a band of r hashes with chance s^r; 0.8 -> 6, 0.5 -> 3.
    """
    rows = range(1, NUM_HASHES + 1)
    fitting = [r for r in rows if 1 - (1 - threshold**r) ** (NUM_HASHES // r) >= RECALL_AT_THRESHOLD]
    return max(fitting, default=1)


def _band_hashes(sets: pl.Series, used: np.ndarray, rows: int) -> np.ndarray:
    """One hash of `rows` MinHashes a band: uint64 [bands, texts]; equal where the texts share the band."""
    random = np.random.default_rng(0)
    factors = random.integers(1, 2**63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 2**63, NUM_HASHES, dtype=np.uint64)
    bands = np.zeros((NUM_HASHES // rows, len(used)), dtype=np.uint64)
    with progress("hashing", len(used), "texts") as advance:
        for start in range(0, len(used), TEXTS_PER_CHUNK):
            chunk = sets.gather(used[start : start + TEXTS_PER_CHUNK])
            starts = np.concatenate([[0], np.cumsum(chunk.list.len().to_numpy(), dtype=np.int64)[:-1]])
            flat = chunk.explode().to_numpy()
            for i in range(len(bands) * rows):
                smallest = np.minimum.reduceat((flat * factors[i] + offsets[i]) >> np.uint64(32), starts)
                band = bands[i // rows, start : start + len(chunk)]
                band[:] = (band ^ smallest) * np.uint64(0x9E3779B97F4A7C15)  # uint64 wraps, as meant
                band ^= band >> np.uint64(29)
            advance(len(chunk))
    return bands


def _partners(ordered: np.ndarray) -> np.ndarray:
    """How many equal values follow each one in a sorted array: [3, 3, 3, 7] -> [2, 1, 0, 0]."""
    return np.searchsorted(ordered, ordered, side="right") - np.arange(len(ordered)) - 1


def _pairs_in_buckets(band: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of equal values, pair by pair, in chunks of about `PAIRS_PER_CHUNK`."""
    order = np.argsort(band, kind="stable")
    counts = _partners(band[order])
    cuts = np.flatnonzero(np.diff(np.cumsum(counts) // PAIRS_PER_CHUNK)) + 1
    for positions in np.split(np.arange(len(band)), cuts):
        count = counts[positions]
        first = np.repeat(positions, count)
        steps = np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count) + 1
        if len(first):
            yield order[first], order[first + steps]
