"""Polars expressions over chats (lists of {role, content}): turns of either side, and stable keys."""

import polars as pl
import xxhash

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
"""A chat: one struct a message."""

NOT_ALTERNATING = "not user, assistant, user, ..., assistant"
"""Why a chat is left out."""


def alternates(chat: str) -> pl.Expr:
    """True where a chat is user, assistant, user, ..., assistant; false for an empty or null one.

    [user, assistant] -> true; [assistant, user], [user], [user, user] -> false
    """
    roles = pl.col(chat).list.eval(pl.element().struct.field("role"))
    users, assistants = roles.list.gather_every(2, 0), roles.list.gather_every(2, 1)
    return (
        (pl.col(chat).list.len() > 0)
        & (pl.col(chat).list.len() % 2 == 0)
        & users.list.eval(pl.element().eq_missing(pl.lit("user"))).list.all()
        & assistants.list.eval(pl.element().eq_missing(pl.lit("assistant"))).list.all()
    ).fill_null(False)


def system_message(chat: str) -> pl.Expr:
    """What stands in a chat's first message where that is the system's ("" for a null), else null."""
    first = pl.col(chat).list.first().struct
    return pl.when(_starts_with_system(chat)).then(first.field("content").fill_null(""))


def without_system(chat: str) -> pl.Expr:
    """The chat less its first message where that is the system's."""
    return pl.when(_starts_with_system(chat)).then(pl.col(chat).list.slice(1)).otherwise(pl.col(chat))


def _starts_with_system(chat: str) -> pl.Expr:
    return pl.col(chat).list.first().struct.field("role") == "system"


def user_turns(chat: str) -> pl.Expr:
    """What the user wrote, one text a turn; only for chats that alternate."""
    return pl.col(chat).list.gather_every(2, 0).list.eval(pl.element().struct.field("content"))


def assistant_turns(chat: str) -> pl.Expr:
    """What the assistant answered, one text a turn; only for chats that alternate."""
    return pl.col(chat).list.gather_every(2, 1).list.eval(pl.element().struct.field("content"))


def stable_key(turns: pl.Expr) -> pl.Expr:
    """128-bit xxh3 of a list of texts, as 16 bytes: the same in every process, version and row order.

    A null, an empty text and other cuts of the same letters differ: ["ab"], ["a", "b"], ["ab", null].
    """
    element = pl.element()
    marked = element.str.len_bytes().cast(pl.String) + ":" + element
    text = turns.list.eval(marked.fill_null("n")).list.join("")
    return text.map_batches(_digests, return_dtype=pl.Binary, is_elementwise=True)


def seeded_order(seed: int, *columns: str) -> pl.Expr:
    """128-bit xxh3 of a seed and some text columns: an order that is random, and always the same."""
    lengths = [pl.col(name).str.len_bytes().cast(pl.String) for name in columns]
    parts = [
        part
        for name, length in zip(columns, lengths, strict=True)
        for part in (length, pl.lit(":"), pl.col(name))
    ]
    text = pl.concat_str(pl.lit(f"{seed};"), *parts)
    return text.map_batches(_digests, return_dtype=pl.Binary, is_elementwise=True)


def _digests(texts: pl.Series) -> pl.Series:
    return pl.Series(
        texts.name,
        [None if text is None else xxhash.xxh3_128_digest(text.encode()) for text in texts],
        dtype=pl.Binary,
    )
