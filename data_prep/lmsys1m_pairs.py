"""lmsys-chat-1m (single conversations) -> pairs of answers by two models to the same user turns, unlabelled.

In    data/lmsys-chat-1m (a folder of the hub's Parquet files, or a file), or else the hub itself
Out   artifacts/data/lmsys1m_pairs.parquet (`common.data.table.SCHEMA`) and its manifest; with --skip-bad-rows
      also lmsys1m_pairs.rejected.parquet
Run   python data_prep/lmsys1m_pairs.py --exclude artifacts/data/arena55k.parquet ...  (or just prep)

Conversations that do not alternate (because of a system message, say) are left out. Of those with the same
user turns and the same answers, whichever model gave them, one stays; then one for each model among those
with the same user turns; these are paired off two by two, and an odd one is left over. Which one stays, who
is its partner and who is A comes from hashes of ids and the seed: order of rows and files, threads and
processes have no say.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from common.console import cli
from common.data import chats
from common.data.sources import Raw, open_raw
from common.data.sources.find import fetch, find_raw
from common.data.sources.made import EXCLUDED, JOINED, check_output, made_of, prompt_keys, write_made
from common.data.table import (
    LABELS,
    REJECTED_SCHEMA,
    SCHEMA,
    TEXTS,
    ReadReport,
    check_report,
    reading,
    scan,
    writing_scratch,
)
from common.runs import is_made

SOURCE = "lmsys1m"
HUB_ID = "lmsys/lmsys-chat-1m"
INPUT_SCHEMA = {"conversation_id": pl.String, "model": pl.String, "conversation": chats.MESSAGES}
KEYS = ("prompt_key", "reply_key")
CONTENT = ("model", "alternates", *KEYS)
"""Columns that tell two conversations apart."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Single conversations into pairs of answers."""

    input: tuple[str, ...] = ()
    """Parquet, CSV or JSON lines files (also .gz, .zst), folders of them, or hub ids OWNER/NAME; none:
    data/lmsys-chat-1m, or else the hub."""
    output: Path = Path("artifacts/data/lmsys1m_pairs.parquet")
    """Comparison Parquet to write."""
    exclude: tuple[Path, ...] = ()
    """Comparison Parquets whose prompts must not occur."""
    seed: int = 42
    """Seed that decides which conversation stands for a model, who is paired with whom and who is A."""
    skip_bad_rows: bool = False
    """Leave bad rows out and list them in <output>.rejected.parquet, instead of stopping."""
    overwrite: bool = False
    """Replace an output that was made of something else."""

    def __post_init__(self) -> None:
        check_output(self.output)


def main(args: Args) -> None:
    names = args.input or (str(find_raw(Path("data"), "lmsys-chat-1m") or HUB_ID),)
    with TemporaryDirectory(prefix="lmsys1m-") as scratch:
        files = fetch(names, Path(scratch))
        wanted = made_of(files, {"seed": args.seed}, args.exclude, script=__file__)
        if is_made(args.output, wanted, overwrite=args.overwrite, skip_bad_rows=args.skip_bad_rows):
            return
        raw = open_raw([(file, INPUT_SCHEMA, pl.LazyFrame.lazy) for file in files], Path(scratch))
        with reading(*names):
            light, report = read_light(raw, skip_bad_rows=args.skip_bad_rows)
        chosen, dropped = choose_pairs(light, prompt_keys(args.exclude), seed=args.seed)
        del light
        if chosen.is_empty():
            counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
            raise ValueError(
                f"{', '.join(names)}: no pair among {report.num_kept:,} conversations ({counts})"
            )
        with reading(*names):
            frame = gather(raw.frame, chosen, Path(scratch))
    write_made(args.output, frame, report, wanted=wanted, dropped=dropped)


