"""Conversations into pairs at full scale, beside the plain way: one scan of the table for every prompt.

Run   just bench data [--rows 2000000] [--plain-rows 80000]          (the defaults: minutes, 2 GB of disk)

Makes conversations in the schema of lmsys-chat-1m (about 2.5 KB each, prompts that repeat by a power law) and
runs `data_prep/lmsys1m_pairs.py` on them, in a process of its own as a user starts it. The plain way's time
grows with the square of the rows, so that it gets fewer; ours is timed at that size too.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl

from common.console import cli, say, show_table
from common.data.chats import assistant_turns, user_turns
from common.data.table import scan

SCRIPT = Path(__file__).resolve().parents[1] / "data_prep" / "lmsys1m_pairs.py"
ROWS_PER_FILE = 50_000
ROWS_PER_GROUP = 1000
"""As the hub's files have it."""
NUM_MODELS = 25
SHARE_REPEATED = 0.37
"""Of conversations whose prompt is drawn from those that many people send."""
SHARE_SAME_ANSWER = 0.05
"""Of conversations whose answer is drawn from three fixed ones of their prompt."""
LETTERS = list("etaoinshrdlucmfwypvbgkqjxz")
NUM_WORDS = 1_000_000
MOST_TURNS = 100
MOST_CHARACTERS = 16_000


WATCH = """
import resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
"""Seconds and peak memory of a command, by a small process: a child starts with the peak of its parent."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Conversations into pairs."""

    rows: int = 1_000_000
    """Conversations for our script."""
    plain_rows: int = 40_000
    """Conversations for both ways."""
    scratch: Path | None = None
    """Folder for the made files, about 1.6 GB per million rows, removed at the end; none: the system's."""

    def __post_init__(self) -> None:
        if min(self.rows, self.plain_rows) < 1:
            raise ValueError(f"--rows is {self.rows}, --plain-rows {self.plain_rows}; expected at least 1")


def main(args: Args) -> None:
    found = []
    for num_rows in (args.rows, args.plain_rows):
        with TemporaryDirectory(dir=args.scratch) as folder:
            write_conversations(Path(folder), num_rows)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            say(f"{num_rows:,} conversations made, {size / 1e9:.2f} GB")
            found.append(("lmsys1m_pairs.py", num_rows, *run_ours(Path(folder))))
            if num_rows == args.plain_rows:
                found.append(("one scan of the table per prompt", num_rows, *scan_per_prompt(Path(folder))))
    rows = [(way, f"{n:,}", f"{pairs:,}", f"{seconds:.1f}", peak) for way, n, pairs, seconds, peak in found]
    columns = ("way", "conversations", "pairs", "seconds", "peak GB")
    show_table(f"conversations into pairs, {os.cpu_count()} cores", columns, rows)


