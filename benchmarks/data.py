"""Pairs out of a million single conversations: seconds and memory of the script, beside a scan per prompt.

Run   python benchmarks/data.py [--rows 500000 1000000 2000000] [--scratch /var/tmp]

Makes conversations in the schema of lmsys-chat-1m (about 2.5 KB each, prompts that repeat by a power law) and
runs `data_prep/lmsys1m_pairs.py` on them in a process of its own: wall time, peak memory. Beside it the plain
way, which looks through the whole table once for every prompt, at sizes where it still ends. The
"growth" columns compare a row with the one above it.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.console import cli, say, show_table

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data_prep" / "lmsys1m_pairs.py"
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
    """Conversations for our script, smallest first."""
    scan_rows: tuple[int, ...] = (20_000, 40_000, 80_000)
    """Conversations for the plain way, whose time grows with the square; none: leave it out."""
    scratch: Path | None = None
    """Folder for the made files, about 1.6 GB per million rows, removed at the end; none: the system's."""

    def __post_init__(self) -> None:
        if min((*self.rows, *self.scan_rows), default=1) < 1:
            raise ValueError(
                f"--rows are {self.rows}, --scan-rows {self.scan_rows}; expected numbers from 1 on"
            )


def main(args: Args) -> None:
    found = []
    for way, sizes in ((ours, args.rows), (scan_per_prompt, args.scan_rows)):
        previous = None
        for num_rows in sizes:
            with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
                made = write_conversations(Path(folder), num_rows)
                say(f"{num_rows:,} conversations made, {made / 1e9:.2f} GB")
                seconds, peak, num_pairs = way(Path(folder))
            growth = ("", "") if previous is None else (num_rows / previous[0], seconds / previous[1])
            found.append(
                (
                    way.__name__.replace("_", " "),
                    f"{num_rows:,}",
                    f"{num_pairs:,}",
                    f"{seconds:.1f}",
                    "-" if peak is None else f"{peak:.2f}",
                    *(f"{one:.2f}" if one else "" for one in growth),
                )
            )
            previous = (num_rows, seconds)
    columns = ("way", "rows", "pairs", "seconds", "peak GB", "growth of rows", "growth of seconds")
    show_table(f"single conversations into pairs, {os.cpu_count()} cores", columns, found)


def ours(folder: Path) -> tuple[float, float, int]:
    """(wall seconds, peak resident GB, pairs) of the script, started as a user starts it."""
    output = folder / "out" / "pairs.parquet"
    began = time.perf_counter()
    command = [sys.executable, SCRIPT, "--input", folder, "--output", output]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{SCRIPT} ended with status {process.returncode}; what it printed says why")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / 1e9, len(pl.read_parquet(output, columns=["id"]))


def scan_per_prompt(folder: Path) -> tuple[float, None, int]:
    """(wall seconds, nothing, pairs) of the plain way, tables in memory and reading not counted."""
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
    return time.perf_counter() - began, None, num_pairs


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