def read_light(raw: Raw, *, skip_bad_rows: bool = False) -> tuple[pl.DataFrame, ReadReport]:
    """Reads all that choosing needs, with hashes instead of texts (about 150 bytes a conversation).

    Args:
        raw: `INPUT_SCHEMA` and places.
        skip_bad_rows: Leave bad rows out, listed in the report, instead of failing.

    Returns:
        Good rows: `index` in `raw.frame`, conversation_id and `CONTENT`; and the report.

    Raises:
        ValueError: There is no row, none is good, or (without `skip_bad_rows`) one is bad.
    """
    rows = raw.frame.with_row_index("index").select(
        "index",
        "conversation_id",
        "model",
        pl.col("conversation").is_null().alias("is_absent"),
        *content_keys(),
    )
    light = rows.collect(engine="streaming")
    bad = find_bad(light)
    report = ReadReport(
        paths=tuple(map(Path, raw.names)),
        num_read=len(light) + len(raw.rejected),
        num_kept=len(light) - len(bad),
        rejected=pl.concat([with_places(raw.frame, bad), raw.rejected]),
        notes=dict(raw.notes),
        row_unit=raw.row_unit,
    )
    report = check_report(report, skip_bad_rows=skip_bad_rows, kind="conversation")
    good = light.join(bad, on="index", how="anti", maintain_order="left") if len(bad) else light
    return good.drop("is_absent"), report


def content_keys() -> list[pl.Expr]:
    """`alternates`, `prompt_key` (what the user wrote) and `reply_key` (what the model answered).

    Of chats that do not alternate the two keys name roles and contents instead: together with `alternates`
    they always tell whether two chats are equal.
    """
    part = pl.col("conversation").list.eval
    regular = chats.alternates("conversation")
    roles, contents = (part(pl.element().struct.field(name)) for name in ("role", "content"))
    return [
        regular.alias("alternates"),
        chats.stable_key(pl.when(regular).then(chats.user_turns("conversation")).otherwise(roles)).alias(
            "prompt_key"
        ),
        chats.stable_key(
            pl.when(regular).then(chats.assistant_turns("conversation")).otherwise(contents)
        ).alias("reply_key"),
    ]


def find_bad(light: pl.DataFrame) -> pl.DataFrame:
    """`index`, `reason`, `detail` of bad rows: something is absent, or an id names several conversations."""
    absent = [pl.col(name).fill_null("") == "" for name in ("conversation_id", "model")]
    absent.append(pl.col("is_absent"))
    names = ("conversation_id", "model", "conversation")
    is_absent = pl.any_horizontal(absent)
    lacking = light.filter(is_absent).select(
        "index",
        reason=pl.lit("something is absent"),
        detail=pl.concat_list(
            pl.when(one).then(pl.lit(name)) for name, one in zip(names, absent, strict=True)
        )
        .list.drop_nulls()
        .list.join(", "),
    )
    # few ids come twice, so that only their rows are compared
    repeated = light.filter(~is_absent).filter(~pl.col("conversation_id").is_unique())
    repeated = (
        repeated.with_columns(num=pl.struct(CONTENT).n_unique().over("conversation_id"))
        .filter(pl.col("num") > 1)
        .select(
            "index",
            reason=pl.lit("repeated id"),
            detail=pl.lit("it names ") + pl.col("num").cast(pl.String) + pl.lit(" different conversations"),
        )
    )
    return pl.concat([lacking, repeated])


def with_places(frame: pl.LazyFrame, bad: pl.DataFrame) -> pl.DataFrame:
    """`REJECTED_SCHEMA` of bad rows, read once more for file, row and id."""
    if bad.is_empty():
        return pl.DataFrame(schema=REJECTED_SCHEMA)
    rows = frame.with_row_index("index").select("index", "file", "row", id="conversation_id")
    found = rows.join(bad.lazy(), on="index", build_side="force_right").select(REJECTED_SCHEMA.names())
    return found.collect(engine="streaming").cast(REJECTED_SCHEMA)


