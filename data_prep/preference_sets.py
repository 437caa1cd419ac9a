"""Public preference sets (chosen and rejected chats) -> comparisons for the pool of stage 2.

In    data/<name of a set> as downloaded from the hub (file or folder), or else the hub itself
Out   artifacts/data/preference_sets.parquet (`common.data.table.SCHEMA`, score_a, score_b) and its manifest
Run   python data_prep/preference_sets.py --exclude artifacts/data/arena55k.parquet
      python data_prep/preference_sets.py --input data/capybara.parquet mine=data/train-00000.parquet

User turns form the prompt, assistant turns the two answers; a system message before them is left out, as the
competition's comparisons have none. Which answer becomes A is drawn from a hash of content and seed, so it
depends on no row order. The sets' own votes are kept (chosen wins); stage 2 trains on pseudo labels instead.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from common.console import cli
from common.data import chats
from common.data.sources import PLACES, Raw, check_raw, open_raw
from common.data.sources.find import ENDING, PREFERENCE_SETS, RawFile, fetch, find_raw
from common.data.sources.made import check_output, made_of, without_prompts, write_made
from common.data.table import LABELS, REJECTED_SCHEMA, SCHEMA, ReadReport, reading
from common.runs import is_made

SCHEMA_IN = {
    "chosen": chats.MESSAGES,
    "rejected": chats.MESSAGES,
    **{f"{side}_{what}?": pl.Float64() for side in ("chosen", "rejected") for what in ("score", "rating")},
    **{f"{side}_model?": pl.String() for side in ("chosen", "rejected")},
}
OTHER_SYSTEM = "system messages differ between chosen and rejected"
OTHER_USER_TURNS = "user turns differ between chosen and rejected"
IDENTICAL = "identical answers"
REPEATED = "exact repeat"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Public preference sets into one comparison table."""

    input: tuple[str, ...] = ()
    """Files, folders or hub ids, each also as SOURCE=INPUT; a known set gets its short name as source, any
    other the name of its file, folder or hub data set. None: the five sets, from data/ or the hub."""
    output: Path = Path("artifacts/data/preference_sets.parquet")
    """Comparison Parquet to write."""
    seed: int = 42
    """Seed of the draw which answer becomes A."""
    exclude: tuple[Path, ...] = ()
    """Comparison tables; comparisons whose prompt stands in one of them are left out."""
    skip_bad_rows: bool = False
    """Leave bad rows out and list them in <output>.rejected.parquet, instead of stopping."""
    overwrite: bool = False
    """Replace an output that was made from something else."""

    def __post_init__(self) -> None:
        check_output(self.output)


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets = fetch_sets(args.input or default_inputs(Path("data")), Path(folder))
        files = [file for _, file in sets]
        sources = sorted([source, str(file.description["sha256"])] for source, file in sets)
        wanted = made_of(files, {"seed": args.seed, "sources": sources}, args.exclude, script=__file__)
        if is_made(args.output, wanted, overwrite=args.overwrite, skip_bad_rows=args.skip_bad_rows):
            return
        raw = open_sets(sets, Path(folder))
        frame, report, dropped = read_sets(raw, seed=args.seed, skip_bad_rows=args.skip_bad_rows)
    table, excluded = without_prompts(frame, args.exclude)
    write_made(args.output, table, report, wanted=wanted, dropped=dropped | excluded)


def default_inputs(data: Path) -> tuple[str, ...]:
    """The five sets: a file or folder of the set's name below `data`, else the hub id."""
    sets = PREFERENCE_SETS.items()
    return tuple(str(find_raw(data, short, hub.split("/")[1]) or hub) for short, hub in sets)


