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
comparison stands there once, with all its `kinds`; `kind` is the gravest, and the other side is the first one
of that kind in another source, or else in its own. The file is a comparison table and serves as --exclude of
the scripts that make the listed tables. That goes by prompt and takes out every copy: make the file with
--between-sources where several votes on one prompt should stay.
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
"""Gravest first: the one that an output row's other side belongs to."""
DATA = Path("artifacts/data")
TESTS = (Path("data/test.csv"), DATA / "test.parquet")
"""Where the rows to answer lie, raw or prepared: the first that is there."""
FIRST, SECOND, LAST = 0, 1, 2
"""Protection of a row of test.csv, a row with a fold, any other."""
SAME_PROMPT = ["prompt"]
SAME_CONTENT = ["prompt", "low", "high"]
SAME_ALL = ["prompt", "low", "high", "is_flipped"]


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
        Rows, those to be protected first: `source`, `place` of the source in the order of the files, `id`,
        `fold` (-1: none), `is_test`, `prompt` (its index in the second value), `low`, `high` (the keys of
        the answers, the lesser first), `is_flipped`. And the joined user turns of each different prompt.

    Raises:
        ValueError: A file cannot be read, or two hold the same key.
    """
    frames, texts = [], []
    for i, path in enumerate([*([test] if test else []), *tables]):
        is_test = i == 0 and test is not None
        frame = read_test(path) if is_test else read_comparisons(path, skip_bad_rows=skip_bad_rows)[0]
        keys = frame.select(
            "source",
            "id",
            pl.col("fold").fill_null(-1),
            is_test=pl.lit(is_test),
            file=pl.lit(i),
            prompt_key=stable_key(pl.col("prompt")),
            a=stable_key(pl.col("response_a")),
            b=stable_key(pl.col("response_b")),
        )
        joined = frame.select(text=pl.col("prompt").list.join("\n", ignore_nulls=True).fill_null(""))
        texts.append(keys.select("prompt_key").hstack(joined).unique("prompt_key"))
        frames.append(keys)
    rows = pl.concat(frames)
    repeated = rows.filter(pl.struct("source", "id").is_duplicated())
    if len(repeated):
        source, key = repeated.select("source", "id").row(0)
        raise ValueError(f"two tables hold source {source} id {key} ({len(repeated):,} rows); leave one out")
    prompts = pl.concat(texts).unique("prompt_key").sort("prompt_key").with_row_index("prompt")
    protection = pl.when("is_test").then(FIRST).when(pl.col("fold") >= 0).then(SECOND).otherwise(LAST)
    rows = (
        rows.join(prompts.drop("text"), on="prompt_key")
        .with_columns(pl.col("file").min().over("source"), is_flipped=pl.col("a") > pl.col("b"))
        .with_columns(
            low=pl.when("is_flipped").then("b").otherwise("a"),
            high=pl.when("is_flipped").then("a").otherwise("b"),
        )
        .sort(protection, "file", "source", "id")
    )
    sources = rows.select("file", "source").unique().sort("file", "source").with_row_index("place")
    rows = rows.join(sources.drop("file"), on="source", maintain_order="left")
    return rows.drop("prompt_key", "a", "b", "file").with_row_index("row"), prompts["text"]


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
    trained = rows.filter(~pl.col("is_test"))
    near, near_partners = _find_near(rows, texts, near_threshold)
    same_prompt, same_content = _count(rows, SAME_PROMPT), _count(rows, SAME_CONTENT)
    exact = _count(rows, SAME_ALL)
    counts = {
        "exact": exact,
        "swapped": same_content - exact,
        "prompt": same_prompt - same_content,
        "near": near,
        "fold": _count(trained, SAME_PROMPT) - _count(trained, [*SAME_PROMPT, "fold"]),
    }
    partners = {
        "exact": _partners(rows, SAME_ALL),
        "swapped": _partners(rows, SAME_CONTENT, "is_flipped"),
        "prompt": _partners(rows, SAME_PROMPT, "low", "high"),
        "near": near_partners,
        "fold": _partners(trained, SAME_PROMPT, "fold"),
    }
    sources = rows.select("place", "source").unique().sort("place")["source"].to_list()
    pairs = combinations_with_replacement(range(len(sources)), 2)
    if between_sources:
        for kind in set(KINDS) - {"fold"}:
            np.fill_diagonal(counts[kind], 0)
    table = [(sources[i], sources[j], *(int(counts[kind][i, j]) for kind in KINDS)) for i, j in pairs]
    schema = {"source": pl.String, "other_source": pl.String, **dict.fromkeys(KINDS, pl.Int64)}
    leaks = _describe(rows, partners, between_sources=between_sources)
    return pl.DataFrame(table, schema=schema, orient="row"), leaks


def _count(rows: pl.DataFrame, group: list[str]) -> np.ndarray:
    """Pairs of rows that agree in all columns of `group`, int64 [sources, sources], the upper half used."""
    sizes = rows.group_by(*group, "place").len().with_columns(pl.col("len").cast(pl.Int64))
    pairs = (
        sizes.join(sizes, on=group, suffix="_other")
        .filter(pl.col("place") <= pl.col("place_other"))
        .with_columns(
            pairs=pl.when(pl.col("place") == pl.col("place_other"))
            .then(pl.col("len") * (pl.col("len") - 1) // 2)
            .otherwise(pl.col("len") * pl.col("len_other"))
        )
        .group_by("place", "place_other")
        .agg(pl.col("pairs").sum())
    )
    counts = np.zeros((_num_sources(rows),) * 2, dtype=np.int64)
    for i, j, number in pairs.iter_rows():
        counts[i, j] = number
    return counts


def _num_sources(rows: pl.DataFrame) -> int:
    return int(rows["place"].max()) + 1


def _partners(rows: pl.DataFrame, group: list[str], *differing: str) -> pl.DataFrame:
    """The first earlier row with the same `group` and another `differing`, in another source if there is one.

    Returns:
        `row`, `other_row`, `similarity`: one row a row that has such a partner.
    """
    rows = rows.select("row", "place", *group, *differing).filter(pl.len().over(group) > 1)
    # of each source the first two rows that differ: one of them differs from any given row
    firsts = (
        rows.unique([*group, *differing, "place"], keep="first", maintain_order=True)
        .group_by(*group, "place", maintain_order=True)
        .head(2)
    )
    found = rows.join(firsts, on=group, suffix="_other").filter(pl.col("row_other") < pl.col("row"))
    if differing:
        found = found.filter(pl.any_horizontal(pl.col(name) != pl.col(f"{name}_other") for name in differing))
    return _best(found).with_columns(similarity=pl.lit(1.0))


def _best(found: pl.DataFrame) -> pl.DataFrame:
    """One partner a row: in another source before its own, then the first."""
    return (
        found.sort("row", pl.col("place") == pl.col("place_other"), "row_other")
        .unique("row", keep="first", maintain_order=True)
        .select("row", other_row="row_other")
    )


def _find_near(rows: pl.DataFrame, texts: pl.Series, threshold: float) -> tuple[np.ndarray, pl.DataFrame]:
    """Counts of near pairs as of `_count`, and partners as of `_partners`; memory as small as the prompts."""
    shape = (len(texts), _num_sources(rows))
    prompt, place = rows["prompt"].to_numpy(), rows["place"].to_numpy()
    sizes, first, best = np.zeros(shape), np.full(shape, len(rows)), np.full(shape, len(rows))
    np.add.at(sizes, (prompt, place), 1)
    np.minimum.at(first, (prompt, place), np.arange(len(rows)))
    sets, products = shingles(texts), np.zeros((shape[1],) * 2)
    if num_empty := int((sets.list.len() == 0).sum()):
        say(f"{num_empty:,} prompts are empty and are not compared for near-duplicates")
    for left, right, _ in near_pairs(sets, threshold=threshold):
        products += sizes[left].T @ sizes[right]
        np.minimum.at(best, left, first[right])
        np.minimum.at(best, right, first[left])
    counts = np.triu(products + products.T, 1) + np.diag(np.diag(products))
    candidates = pl.concat(
        pl.DataFrame({"row": rows["row"], "place": place, "row_other": best[prompt, other]}).with_columns(
            place_other=pl.lit(other)
        )
        for other in range(shape[1])
    )
    partners = _best(candidates.filter(pl.col("row_other") < pl.col("row")))
    ends = (prompt[partners[name].to_numpy()].astype(np.int64) for name in ("row", "other_row"))
    similarity = pl.Series("similarity", jaccard(sets, *ends), dtype=pl.Float64)
    return counts.astype(np.int64), partners.cast(pl.UInt32).with_columns(similarity)


def _describe(
    rows: pl.DataFrame, partners: dict[Kind, pl.DataFrame], *, between_sources: bool
) -> pl.DataFrame:
    """One row a comparison to take out: its kinds, and the partner of the gravest."""
    found = pl.concat(
        partners[kind].with_columns(kind=pl.lit(kind), gravity=pl.lit(i)) for i, kind in enumerate(KINDS)
    )
    names = rows.select("row", "source", "id")
    found = found.join(names.filter(~rows["is_test"]), on="row").join(
        names.select(other_row="row", other_source="source", other_id="id"), on="other_row"
    )
    if between_sources:
        found = found.filter((pl.col("source") != pl.col("other_source")) | (pl.col("kind") == "fold"))
    kinds = pl.col("kind").sort_by("gravity").over("source", "id", mapping_strategy="join")
    return (
        found.with_columns(kinds=kinds)
        .sort("source", "id", "gravity")
        .unique(("source", "id"), keep="first", maintain_order=True)
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
