"""Pairs out of a million single conversations, and what is in them: seconds and memory.

Run   just bench data [--rows 500000 1000000 2000000] [--checkpoint artifacts/demo/models/tiny-gemma]

Makes conversations in the schema of lmsys-chat-1m (about 2.5 KB each, prompts that repeat by a power law) and
runs our scripts on them, each in a process of its own: `data_prep/lmsys1m_pairs.py`, then `leak_check.py` on
the pairs and, with a tokenizer, `summary.py` on up to 100,000 of them. Beside the first the plain way, which
looks through the whole table once for every prompt, at sizes where it still ends. The "growth" columns
compare a row with the one above it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from common.console import cli, say, show_table

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_prep"
NUM_TOKENISED = 100_000
"""Most pairs whose tokens are counted."""
ROWS_PER_FILE = 250_000
ROWS_PER_GROUP = 1000
"""As the hub's files have it."""
NUM_MODELS = 25
SHARE_REPEATED = 0.37
"""Of conversations whose prompt is drawn from those that many people send."""
SHARE_SAME_ANSWER = 0.05
"""Of conversations whose answer is drawn from three fixed ones of their prompt."""
LETTERS = list("etaoinshrdlucmfwypvbgkqjxz")
BLOB_CHARACTERS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Args:
    """Conversations into pairs, at growing sizes."""

    rows: tuple[int, ...] = (500_000, 1_000_000, 2_000_000)
    """Conversations for our scripts, smallest first."""
    scan_rows: tuple[int, ...] = (20_000, 40_000, 80_000)
    """Conversations for the plain way, whose time grows with the square; none: leave it out."""
    checkpoint: str | None = None
    """Checkpoint (folder, short name or hub id) whose tokenizer counts tokens; none: they are not counted."""
    scratch: Path | None = None
    """Folder for the made files, about 1.6 GB per million rows, removed at the end; none: the system's."""

    def __post_init__(self) -> None:
        if min((*self.rows, *self.scan_rows), default=1) < 1:
            raise ValueError(
                f"--rows are {self.rows}, --scan-rows {self.scan_rows}; expected numbers from 1 on"
            )


class Measured(NamedTuple):
    """One run of one way."""

    num_rows: int
    num_results: int
    seconds: float
    peak_gb: float | None
    """Peak resident memory; none where it was not measured."""


def main(args: Args) -> None:
    ways: dict[str, list[Measured]] = {}
    for num_rows in args.rows:
        with made(num_rows, args.scratch) as folder:
            for way, measured in ours(folder, num_rows, args.checkpoint).items():
                ways.setdefault(way, []).append(measured)
    for num_rows in args.scan_rows:
        with made(num_rows, args.scratch) as folder:
            ways.setdefault("one scan of the table per prompt", []).append(scan_per_prompt(folder, num_rows))
    columns = ("way", "rows", "results", "seconds", "peak GB", "growth of rows", "growth of seconds")
    rows = [row for way, measured in ways.items() for row in described(way, measured)]
    show_table(f"single conversations into pairs, {os.cpu_count()} cores", columns, rows)


