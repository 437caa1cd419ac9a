"""The competition's votes (train.csv, test.csv, other files of that form) -> comparisons with folds.

In    data/train.csv as published: UTF-8, every text column a JSON list with one string or null a turn; or the
      same columns as Parquet, JSON lines or a hub data set
Out   artifacts/data/arena55k.parquet (`common.data.table.SCHEMA`), in id order, and its manifest; with
      --skip-bad-rows also arena55k.rejected.parquet
Run   python data_prep/competition.py          (57,477 rows: under a minute, under 2 GB)
"""

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl

from common.console import cli, say
from common.data.sources.find import fetch
from common.data.sources.made import check_output, made_of, without_prompts, write_made
from common.data.sources.votes import open_competition, read_competition
from common.data.table import LABELS, is_labelled, labels_array
from common.runs import is_made

SOURCE = "arena55k"
MAX_FOLDS = 127
"""Folds are int8."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """The competition's votes into a comparison table."""

    input: tuple[str, ...] = ("data/train.csv",)
    """CSV, Parquet or JSON lines files (also .gz, .zst), folders of them, or hub ids OWNER/NAME. Columns: id,
    prompt, response_a, response_b; and, as train.csv has them, the models and the votes."""
    output: Path = Path("artifacts/data/arena55k.parquet")
    """Comparison Parquet to write."""
    source: str = SOURCE
    """Name of the data set; (source, id) names a comparison."""
    folds: int = 5
    """Number of folds, grouped by prompt and stratified by vote; 0: none."""
    exclude: tuple[Path, ...] = ()
    """Comparison tables; comparisons whose prompt stands in one of them are left out."""
    skip_bad_rows: bool = False
    """Leave bad rows out and list them in <output>.rejected.parquet, instead of stopping."""
    overwrite: bool = False
    """Replace an output that holds something else."""

    def __post_init__(self) -> None:
        if self.folds == 1 or not 0 <= self.folds <= MAX_FOLDS:
            raise ValueError(f"--folds is {self.folds}; expected 0 (no folds) or 2 to {MAX_FOLDS}")
        if not self.source:
            raise ValueError("--source is empty; expected a name such as " + SOURCE)
        check_output(self.output)


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = fetch(args.input, Path(folder))
        parameters = {
            "source": args.source,
            "folds": args.folds,
            "scikit_learn": version("scikit-learn") if args.folds else None,
        }
        wanted = made_of(files, parameters, args.exclude, script=__file__)
        if is_made(args.output, wanted, overwrite=args.overwrite, skip_bad_rows=args.skip_bad_rows):
            return
        raw = open_competition(files, args.source, Path(folder))
        frame, report = read_competition(raw, skip_bad_rows=args.skip_bad_rows)
    kept, dropped = without_prompts(frame, args.exclude)
    if args.folds and kept.select(is_labelled().any()).item():
        kept = with_folds(kept, num_folds=args.folds)
    write_made(args.output, kept, report, wanted=wanted, dropped=dropped)
    sizes = kept["fold"].drop_nulls().value_counts().sort("fold")["count"].to_list()
    folds = f"folds of {', '.join(map(str, sizes))}" if sizes else "no folds"
    say(f"{args.output}: {len(kept):,} comparisons, {folds}")


def with_folds(frame: pl.DataFrame, *, num_folds: int) -> pl.DataFrame:
    """Assigns every labelled comparison to a validation fold; unlabelled ones get none.

    A prompt is in one fold only, and all folds have about the same share of each vote. The assignment does
    not depend on the order of the rows, but it does on the version of scikit-learn: record it.

    Args:
        frame: Comparisons (`SCHEMA`).
        num_folds: 2 or more.

    Returns:
        The frame with `fold` from 0 to num_folds - 1.

    Raises:
        ValueError: Too few prompts or votes of a kind for so many folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # only folds need it, reading does not

    votes = frame.filter(is_labelled()).select("source", "id", "prompt", *LABELS).sort("source", "id")
    numbers: dict[tuple, int] = {}
    prompts = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in votes["prompt"].to_list()]
    winners = labels_array(votes).argmax(axis=1)
    rarest = min(count for count in np.bincount(winners, minlength=3) if count) if len(votes) else 0
    way_out = "pass a smaller --folds, or 0 for none"
    if min(len(numbers), rarest) < num_folds:
        raise ValueError(
            f"{len(votes):,} labelled comparisons of {len(numbers):,} different prompts, the rarest vote "
            f"{rarest} times, are too few for {num_folds} folds; {way_out}"
        )
    folds = np.zeros(len(votes), dtype=np.int8)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    for i, (_, held_out) in enumerate(splitter.split(winners, winners, prompts)):
        folds[held_out] = i
    if len(np.unique(folds)) < num_folds:
        raise ValueError(f"{num_folds} folds of {len(numbers):,} prompts leave one empty; {way_out}")
    assigned = votes.select("source", "id", pl.Series("fold", folds))
    joined = frame.drop("fold").join(assigned, on=["source", "id"], how="left", maintain_order="left")
    return joined.select(frame.columns)


if __name__ == "__main__":
    cli(main)
