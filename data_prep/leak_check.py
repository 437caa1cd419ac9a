"""What overlaps with what: across comparison tables and a test.csv, within each source and between any two.

In    comparison tables (all of artifacts/data/ by default), data/test.csv if it is there
Out   counts of pairs; artifacts/data/leaks.parquet: the comparisons to take out, why, and the other side
Run   python data_prep/leak_check.py --fail-on fold          (240,000 prompts: a minute on 2 cores)

Every pair of comparisons is counted once, as the first of these that holds:

  exact    same list of user turns, same answers in the same order
  swapped  the same with A and B exchanged
  prompt   same list of user turns, other answers
  near     other lists of user turns, much alike once joined: the Jaccard similarity of their shingles
           (`common.data.near_duplicates`) is at least --near-threshold. A prompt too short for a shingle is
           compared as a whole; an empty one is not compared

and besides, whichever of the first three it is, as

  fold     same list of user turns, other folds: who holds one of the two out trains on the other. Rows
           without a fold always train, so they cross with every fold; one number in two sources is one
           fold; rows of test.csv do not count, for nothing trains on them

The output lists of each pair the side to take out. That is never a row of test.csv, and a row with a fold (it
is scored) only where the other side has one too or is of test.csv; else it is the later table, source, id. A
comparison stands there once, with all its `kinds` (fold, exact, swapped, prompt, near; the first of them is
its `kind`) and, as the other side, the first row that makes such a pair with it. The file is a comparison
table and serves as --exclude of the scripts that make the listed tables. That goes by prompt and takes out
every copy: make the file with --between-sources where several votes on one prompt should stay.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import polars as pl

from common.console import cli, say, show_table
from common.data.chats import stable_key
from common.data.near_duplicates import jaccard, near_pairs, shingles
from common.data.sources.find import LEAK_COLUMNS, fetch, find_tables, is_leak_table
from common.data.sources.made import check_output
from common.data.sources.votes import open_competition, read_competition
from common.data.table import SCHEMA, read_comparisons, write_comparisons

Kind = Literal["fold", "exact", "swapped", "prompt", "near"]
KINDS: tuple[Kind, ...] = ("fold", "exact", "swapped", "prompt", "near")
SAME = {
    "same_prompt": (),
    "same_answers": (pl.min_horizontal("a", "b"), pl.max_horizontal("a", "b")),
    "same_order": ("a", "b"),
    "same_use": ("is_test",),
    "same_fold": ("is_test", "fold"),
}
"""Groups of rows that agree in the prompt and in these."""
NESTED: dict[Kind, tuple[str, str]] = {
    "fold": ("same_use", "same_fold"),
    "exact": ("same_order", "row"),
    "swapped": ("same_answers", "same_order"),
    "prompt": ("same_prompt", "same_answers"),
}
"""The pairs of a kind are in one group of the first sort, but not of the second, which is finer."""
DATA = Path("artifacts/data")
TESTS = (Path("data/test.csv"), DATA / "test.parquet")
"""Where the rows to answer lie, raw or prepared: the first that is there."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Duplicates and leaks within and between sources."""

    input: tuple[Path, ...] = ()
    """Comparison tables, later ones give way to earlier ones; default: all of artifacts/data/, by name."""
    test: Path | None = None
    """Rows to answer, in the form of the competition's test.csv; default: data/test.csv, or its table."""
    near_threshold: float = 0.8
    """Jaccard similarity of shingles, 0.2 to 1, from which prompts are near-duplicates."""
    between_sources: bool = False
    """Leave out pairs within one source, folds apart."""
    fail_on: tuple[Kind, ...] = ()
    """Kinds of which one pair is enough for exit status 1."""
    skip_bad_rows: bool = False
    """Leave bad rows of tables out instead of stopping; those of test.csv always are left out, counted."""
    output: Path = DATA / "leaks.parquet"
    """Comparison table to write."""

    def __post_init__(self) -> None:
        if not 0.2 <= self.near_threshold <= 1:
            raise ValueError(f"--near-threshold is {self.near_threshold}; expected 0.2 to 1")
        check_output(self.output)


def main(args: Args) -> None:
    check_replaceable(args.output, args.input)
    tables = args.input or tuple(path for path in find_tables(DATA) if path not in TESTS)
    if not tables:
        raise ValueError(f"{DATA} holds no table but those to answer; make one with just prep")
    test = args.test or next((path for path in TESTS if path.is_file()), None)
    rows, texts = read_keys(tables, test, skip_bad_rows=args.skip_bad_rows)
    say(f"{len(rows):,} comparisons of {rows['source'].n_unique()} sources, {len(texts):,} different prompts")
    counts, leaks = find_leaks(
        rows, texts, near_threshold=args.near_threshold, between_sources=args.between_sources
    )
    show_counts(counts)
    write_leaks(leaks, tables, args.output, skip_bad_rows=args.skip_bad_rows)
    totals = {kind: int(counts[kind].sum()) for kind in KINDS}
    if found := [kind for kind in KINDS if kind in args.fail_on and totals[kind]]:
        pairs = ", ".join(f"{totals[kind]:,} of kind {kind}" for kind in found)
        raise ValueError(f"--fail-on {' '.join(args.fail_on)}: pairs were found, {pairs}; see {args.output}")


