"""just prep makes every table that it finds raw files for, once, and says what is missing."""

import importlib
import json

import polars as pl
import pytest
import tyro
from helpers import make_comparisons
from samples import chat

from common.data.table import read_comparisons, write_comparisons
from data_prep import leak_check, prepare


@pytest.fixture
def in_process(monkeypatch):
    """Scripts run within this process on the command lines that they would get: a start takes seconds."""

    def run(script, *arguments):
        module = importlib.import_module(f"data_prep.{script.removesuffix('.py')}")
        module.main(tyro.cli(module.Args, args=[str(argument) for argument in arguments]))

    monkeypatch.setattr(prepare, "run", run)


def as_published(frame):
    """The competition's columns, texts as JSON."""
    return frame.drop("source", "fold").with_columns(
        pl.Series(name, [json.dumps(turns) for turns in frame[name].to_list()])
        for name in ("prompt", "response_a", "response_b")
    )


def write_raw(folder, count=60):
    """train.csv, the 33k votes and the conversations, some about the same prompts."""
    frame = make_comparisons(count)
    folder.mkdir()
    table = as_published(frame)
    table.write_csv(folder / "train.csv")
    table.select("id", "prompt", "response_a", "response_b").head(3).write_csv(folder / "test.csv")
    further = as_published(make_comparisons(30, seed=5))
    pl.concat([table.tail(20), further]).write_csv(folder / "lmsys-33k-deduplicated.csv")
    (folder / "lmsys-chat-1m.jsonl").write_text(
        "".join(
            json.dumps({"conversation_id": f"c{i}", "model": f"m{i % 3}", "conversation": chat}) + "\n"
            for i, chat in enumerate(chats(frame, 10) + chats(make_comparisons(10, seed=9), 10))
        )
    )


def chats(frame, count):
    """Both answers of the first comparisons, as conversations of their own."""
    rows = frame.select("prompt", "response_a", "response_b").head(count).rows()
    return [
        [
            {"role": role, "content": text}
            for turn in zip(prompt, answers, strict=True)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        for prompt, *both in rows
        for answers in both
    ]


def test_everything_is_made_once_in_order(tmp_path, capfd, monkeypatch, in_process):
    write_raw(tmp_path / "data")
    args = prepare.Args(data=tmp_path / "data", artifacts=tmp_path / "artifacts")
    prepare.main(args)
    said = capfd.readouterr().out
    tables = tmp_path / "artifacts/data"
    votes, pairs, further = (
        read_comparisons(tables / f"{name}.parquet")[0] for name in ("arena55k", "lmsys1m_pairs", "arena33k")
    )
    seen = {tuple(prompt) for prompt in votes["prompt"].to_list()}
    for table in (pairs, further):
        assert len(table) and not seen & {tuple(prompt) for prompt in table["prompt"].to_list()}
    assert "preference_sets: not in " in said and "raw files missing" in said
    assert "helpsteer or Helpsteer-preference-standard; --hub would fetch it" in said
    monkeypatch.chdir(tmp_path)
    leak_check.main(leak_check.Args(fail_on=("fold",)))
    assert "test.csv and arena55k" in capfd.readouterr().out, "the three rows to answer are of train.csv here"
    (tables / "leaks.parquet").unlink()
    assert (tables / "summary.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in tables.glob("*.parquet")}
    assert len(before) == 4
    prepare.main(args)
    assert capfd.readouterr().out.count("up to date") >= 4
    assert before == {path: path.stat().st_mtime_ns for path in tables.glob("*.parquet")}


def test_nothing_to_make(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of train, .*docs/data\.md"):
        prepare.main(prepare.Args(data=tmp_path, artifacts=tmp_path / "artifacts"))


def test_scripts_are_processes_and_one_that_fails_stops_the_rest(tmp_path, capfd):
    args = prepare.Args(data=tmp_path / "data", artifacts=tmp_path / "artifacts")
    write_raw(args.data)
    whole = (args.data / "train.csv").read_text()
    (args.data / "train.csv").write_text("id,prompt\n1,[]\n")
    with pytest.raises(ValueError, match=r"competition\.py ended with status 1"):
        prepare.main(args)
    assert "lacks the columns" in capfd.readouterr().err
    assert not args.artifacts.exists()
    for path in args.data.iterdir():
        path.unlink()
    (args.data / "train.csv").write_text(whole)
    prepare.main(args)
    said = capfd.readouterr().out
    assert f"$ python data_prep/competition.py --input {args.data / 'train.csv'} --output " in said
    assert "made in " in said and len(read_comparisons(args.artifacts / "data/arena55k.parquet")[0]) == 60


def test_the_hub_takes_the_place_of_what_is_not_there(tmp_path):
    (tmp_path / "Capybara-Preferences.parquet").touch()
    source = prepare.SOURCES[-1]
    args = prepare.Args(data=tmp_path, hub=True)
    found, missing = prepare.find_inputs(source, args)
    assert found[0] == str(tmp_path / "Capybara-Preferences.parquet") and len(found) == 5
    assert found[1] == "RLHFlow/PKU-SafeRLHF-30K-standard" and not missing
    found, missing = prepare.find_inputs(source, prepare.Args(data=tmp_path))
    assert len(found) == 1 and len(missing) == 4


def test_a_list_of_leaks_stays_out_of_the_other_tables_and_a_missing_set_is_told(tmp_path, capfd, in_process):
    write_raw(tmp_path / "data")
    rows = [
        {"chosen": chat("the lazy dog", a), "rejected": chat("the lazy dog", b)} for a, b in ("12", "34")
    ] + [{"chosen": chat("fox", "1"), "rejected": chat("fox", "2")}]
    (tmp_path / "data/Capybara-Preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"data": tmp_path / "data", "artifacts": tmp_path / "artifacts"}
    prepare.main(prepare.Args(**args))
    said = capfd.readouterr().out
    assert "preference_sets: not in" in said and "of 1 of 5 sets" in said
    table = tmp_path / "artifacts/data/preference_sets.parquet"
    leaks = read_comparisons(table)[0].filter(pl.col("prompt").list.first() == "fox")
    write_comparisons(leaks, tmp_path / "leaks.parquet")
    with pytest.raises(ValueError, match="here it is exclude"):  # other tables are not replaced unasked
        prepare.main(prepare.Args(**args, exclude=(tmp_path / "leaks.parquet",)))
    prepare.main(prepare.Args(**args, exclude=(tmp_path / "leaks.parquet",), overwrite=True))
    assert read_comparisons(table)[0]["prompt"].explode().unique().to_list() == ["the lazy dog"]
    assert len(read_comparisons(tmp_path / "artifacts/data/arena55k.parquet")[0]) == 60