def source_of(name: str) -> tuple[str, str]:
    """(source, input) of one --input.

    data/capybara.jsonl.gz -> capybara; RLHFlow/Helpsteer-preference-standard -> helpsteer; me=x.csv -> me
    """
    given = re.fullmatch(r"([\w.-]+)=(.+)", name)
    if given and not Path(name).exists():
        return given[1], given[2]
    stem = ENDING.sub("", Path(name).resolve().name)
    return next((short for short, hub in PREFERENCE_SETS.items() if hub.split("/")[1] == stem), stem), name


def fetch_sets(inputs: Sequence[str], scratch: Path) -> list[tuple[str, RawFile]]:
    """(source, file) of each file of each input.

    Args:
        inputs: As `Args.input`.
        scratch: Existing folder for temporary files.

    Raises:
        ValueError: An input is not there.
    """
    found = []
    for i, (source, name) in enumerate(map(source_of, inputs)):
        (scratch / f"fetched-{i}").mkdir()
        found += [(source, file) for file in fetch([name], scratch / f"fetched-{i}")]
    return found


def open_sets(sets: Sequence[tuple[str, RawFile]], scratch: Path) -> Raw:
    """Opens preference sets.

    Args:
        sets: As of `fetch_sets`.
        scratch: Existing folder for temporary files.

    Returns:
        Prompt, both answers, scores, models, id, source, `PLACES`, `left_out` (why a row cannot be compared,
        or null) and flags.

    Raises:
        ValueError: A file cannot be read, or lacks a column or has it in another type.
    """
    return open_raw([(file, SCHEMA_IN, partial(_compared, source=source)) for source, file in sets], scratch)


def read_sets(
    raw: Raw, *, seed: int, skip_bad_rows: bool = False
) -> tuple[pl.DataFrame, ReadReport, dict[str, int]]:
    """Reads preference sets.

    Args:
        raw: As of `open_sets`.
        seed: Of the draw which answer becomes A.
        skip_bad_rows: Leave bad rows out, listed in the report, instead of failing.

    Returns:
        Comparisons (`SCHEMA`, score_a, score_b) sorted by id, the report, and why rows were left out -> how
        many. An exact repeat is dropped across sources too; the first by source and scores stays.

    Raises:
        ValueError: A file is broken; there is no row; a row is bad, or no row is good.
    """
    with reading(*raw.names):
        rows = raw.frame.collect()
    unusable = _unusable(rows)
    rest = rows.filter(pl.col("left_out").is_null() & pl.col("is_usable"))
    different = _first_of_repeats(rest)
    reasons = (chats.NOT_ALTERNATING, OTHER_SYSTEM, OTHER_USER_TURNS, IDENTICAL)
    dropped = {
        **{reason: int((rows["left_out"] == reason).sum()) for reason in reasons},
        REPEATED: len(rest) - len(different),
    }
    notes = {
        "with earlier answers that differ": int(different["earlier_differs"].sum()),
        "with a system message, which is left out": int(different["has_system"].sum()),
    }
    frame, report = check_raw(
        raw,
        _with_sides(different, seed),
        rejected=[unusable],
        dropped=dropped,
        notes={note: count for note, count in notes.items() if count},
        skip_bad_rows=skip_bad_rows,
    )
    return frame, report, dropped