def check_replaceable(output: Path, inputs: tuple[Path, ...]) -> None:
    """ValueError where the output would replace something that this script did not write."""
    if output.resolve() in {path.resolve() for path in inputs}:
        raise ValueError(f"{output} is both --input and --output; name another --output")
    if output.exists() and not is_leak_table(output):
        raise ValueError(f"{output} is there and was not written by this script; name another --output")


def read_keys(
    tables: tuple[Path, ...], test: Path | None, *, skip_bad_rows: bool = False
) -> tuple[pl.DataFrame, pl.Series]:
    """What the search needs of each comparison, table by table: keys instead of texts.

    Returns:
        Rows, those to be protected first: `row` (its number), `source`, `place` of the source in the order of
        the files, `id`, `is_test`, `prompt` (its index in the second value), and the groups of `SAME`, each
        named by its first row. And the joined user turns of each different prompt.

    Raises:
        ValueError: A file cannot be read, or two hold the same key.
    """
    frames = []
    for i, path in enumerate([*([test] if test else []), *tables]):
        is_test = i == 0 and test is not None
        frame = read_test(path) if is_test else read_comparisons(path, skip_bad_rows=skip_bad_rows)[0]
        keys = frame.select(
            "source",
            "id",
            pl.col("fold").fill_null(-1),
            is_test=pl.lit(is_test),
            file=pl.lit(i),
            text=pl.col("prompt").list.join("\n", ignore_nulls=True).fill_null(""),
            key=stable_key(pl.col("prompt")),
            a=stable_key(pl.col("response_a")),
            b=stable_key(pl.col("response_b")),
        )
        frames.append(keys)
    rows = pl.concat(frames)
    repeated = rows.filter(pl.struct("source", "id").is_duplicated())
    if len(repeated):
        source, key = repeated.select("source", "id").row(0)
        raise ValueError(f"two tables hold source {source} id {key} ({len(repeated):,} rows); leave one out")
    rows = (
        rows.sort(pl.col("file").min().over("source"), "source")
        .with_columns(place=pl.col("source").rle_id())
        .sort(~pl.col("is_test"), pl.col("fold") < 0, "place", "id")
        .with_row_index("row")
        .with_columns(pl.col("row").first().over("key", *by).alias(name) for name, by in SAME.items())
        .with_columns(prompt=pl.col("same_prompt").rank("dense") - 1)
    )
    texts = rows.filter(pl.col("row") == pl.col("same_prompt"))["text"]
    return rows.select("row", "source", "place", "id", "is_test", "prompt", *SAME), texts


def read_test(path: Path) -> pl.DataFrame:
    """test.csv as comparisons whose source is the file's name; bad rows are left out and counted."""
    with TemporaryDirectory() as scratch:
        files = fetch([str(path)], Path(scratch))
        raw = open_competition(files, path.name, Path(scratch))
        frame, report = read_competition(raw, skip_bad_rows=True)
    if len(report.rejected):
        say(f"{path}: {len(report.rejected):,} bad rows are left out")
    return frame


