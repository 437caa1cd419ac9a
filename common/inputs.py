"""What stages read: comparison tables, the held-out fold, finished checkpoints and their past."""

from pathlib import Path
from typing import Literal

import polars as pl

from common.console import say
from common.data.table import content_hashes, read_comparisons, write_rejected
from common.files import file_hash, read_json, text_hash
from common.prompts import INSTRUCTION
from common.train.recipe import Execution

Seen = Literal["refuse", "drop"]


def load_comparisons(paths: tuple[Path, ...], execution: Execution) -> pl.DataFrame:
    """Reads comparison tables and says what was read; bad rows stop, or land beside the artifacts."""
    frame, report = read_comparisons(paths, skip_bad_rows=execution.skip_bad_rows)
    say(str(report))
    if len(report.rejected):
        side = execution.artifacts / "rejected" / f"{'+'.join(path.stem for path in paths)}.parquet"
        write_rejected(report, side)
        say(f"{len(report.rejected)} rejected rows are in {side}")
    return frame


def split_fold(votes: pl.DataFrame, held_out_fold: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(train, held out): rows of one fold are held out; rows without a fold always train.

    Raises:
        ValueError: The fold is empty.
    """
    is_held_out = (pl.col("fold") == held_out_fold).fill_null(False)
    held_out, train = votes.filter(is_held_out), votes.filter(~is_held_out)
    if held_out.is_empty():
        folds = sorted(votes["fold"].drop_nulls().unique().to_list())
        raise ValueError(f"--held-out-fold {held_out_fold} holds no comparison; folds present: {folds}")
    return without_content_of(train, held_out), held_out


def without_content_of(train: pl.DataFrame, held_out: pl.DataFrame) -> pl.DataFrame:
    """`train` less the rows with the content of a held-out row, in either order; they are counted."""
    leaked = content_hashes(train).is_in(content_hashes(held_out).implode())
    if leaked.any():
        say(f"{leaked.sum():,} training rows have the content of a held-out row and are left out")
    return train.filter(~leaked)


def read_instruction(path: Path | None) -> str:
    """The instruction in a text file, or ours."""
    if path is None:
        return INSTRUCTION
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--instruction {path} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"--instruction {path} is empty")
    return text


def checkpoint_hash(folder: Path) -> str:
    """Identity of a checkpoint: its weights, configuration and preference head settings."""
    names = ("*.safetensors", "config.json", "preference.json")
    files = sorted(path for name in names for path in folder.glob(name))
    return text_hash(*(f"{path.name} {file_hash(path)}" for path in files))


def find_complete(folder: Path) -> tuple[Path, ...]:
    """Folders of finished validation runs below `folder`, by name; finals are left out.

    Raises:
        ValueError: There is none.
    """
    found = tuple(
        path.parent
        for path in sorted(folder.glob("*/run.json"))
        if read_json(path).get("status") == "complete" and not path.parent.name.endswith("-final")
    )
    if not found:
        raise ValueError(f"{folder} holds no finished run; train one first, or name checkpoints")
    return found


def read_trained_on(checkpoint: Path) -> pl.Series:
    """Content hashes of every comparison that a checkpoint or an ancestor was trained on.

    Raises:
        ValueError: There is no such checkpoint, or its trained_on.parquet is absent or cannot be read.
    """
    path = checkpoint / "trained_on.parquet"
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a folder; expected a checkpoint that a stage has written")
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no trained_on.parquet, so what it was trained on is not known: it is not a "
            "finished checkpoint of ours. Finish its stage, or name another folder"
        )
    try:
        return pl.read_parquet(path, columns=["content_hash"]).to_series()
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}. Copy it again or train again") from error


def without_seen(frame: pl.DataFrame, checkpoint: Path, seen: Seen) -> pl.DataFrame:
    """`frame` less the comparisons that a checkpoint or its ancestors were trained on.

    Raises:
        ValueError: There are some and `seen` is "refuse"; or it cannot be known.
    """
    is_seen = content_hashes(frame).is_in(read_trained_on(checkpoint).implode())
    if is_seen.any() and seen == "refuse":
        first = frame.filter(is_seen).select("source", "id").row(0)
        raise ValueError(
            f"{checkpoint} was trained on {is_seen.sum():,} of these {len(frame):,} comparisons, first "
            f"{'/'.join(first)}: its answers for them are worthless. Take others, or say --seen drop"
        )
    if is_seen.any():
        say(f"{is_seen.sum():,} comparisons that {checkpoint} was trained on are left out")
    return frame.filter(~is_seen)