def _compared(frame: pl.LazyFrame, source: str) -> pl.LazyFrame:
    """What `open_sets` gives."""
    sides = ("chosen", "rejected")
    frame = frame.with_columns(
        *(chats.without_system(side).alias(side) for side in sides),
        *(chats.system_message(side).alias(f"{side}_system") for side in sides),
    )
    has_chats = pl.all_horizontal(pl.col(sides).is_not_null())
    scores = [pl.coalesce(f"{side}_score", f"{side}_rating") for side in sides]
    is_usable = has_chats & pl.all_horizontal(score.is_finite().fill_null(True) for score in scores)
    prompts, answers = (
        [chats.stable_key(turns(side)) for side in sides]
        for turns in (chats.user_turns, chats.assistant_turns)
    )
    left_out = (
        pl.when(is_usable & ~pl.all_horizontal(map(chats.alternates, sides)))
        .then(pl.lit(chats.NOT_ALTERNATING))
        .when(is_usable & pl.col("chosen_system").ne_missing(pl.col("rejected_system")))
        .then(pl.lit(OTHER_SYSTEM))
        .when(is_usable & (prompts[0] != prompts[1]))
        .then(pl.lit(OTHER_USER_TURNS))
        .when(is_usable & (answers[0] == answers[1]))
        .then(pl.lit(IDENTICAL))
    )
    earlier = [
        chats.stable_key(turns.list.head(turns.list.len() - 1)) for turns in map(chats.assistant_turns, sides)
    ]
    return frame.select(
        pl.lit(source).alias("source"),
        *PLACES,
        chats.user_turns("chosen").alias("prompt"),
        *(chats.assistant_turns(side).alias(f"{side}_answers") for side in sides),
        *(score.alias(f"{side}_score") for score, side in zip(scores, sides, strict=True)),
        *(
            pl.when(pl.col(f"{side}_model") != "").then(f"{side}_model").alias(f"{side}_model")
            for side in sides
        ),
        has_chats=has_chats,
        is_usable=is_usable,
        left_out=left_out,
        has_system=pl.col("chosen_system").is_not_null(),
        earlier_differs=earlier[0] != earlier[1],
        id=chats.stable_key(
            pl.concat_list(key.bin.encode("hex") for key in (prompts[0], *answers))
        ).bin.encode("hex"),
    )


def _first_of_repeats(rows: pl.DataFrame) -> pl.DataFrame:
    """One row an id, whatever the order of the rows; sorted by id."""
    order = ["id", "source", "chosen_score", "rejected_score", "chosen_model", "rejected_model"]
    order += ["has_system", "earlier_differs", *PLACES]
    return rows.sort(order, nulls_last=True).unique("id", keep="first", maintain_order=True)


def _with_sides(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """`SCHEMA`, score_a, score_b, `PLACES`: chosen is A where the first bit of a hash of seed and id is 0."""
    digit = chats.seeded_order(seed, "id").bin.encode("hex").str.slice(0, 1)
    rows = rows.with_columns(chosen_is_a=digit.is_in(list("01234567")))

    def side(what: str, *, is_a: bool) -> pl.Expr:
        mine = pl.col("chosen_is_a") if is_a else ~pl.col("chosen_is_a")
        return pl.when(mine).then(f"chosen_{what}").otherwise(f"rejected_{what}")

    columns: Mapping[str, pl.Expr] = {
        f"{name}_{letter}": side(what, is_a=letter == "a")
        for letter in "ab"
        for name, what in (("model", "model"), ("response", "answers"), ("score", "score"))
    }
    votes = (pl.col("chosen_is_a"), ~pl.col("chosen_is_a"), pl.lit(False))
    labels = {label: vote.cast(pl.Float32) for label, vote in zip(LABELS, votes, strict=True)}
    rows = rows.with_columns(**columns, **labels, fold=pl.lit(None, pl.Int8))
    return rows.select(*SCHEMA.names(), "score_a", "score_b", *PLACES)


def _unusable(rows: pl.DataFrame) -> pl.DataFrame:
    """`REJECTED_SCHEMA` of the rows of which a chat is null, or a score is no number."""
    no_chat = pl.lit("chosen or rejected is null, expected lists of {role, content}")
    scores = pl.col("chosen_score", "rejected_score").cast(pl.String).fill_null("null")
    no_number = pl.concat_str(pl.lit("found the scores"), scores, separator=" ")
    return (
        rows.filter(~pl.col("is_usable"))
        .with_columns(
            reason=pl.when("has_chats").then(pl.lit("wrong type")).otherwise(pl.lit("no chat")),
            detail=pl.when("has_chats").then(no_number).otherwise(no_chat),
            id=pl.lit(None, pl.String),
        )
        .select(REJECTED_SCHEMA.names())
    )


if __name__ == "__main__":
    cli(main)
