"""The 33k external votes, in either published form -> comparisons, one a prompt.

In    data/lmsys-33k-deduplicated.csv : the 21k votes in the competition's columns; or the original votes
      (lmsys/chatbot_arena_conversations: question_id, winner, conversation_a, conversation_b)
Out   artifacts/data/arena33k.parquet (`common.pairs.SCHEMA`) and its manifest
Run   python data_prep/external33k.py          (33,000 votes: under a minute)
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from common.console import cli, say
from common.conversations import MESSAGES, alternates, assistant_turns, stable_key, user_turns
from common.data_manifest import is_made, made_of, write_made
from common.files import file_hash
from common.inputs import without_prompts_of
from common.pairs import LABELS, REJECTED_SCHEMA, SCHEMA, TEXTS, ReadReport, check_rows
from common.raw_files import PLACES, Raw, column_names, fetch, open_raw, reading

SOURCE = "arena33k"
MODELS = {"model_a?": pl.String(), "model_b?": pl.String()}
DEDUPLICATED = {
    "id": pl.String(),
    **MODELS,
    **dict.fromkeys(TEXTS, pl.List(pl.String)),
    **dict.fromkeys(LABELS, pl.Float64()),
}
ORIGINAL = {
    "question_id": pl.String(),
    **MODELS,
    "winner": pl.String(),
    "conversation_a": MESSAGES,
    "conversation_b": MESSAGES,
}
WINNERS = {"model_a": 0, "model_b": 1, "tie": 2, "tie (bothbad)": 2}
"""What the original votes say -> index of `LABELS`."""
NOT_ALTERNATING = "a conversation does not go user, assistant, user, ..., assistant"
OTHER_USER_TURNS = "user turns differ between A and B"
REPEATED_PROMPT = "prompt stands in an earlier vote"


@dataclass(frozen=True, kw_only=True)
class Args:
    """The 33k external votes into a comparison table."""

    input: tuple[str, ...] = ("data/lmsys-33k-deduplicated.csv",)
    """Parquet, CSV or JSON lines files (also .gz, .zst), folders of them, or hub ids OWNER/NAME."""
    output: Path = Path("artifacts/data/arena33k.parquet")
    """Comparison Parquet to write."""
    exclude: tuple[Path, ...] = ()
    """Comparison tables; comparisons whose prompt stands in one of them are left out."""
    skip_bad_rows: bool = False
    """Leave bad rows out and list them in <output>.rejected.parquet, instead of stopping."""
    overwrite: bool = False
    """Replace an output that was made from something else."""

    def __post_init__(self) -> None:
        if self.output.suffix != ".parquet":
            raise ValueError(f"--output is {self.output}; expected a name that ends in .parquet")


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raws = open_votes(args.input, Path(folder))
        inputs = [one for raw in raws for one in raw.inputs]
        parameters = {"exclude": sorted(file_hash(path) for path in args.exclude)}
        wanted = made_of(inputs, parameters, [Path(__file__)])
        if is_made(args.output, wanted, overwrite=args.overwrite):
            say(f"{args.output} is up to date")
            return
        frame, report, dropped = read_votes(raws, skip_bad_rows=args.skip_bad_rows)
    kept = first_of_each_prompt(frame)
    dropped |= {REPEATED_PROMPT: len(frame) - len(kept)}
    table = without_prompts_of(kept, args.exclude)
    dropped |= {"prompt stands in --exclude": len(kept) - len(table)} if args.exclude else {}
    say(str(report))
    write_made(args.output, table, report, wanted=wanted, dropped=dropped)


def open_votes(inputs: Sequence[str], scratch: Path) -> list[Raw]:
    """Opens each input in the form that its columns show.

    Args:
        inputs: Files, folders or hub ids.
        scratch: Existing folder for temporary files.

    Raises:
        ValueError: An input is not there, cannot be read or has the columns of neither form.
    """
    raws = []
    for i, (name, path) in enumerate(fetch(inputs, scratch)):
        found = column_names(path)
        is_original = "question_id" in found or "conversation_a" in found
        if not is_original and not set(TEXTS) & set(found):
            raise ValueError(
                f"{name} has the columns {', '.join(found) or 'of neither form (none)'}; expected "
                f"{', '.join(DEDUPLICATED)}, or {', '.join(ORIGINAL)}"
            )
        (scratch / str(i)).mkdir()
        raw = open_raw([str(path)], ORIGINAL if is_original else DEDUPLICATED, scratch / str(i))
        described = tuple({**one, "name": name} for one in raw.inputs)
        rejected = raw.rejected.with_columns(file=pl.lit(name))
        raws.append(
            replace(raw, frame=raw.frame.with_columns(file=pl.lit(name)), rejected=rejected, inputs=described)
        )
    return raws


def read_votes(
    raws: Sequence[Raw], *, skip_bad_rows: bool = False
) -> tuple[pl.DataFrame, ReadReport, dict[str, int]]:
    """Reads votes of either form.

    Args:
        raws: As of `open_votes`.
        skip_bad_rows: Leave bad rows out, listed in the report, instead of failing.

    Returns:
        Comparisons (`SCHEMA`, prompts may repeat), the report, and why votes were left out -> how many.

    Raises:
        ValueError: A file is broken; there is no vote; a row is bad, or every row is.
    """
    with reading([str(path) for raw in raws for path in raw.paths]):
        votes = pl.concat(_compared(raw.frame) for raw in raws).collect()
    dropped = {r: int((votes["left_out"] == r).sum()) for r in (NOT_ALTERNATING, OTHER_USER_TURNS)}
    unreadable = pl.concat([*(raw.rejected for raw in raws), _incomplete(votes)])
    rest = votes.filter(pl.col("left_out").is_null() & pl.col("has_vote") & pl.col("has_chats"))
    num_repaired = sum(raw.num_repaired for raw in raws)
    if sum(dropped.values()) and rest.is_empty() and unreadable.is_empty():
        raise ValueError(
            f"none of the {len(votes):,} votes can be compared: {dropped}; is this the right file?"
        )
    frame, report = check_rows(
        rest.select(SCHEMA.names()),
        rest.select(*PLACES),
        paths=tuple(path for raw in raws for path in raw.paths),
        row_unit=" or ".join(sorted({u for raw in raws for u in raw.row_unit.split(" or ")}, reverse=True)),
        unreadable=unreadable,
        notes={"with a lone surrogate replaced by U+FFFD": num_repaired} if num_repaired else {},
        skip_bad_rows=skip_bad_rows,
    )
    return frame, replace(report, num_read=report.num_read + sum(dropped.values())), dropped


def first_of_each_prompt(frame: pl.DataFrame) -> pl.DataFrame:
    """One vote a prompt (all user turns), the first in id order; sorted in that order.

    Id order: whole numbers by value, then all other ids by their letters' code points. "9", "10", "a10", "a9"
    """
    keyed = frame.with_columns(prompt_key=stable_key(pl.col("prompt")))
    first = keyed.sort(*id_order()).unique("prompt_key", keep="first", maintain_order=True)
    return first.drop("prompt_key")


def id_order() -> tuple[pl.Expr, ...]:
    """Sort keys of textual ids; ids that differ have another place."""
    is_number = pl.col("id").str.contains(r"^[0-9]+$")
    digits = pl.when(is_number).then(pl.col("id").str.strip_chars_start("0"))
    return ~is_number, digits.str.len_bytes().fill_null(0), digits.fill_null(""), pl.col("id")


def _compared(frame: pl.LazyFrame) -> pl.LazyFrame:
    """`SCHEMA`, `PLACES`, `left_out` (why a vote cannot be compared, or null), `has_vote`, `has_chats`."""
    if "conversation_a" in frame.collect_schema():
        frame = frame.with_columns(
            pl.col("question_id").alias("id"),
            *(
                pl.col("winner")
                .replace_strict(WINNERS, default=None, return_dtype=pl.Int8)
                .eq(i)
                .alias(label)
                for i, label in enumerate(LABELS)
            ),
            user_turns("conversation_a").alias("prompt"),
            assistant_turns("conversation_a").alias("response_a"),
            assistant_turns("conversation_b").alias("response_b"),
            found=pl.col("winner"),
            left_out=_left_out(),
            has_chats=pl.all_horizontal(pl.col("conversation_a", "conversation_b").is_not_null()),
        )
    else:
        frame = frame.with_columns(
            found=pl.lit(None, pl.String),
            left_out=pl.lit(None, pl.String),
            has_chats=True,
        )
    return frame.select(
        "id",
        pl.lit(SOURCE).alias("source"),
        *(pl.when(pl.col(name) != "").then(name).alias(name) for name in ("model_a", "model_b")),
        *TEXTS,
        *(pl.col(name).cast(pl.Float32) for name in LABELS),
        pl.lit(None, pl.Int8).alias("fold"),
        *PLACES,
        "left_out",
        "found",
        "has_chats",
        # a vote that is there in part is for check_rows to name
        has_vote=pl.any_horizontal(pl.col(LABELS).is_not_null()),
    )


def _left_out() -> pl.Expr:
    """Why two chats cannot be compared; null where they can be, or where one is missing (a bad row)."""
    chats = ("conversation_a", "conversation_b")
    is_there = pl.all_horizontal(pl.col(chats).is_not_null())
    turns_differ = stable_key(user_turns(chats[0])) != stable_key(user_turns(chats[1]))
    return (
        pl.when(is_there & ~pl.all_horizontal(map(alternates, chats)))
        .then(pl.lit(NOT_ALTERNATING))
        .when(is_there & turns_differ)
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
