"""Rows of every source as it is published, and the script that reads them."""

import csv
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import polars as pl
import pyarrow as pa

from common.data.table import LABELS
from data_prep import competition, external33k, lmsys1m_pairs, preference_sets


def chat(*contents: str | None) -> list[dict]:
    """user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


class Source(NamedTuple):
    """One script of data_prep/ and rows for it."""

    script: ModuleType
    make: Callable[[random.Random, int], dict]
    """Row i of a file."""
    column: str
    """One that holds a list."""

    def rows(self, count: int) -> list[dict]:
        draw = random.Random(0)
        return [self.make(draw, i) for i in range(count)]

    def run(self, *inputs: Path | str, output: Path, **flags: object) -> None:
        self.script.main(self.script.Args(input=tuple(map(str, inputs)), output=output, **flags))

    def path(self) -> str:
        return f"data_prep/{Path(self.script.__file__).name}"


def _vote(draw: random.Random, i: int) -> dict:
    prompt, *answers = ([f"{what} {draw.randint(0, 99)}", None, "é"] for what in ("p", "a", "b"))
    winner = draw.randrange(3)
    return {
        "id": str((i * 7919 % 100_003) * 40_000),
        **dict(zip(("model_a", "model_b"), draw.sample(["m1", "m2", "m3"], 2), strict=True)),
        **dict(zip(("prompt", "response_a", "response_b"), (prompt, *answers), strict=True)),
        **{label: float(c == winner) for c, label in enumerate(LABELS)},
    }


def _original_vote(draw: random.Random, i: int) -> dict:
    prompt = f"p {draw.randint(0, 150)}"
    return {
        "question_id": f"{i * 7919 % 100_003}",
        "model_a": "m1",
        "model_b": "m2",
        "winner": draw.choice(list(external33k.WINNERS)),
        "conversation_a": chat(prompt, draw.choice("xyz"), "é", None),
        "conversation_b": chat(prompt, draw.choice("xyz"), "é", "b"),
    }


def _conversation(draw: random.Random, i: int) -> dict:
    turns = (f"é {draw.randint(0, 60)}", draw.choice(["x", None, str(i)]))
    return {
        "conversation_id": f"c{i * 7919 % 100_003}",
        "model": f"m{draw.randint(0, 6)}",
        "conversation": chat(*turns),
    }


def _preference(draw: random.Random, i: int) -> dict:
    prompt = f"p {draw.randint(0, 60)}"
    return {
        "chosen": chat(prompt, draw.choice("wxyz")),
        "rejected": chat(prompt, draw.choice("12é")),
        "chosen_score": float(i % 3 + 2),
        "rejected_score": 1.5,
    }


SOURCES = {
    "competition": Source(competition, _vote, "prompt"),
    "external33k": Source(external33k, _original_vote, "conversation_a"),
    "lmsys1m_pairs": Source(lmsys1m_pairs, _conversation, "conversation"),
    "preference_sets": Source(preference_sets, _preference, "chosen"),
}


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """Writes rows as the name says: Parquet, CSV with lists as JSON, or JSON lines, also .gz and .zst."""
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
        return path
    if ".csv" in path.suffixes:
        cells = [[json.dumps(v) if isinstance(v, list | dict) else v for v in row.values()] for row in rows]
        with path.with_suffix(".part").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([rows[0].keys(), *cells])
        data = path.with_suffix(".part").read_bytes()
        path.with_suffix(".part").unlink()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path