def run_ours(folder: Path) -> tuple[int, float, str]:
    """Pairs, seconds and peak memory of our script on a folder of conversations."""
    output = folder / "out" / "pairs.parquet"
    command = [sys.executable, str(SCRIPT), "--input", str(folder), "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{SCRIPT.name} ended with status {done.returncode}: {done.stderr.strip()}")
    seconds, peak = map(float, done.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    num_pairs = scan(output).select(pl.len()).collect().item()
    return num_pairs, seconds, f"{peak * unit / 1e9:.2f}"


def scan_per_prompt(folder: Path) -> tuple[int, float, None]:
    """Pairs and seconds of the plain way; the table in memory, reading not counted."""
    chat = "conversation"
    turns = {"prompt": user_turns(chat).list.join("\0"), "reply": assistant_turns(chat).list.join("\0")}
    table = scan(sorted(folder.glob("*.parquet"))).select("model", **turns).collect()
    began = time.perf_counter()
    table = table.unique(["prompt", "reply"], maintain_order=True)
    num_pairs = 0
    for prompt in table["prompt"].unique():
        num_pairs += table.filter(pl.col("prompt") == prompt)["model"].n_unique() // 2
    return num_pairs, time.perf_counter() - began, None


def write_conversations(folder: Path, num_rows: int, *, seed: int = 0) -> None:
    """Writes Parquet files in the schema of lmsys-chat-1m.

    Args:
        folder: Existing folder.
        num_rows: Conversations in all.
        seed: Of everything that is drawn.
    """
    draw = np.random.default_rng(seed)
    blob = make_blob(draw)
    num_shared = 1 + num_rows // 10
    for start in range(0, num_rows, ROWS_PER_FILE):
        rows = np.arange(start, min(start + ROWS_PER_FILE, num_rows))
        drawn = (num_shared * draw.random(len(rows)) ** 2).astype(int)
        prompts = np.where(draw.random(len(rows)) < SHARE_REPEATED, drawn, num_shared + rows)
        fixed = 3 * prompts + draw.integers(0, 3, len(rows))
        is_fixed = draw.random(len(rows)) < SHARE_SAME_ANSWER
        replies = np.where(is_fixed, fixed, 3 * (num_shared + num_rows) + rows)
        chats = make_chats(blob, prompts, replies)
        weights = 1 / np.arange(1, NUM_MODELS + 1)
        models = draw.choice(NUM_MODELS, len(rows), p=weights / weights.sum())
        table = pl.DataFrame({"conversation_id": rows, "model": models}).select(
            pl.col("conversation_id").cast(pl.String).str.zfill(32), model=pl.format("model-{}", "model")
        )
        rest = {"turn": chats["conversation"].list.len() // 2, "language": pl.lit("English")}
        path = folder / f"train-{start // ROWS_PER_FILE:05d}.parquet"
        table = table.hstack(chats).with_columns(**rest, redacted=pl.lit(False))
        table.write_parquet(path, row_group_size=ROWS_PER_GROUP, compression="snappy")


def make_blob(draw: np.random.Generator) -> str:
    """Words of a power law, from which every text is cut."""
    words = ["".join(draw.choice(LETTERS, n)) for n in draw.integers(2, 11, 20_000)] + ["naïve", "日本", "\n"]
    return " ".join([words[i] for i in (draw.zipf(1.2, NUM_WORDS) - 1) % len(words)])


def make_chats(blob: str, prompts: np.ndarray, replies: np.ndarray) -> pl.DataFrame:
    """`conversation` of each row: the prompt's number decides the user's turns, the reply's the answers."""
    num_turns = (1 - 1.2 * np.log(uniform(prompts))).astype(int)
    row = np.repeat(np.arange(len(prompts)), num_turns)
    turn = np.arange(len(row)) - np.repeat(np.cumsum(num_turns) - num_turns, num_turns)
    texts = np.empty(2 * len(row), dtype=object)
    texts[0::2] = cut(blob, MOST_TURNS * prompts[row] + turn, mean=200)
    texts[1::2] = cut(blob, MOST_TURNS * replies[row] + turn, mean=1300)
    messages = pl.DataFrame(
        {
            "row": np.repeat(row, 2),
            "role": np.tile(["user", "assistant"], len(row)),
            "content": pl.Series(texts.tolist(), dtype=pl.String),
        }
    )
    chats = messages.group_by("row", maintain_order=True).agg(conversation=pl.struct("content", "role"))
    return chats.select("conversation")


def cut(blob: str, numbers: np.ndarray, *, mean: int) -> list[str]:
    """A stretch of the blob for each number, the same for the same one; lengths are exponential."""
    lengths = (-mean * np.log(uniform(numbers))).astype(int).clip(2, MOST_CHARACTERS)
    starts = numbers * 1_000_003 % (len(blob) - MOST_CHARACTERS)
    return [blob[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def uniform(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers -> numbers between 0 and 1, both exclusive, that look random."""
    return (numbers * 2_654_435_761 % 2**24 + 0.5) / 2**24


if __name__ == "__main__":
    cli(main)