@contextmanager
def made(num_rows: int, scratch: Path | None) -> Iterator[Path]:
    """A temporary folder of conversations."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        size = write_conversations(Path(folder), num_rows)
        say(f"{num_rows:,} conversations made, {size / 1e9:.2f} GB")
        yield Path(folder)


def described(way: str, measured: Sequence[Measured]) -> Iterator[tuple[str | None, ...]]:
    """Lines of the table."""
    for i, one in enumerate(measured):
        before = measured[i - 1] if i else None
        yield (
            way,
            f"{one.num_rows:,}",
            f"{one.num_results:,}",
            f"{one.seconds:.1f}",
            one.peak_gb and f"{one.peak_gb:.2f}",
            before and f"{one.num_rows / before.num_rows:.2f}",
            before and f"{one.seconds / before.seconds:.2f}",
        )


def ours(folder: Path, num_rows: int, checkpoint: str | None) -> dict[str, Measured]:
    """What our scripts take, each started as a user starts it."""
    pairs, part = folder / "out" / "pairs.parquet", folder / "part" / "pairs.parquet"
    found = {}
    seconds, peak = run("lmsys1m_pairs.py", "--input", folder, "--output", pairs)
    num_pairs = pl.scan_parquet(pairs).select(pl.len()).collect().item()
    found["lmsys1m_pairs.py (results: pairs)"] = Measured(num_rows, num_pairs, seconds, peak)
    leaks = folder / "leaks.parquet"
    seconds, peak = run("leak_check.py", "--input", pairs, "--output", leaks)
    num_leaks = len(pl.read_parquet(leaks, columns=["id"])) if leaks.exists() else 0
    found["leak_check.py (results: to take out)"] = Measured(num_pairs, num_leaks, seconds, peak)
    if checkpoint:
        num_counted = min(num_pairs, NUM_TOKENISED)
        part.parent.mkdir()
        pl.scan_parquet(pairs).head(num_counted).sink_parquet(part)
        seconds, peak = run("summary.py", "--input", part, "--output", folder, "--checkpoint", checkpoint)
        num_tokens = json.loads((folder / "summary.json").read_text())["tables"]["pairs"]["tokens"]["total"]
        found["summary.py (results: tokens)"] = Measured(num_counted, num_tokens, seconds, peak)
    return found


def run(script: str, *arguments: object) -> tuple[float, float]:
    """(wall seconds, peak resident GB) of one of our scripts."""
    began = time.perf_counter()
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{script} ended with status {process.returncode}; what it printed says why")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / 1e9


def scan_per_prompt(folder: Path, num_rows: int) -> Measured:
    """The plain way; the table in memory, reading not counted."""
    chats = pl.col("conversation")
    table = pl.read_parquet(folder / "*.parquet").select(
        "model",
        prompt=chats.list.gather_every(2, 0).list.eval(pl.element().struct.field("content")).list.join("\n"),
        reply=chats.list.gather_every(2, 1).list.eval(pl.element().struct.field("content")).list.join("\n"),
    )
    began = time.perf_counter()
    table = table.unique(["prompt", "reply"], maintain_order=True)
    num_pairs = 0
    for prompt in table["prompt"].unique():
        group = table.filter(pl.col("prompt") == prompt)
        num_pairs += group["model"].n_unique() // 2
    return Measured(num_rows, num_pairs, time.perf_counter() - began, None)


def write_conversations(folder: Path, num_rows: int, *, seed: int = 0) -> int:
    """Writes Parquet files in the schema of lmsys-chat-1m; returns their bytes.

    Args:
        folder: Existing folder.
        num_rows: Conversations in all.
        seed: Of everything that is drawn.
    """
    draw = np.random.default_rng(seed)
    blob = make_blob(draw)
    weights = 1 / np.arange(1, NUM_MODELS + 1)
    total = 0
    for start in range(0, num_rows, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, num_rows - start)
        models = draw.choice(NUM_MODELS, count, p=weights / weights.sum())
        path = folder / f"train-{start // ROWS_PER_FILE:05d}.parquet"
        parts = [
            make_chunk(draw, blob, models[i : i + 25_000], first_row=start + i, num_shared=1 + num_rows // 10)
            for i in range(0, count, 25_000)
        ]
        pl.concat(parts).write_parquet(path, row_group_size=ROWS_PER_GROUP, compression="snappy")
        total += path.stat().st_size
    return total


def make_blob(draw: np.random.Generator) -> str:
    """Words of a power law, from which every text is cut."""
    words = ["".join(draw.choice(LETTERS, n)) for n in draw.integers(2, 11, 20_000)] + ["naïve", "日本", "\n"]
    picked = (draw.zipf(1.2, BLOB_CHARACTERS // 4) - 1) % len(words)
    return " ".join([words[i] for i in picked])


def make_chunk(
    draw: np.random.Generator, blob: str, models: np.ndarray, *, first_row: int, num_shared: int
) -> pl.DataFrame:
    """Conversations in a row: the prompt's number decides its turns and texts, the row its answers."""
    count = len(models)
    rows = np.arange(first_row, first_row + count)
    is_shared = draw.random(count) < SHARE_REPEATED
    prompts = np.where(is_shared, (num_shared * draw.random(count) ** 2).astype(int) * 2, rows * 2 + 1)
    is_same = draw.random(count) < SHARE_SAME_ANSWER
    replies = np.where(is_same, prompts * 3 + draw.integers(0, 3, count), -1 - rows)
    num_turns = 1 + (-1.2 * np.log(uniform(mixed(prompts, 1)))).astype(int)
    prompt_of, reply_of = np.repeat(prompts, num_turns), np.repeat(replies, num_turns)
    turn = np.arange(num_turns.sum()) - np.repeat(np.cumsum(num_turns) - num_turns, num_turns)
    texts = np.empty(2 * len(turn), dtype=object)
    texts[0::2] = cut(blob, mixed(prompt_of, 2 + turn), median=100)
    texts[1::2] = cut(blob, mixed(reply_of, 50 + turn), median=750)
    messages = pl.DataFrame(
        {
            "row": np.repeat(np.arange(count), 2 * num_turns),
            "role": np.tile(["user", "assistant"], len(turn)),
            "content": pl.Series(texts.tolist(), dtype=pl.String),
        }
    )
    chats = messages.group_by("row", maintain_order=True).agg(conversation=pl.struct("content", "role"))
    return pl.DataFrame(
        {
            "conversation_id": [
                f"{a:016x}{b:016x}" for a, b in zip(mixed(rows, 98), mixed(rows, 99), strict=True)
            ],
            "model": pl.Series(models).cast(pl.String).str.replace("^", "model-"),
            "conversation": chats["conversation"],
            "turn": num_turns,
            "language": ["English"] * count,
            "redacted": [False] * count,
        }
    )


def mixed(numbers: np.ndarray, salt: int | np.ndarray) -> np.ndarray:
    """A number -> 64 bits that look random (splitmix64)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.asarray(salt, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def cut(blob: str, bits: np.ndarray, *, median: int) -> list[str]:
    """A stretch of the blob for each 64 bits; lengths are log-normal."""
    u = uniform(bits)
    spread = np.log(u / (1 - u)) / 1.7  # about a normal variable
    lengths = (median * np.exp(spread)).astype(int).clip(2, 16_000)
    starts = ((bits & np.uint64(0xFFFFFFFF)) % np.uint64(len(blob) - 16_001)).astype(int)
    return [blob[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def uniform(bits: np.ndarray) -> np.ndarray:
    """64 bits -> a number between 0 and 1, both exclusive, from the upper 24."""
    return ((bits >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24


if __name__ == "__main__":
    cli(main)
