"""The summary's numbers against plain counting, its pictures, and what may be missing."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import make_comparisons, make_tokenizer, run_script
from matplotlib.image import imread

from common.data.table import write_comparisons
from common.prompts import Prompter
from common.tokens import count_tokens
from data_prep.summary import Args, count_overlap, describe_tokens, main, read_counts, summarise

BUDGET = 130
PICTURES = {"summary-rows.png", "summary-labels.png", "summary-characters.png"}


@pytest.fixture
def folder(tmp_path):
    """Two tables of different sources with 30 rows in common, one with a manifest; and a tokenizer."""
    frame = make_comparisons(120, source="first")
    write_comparisons(frame, tmp_path / "first.parquet")
    counts = {"read": 150, "rejected": {"malformed JSON": 10}, "dropped": {"no English": 20}, "kept": 120}
    (tmp_path / "first.manifest.json").write_text(json.dumps({"counts": counts}))
    other = pl.concat([frame[:30].with_columns(source=pl.lit("second")), make_comparisons(50, seed=1)])
    write_comparisons(
        other.with_columns(source=pl.lit("second"), model_b=pl.lit("m3")), tmp_path / "second.parquet"
    )
    make_tokenizer("gemma").save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def run(folder: Path, **flags) -> dict:
    tables = (folder / "first.parquet", folder / "second.parquet")
    main(Args(input=tables, output=folder / "out", **flags))
    return json.loads((folder / "out" / "summary.json").read_text())


def check_png(path: Path) -> None:
    image = imread(path)
    assert image.shape[1] >= 1000
    assert image[..., :3].std() > 0.02, "the picture is blank"


def test_numbers_equal_plain_counting():
    frame = make_comparisons(80, seed=3)
    rows = frame.to_dicts()
    found = summarise(frame)
    turns = [len(row["prompt"]) for row in rows]
    assert found["turns"]["counts"] == {str(n): turns.count(n) for n in sorted(set(turns))}
    assert found["turns"]["mean"] == pytest.approx(sum(turns) / 80)
    assert found["prompts"] == len({tuple(row["prompt"]) for row in rows})
    shares = [
        sum(row[name] for row in rows) / 80 for name in ("winner_model_a", "winner_model_b", "winner_tie")
    ]
    assert found["labels"] == {"labelled": 80, "shares": pytest.approx(shares)}
    prompt = [sum(map(len, row["prompt"])) for row in rows]
    answers = [sum(map(len, row["response_a"] + row["response_b"])) for row in rows]
    whole = [one + other for one, other in zip(prompt, answers, strict=True)]
    for name, values in (("prompt", prompt), ("answers", answers), ("comparison", whole)):
        assert found["characters"][name] == {
            "mean": pytest.approx(np.mean(values)),
            "median": np.median(values),
            "p95": pytest.approx(np.quantile(values, 0.95)),
            "max": max(values),
        }
    assert found["models"] == {"m1": 80, "m2": 80}
    assert found["sources"] == {"test": 80}


def test_null_turns_count_no_characters_and_missing_labels_have_no_shares():
    frame = make_comparisons(4, labelled=False).with_columns(
        pl.col("prompt").list.eval(pl.lit(None, pl.String)), model_a=None, model_b=None
    )
    found = summarise(frame.cast({"model_a": pl.String, "model_b": pl.String}))
    assert found["characters"]["prompt"] == {"mean": 0, "median": 0, "p95": 0, "max": 0}
    assert found["characters"]["answers"]["max"] > 0
    assert found["labels"] == {"labelled": 0, "shares": None}
    assert found["models"] == {}


def test_tokens_equal_rendering_each_comparison(gemma_tokenizer):
    frame = make_comparisons(60, seed=4)
    whole, cut = (Prompter(gemma_tokenizer, conversation_tokens=n) for n in (100_000, BUDGET))
    before, after = count_tokens(frame, cut)
    for row, one, other in zip(frame.to_dicts(), before, after, strict=True):
        [tokenised] = whole.tokenise([(row["prompt"], row["response_a"], row["response_b"])])
        assert one == len(whole.render(tokenised).input_ids)
        rendered = cut.render(tokenised)
        assert other == len(rendered.input_ids)
        assert (other < one) == rendered.truncated
    assert 0 < (after < before).mean() < 1, "the budget cuts some and not all"
    found = describe_tokens(before, after)
    assert found["comparisons_cut"] == pytest.approx(np.mean(after < before))
    assert found["tokens_cut"] == pytest.approx(1 - after.sum() / before.sum())
    assert (found["total"], found["max"]) == (before.sum(), before.max())


def test_overlap_counts_different_prompts_once():
    prompts = {"s": "aabc", "t": "abz", "u": "y"}
    frame = pl.DataFrame(
        [(source, letter) for source, letters in prompts.items() for letter in letters],
        schema=("source", "prompt"),
        orient="row",
    ).unique()
    found = [tuple(one.values()) for one in count_overlap(frame)]
    assert found == [("s", "t", 2), ("s", "u", 0), ("t", "u", 0)]


def test_the_whole_summary(folder, capsys):
    found = run(folder, checkpoint=str(folder / "tokenizer"), conversation_tokens=BUDGET)
    first, second = found["tables"]["first"], found["tables"]["second"]
    assert (first["read"], first["kept"], second["read"], second["kept"]) == (150, 120, None, 80)
    assert first["dropped"] == {"no English": 20}
    assert second["models"] == {"m1": 80, "m3": 80}
    tables = {
        name: {tuple(p) for p in pl.read_parquet(folder / f"{name}.parquet")["prompt"].to_list()}
        for name in ("first", "second")
    }
    common = len(tables["first"] & tables["second"])
    assert found["overlap"] == [{"source": "first", "other_source": "second", "prompts": common}]
    assert 0 < first["tokens"]["comparisons_cut"] < 1
    said = capsys.readouterr().out
    for text in ("bad: malformed JSON", "-10", "dropped: no English", "m3 (80)", "first and second"):
        assert text in said
    pictures = {path.name for path in (folder / "out").iterdir()} - {"summary.json"}
    assert pictures == PICTURES | {"summary-tokens.png"}
    for name in pictures:
        check_png(folder / "out" / name)


def test_without_a_tokenizer_and_labels(folder):
    unlabelled = make_comparisons(10, labelled=False)
    write_comparisons(unlabelled, folder / "pool.parquet")
    main(Args(input=(folder / "pool.parquet",), output=folder / "out"))
    found = json.loads((folder / "out" / "summary.json").read_text())
    assert "tokens" not in found["tables"]["pool"]
    assert "checkpoint" not in found
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == PICTURES - {"summary-labels.png"} | {"summary.json"}


def test_a_manifest_of_another_table_is_refused(folder):
    with pytest.raises(ValueError, match=r"first\.manifest\.json says 120 comparisons, .* has 119; make"):
        read_counts(folder / "first.parquet", 119)
    assert read_counts(folder / "second.parquet", 80)["read"] is None


def test_an_empty_folder_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="artifacts/data holds no comparison table; make one with just prep"):
        main(Args())


def test_the_command_line(folder):
    done = run_script(
        "data_prep/summary.py", "--input", folder / "first.parquet", "--output", folder / "new" / "out"
    )
    assert done.returncode == 0, done.stderr
    check_png(folder / "new" / "out" / "summary-rows.png")
    failed = run_script("data_prep/summary.py", "--input", folder / "absent.parquet", "--output", folder)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
