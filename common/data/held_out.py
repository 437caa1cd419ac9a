"""What may be trained on and what may be scored: folds, labels, and what a checkpoint has already seen."""

import os
from pathlib import Path
from typing import Literal

import polars as pl

from common.console import say
from common.data.table import content_hashes, is_labelled, read_comparisons, scan, write_table
from common.files import confined

Seen = Literal["refuse", "drop"]


def default_tables(artifacts: Path, *names: str) -> tuple[Path, ...]:
    """Those of the tables that a stage reads by default that are there; it says which are not.

    Raises:
        ValueError: None is there.
    """
    paths = [artifacts / "data" / f"{name}.parquet" for name in names]
    there = tuple(path for path in paths if os.path.lexists(path))
    absent = ", ".join(str(path) for path in paths if path not in there)
    if not there:
        raise ValueError(
            f"none of the default tables is there: {absent}. Make {names[0]}.parquet with just prep from "
            "what docs/data.md names, or name others on the command line"
        )
    if absent:
        say(f"not there, so left out: {absent} (just prep makes what it finds raw files for)")
    return there


def load_comparisons(paths: tuple[Path, ...], *, artifacts: Path, skip_bad_rows: bool) -> pl.DataFrame:
    """Reads comparison tables and says what was read.

    Args:
        paths: Parquets, in this order.
        artifacts: Folder below which bad rows are listed.
        skip_bad_rows: Leave bad rows out instead of stopping.
    """
    frame, report = read_comparisons(paths, skip_bad_rows=skip_bad_rows)
    say(str(report))
    if len(report.rejected):
        side = artifacts / "rejected" / f"{'+'.join(path.stem for path in paths)}.parquet"
        write_table(report.rejected, side)
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


def require_labels(stage: str, *frames: pl.DataFrame | None) -> None:
    """What teaches and what scores must carry labels, votes or soft ones; a ValueError before any work."""
    for frame in frames:
        if frame is not None and len(unlabelled := frame.filter(~is_labelled())):
            raise ValueError(
                f"{stage} needs labels, but {len(unlabelled):,} of {len(frame):,} comparisons have none, "
                f"first {'/'.join(unlabelled.select('source', 'id').row(0))}; is this an unlabelled pool? "
                "Label it with stages/pseudo_label.py and train stage 2 on it"
            )


def all_trained_on(train: pl.DataFrame, parent: Path) -> pl.Series:
    """Content hashes of `train` and of everything that the checkpoint `parent` or an ancestor was trained on.

    Returns:
        Series "content_hash", sorted, each once.
    """
    hashes = content_hashes(train)
    if (parent / "trained_on.parquet").is_file():
        hashes = pl.concat([hashes, read_trained_on(parent)], rechunk=True)
    return hashes.unique().sort().alias("content_hash")


def read_trained_on(checkpoint: Path) -> pl.Series:
    """Content hashes of every comparison that a checkpoint or an ancestor was trained on.

    Raises:
        ValueError: There is no such checkpoint, or its trained_on.parquet is absent, a link that
            leaves it, or cannot be read.
    """
    path = checkpoint / "trained_on.parquet"
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a folder; expected a checkpoint that a stage has written")
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no trained_on.parquet, so what it was trained on is not known: it is not a "
            "finished checkpoint of ours. Finish its stage, or name another folder"
        )
    confined(checkpoint, path.name)
    try:
        return scan(path).select("content_hash").collect().to_series()
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}. Copy it again or train again") from error


def unseen(held_out: pl.DataFrame, trained_on: pl.Series) -> pl.DataFrame:
    """Held-out rows that no ancestor was trained on; the others are counted.

    Args:
        held_out: Comparisons.
        trained_on: As of `all_trained_on`.

    Raises:
        ValueError: None is left.
    """
    seen = content_hashes(held_out).is_in(trained_on.implode())
    if seen.all():
        raise ValueError(
            "every held-out comparison was trained on by this model or an ancestor, so there is nothing to "
            "score. Take another --held-out-fold, or --final in stage 3"
        )
    if seen.any():
        say(f"{seen.sum():,} held-out rows were trained on by an ancestor and are not scored")
    return held_out.filter(~seen)


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
