"""The 33k votes: both forms against a slow reader, row order and threads, real votes, the script itself."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from helpers import few_or_many, key_of
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.sources.find import fetch
from common.data.table import LABELS, SCHEMA, read_comparisons
from common.data.votes_csv import LONE_SURROGATE
from common.score.ensemble import read_table
from data_prep import external33k
from data_prep.external33k import Args, first_of_each_prompt, main, open_votes, read_votes

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "arena_1000"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real rows are not in {REAL}")
ONE_HOT = {
    **dict.fromkeys(("a", "model_a"), (1, 0, 0)),
    **dict.fromkeys(("b", "model_b"), (0, 1, 0)),
    **dict.fromkeys(("tie", "tie (bothbad)", "tie (both bad)", "both_bad", "bothbad"), (0, 0, 1)),
}


def chat(*texts: str | None) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def vote(key: str = "7", a: list | None = None, b: list | None = None, **changes: object) -> dict:
    conversations = {
        "conversation_a": chat("Hi", "yes") if a is None else a,
        "conversation_b": chat("Hi", "no") if b is None else b,
    }
    row = {"question_id": key, "model_a": "x", "model_b": "y", "winner": "model_a", **conversations}
    return {**row, **changes}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, scratch: Path, **flags: bool):
    scratch.mkdir(parents=True)
    frame, report, dropped = read_votes(open_votes(fetch([str(path)], scratch), scratch), **flags)
    return first_of_each_prompt(frame), report, dropped


def repair(text: str | None) -> str | None:
    return text if text is None else LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def slow(rows: list[dict]) -> tuple[list[tuple], list[str], dict[str, int]]:
    """Comparisons (id, prompt, answers, label), reasons of bad rows, dropped: one row at a time."""
    good, bad, dropped = [], [], dict.fromkeys(("not alternating", "other turns"), 0)
    for row in rows:
        chats = [row["conversation_a"], row["conversation_b"]]
        if None not in chats:
            roles = [[message["role"] for message in one] for one in chats]
            if any(not r or r != ["user", "assistant"] * (len(r) // 2) for r in roles):
                dropped["not alternating"] += 1
                continue
            users = [[repair(message["content"]) for message in one[::2]] for one in chats]
            if users[0] != users[1]:
                dropped["other turns"] += 1
                continue
        if row["winner"] not in ONE_HOT:
            bad.append("unknown winner")
        elif None in chats:
            bad.append("no conversation")
        else:
            answers = ([repair(message["content"]) for message in one[1::2]] for one in chats)
            good.append((row["question_id"], users[0], *answers, ONE_HOT[row["winner"]]))
    for key in {row[0] for row in good}:  # of rows with one id one stays, whatever their order
        first, *others = sorted((row for row in good if row[0] == key), key=content_order)
        good = [row for row in good if row[0] != key] + [first]
        bad += ["repeated key"] * len(others)
    numbers = sorted((row for row in good if row[0].isdigit()), key=lambda row: (int(row[0]), row[0]))
    ordered = numbers + sorted((row for row in good if not row[0].isdigit()), key=lambda row: row[0])
    first: dict[str, tuple] = {}
    for row in ordered:
        first.setdefault(json.dumps(row[1]), row)
    return list(first.values()), sorted(bad), dropped


def content_order(row: tuple) -> tuple:
    _, prompt, a, b, label = row
    return *map(key_of, (prompt, a, b)), label


TEXTS = st.sampled_from(["", "a", "b", "nan", "null", "ab", None, "\ud800", "a/b", "\U0001f600"])
CHATS = st.one_of(
    st.lists(TEXTS, max_size=4).map(lambda texts: chat(*texts)),
    st.lists(TEXTS, min_size=1, max_size=1).map(lambda texts: chat(*texts, "answer")),
    st.just(None),
    st.just([{"role": "assistant", "content": "first"}, {"role": "user", "content": "?"}]),
)
VOTES = st.builds(
    lambda key, question, a, b, free, winner: {
        **vote(key, winner=winner),
        "conversation_a": chat(question, a) if free is None else free,
        "conversation_b": chat(question, b),
    },
    st.sampled_from(["1", "01", "2", "10", "9", "4294899228", "a", "b1", "é", "F"])
    | st.integers(0, 300).map(str),
    TEXTS | st.integers(0, 30).map(str),
    TEXTS,
    TEXTS,
    st.one_of(st.none(), st.none(), CHATS),
    st.sampled_from([*ONE_HOT, *ONE_HOT, "draw", None]),
)


@settings(max_examples=140, deadline=None)
@given(rows=few_or_many(VOTES), null=st.booleans())
def test_random_votes_equal_a_slow_reader(tmp_path_factory, rows, null):
    if null:
        rows[0]["conversation_b"] = None
    folder = tmp_path_factory.mktemp("votes")
    expected, bad, dropped = slow(rows)
    if not expected:
        with pytest.raises(ValueError):
            read(write(folder / "x.jsonl", rows), folder / "s", skip_bad_rows=True)
        return
    frame, report, found = read(write(folder / "x.jsonl", rows), folder / "s", skip_bad_rows=True)
    assert frame.schema == SCHEMA
    rows_found = frame.select("id", "prompt", "response_a", "response_b").rows()
    labels = frame.select(LABELS).rows()
    assert [(*row, label) for row, label in zip(rows_found, labels, strict=True)] == expected
    assert sorted(report.rejected["reason"]) == bad
    assert list(found.values()) == list(dropped.values())
    assert report.num_read == len(rows)


def test_of_votes_with_one_prompt_the_first_id_stays_in_any_row_order(tmp_path):
    rows = [
        vote(str(i * 7919 % 301), chat(f"q{i % 90}", f"{i}"), chat(f"q{i % 90}", "b")) for i in range(300)
    ]
    tables = []
    for i in range(2):
        random.Random(i).shuffle(rows)
        output = tmp_path / f"{i}.parquet"
        main(Args(input=(str(write(tmp_path / f"{i}.jsonl", rows)),), output=output))
        tables.append(read_comparisons(output)[0])
    assert tables[0].equals(tables[1])
    assert len(tables[0]) == 90


def test_ids_are_ordered_by_value_and_then_by_letters(tmp_path):
    keys = ["b", "10", "9", "a10", "a9", "4294899228"]
    rows = [vote(key, chat(key, "1"), chat(key, "2")) for key in keys]
    frame, _, _ = read(write(tmp_path / "x.jsonl", rows), tmp_path / "s")
    assert frame["id"].to_list() == ["9", "10", "4294899228", "a10", "a9", "b"]


@needs_real_rows
def test_the_thousand_real_votes_lose_only_repeated_prompts(tmp_path):
    frame, report, _ = read(REAL / "train.csv", tmp_path / "s")
    raw = pl.read_csv(REAL / "train.csv", infer_schema=False)
    prompts: dict[str, int] = {}
    for key, prompt in sorted((int(key), prompt) for key, prompt in raw.select("id", "prompt").rows()):
        prompts.setdefault(json.dumps(json.loads(prompt)), key)
    assert report.num_read == 1000
    assert frame["id"].to_list() == [str(key) for key in sorted(prompts.values())]
    by_id = {row["id"]: row for row in raw.rows(named=True)}
    for row in frame.rows(named=True):
        assert row["response_a"] == json.loads(by_id[row["id"]]["response_a"])
        assert row["winner_tie"] == float(by_id[row["id"]]["winner_tie"])


def test_the_original_form_as_parquet_with_further_fields(tmp_path):
    rows = [vote("1", turn=1, language="English"), vote("2", chat("Q", "A"), chat("Q", "B"))]
    pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
    frame, _, _ = read(tmp_path / "x.parquet", tmp_path / "s")
    assert frame["prompt"].to_list() == [["Hi"], ["Q"]]


@pytest.mark.parametrize("word", ONE_HOT)
def test_every_winner_word_is_read_in_votes_and_in_tables_of_probabilities(tmp_path, word):
    frame, _, _ = read(write(tmp_path / "x.jsonl", [vote(winner=word)]), tmp_path / "s")
    assert frame.select(LABELS).row(0) == ONE_HOT[word]
    (tmp_path / "t.csv").write_text(f"id,label,m_a,m_b,m_tie\n1,{word},1,0,0\n")
    assert read_table(tmp_path / "t.csv")[0].select(LABELS).row(0) == ONE_HOT[word]


def test_the_default_is_what_is_in_data_or_else_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"lmsys/chatbot_arena_conversations .*accept the licence"):
        main(Args(output=tmp_path / "x.parquet"))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (vote("8", winner="draw"), "unknown winner: found draw, expected one of a, b, model_a"),
        (vote("8", winner=3.5), "wrong type: winner is '3.5'"),
        (vote("8", conversation_a=None), "no conversation"),
        (vote("8", conversation_a="Hi"), "malformed JSON: conversation_a"),
        (vote("8", conversation_a=[{"role": "user", "content": 1}]), "wrong type: conversation_a[0].content"),
        ({"question_id": "8"}, "missing field"),
        (vote("", chat("k", "1"), chat("k", "2")), "no key"),
    ],
)
def test_a_bad_row_stops_the_script_or_lands_in_a_side_file(tmp_path, bad, message, skip):
    source = write(tmp_path / "x.jsonl", [vote("1"), bad])
    args = Args(input=(str(source),), output=tmp_path / "out" / "x.parquet", skip_bad_rows=skip)
    if not skip:
        with pytest.raises(ValueError) as caught:
            main(args)
        assert message in str(caught.value)
        assert f"{source} line 2" in str(caught.value)
        assert not args.output.parent.exists()
        return
    main(args)
    (rejected,) = pl.read_parquet(tmp_path / "out" / "x.rejected.parquet").rows(named=True)
    assert f"{rejected['reason']}: {rejected['detail']}".startswith(message.split(":")[0])
    assert read_comparisons(args.output)[0]["id"].to_list() == ["1"]


def test_exclude_up_to_date_and_other_flags(tmp_path, capsys):
    rows = [vote("1"), vote("2", chat("Q", "A"), chat("Q", "B"))]
    source, other = write(tmp_path / "x.jsonl", rows), tmp_path / "other.parquet"
    main(Args(input=(str(write(tmp_path / "y.jsonl", rows[:1])),), output=other))
    args = {"input": (str(source),), "output": tmp_path / "x.parquet"}
    main(Args(**args, exclude=(other,)))
    assert read_comparisons(args["output"])[0]["id"].to_list() == ["2"]
    manifest = json.loads((tmp_path / "x.manifest.json").read_text())
    assert manifest["counts"]["dropped"]["prompt stands in --exclude"] == 1
    before = args["output"].stat().st_mtime_ns
    main(Args(**args, exclude=(other,)))
    assert "up to date" in capsys.readouterr().out
    assert args["output"].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"made with exclude [0-9a-f]{12}; here it is exclude none"):
        main(Args(**args))


def test_neither_form_and_nothing_comparable_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has the columns a; expected id, prompt, response_a, "):
        read(write(tmp_path / "x.jsonl", [{"a": 1}]), tmp_path / "s")
    rows = [vote(a=chat("Hi"))]
    with pytest.raises(ValueError, match="none of the 1 rows can be compared"):
        read(write(tmp_path / "y.jsonl", rows), tmp_path / "t")


def test_an_interrupted_run_leaves_the_old_table(tmp_path, monkeypatch):
    output = tmp_path / "x.parquet"
    main(Args(input=(str(write(tmp_path / "a.jsonl", [vote("1")])),), output=output))
    before, names = output.read_bytes(), sorted(p.name for p in tmp_path.iterdir())

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pl.DataFrame, "write_parquet", interrupt)
    source = tmp_path / "a.jsonl"
    write(source, [vote("2")])
    with pytest.raises(KeyboardInterrupt):
        main(Args(input=(str(source),), output=output, overwrite=True))
    assert output.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def run_script(*flags: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, external33k.__file__, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_folder_that_cannot_be_written_ends_with_status_1(tmp_path):
    (tmp_path / "way").write_text("")
    source = write(tmp_path / "x.jsonl", [vote()])
    failed = run_script("--input", source, "--output", tmp_path / "way" / "x.parquet")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["way", "x.jsonl"]