def find_leaks(
    rows: pl.DataFrame, texts: pl.Series, *, near_threshold: float, between_sources: bool = False
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """All kinds of pairs.

    Args:
        rows, texts: As of `read_keys`.
        near_threshold: Least similarity of near-duplicates.
        between_sources: Leave out pairs within one source, folds apart.

    Returns:
        Counts (`source`, `other_source`, a column a kind; all pairs of sources), and the comparisons to take
        out (`source`, `id`, `LEAK_COLUMNS`; one row each, by source and id).
    """
    counts, partners = {}, {}
    for kind, (same, different) in NESTED.items():
        between = between_sources and kind != "fold"
        counts[kind] = _count(rows, same, between) - _count(rows, different, between)
        partners[kind] = _partners(rows, same, different, between)
    counts["near"], partners["near"] = _find_near(rows, texts, near_threshold, between_sources)
    sources = rows.unique("place").sort("place")["source"].to_list()
    pairs = combinations_with_replacement(range(len(sources)), 2)
    table = [(sources[i], sources[j], *(int(counts[kind][i, j]) for kind in KINDS)) for i, j in pairs]
    columns = ("source", "other_source", *KINDS)
    return pl.DataFrame(table, schema=columns, orient="row"), _describe(rows, partners)


def _count(rows: pl.DataFrame, group: str, between_sources: bool) -> np.ndarray:
    """Pairs of rows within the groups of a sort, float64 [sources, sources], the upper half used."""
    sizes = _sizes(rows, group)
    products = sizes.T @ sizes
    within = (np.diag(products) - sizes.sum(0)) / 2
    return np.triu(products, 1) + np.diag(within) * (not between_sources)


def _sizes(rows: pl.DataFrame, group: str) -> np.ndarray:
    """Rows of each group from each source, float64 [groups, sources]."""
    groups, places = rows[group].to_numpy(), rows["place"].to_numpy()
    sizes = np.zeros((groups.max() + 1, places.max() + 1))
    np.add.at(sizes, (groups, places), 1)
    return sizes


def _partners(rows: pl.DataFrame, same: str, different: str, between_sources: bool) -> pl.DataFrame:
    """Of each row the first earlier one in the same group of one sort and in another one of a finer sort.

    Returns:
        `row`, `other_row`, `similarity`: one row a row that has such a partner.
    """
    # of each source the first two that differ: one of them differs from any given row
    differing = rows.unique([different, "place"], keep="first", maintain_order=True)
    firsts = differing.group_by(same, "place", maintain_order=True).head(2)
    found = rows.join(firsts, on=same, suffix="_other").filter(
        pl.col("row_other") < pl.col("row"),
        pl.col(f"{different}_other") != pl.col(different),
        (pl.col("place_other") != pl.col("place")) | (not between_sources),
    )
    return found.group_by("row").agg(other_row=pl.col("row_other").min(), similarity=pl.lit(1.0))


def _find_near(
    rows: pl.DataFrame, texts: pl.Series, threshold: float, between_sources: bool
) -> tuple[np.ndarray, pl.DataFrame]:
    """Counts of near pairs as of `_count`, and partners as of `_partners`; memory as small as the prompts."""
    row, place, prompt = (rows[name].to_numpy().astype(np.int64) for name in ("row", "place", "prompt"))
    sizes = _sizes(rows, "prompt")
    first, near = (np.full(sizes.shape, len(rows)) for _ in range(2))
    np.minimum.at(first, (prompt, place), row)
    sets, products = shingles(texts), np.zeros((sizes.shape[1],) * 2)
    if num_empty := int((sets.list.len() == 0).sum()):
        say(f"{num_empty:,} prompts are empty and are not compared for near-duplicates")
    for left, right, _ in near_pairs(sets, threshold=threshold):
        products += sizes[left].T @ sizes[right]
        np.minimum.at(near, left, first[right])
        np.minimum.at(near, right, first[left])
    counts = np.triu(products + products.T, 1) + np.diag(np.diag(products)) * (not between_sources)
    others = near[prompt]
    if between_sources:
        others[row, place] = len(rows)
    other = others.min(axis=1)
    row, other = row[other < row], other[other < row]
    found = {"row": row, "other_row": other, "similarity": jaccard(sets, prompt[row], prompt[other])}
    return counts, pl.DataFrame(found).cast({"row": pl.UInt32, "other_row": pl.UInt32})


def _describe(rows: pl.DataFrame, partners: dict[Kind, pl.DataFrame]) -> pl.DataFrame:
    """One row a comparison to take out: its kinds, and the partner of the first one."""
    names = rows.select("row", "source", "id")
    return (
        pl.concat(partners[kind].with_columns(kind=pl.lit(kind)) for kind in KINDS)
        .group_by("row", maintain_order=True)
        .agg(pl.col("kind", "other_row", "similarity").first(), kinds=pl.col("kind"))
        .join(names.filter(~rows["is_test"]), on="row")
        .join(names.select(pl.all().name.prefix("other_")), on="other_row")
        .sort("source", "id")
        .select("source", "id", *LEAK_COLUMNS)
    )


def show_counts(counts: pl.DataFrame) -> None:
    """Prints the pairs of sources that have pairs of comparisons in common."""
    found = counts.filter(pl.any_horizontal(pl.col(KINDS) > 0))
    rows = [
        (f"within {one}" if one == other else f"{one} and {other}", *(f"{count:,}" for count in numbers))
        for one, other, *numbers in found.iter_rows()
    ]
    if rows:
        show_table("pairs of comparisons", ("sources", *KINDS), rows)
    else:
        say("no pair of any kind")


def write_leaks(leaks: pl.DataFrame, tables: tuple[Path, ...], output: Path, *, skip_bad_rows: bool) -> None:
    """Writes the listed comparisons as they stand in their tables; with none, no file stays."""
    if leaks.is_empty():
        output.unlink(missing_ok=True)
        say(f"no comparison to take out: there is no {output}")
        return
    whole = [
        read_comparisons(path, skip_bad_rows=skip_bad_rows)[0]
        .select(SCHEMA.names())
        .join(leaks, on=["source", "id"])
        for path in tables
    ]
    write_comparisons(pl.concat(whole).sort("source", "id"), output)
    say(f"{output}: {len(leaks):,} comparisons to take out")


if __name__ == "__main__":
    cli(main)