def choose_pairs(
    light: pl.DataFrame, excluded: pl.Series, *, seed: int
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Seed that decides which conversations become a pair.

    Args:
        light: `index`, conversation_id and `CONTENT` of good rows.
        excluded: Keys of prompts that must not occur.
        seed: Of the choice.

    Returns:
        `index`, conversation_id, model, `pair` (its number) and `is_a` of two conversations a pair; and how
        many conversations were left out on purpose, by reason, in the order in which that happens.
    """
    regular = light.filter("alternates").with_columns(choice=chats.seeded_order(seed, "conversation_id"))
    # rows that are equal in all of these columns are the same conversation: it does not matter which stays
    ordered = regular.sort("choice", "model", *KEYS)
    different = ordered.unique(KEYS, keep="first", maintain_order=True)
    of_models = different.unique(["prompt_key", "model"], keep="first", maintain_order=True)
    # another hash than the choice's: a model with many conversations would often be the first, hence A
    place = pl.int_range(pl.len()).over("prompt_key")
    placed = (
        of_models.with_columns(order=chats.seeded_order(seed, "conversation_id", "model"))
        .sort("prompt_key", "order")
        .with_columns(place=place, num_models=pl.len().over("prompt_key"))
    )
    paired = placed.filter(pl.col("place") < pl.col("num_models") // 2 * 2)
    kept = paired.filter(~pl.col("prompt_key").is_in(excluded.implode()))
    steps = {
        chats.NOT_ALTERNATING: (light, regular),
        "repeated conversation": (regular, different),
        "model already in the group": (different, of_models),
        "left without a partner": (of_models, paired),
        EXCLUDED: (paired, kept),
    }
    dropped = {reason: len(before) - len(after) for reason, (before, after) in steps.items()}
    is_a = pl.col("place") % 2 == 0
    numbered = kept.select("index", "conversation_id", "model", pair=is_a.cum_sum(), is_a=is_a)
    return numbered, dropped | {JOINED: len(kept) // 2}


def gather(frame: pl.LazyFrame, chosen: pl.DataFrame, scratch: Path) -> pl.DataFrame:
    """Reads the texts of the chosen conversations and lays them out as comparisons, sorted by id.

    Args:
        frame: `INPUT_SCHEMA` and places, the rows that `chosen["index"]` counts.
        chosen: As of `choose_pairs`.
        scratch: Existing folder for a temporary file.

    Returns:
        Unlabelled comparisons (`SCHEMA`).
    """
    rows = frame.select("conversation").with_row_index("index")
    # Without build_side the texts of all rows may become the hash table. By way of a file, because in memory
    # each chosen text would keep alive the buffer of all that were read with it.
    file = scratch / "texts.parquet"
    with writing_scratch():
        file.touch()  # within the plan, a failure to do so would look like one of what it reads
    (
        rows.join(chosen.lazy(), on="index", build_side="force_right")
        .select(
            *("pair", "is_a", "conversation_id", "model"),
            prompt=pl.when("is_a").then(chats.user_turns("conversation")),
            response=chats.assistant_turns("conversation"),
        )
        .sink_parquet(file, compression="lz4", row_group_size=2000, maintain_order=False)
    )
    texts = scan(file).collect()
    first = texts.filter("is_a").drop("is_a").rename({"model": "model_a", "response": "response_a"})
    second = texts.filter(~pl.col("is_a")).select(
        "pair", other="conversation_id", model_b="model", response_b="response"
    )
    del texts
    # a "-" within the first id is escaped, or two pairs could have the same name
    first_id = pl.col("conversation_id").str.replace_all("%", "%25", literal=True)
    first_id = first_id.str.replace_all("-", "%2D", literal=True)
    nothing = [pl.lit(None, SCHEMA[name]).alias(name) for name in (*LABELS, "fold")]
    return (
        first.join(second, on="pair")
        .select(
            "model_a", "model_b", *TEXTS, *nothing, id=first_id + "-" + pl.col("other"), source=pl.lit(SOURCE)
        )
        .select(SCHEMA.names())
        .sort("id")
    )


if __name__ == "__main__":
    cli(main)
