"""Chats: turns of either side, and keys that stay the same for ever."""

import itertools

import polars as pl
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.chats import (
    MESSAGES,
    alternates,
    assistant_turns,
    seeded_order,
    stable_key,
    user_turns,
)

TEXTS = pl.List(pl.String)


def chats(*values: list | None) -> pl.DataFrame:
    return pl.DataFrame({"chat": values}, schema={"chat": MESSAGES})


def with_roles(*roles: str | None) -> list[dict]:
    return [{"role": role, "content": str(i)} for i, role in enumerate(roles)]


def keys(*values: list | None) -> list[bytes | None]:
    return pl.DataFrame({"x": values}, schema={"x": TEXTS}).select(stable_key(pl.col("x")))["x"].to_list()


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (with_roles("user", "assistant"), True),
        (with_roles("user", "assistant", "user", "assistant"), True),
        (with_roles("user"), False),
        (with_roles("user", "assistant", "user"), False),
        (with_roles("assistant", "user"), False),
        (with_roles("user", "user"), False),
        (with_roles("system", "user", "assistant"), False),
        (with_roles("user", "assistant", "user", "user"), False),
        (with_roles("user", None), False),
        (with_roles(None, "assistant"), False),
        (with_roles("User", "assistant"), False),
        ([None, None], False),
        ([], False),
        (None, False),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": None}], True),
    ],
)
def test_alternates(chat, expected):
    beside = with_roles("user", "assistant")  # a result that spreads to other rows would be wrong
    assert chats(beside, chat, beside).select(alternates("chat"))["chat"].to_list() == [True, expected, True]


def test_turns_of_either_side():
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "b"},
    ]
    found = chats(chat, chat[:2]).select(user=user_turns("chat"), assistant=assistant_turns("chat"))
    assert found.to_dict(as_series=False) == {"user": [["a", ""], ["a"]], "assistant": [[None, "b"], [None]]}


def test_keys_do_not_change():
    """These bytes name prompts in tables that are already made."""
    assert [key.hex() if key else None for key in keys(["Hi"], ["é", None], [], None)] == [
        xxhash.xxh3_128_hexdigest(text) for text in (b"2:Hi", "2:én".encode(), b"")
    ] + [None]


def test_different_lists_have_different_keys():
    parts = [None, "", "a", "b", "ab", "n", "1:a", "0:", "é", "e\u0301", "2:ab"]
    lists = [list(one) for size in range(4) for one in itertools.product(parts, repeat=size)]
    assert len(set(keys(*lists))) == len(lists)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=4))))
def test_keys_are_the_hash_of_marked_turns(values):
    expected = [
        None
        if value is None
        else xxhash.xxh3_128_digest(
            "".join("n" if turn is None else f"{len(turn.encode())}:{turn}" for turn in value).encode()
        )
        for value in values
    ]
    assert keys(*values) == expected


def test_keys_are_the_same_streamed_and_in_any_cut():
    frame = pl.DataFrame({"x": [[str(i), None] for i in range(5000)]}, schema={"x": TEXTS})
    whole = frame.select(stable_key(pl.col("x")))
    assert frame.lazy().select(stable_key(pl.col("x"))).collect(engine="streaming").equals(whole)
    assert pl.concat(frame[i : i + 999].select(stable_key(pl.col("x"))) for i in range(0, 5000, 999)).equals(
        whole
    )


def orders(seed: int, *rows: tuple) -> list[bytes | None]:
    frame = pl.DataFrame(rows, schema={"a": pl.String, "b": pl.String}, orient="row")
    return frame.select(order=seeded_order(seed, "a", "b"))["order"].to_list()


def test_seeded_order():
    assert orders(3, ("é", "x")) == [xxhash.xxh3_128_digest("3;2:é1:x".encode())]
    rows = [("ab", ""), ("a", "b"), ("", "ab"), ("1:a", ""), ("", "")]
    assert len(set(orders(0, *rows)) | set(orders(1, *rows))) == 2 * len(rows)
    assert orders(0, (None, "x"), ("a", "x"))[0] is None
