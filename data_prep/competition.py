"""The competition's CSV (train.csv, test.csv, the 21k votes of the same form) -> comparisons with folds.

In    data/train.csv as published: UTF-8, every text column a JSON list with one string or null a turn
Out   artifacts/data/arena55k.parquet (`common.pairs.SCHEMA`) and its manifest; with --skip-bad-rows also
      arena55k.rejected.parquet
Run   python data_prep/competition.py          (57,477 rows: under a minute, under 2 GB)
"""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl

from common.competition_csv import REQUIRED, BadRowError, check_header, parse_texts, read_rows
from common.console import cli, say
from common.data_manifest import describe_file, is_made, made_of, write_made
from common.files import file_hash
from common.inputs import without_prompts_of
from common.pairs import (
    LABELS,
    REJECTED_SCHEMA,
    SCHEMA,
    ReadReport,
    check_rows,
    is_labelled,
    labels_array,
)

SOURCE = "arena55k"
OPTIONAL = ("model_a", "model_b", *LABELS)
MAX_FOLDS = 127
"""Folds are int8."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Args:
    """The competition's CSV into a comparison table."""

    input: Path = Path("data/train.csv")
    """CSV with id, prompt, response_a, response_b; train.csv also has the models and the votes."""
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
        if self.output.suffix != ".parquet":
            raise ValueError(f"--output is {self.output}; expected a name that ends in .parquet")


def main(args: Args) -> None:
    if not args.input.is_file():
        raise ValueError(
            f"{args.input} does not exist or is not a file; expected the competition's CSV: put it there, or "
            "name it with --input"
        )
    parameters = {
        "source": args.source,
        "folds": args.folds,
        "scikit_learn": version("scikit-learn") if args.folds else None,
        "exclude": [file_hash(path) for path in args.exclude],
    }
    wanted = made_of([describe_file(args.input)], parameters, [Path(__file__)])
    if is_made(args.output, wanted, overwrite=args.overwrite):
        say(f"{args.output} is up to date")
        return
    frame, report = read_competition_csv(args.input, source=args.source, skip_bad_rows=args.skip_bad_rows)
    kept = without_prompts_of(frame, args.exclude)
    dropped = {"prompt stands in --exclude": len(frame) - len(kept)} if args.exclude else {}
    if args.folds and kept.select(is_labelled().any()).item():
        kept = with_folds(kept, num_folds=args.folds)
    say(str(report))
    write_made(args.output, kept, report, wanted=wanted, dropped=dropped)
    sizes = kept["fold"].drop_nulls().value_counts().sort("fold")["count"].to_list()
    folds = f"folds of {', '.join(map(str, sizes))}" if sizes else "no folds"
    say(f"{args.output}: {len(kept):,} comparisons, {folds}")


def read_competition_csv(
    path: Path | str, *, source: str = SOURCE, skip_bad_rows: bool = False
) -> tuple[pl.DataFrame, ReadReport]:
    """Reads a CSV in the competition's form, strictly.

    Args:
        path: UTF-8 CSV with `id`, `prompt`, `response_a`, `response_b`; `model_a`, `model_b` and the three
            winner columns if it has them. Without them, and in rows where they are empty, they are null.
        source: Value of the column `source`.
        skip_bad_rows: Leave bad rows out, listed in the report, instead of failing.

    Returns:
        Comparisons (`SCHEMA`, fold null, in file order) and the report; its rows are lines of the file.

    Raises:
        ValueError: The file is absent, empty, not UTF-8, cut off, or has other columns; a row is bad
            (malformed JSON, unequal turn counts, labels that do not sum to 1, a repeated id; ten are listed).
    """
    path = Path(path)
    columns: dict[str, list] = {name: [] for name in SCHEMA}
    lines, unreadable = [], []
    num_repaired = 0
    with closing(read_rows(path)) as rows:
        _, header = next(rows, (1, []))
        check_header(header, path)
        for line, cells in rows:
            try:
                row, is_repaired = _parse_row(header, cells)
            except BadRowError as bad:
                key = cells[header.index("id")] if len(cells) > header.index("id") else None
                unreadable.append((str(path), line, key, *bad.args))
                continue
            for name, values in columns.items():
                values.append(source if name == "source" else row.get(name))
            lines.append(line)
            num_repaired += is_repaired
    ignored = [name for name in header if name not in REQUIRED + OPTIONAL]
    notes = {"with a lone surrogate replaced by U+FFFD": num_repaired} if num_repaired else {}
    notes |= (
        {f"column{'s' * (len(ignored) > 1)} not used: {', '.join(ignored)}": len(ignored)} if ignored else {}
    )
    return check_rows(
        pl.DataFrame(columns, schema=SCHEMA),
        pl.DataFrame({"row": lines}, schema={"row": pl.Int64}).with_columns(file=pl.lit(str(path))),
        paths=(path,),
        row_unit="line",
        unreadable=pl.DataFrame(unreadable, schema=REJECTED_SCHEMA, orient="row"),
        notes=notes,
        skip_bad_rows=skip_bad_rows,
    )


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


def _parse_row(header: Sequence[str], cells: Sequence[str]) -> tuple[dict, bool]:
    """(values by column, was a lone surrogate replaced)."""
    texts, is_repaired = parse_texts(header, cells)
    row = dict(zip(header, cells, strict=True))
    models = {name: row.get(name) or None for name in ("model_a", "model_b")}
    return {"id": row["id"], **models, **texts, **_parse_labels(row)}, is_repaired


def _parse_labels(row: dict[str, str]) -> dict[str, float | None]:
    cells = {name: row.get(name, "") for name in LABELS}
    if not any(cells.values()):
        return dict.fromkeys(LABELS)
    for name, cell in cells.items():
        if not NUMBER.fullmatch(cell):
            raise BadRowError("malformed label", f"{name} is {cell!r}, expected a number")
    return {name: float(cell) for name, cell in cells.items()}


if __name__ == "__main__":
    cli(main)
