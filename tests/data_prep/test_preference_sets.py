"""Preference sets: random rows against a slow reader, row order and threads, real lists, the script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import polars as pl
import pytest
import xxhash
from helpers import few_or_many, key_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_external33k import chat, repair, write

from common.data.table import LABELS, SCHEMA, read_comparisons
from data_prep import preference_sets
from data_prep.preference_sets import Args, default_inputs, fetch_sets, main, open_sets, read_sets, source_of

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "preference_messages" / "chosen_rejected.jsonl"


NAN, INF = float("nan"), float("inf")


def pair(chosen: object, rejected: object, **more: object) -> dict:
    return {"chosen": chosen, "rejected": rejected, **more}


def read(inputs: list[str], scratch: Path, *, seed: int = 42, skip_bad_rows: bool = False):
    scratch.mkdir(parents=True)
    raw = open_sets(fetch_sets(inputs, scratch), scratch)
    return read_sets(raw, seed=seed, skip_bad_rows=skip_bad_rows)


def slow(rows: list[dict], seed: int) -> tuple[dict[str, tuple], int, list[int], int]:
    """(id -> comparison, bad rows, dropped by reason, differing earlier turns): one row at a time."""
    found: dict[str, list] = {}
    dropped, num_bad, num_earlier = [0, 0, 0, 0, 0], 0, 0
    for row in rows:
        chats = [row["chosen"], row["rejected"]]
        if None in chats:
            num_bad += 1
            continue
        system = [one[0]["content"] or "" if one and one[0]["role"] == "system" else None for one in chats]
        chats = [one if text is None else one[1:] for one, text in zip(chats, system, strict=True)]
        roles = [[message["role"] for message in one] for one in chats]
        users = [[repair(message["content"]) for message in one[::2]] for one in chats]
        answers = [[repair(message["content"]) for message in one[1::2]] for one in chats]
        if any(not r or r != ["user", "assistant"] * (len(r) // 2) for r in roles):
            dropped[0] += 1
        elif system[0] != system[1]:
            dropped[1] += 1
        elif users[0] != users[1]:
            dropped[2] += 1
        elif answers[0] == answers[1]:
            dropped[3] += 1
        else:
            key = key_of([key_of(turns).hex() for turns in (users[0], *answers)]).hex()
            scores = (row.get("chosen_score"), row.get("rejected_score"))
            dropped[4] += key in found
            found.setdefault(key, []).append((users[0], answers, scores))
    table = {}
    for key, repeats in sorted(found.items()):
        prompt, (chosen, rejected), (high, low) = min(
            repeats, key=lambda one: [(score is None, score or 0) for score in one[2]]
        )
        num_earlier += chosen[:-1] != rejected[:-1]
        text = f"{seed};{len(key)}:{key}"
        if int(xxhash.xxh3_128_hexdigest(text.encode())[0], 16) < 8:
            table[key] = (prompt, chosen, rejected, (1, 0, 0), high, low)
        else:
            table[key] = (prompt, rejected, chosen, (0, 1, 0), low, high)
    return table, num_bad, dropped, num_earlier


TEXTS = st.sampled_from(["", "a", "b", "nan", "ab", None, "\udc00", "\U0001f600"])
FREE = st.one_of(
    st.lists(TEXTS, max_size=5).map(lambda texts: chat(*texts)),
    st.sampled_from(["x", "", None]).map(lambda text: [{"role": "system", "content": text}, *chat("a", "b")]),
    st.just([*chat("a", "b"), {"role": "system", "content": "x"}]),
    st.just([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]),
    st.none(),
)
SCORES = st.one_of(st.none(), st.integers(0, 2), st.sampled_from([0.5, 1.5]))
SAME_TURNS = st.builds(
    lambda users, chosen, rejected: [
        chat(*(text for two in zip(users, side, strict=False) for text in two)) for side in (chosen, rejected)
    ],
    st.lists(TEXTS, min_size=1, max_size=2),
    st.lists(TEXTS, min_size=2, max_size=2),
    st.lists(TEXTS, min_size=2, max_size=2),
)
WITH_SYSTEM = st.builds(
    lambda chats, systems: [
        [{"role": "system", "content": text}, *one] for one, text in zip(chats, systems, strict=True)
    ],
    SAME_TURNS,
    st.sampled_from([("x", "x"), ("x", "y"), ("", None)]),
)
ROWS = st.builds(
    lambda chats, high, low: pair(*chats, chosen_score=high, rejected_score=low),
    st.one_of(SAME_TURNS, SAME_TURNS, WITH_SYSTEM, st.tuples(FREE, FREE)),
    SCORES,
    SCORES,
)


@settings(max_examples=140, deadline=None)
@given(rows=few_or_many(ROWS), seed=st.integers(0, 3))
def test_random_rows_equal_a_slow_reader(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("sets")
    path = str(write(folder / "x.jsonl", rows))
    expected, num_bad, num_dropped, num_earlier = slow(rows, seed)
    if not expected:
        with pytest.raises(ValueError):
            read([path], folder / "s", seed=seed, skip_bad_rows=True)
        return
    frame, report, dropped = read([path], folder / "s", seed=seed, skip_bad_rows=True)
    assert frame.schema == {**SCHEMA, "score_a": pl.Float64, "score_b": pl.Float64}
    found = {
        row["id"]: (
            row["prompt"],
            row["response_a"],
            row["response_b"],
            tuple(row[label] for label in LABELS),
            row["score_a"],
            row["score_b"],
        )
        for row in frame.rows(named=True)
    }
    assert list(found.items()) == list(expected.items())
    assert (len(report.rejected), list(dropped.values())) == (num_bad, num_dropped)
    assert report.notes.get("with earlier answers that differ", 0) == num_earlier
    assert report.num_read == len(rows)


def test_ids_are_in_order_and_the_side_of_chosen_is_drawn(tmp_path):
    rows = [
        pair(chat(f"q{i}", "good"), chat(f"q{i}", "bad"), chosen_score=i % 7, rejected_score=0.5)
        for i in range(200)
    ]
    frame, _, _ = read([str(write(tmp_path / "mine.jsonl", rows))], tmp_path / "s")
    assert frame["id"].is_sorted()
    assert 60 < frame["winner_model_a"].sum() < 140


@pytest.mark.skipif(not REAL.is_file(), reason=f"the real lists are not in {REAL}")
def test_the_300_real_lists(tmp_path):
    rows = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    frame, report, dropped = read([str(REAL)], tmp_path / "s")
    expected, _, num_dropped, _ = slow(rows, 42)
    assert frame["id"].to_list() == list(expected)
    assert list(dropped.values()) == num_dropped == [0, 0, 0, 0, 5], "nothing but exact repeats"
    assert (report.num_read, len(frame)) == (300, 295)
    assert report.notes["with a system message, which is left out"] == 80
    assert frame["score_a"].null_count() == len(frame)
    assert frame["source"].unique().to_list() == ["chosen_rejected"]


def test_ratings_scores_and_models_follow_their_answer(tmp_path):
    chats = (chat("q", "good"), chat("q", "bad"))
    rating = pair(
        *chats, source="origin", chosen_rating=5, rejected_rating=2, chosen_model="c", rejected_model="r"
    )
    pl.DataFrame([rating]).write_parquet(tmp_path / "Capybara-Preferences.parquet")
    score = pair(*chats[::-1], chosen_score=1.5, rejected_score=1)
    inputs = [str(tmp_path / "Capybara-Preferences.parquet"), f"me={write(tmp_path / 'x.jsonl', [score])}"]
    for seed in range(12):
        frame, _, _ = read(inputs, tmp_path / str(seed), seed=seed)
        rows = {row["source"]: row for row in frame.rows(named=True)}
        for source, chosen, values, models in (
            ("capybara", "good", (5.0, 2.0), ("c", "r")),
            ("me", "bad", (1.5, 1.0), (None, None)),
        ):
            row = rows[source]
            is_a = row["response_a"] == [chosen]
            assert (row["winner_model_a"], row["winner_model_b"]) == (float(is_a), float(not is_a))
            assert (row["score_a"], row["score_b"]) == (values if is_a else values[::-1])
            assert (row["model_a"], row["model_b"]) == (models if is_a else models[::-1])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("RLHFlow/Helpsteer-preference-standard", "helpsteer"),
        ("data/capybara.jsonl.gz", "capybara"),
        ("data/Argilla-Math-DPO-standard", "argilla_math"),
        ("mine=data/train-00000.parquet", "mine"),
        ("a.v1.parquet", "a.v1"),
    ],
)
def test_the_source_follows_from_the_name(name, source):
    assert source_of(name)[0] == source


def test_the_default_takes_what_is_in_the_folder_and_else_the_hub(tmp_path):
    (tmp_path / "Capybara-Preferences").mkdir()
    found = default_inputs(tmp_path)
    assert found[0] == str(tmp_path / "Capybara-Preferences")
    assert found[1] == "RLHFlow/PKU-SafeRLHF-30K-standard"


def test_a_hub_set_and_its_file_give_the_same_table(tmp_path, monkeypatch):
    rows = [pair(chat("q", "good"), chat("q", "bad"), chosen_score=2, rejected_score=1)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: datasets.Dataset.from_list(rows))
    hub, _, _ = read(["RLHFlow/Helpsteer-preference-standard"], tmp_path / "a")
    local, _, _ = read([f"helpsteer={write(tmp_path / 'x.jsonl', rows)}"], tmp_path / "b")
    assert hub.equals(local)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(None, chat("a", "b")), "no chat"),
        (pair("text", chat("a", "b")), "malformed JSON: chosen"),
        (pair([{"role": "user", "content": ["x"]}], chat("a", "b")), "wrong type: chosen[0].content"),
        (pair(chat("a", "b"), chat("a", "c"), chosen_score="5"), "wrong type: chosen_score"),
        ({"chosen": chat("a", "b")}, "missing field: rejected"),
        (
            pair(chat("a", "b"), chat("a", "c"), chosen_score=NAN),
            "wrong type: chosen_score is 'nan'",
        ),
    ],
)
def test_a_bad_row_stops_the_script_or_lands_in_a_side_file(tmp_path, row, message):
    source = write(tmp_path / "x.jsonl", [pair(chat("q", "1"), chat("q", "2")), row])
    args = {"input": (str(source),), "output": tmp_path / "x.parquet"}
    with pytest.raises(ValueError) as caught:
        main(Args(**args))
    assert message in str(caught.value)
    assert not args["output"].exists()
    main(Args(**args, skip_bad_rows=True))
    assert len(pl.read_parquet(tmp_path / "x.rejected.parquet")) == 1
    assert len(read_comparisons(args["output"])[0]) == 1


def test_scores_that_are_no_numbers_are_bad_in_a_parquet_too(tmp_path):
    rows = [pair(chat("q", "1"), chat("q", "2"), chosen_score=score) for score in (1.0, INF, NAN)]
    pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
    frame, report, _ = read([str(tmp_path / "x.parquet")], tmp_path / "s", skip_bad_rows=True)
    assert frame.select("score_a", "score_b").row(0) in ((1.0, None), (None, 1.0))
    assert report.rejected.select("row", "reason", "detail").rows() == [
        (1, "wrong type", "found the scores inf null"),
        (2, "wrong type", "found the scores NaN null"),
    ]


def test_exclude_and_up_to_date(tmp_path, capsys):
    rows = [pair(chat(q, "1"), chat(q, "2")) for q in ("p", "q")]
    source, other = write(tmp_path / "x.jsonl", rows), tmp_path / "other.parquet"
    main(Args(input=(str(write(tmp_path / "y.jsonl", rows[:1])),), output=other))
    args = Args(input=(str(source),), output=tmp_path / "x.parquet", exclude=(other,))
    main(args)
    assert read_comparisons(args.output)[0]["prompt"].to_list() == [["q"]]
    main(args)
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with seed 42; here it is seed 1"):
        main(Args(input=args.input, output=args.output, exclude=(other,), seed=1))


def run_script(*flags: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, preference_sets.__file__, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_hub_id_that_cannot_be_reached_ends_with_status_1(tmp_path):
    failed = run_script(
        "--input", "nobody/nothing-here", "--output", tmp_path / "x.parquet", HF_HUB_OFFLINE="1"
    )
    assert failed.returncode == 1
    assert "error: nobody/nothing-here is no file here, and was not fetched from the hub" in failed.stderr
    assert list(tmp_path.iterdir()) == []
