"""The 33k external votes, in either published form -> comparisons, one a prompt.

In    data/lmsys-33k-deduplicated.csv : the 21k votes in the competition's columns; or the original votes,
      data/chatbot_arena_conversations (question_id, winner, conversation_a, conversation_b)
Out   artifacts/data/arena33k.parquet (`common.data.table.SCHEMA`) and its manifest
Run   python data_prep/external33k.py --exclude artifacts/data/arena55k.parquet
      (33,000 votes: under a minute; without --exclude prompts of held-out votes may be trained on)
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from common.console import cli
from common.data import chats
from common.data.sources import Raw, check_raw, column_names, open_raw
from common.data.sources.find import RawFile, fetch, find_raw
from common.data.sources.made import check_output, made_of, without_prompts, write_made
from common.data.sources.votes import COLUMNS, MODELS, id_order, to_comparisons
from common.data.table import LABELS, REJECTED_SCHEMA, SCHEMA, TEXTS, WINNERS, ReadReport, reading
from common.runs import is_made

SOURCE = "arena33k"
HUB_ID = "lmsys/chatbot_arena_conversations"
DEDUPLICATED = COLUMNS | dict.fromkeys(LABELS, pl.Float64())
ORIGINAL = {
    "question_id": pl.String(),
    **{f"{name}?": pl.String() for name in MODELS},
    "winner": pl.String(),
    "conversation_a": chats.MESSAGES,
    "conversation_b": chats.MESSAGES,
}
OTHER_USER_TURNS = "user turns differ between A and B"
REPEATED_PROMPT = "prompt stands in an earlier vote"


@dataclass(frozen=True, kw_only=True)
class Args:
    """The 33k external votes into a comparison table."""

    input: tuple[str, ...] = ()
    """Parquet, CSV or JSON lines files (also .gz, .zst), folders of them, or hub ids OWNER/NAME; none:
    data/lmsys-33k-deduplicated.csv, or else data/chatbot_arena_conversations, or else the hub."""
    output: Path = Path("artifacts/data/arena33k.parquet")
    """Comparison Parquet to write."""
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
        published = find_raw(Path("data"), "lmsys-33k-deduplicated", "chatbot_arena_conversations")
        files = fetch(args.input or (str(published or HUB_ID),), Path(folder))
        wanted = made_of(files, {}, args.exclude, script=__file__)
        if is_made(args.output, wanted, overwrite=args.overwrite, skip_bad_rows=args.skip_bad_rows):
            return
        frame, report, dropped = read_votes(open_votes(files, Path(folder)), skip_bad_rows=args.skip_bad_rows)
    kept = first_of_each_prompt(frame)
    table, excluded = without_prompts(kept, args.exclude)
    dropped |= {REPEATED_PROMPT: len(frame) - len(kept)} | excluded
    write_made(args.output, table, report, wanted=wanted, dropped=dropped)


def open_votes(files: Sequence[RawFile], scratch: Path) -> Raw:
    """Opens each file in the form that its columns show.

    Args:
        files: As of `common.data.sources.find.fetch`.
        scratch: Existing folder for temporary files.

    Returns:
        `SCHEMA`, `PLACES`, `left_out` (why a vote cannot be compared, or null), `found` (the winner as
        written), `has_vote`, `has_chats`.

    Raises:
        ValueError: A file cannot be read or has the columns of neither form.
    """
    forms = {True: (ORIGINAL, _from_original), False: (DEDUPLICATED, _from_deduplicated)}
    return open_raw([(file, *forms[_is_original(file)]) for file in files], scratch)


def _is_original(file: RawFile) -> bool:
    found = column_names(file)
    is_original = "question_id" in found or "conversation_a" in found
    if found and not is_original and not set(TEXTS) & set(found):
        raise ValueError(
            f"{file.name} has the columns {', '.join(found)}; expected "
            f"{_listed(DEDUPLICATED)}, or {_listed(ORIGINAL)}"
        )
    return is_original


def _listed(schema: Mapping[str, pl.DataType]) -> str:
    return ", ".join(name for name in schema if not name.endswith("?"))


def read_votes(raw: Raw, *, skip_bad_rows: bool = False) -> tuple[pl.DataFrame, ReadReport, dict[str, int]]:
    """Reads votes of either form.

    Args:
        raw: As of `open_votes`.
        skip_bad_rows: Leave bad rows out, listed in the report, instead of failing.

    Returns:
        Comparisons (`SCHEMA`, prompts may repeat), the report, and why votes were left out -> how many.

    Raises:
        ValueError: A file is broken; there is no vote; a row is bad, or every row is.
    """
    with reading(*raw.names):
        votes = raw.frame.collect()
    dropped = {r: int((votes["left_out"] == r).sum()) for r in (chats.NOT_ALTERNATING, OTHER_USER_TURNS)}
    incomplete = _incomplete(votes)
    rest = votes.filter(pl.col("left_out").is_null() & pl.col("has_vote") & pl.col("has_chats"))
    frame, report = check_raw(raw, rest, rejected=[incomplete], dropped=dropped, skip_bad_rows=skip_bad_rows)
    return frame.select(SCHEMA.names()), report, dropped


def first_of_each_prompt(frame: pl.DataFrame) -> pl.DataFrame:
    """One vote a prompt (all user turns), the first in id order; sorted in that order."""
    keyed = frame.with_columns(prompt_key=chats.stable_key(pl.col("prompt")))
    first = keyed.sort(*id_order()).unique("prompt_key", keep="first", maintain_order=True)
    return first.drop("prompt_key")


def _from_original(frame: pl.LazyFrame) -> pl.LazyFrame:
    winner = pl.col("winner").replace_strict(WINNERS, default=None, return_dtype=pl.Int8)
    named = frame.with_columns(
        id=pl.col("question_id"),
        **{label: winner.eq(i) for i, label in enumerate(LABELS)},
        prompt=chats.user_turns("conversation_a"),
        response_a=chats.assistant_turns("conversation_a"),
        response_b=chats.assistant_turns("conversation_b"),
    )
    return _with_flags(
        named,
        left_out=_left_out(),
        found=pl.col("winner"),
        has_chats=pl.all_horizontal(pl.col("conversation_a", "conversation_b").is_not_null()),
    )


def _from_deduplicated(frame: pl.LazyFrame) -> pl.LazyFrame:
    nothing = pl.lit(None, pl.String)
    return _with_flags(frame, left_out=nothing, found=nothing, has_chats=pl.lit(True))


def _with_flags(frame: pl.LazyFrame, **flags: pl.Expr) -> pl.LazyFrame:
    """What `open_votes` gives: a vote that is there in part counts as one, for `check_rows` to name."""
    flagged = frame.with_columns(**flags, has_vote=pl.any_horizontal(pl.col(LABELS).is_not_null()))
    return to_comparisons(flagged, "left_out", "found", "has_chats", "has_vote", source=SOURCE)


def _left_out() -> pl.Expr:
    """Why two chats cannot be compared; null where they can be, or where one is missing (a bad row)."""
    sides = ("conversation_a", "conversation_b")
    is_there = pl.all_horizontal(pl.col(sides).is_not_null())
    a, b = (chats.stable_key(chats.user_turns(side)) for side in sides)
    return (
        pl.when(is_there & ~pl.all_horizontal(map(chats.alternates, sides)))
        .then(pl.lit(chats.NOT_ALTERNATING))
        .when(is_there & (a != b))
        .then(pl.lit(OTHER_USER_TURNS))
    )


def _incomplete(votes: pl.DataFrame) -> pl.DataFrame:
    """`REJECTED_SCHEMA` of the votes that no one won, or that lack a conversation."""
    winners = f"expected one of {', '.join(WINNERS)}, or three numbers that sum to 1"
    no_vote = pl.concat_str(pl.lit("found "), pl.col("found").fill_null("none"), pl.lit(f", {winners}"))
    no_chat = pl.lit("conversation_a or conversation_b is null, expected lists of {role, content}")

    def either(vote: pl.Expr, chat: pl.Expr) -> pl.Expr:
        return pl.when(~pl.col("has_vote")).then(vote).otherwise(chat)

    incomplete = votes.filter(pl.col("left_out").is_null() & ~(pl.col("has_vote") & pl.col("has_chats")))
    return incomplete.with_columns(
        reason=either(pl.lit("unknown winner"), pl.lit("no conversation")), detail=either(no_vote, no_chat)
    ).select(REJECTED_SCHEMA.names())


if __name__ == "__main__":
    cli(main)
