"""Data preparation at full scale: seconds and memory of each script, beside one scan of the table per prompt.

Run   just bench data [--rows 500000 1000000 2000000] [--checkpoint artifacts/demo/models/tiny-gemma]

Makes conversations in the schema of lmsys-chat-1m (about 2.5 KB each, prompts that repeat by a power law) and
runs `data_prep/lmsys1m_pairs.py` on them, then the other scripts on what it made: `leak_check.py` on the
pairs, `competition.py` on as many of them as train.csv has rows, as a CSV with votes, `preference_sets.py` on
all of them as chosen and rejected chats and, with a tokenizer, `summary.py` on up to 100,000. Each runs in a
process of its own, as a user starts it. Beside the first the plain way, which looks through the whole table
once for every prompt, at sizes where it still ends. The "growth" columns compare a row with the one above it.
"""

import csv
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
from common.data.table import LABELS, TEXTS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "data_prep"
NUM_VOTES = 57_477
"""Most rows of the CSV of votes, as many as the competition's train.csv has."""
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


WATCH = """
import pathlib, resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.run(sys.argv[2:]).returncode
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
pathlib.Path(sys.argv[1]).write_text(f"{seconds} {peak}")
sys.exit(status)
"""
"""Seconds and peak memory of a command, by a small process: a child starts with the peak of its parent."""


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

    way: str
    num_rows: int
    num_kept: int | None
    """Comparisons that came of it."""
    seconds: float
    peak_gb: float | None
    """Peak resident memory; none where it was not measured."""


def main(args: Args) -> None:
    found: list[Measured] = []
    for num_rows in args.rows:
        with made(num_rows, args.scratch) as folder:
            for one in ours(folder, num_rows, args.checkpoint):
                say(f"{one.way}: {one.num_rows:,} rows in {one.seconds:.1f} s")
                found.append(one)
    for num_rows in args.scan_rows:
        with made(num_rows, args.scratch) as folder:
            found.append(scan_per_prompt(folder, num_rows))
    columns = ("way", "rows", "kept", "seconds", "peak GB", "growth of rows", "growth of seconds")
    show_table(f"data preparation, {os.cpu_count()} cores", columns, described(found))


@contextmanager
def made(num_rows: int, scratch: Path | None) -> Iterator[Path]:
    """A temporary folder of conversations."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        size = write_conversations(Path(folder), num_rows)
        say(f"{num_rows:,} conversations made, {size / 1e9:.2f} GB")
        yield Path(folder)


def described(found: Sequence[Measured]) -> Iterator[tuple[str | None, ...]]:
    """Lines of the table, the runs of a way below each other."""
    for way in dict.fromkeys(one.way for one in found):
        before = None
        for one in (one for one in found if one.way == way):
            yield (
                way,
                f"{one.num_rows:,}",
                one.num_kept and f"{one.num_kept:,}",
                f"{one.seconds:.1f}",
                one.peak_gb and f"{one.peak_gb:.2f}",
                before and f"{one.num_rows / before.num_rows:.2f}",
                before and f"{one.seconds / before.seconds:.2f}",
            )
            before = one


def ours(folder: Path, num_rows: int, checkpoint: str | None) -> Iterator[Measured]:
    """What our scripts take on a folder of conversations and on what they make of it."""
    out = folder / "out"
    pairs = out / "pairs.parquet"
    yield measure("lmsys1m_pairs.py", num_rows, pairs, "--input", folder)
    table = pl.read_parquet(pairs)
    yield measure("leak_check.py", len(table), out / "leaks.parquet", "--input", pairs)
    votes, sets = folder / "train.csv", folder / "sets.parquet"
    num_votes = write_votes(table, votes)
    yield measure("competition.py", num_votes, out / "votes.parquet", "--input", votes)
    write_preferences(table, sets)
    yield measure("preference_sets.py", len(table), out / "sets.parquet", "--input", sets)
    if checkpoint:
        some = table.head(NUM_TOKENISED)
        some.write_parquet(folder / "some.parquet")
        flags = ("--input", folder / "some.parquet", "--checkpoint", checkpoint)
        yield measure("summary.py", len(some), out, *flags)


def measure(script: str, num_rows: int, output: Path, *arguments: object) -> Measured:
    """One of our scripts, which reads `num_rows` rows and writes `output`."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments), "--output", str(output)]
    with tempfile.NamedTemporaryFile("r") as result:
        watching = [sys.executable, "-c", WATCH, result.name, *command]
        if status := subprocess.run(watching, stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"{script} ended with status {status}; what it printed says why")
        seconds, peak = map(float, result.read().split())
    num_kept = pl.scan_parquet(output).select(pl.len()).collect().item() if output.is_file() else None
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(script, num_rows, num_kept, seconds, peak * unit / 1e9)


def write_votes(table: pl.DataFrame, path: Path) -> int:
    """Pairs as the competition publishes votes, every third one a tie; returns the rows."""
    some = table.head(NUM_VOTES)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "model_a", "model_b", *TEXTS, *LABELS))
        for i, (a, b, *texts) in enumerate(some.select("model_a", "model_b", *TEXTS).iter_rows()):
            writer.writerow((i, a, b, *map(json.dumps, texts), *(int(i % 3 == c) for c in range(3))))
    return len(some)


def write_preferences(table: pl.DataFrame, path: Path) -> None:
    """Pairs as chats: A is chosen."""

    def chat(answers: str) -> pl.Expr:
        """Of one turn, whatever the number of turns."""
        roles = {"user": pl.col("prompt"), "assistant": pl.col(answers)}
        return pl.concat_list(
            pl.struct(role=pl.lit(role), content=turns.list.first()) for role, turns in roles.items()
        )

    columns = {"chosen": chat("response_a"), "rejected": chat("response_b")}
    scores = {"chosen_score": pl.lit(2), "rejected_score": pl.lit(0.5)}
    table.select(**columns, **scores).write_parquet(path)


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
    seconds = time.perf_counter() - began
    return Measured("one scan of the table per prompt", num_rows, num_pairs, seconds, None)


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
