"""The competition's CSV: the real rows, everything that a bad file can be, folds, and the script itself."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import few_or_many, key_of, read_competition_file
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.table import LABELS, SCHEMA, content_hashes, labels_array, read_comparisons
from common.files import read_json
from data_prep.competition import Args, main, with_folds

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "arena_1000"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real rows are not in {REAL}")

HEADER = ("id", "model_a", "model_b", "prompt", "response_a", "response_b", *LABELS)
TEST_HEADER = ("id", "prompt", "response_a", "response_b")
GOOD = {
    "id": "4294899228",
    "model_a": "left",
    "model_b": "right",
    "prompt": '["Hi"]',
    "response_a": '["yes, \\"sir\\""]',
    "response_b": '["no"]',
    **dict(zip(LABELS, "100", strict=True)),
}


def row(**changes: str) -> dict[str, str]:
    return {**GOOD, **changes}


def write_csv(path: Path, rows: list[dict[str, str]], header: tuple[str, ...] = HEADER) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([values[name] for name in header] for values in rows)
    return path


def arguments(source: Path, output: Path, **changes: object) -> Args:
    return Args(input=(str(source),), output=output, **changes)


def votes(num_rows: int, num_prompts: int) -> list[dict[str, str]]:
    """Rows whose prompts repeat, with about as many of each vote."""
    return [
        row(
            id=str(7919 * i % 10_007),
            prompt=json.dumps([f"prompt {i % num_prompts}"]),
            **dict(zip(LABELS, "001" if i % 5 == 4 else ("100", "010")[i % 2], strict=True)),
        )
        for i in range(num_rows)
    ]


@needs_real_rows
def test_the_thousand_real_votes():
    frame, report = read_competition_file(REAL / "train.csv")
    assert frame.schema == SCHEMA
    assert (report.num_read, report.num_kept, len(report.rejected)) == (1000, 1000, 0)
    assert labels_array(frame).mean(axis=0) == pytest.approx([0.352, 0.353, 0.295])
    assert report.notes == {"with a null turn": 4, "with an empty answer": 2, "with identical answers": 7}
    assert frame["prompt"].list.len().max() == 15
    assert (frame["prompt"].list.len() == 1).mean() == pytest.approx(0.87, abs=0.005)
    assert frame["id"][0] == "30192"
    assert frame["prompt"][0].to_list() == [
        "Is it morally right to try to have a certain percentage of females on managerial positions?",
        "OK, does pineapple belong on a pizza? Relax and give me fun answer.",
    ]
    assert frame["model_a"][0] == "gpt-4-1106-preview"
    assert frame["fold"].null_count() == 1000
    assert frame["response_a"].explode().str.contains(r"\\u[0-9a-f]{4}|\\/").sum() < 10, (
        "escapes are resolved"
    )


@needs_real_rows
def test_the_real_test_rows_have_neither_votes_nor_models():
    frame, report = read_competition_file(REAL / "test.csv")
    assert frame.schema == SCHEMA
    assert frame["id"].to_list() == ["136060", "211333", "1233961"]
    assert frame.select(pl.col("model_a", "model_b", "fold", *LABELS).null_count().sum()).row(0) == (3,) * 6
    assert report.notes == {"without a label": 3}


@needs_real_rows
def test_the_real_votes_fold_by_prompt_and_by_vote():
    frame = with_folds(read_competition_file(REAL / "train.csv")[0], num_folds=5)
    sizes = Counter(frame["fold"])
    assert sorted(sizes) == [0, 1, 2, 3, 4]
    assert max(sizes.values()) - min(sizes.values()) <= 10
    for fold in range(5):
        shares = labels_array(frame.filter(pl.col("fold") == fold)).mean(axis=0)
        assert shares == pytest.approx([0.352, 0.353, 0.295], abs=0.02)


def test_texts_are_kept_as_they_are(tmp_path):
    """No null out of "nan", no number out of an id, no line ending changed, however long the cell."""
    turns = ["nan", None, "", "null", "NA", "a\r\nb\u2028", "<|eot_id|>", "\U0001f600", "x" * 200_000]
    cells = json.dumps(turns)
    changes = {
        "id": "007",
        "model_a": "nan",
        "model_b": "a\r\nb",
        "prompt": cells,
        "response_a": cells,
        "response_b": cells,
    }
    frame, _ = read_competition_file(write_csv(tmp_path / "x.csv", [row(**changes)]))
    found = frame.row(0, named=True)
    assert found["prompt"] == found["response_a"] == found["response_b"] == turns
    assert (found["id"], found["model_a"], found["model_b"]) == ("007", "nan", "a\r\nb")
    assert found["source"] == "arena55k"


def test_a_byte_order_mark_blank_lines_and_further_columns_are_no_obstacle(tmp_path, capsys):
    path = write_csv(tmp_path / "x.csv", [row(fold="9")], (*HEADER, "fold"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")
    frame, report = read_competition_file(path)
    assert frame["id"].to_list() == [GOOD["id"]]
    assert frame["fold"].to_list() == [None]
    assert not report.notes
    assert f"{path}: not used: fold" in capsys.readouterr().out


def test_soft_labels_and_rows_without_a_vote(tmp_path):
    soft = dict(zip(LABELS, ("0.25", ".5", "2.5e-1"), strict=True))
    path = write_csv(tmp_path / "x.csv", [row(id="1", **soft), row(id="2", **dict.fromkeys(LABELS, ""))])
    frame, report = read_competition_file(path, source="mine")
    assert labels_array(frame)[0].tolist() == [0.25, 0.5, 0.25]
    assert frame.select(LABELS).row(1) == (None, None, None)
    assert report.notes == {"without a label": 1}
    assert frame["source"].to_list() == ["mine", "mine"]


def test_lone_surrogates_are_replaced_and_counted_and_pairs_are_joined(tmp_path):
    changes = {
        "prompt": r'["\ud83d\ude00"]',
        "response_a": r'["a\ud83dz\ude00"]',
        "response_b": r'["\udead"]',
    }
    frame, report = read_competition_file(write_csv(tmp_path / "x.csv", [row(**changes), row(id="2")]))
    texts = frame.filter(id=GOOD["id"]).select("prompt", "response_a", "response_b").row(0)
    assert texts == (["\U0001f600"], ["a\ufffdz\ufffd"], ["\ufffd"])
    assert report.notes["with a lone surrogate replaced by U+FFFD"] == 1


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
ANY_TURNS = st.lists(st.none() | ANY_TEXT, min_size=2, max_size=2)


def repaired(turns: list[str | None]) -> list[str | None]:
    """What UTF-16 makes of it: halves that meet are joined, those that are alone become U+FFFD."""
    return [t and t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in turns]


@settings(max_examples=60, deadline=None)
@given(
    content=st.lists(st.tuples(ANY_TURNS, ANY_TURNS, ANY_TURNS), min_size=1, max_size=4),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_text_survives_the_csv(tmp_path_factory, content, line_end, quoting):
    path = tmp_path_factory.mktemp("any") / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=line_end, quoting=quoting)
        writer.writerow(TEST_HEADER)
        writer.writerows([i, *map(json.dumps, texts)] for i, texts in enumerate(content))
    frame, _ = read_competition_file(path)
    assert frame["id"].to_list() == [str(i) for i in range(len(content))]
    found = frame.select("prompt", "response_a", "response_b").rows()
    assert found == [tuple(map(repaired, texts)) for texts in content]


@settings(max_examples=40, deadline=None)
@given(content=st.tuples(*[st.lists(st.text(max_size=8), min_size=1, max_size=1)] * 3))
def test_unescaped_unicode_reads_like_escaped(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("escapes")
    hashes = []
    for ensure_ascii in (True, False):
        cells = [json.dumps(turns, ensure_ascii=ensure_ascii) for turns in content]
        path = write_csv(
            folder / f"{ensure_ascii}.csv", [dict(zip(TEST_HEADER, ("1", *cells), strict=True))], TEST_HEADER
        )
        hashes.append(content_hashes(read_competition_file(path)[0]).to_list())
    assert hashes[0] == hashes[1]


def slow(rows: list[dict]) -> tuple[list[tuple], list[tuple]]:
    """Good rows in id order and (line, id, reason) of bad ones, one row at a time in plain Python."""
    good, bad = defaultdict(list), []
    for line, cells in enumerate(rows, start=2):
        texts, labels = [], []
        reason = None
        for name in ("prompt", "response_a", "response_b"):
            try:
                turns = json.loads(cells[name])
            except ValueError:
                reason = reason or "malformed JSON"
                continue
            if not isinstance(turns, list) or not {type(turn) for turn in turns} <= {str, type(None)}:
                reason = reason or "wrong type"
            texts.append(turns)
        for name in LABELS:
            try:
                labels.append(float(cells[name]) if cells[name] else None)
            except ValueError:
                reason = reason or "wrong type"
        if reason is None and not cells["id"]:
            reason = "no key"
        elif reason is None and len({len(turns) for turns in texts}) > 1:
            reason = "unequal turn counts"
        elif reason is None and not texts[0]:
            reason = "no turns"
        elif reason is None and labels != [None] * 3:
            if None in labels or min(labels) < 0:
                reason = "labels that are no probabilities"
            elif abs(sum(labels) - 1) > 1e-3:
                reason = "labels that do not sum to 1"
        if reason is None:
            models = (cells["model_a"] or None, cells["model_b"] or None)
            good[cells["id"]].append((line, (cells["id"], *models, *map(repaired, texts), *labels)))
        else:
            bad.append((line, cells["id"] or None, reason))
    kept = []
    for same in good.values():  # of rows with one id one stays, whatever their order
        first, *others = sorted(same, key=content_order)
        kept.append(first[1])
        bad += [(line, row[0], "repeated key") for line, row in others]
    numbers = sorted((row for row in kept if row[0].isdigit()), key=lambda row: (int(row[0]), row[0]))
    return numbers + sorted(row for row in kept if not row[0].isdigit()), sorted(bad)


def content_order(numbered: tuple[int, tuple]) -> tuple:
    line, (_, *models, prompt, a, b, winner_a, winner_b, tie) = numbered
    labels = [(value is None, value or 0.0) for value in (winner_a, winner_b, tie)]
    names = [(name is None, name or "") for name in models]
    return *map(key_of, (prompt, a, b)), *names, *labels, line


TURN = st.sampled_from(["", "a", "nan", None, "a/b", "\U0001f600", "\ud83d"])
CELL = st.one_of(
    st.lists(TURN, max_size=2).map(json.dumps),
    st.lists(TURN, min_size=1, max_size=1).map(json.dumps),
    st.lists(TURN, min_size=1, max_size=1).map(lambda turns: json.dumps(turns).replace("/", "\\/")),
    st.lists(TURN, min_size=1, max_size=1).map(json.dumps),
    st.sampled_from(["", "null", "[1]", '"a"', "['a']", "{}"]),
)
VOTE = st.one_of(
    st.sampled_from(["100", "010", "001", "100", "010", "001", ("", "", ""), ("0.5", "0.25", ".25")]),
    st.tuples(*[st.sampled_from(["0", "1", "", "-1", "x", "1e-1"])] * 3),
)
CSV_ROWS = st.builds(
    lambda key, models, texts, vote: {
        "id": key,
        **dict(zip(("model_a", "model_b"), models, strict=True)),
        **dict(zip(("prompt", "response_a", "response_b"), texts, strict=True)),
        **dict(zip(LABELS, vote, strict=True)),
    },
    st.sampled_from(["", "7", "07", "10", "9", "4294899228", "a10", "a9", "nan", "é", "x,y", '"'])
    | st.integers(0, 300).map(str),
    st.tuples(*[st.sampled_from(["", "m", "nan"])] * 2),
    st.tuples(CELL, CELL, CELL) | CELL.map(lambda cell: (cell,) * 3),
    VOTE,
)


@settings(max_examples=140, deadline=None)
@given(rows=few_or_many(CSV_ROWS))
def test_random_rows_equal_a_slow_reader(tmp_path_factory, rows):
    path = write_csv(tmp_path_factory.mktemp("rows") / "x.csv", rows)
    good, bad = slow(rows)
    if not good:
        with pytest.raises(ValueError, match="No row is good"):
            read_competition_file(path, skip_bad_rows=True)
        return
    frame, report = read_competition_file(path, skip_bad_rows=True)
    expected = [(*row[:6], *(label and float(np.float32(label)) for label in row[6:])) for row in good]
    assert frame.drop("source", "fold").rows() == expected
    found = [(line, key or None, reason) for _, line, key, reason, _ in report.rejected.iter_rows()]
    assert found == bad


BAD_ROWS = {
    "malformed JSON": ({"prompt": '["Hi"'}, "malformed JSON: prompt: "),
    "Python instead of JSON": ({"prompt": "['Hi']"}, "malformed JSON: prompt: "),
    "an expression": ({"prompt": '["Hi" + "!"]'}, "malformed JSON"),
    "an empty cell": ({"response_b": ""}, "malformed JSON: response_b"),
    "nested without end": ({"prompt": "[" * 100_000}, "malformed JSON"),
    "no list": ({"prompt": '"Hi"'}, "wrong type: prompt is 'Hi', expected List(String)"),
    "null instead of a list": ({"prompt": "null"}, "wrong type: prompt is 'null', expected List(String)"),
    "a number as a turn": ({"response_a": "[1]"}, "wrong type: response_a[0] is '1', expected String"),
    "NaN as a turn": ({"response_a": "[NaN]"}, "wrong type: response_a[0] is 'nan'"),
    "unequal turn counts": ({"response_b": '["x","y"]'}, "prompt has 1 turns, response_a 1, response_b 2"),
    "no turn": (dict.fromkeys(("prompt", "response_a", "response_b"), "[]"), "no turns"),
    "two winners": ({"winner_tie": "1"}, "labels that do not sum to 1: found 1.0, 0.0, 1.0, sum 2.0"),
    "no winner": ({"winner_model_a": "0"}, "labels that do not sum to 1"),
    "a negative label": ({"winner_model_a": "2", "winner_tie": "-1"}, "labels that are no probabilities"),
    "an endless label": ({"winner_tie": "1e999"}, "wrong type: winner_tie is 'inf', expected Float64"),
    "a label that is a word": ({"winner_tie": "nan"}, "wrong type: winner_tie is 'nan', expected Float64"),
    "a label that only Python reads": ({"winner_tie": "0_0"}, "wrong type: winner_tie is '0_0'"),
    "a label missing": ({"winner_tie": ""}, "labels that are no probabilities: found 1.0, 0.0, null"),
    "no id": ({"id": ""}, "no key"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_the_run_or_is_left_out(tmp_path, name):
    """The first row spans two lines, so the bad one begins in line 4."""
    change, message = BAD_ROWS[name]
    spanning = row(id="1", model_a="two\nlines")
    path = write_csv(tmp_path / "x.csv", [spanning, row(**{"id": "2", **change}), row(id="3")])
    with pytest.raises(ValueError) as caught:
        read_competition_file(path)
    assert f"1 of 3 rows of {path} are bad" in str(caught.value)
    assert f"{path} line 4, id {change.get('id', '2') or 'missing'}: " in str(caught.value)
    assert message in str(caught.value)
    frame, report = read_competition_file(path, skip_bad_rows=True)
    assert frame["id"].to_list() == ["1", "3"]
    assert (report.num_read, report.num_kept) == (3, 2)
    assert report.rejected.select("row", "id").row(0) == (4, change.get("id", "2"))


def test_of_rows_with_one_id_the_same_stays_in_any_order(tmp_path):
    rows = [row(id="1", model_a=name) for name in "abc"] + [row(id="2")]
    for shift in range(3):
        path = write_csv(tmp_path / "x.csv", rows[shift:3] + rows[:shift] + rows[3:])
        with pytest.raises(ValueError, match=r"2 of 4 rows.*are bad") as caught:
            read_competition_file(path)
        assert "repeated key: source arena55k has it in" in str(caught.value)
        frame, report = read_competition_file(path, skip_bad_rows=True)
        assert frame.select("id", "model_a").rows() == [("1", "a"), ("2", "left")]
        assert report.rejected["reason"].to_list() == ["repeated key"] * 2


@pytest.mark.parametrize(("cells", "hint"), [(8, "; is the file cut off here?"), (10, "")])
def test_a_row_of_another_width_is_bad(tmp_path, cells, hint):
    path = write_csv(tmp_path / "x.csv", [row()])
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(["8", *["[]"] * (cells - 1)])
    with pytest.raises(ValueError) as caught:
        read_competition_file(path)
    assert f"line 3, id 8: wrong number of cells: found {cells}, expected 9{hint}\n" in str(caught.value)


@pytest.mark.parametrize("cut", ['"[""x', '"[""x"', '"[""x""]'])
def test_a_csv_cut_off_in_the_middle_of_a_row_is_refused_with_its_line(tmp_path, cut):
    path = write_csv(tmp_path / "x.csv", [row(id="1", model_a="two\nlines"), row(id="2")])
    with path.open("a", newline="") as file:
        file.write(f"3,m,m,{cut}")
    with pytest.raises(ValueError, match=f"{path} line 5.*cut off"):
        read_competition_file(path)
    frame, report = read_competition_file(path, skip_bad_rows=True)
    assert frame["id"].to_list() == ["1", "2"]
    assert report.rejected.select("row", "reason").rows() == [
        (5, "wrong number of cells" if cut.endswith('x"') else "broken quotes")
    ]


def test_a_quote_left_open_is_told_with_all_the_lines_that_it_takes(tmp_path):
    path = write_csv(tmp_path / "x.csv", [row(id="1")])
    with path.open("a", newline="") as file:
        file.write('2,m,m,"[]\r\n' + "3,m,m,[],[],[],1,0,0\r\n" * 5)
    _, report = read_competition_file(path, skip_bad_rows=True)
    assert report.rejected.select("row", "reason").rows() == [(3, "broken quotes")]
    assert "up to line 8: a quote does not close" in report.rejected["detail"].item()


def test_every_cut_of_a_file_loses_no_row_silently(tmp_path):
    """Cut anywhere but between two rows (or inside the last number), the file is refused."""
    path = write_csv(tmp_path / "x.csv", [row(id="1"), row(id="2", winner_tie="0.0")])
    data = path.read_bytes()
    whole = {data.index(b"\r\n2,") + 2, len(data)}
    for end in range(data.index(b"\r\n1,") + 3, len(data)):
        path.write_bytes(data[:end])
        rest = data[end : data.index(b"\r\n", end - 1) + 2]
        if end in whole or set(rest) <= set(b".0\r\n"):
            continue
        with pytest.raises(ValueError):
            read_competition_file(path)


@pytest.mark.parametrize("broken", ['3,m,m,"[]"x,[],[],1,0,0\r\n', "3,m,m,[],a\rb,[],1,0,0\r\n"])
def test_broken_quotes_and_line_ends_are_refused(tmp_path, broken):
    path = write_csv(tmp_path / "x.csv", [row()])
    with path.open("a", newline="") as file:
        file.write(broken)
    with pytest.raises(ValueError, match=f"{path}"):
        read_competition_file(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            ("id", "prompt", "response_a"),
            "lacks the column response_b; found id, prompt, response_a; expected id, ",
        ),
        (("key", "prompts"), "lacks the columns id, prompt, response_a, response_b; found key, prompts"),
        (HEADER[:-1], "lacks the column winner_tie"),
        ((*TEST_HEADER, "prompt"), "the header has prompt more than once"),
    ],
)
def test_a_wrong_header_names_what_was_found_and_expected(tmp_path, header, message):
    path = write_csv(tmp_path / "x.csv", [row(key="1", prompts="[]")], header)
    with pytest.raises(ValueError) as caught:
        read_competition_file(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n", "lacks the columns id, prompt, response_a, response_b; found none"),
        ((",".join(TEST_HEADER)).encode(), "no comparison in it"),
        ("id,prompt".encode("utf-16"), "is not UTF-8: its header has the byte 0xff after ''; save it again"),
        (
            ",".join(TEST_HEADER).encode() + b"\n" + b"x" * 100_000 + b"\ncaf\xe9,",
            "line 3, id caf\ufffd: not UTF-8: found the byte 0xe9 after 'caf'; save the file as UTF-8",
        ),
        (b"PAR1\x15\x04\x15\x80", r"is not UTF-8: its header has the byte 0x80 after 'PAR1\x15\x04\x15'"),
    ],
)
def test_a_file_that_is_no_utf8_csv_is_refused(tmp_path, data, message):
    path = tmp_path / "x.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_competition_file(path, skip_bad_rows=True)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_absent_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.csv does not exist; .* put it there, or name another"):
        read_competition_file(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="holds no Parquet, CSV or JSON lines file"):
        read_competition_file(tmp_path)


def test_reading_leaves_the_csv_module_as_it_was(tmp_path):
    limit = 131_072
    csv.field_size_limit(limit)
    read_competition_file(write_csv(tmp_path / "x.csv", [row()]))
    with pytest.raises(ValueError) as caught:  # held on to, and with it the reader's frame
        read_competition_file(write_csv(tmp_path / "x.csv", [row()], ("id",)))
    assert csv.field_size_limit() == limit, caught


def test_folds_keep_a_prompt_together_and_do_not_depend_on_row_order(tmp_path):
    frame, _ = read_competition_file(write_csv(tmp_path / "x.csv", votes(600, 90)))
    folded = with_folds(frame, num_folds=5)
    assert folded.drop("fold").equals(frame.drop("fold"))
    assert folded.schema == SCHEMA
    assert folded.group_by("prompt").agg(pl.col("fold").n_unique())["fold"].max() == 1
    assert sorted(folded["fold"].unique()) == [0, 1, 2, 3, 4]
    assert max(Counter(folded["fold"]).values()) <= 160
    shuffled = with_folds(frame.sample(fraction=1, shuffle=True, seed=1), num_folds=5)
    assert shuffled.sort("id").equals(folded.sort("id"))
    assert (
        not with_folds(frame.with_columns(id=pl.col("id").reverse()), num_folds=5)
        .sort("id")
        .equals(folded.sort("id"))
    )


def test_unlabelled_rows_get_no_fold(tmp_path):
    rows = votes(60, 60)
    rows[7].update(dict.fromkeys(LABELS, ""))
    folded = with_folds(read_competition_file(write_csv(tmp_path / "x.csv", rows))[0], num_folds=2)
    assert folded.filter(pl.col("fold").is_null())["id"].to_list() == [rows[7]["id"]]


@pytest.mark.parametrize(
    ("num_rows", "num_prompts", "message"),
    [
        (60, 4, "60 labelled comparisons of 4 different prompts"),
        (20, 20, "the rarest vote 4 times, are too few for 5 folds"),
        (4, 4, "are too few for 5 folds; pass a smaller --folds, or 0 for none"),
    ],
)
def test_too_few_rows_for_the_folds_is_an_error(tmp_path, num_rows, num_prompts, message):
    frame, _ = read_competition_file(write_csv(tmp_path / "x.csv", votes(num_rows, num_prompts)))
    with pytest.raises(ValueError, match=message):
        with_folds(frame, num_folds=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"folds": 1}, "--folds is 1"),
        ({"folds": -1}, "0 "),
        ({"folds": 128}, "127"),
        ({"source": ""}, "--source"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Args(**flags)
    with pytest.raises(ValueError, match=r"--output is x\.csv"):
        Args(output=Path("x.csv"))


def test_the_script_writes_once_and_then_says_up_to_date(tmp_path, capsys):
    args = arguments(write_csv(tmp_path / "x.csv", votes(60, 60)), tmp_path / "new" / "x.parquet")
    main(args)
    said = capsys.readouterr().out
    assert "comparisons kept │" in said.replace("  ", " ")
    assert "x.parquet: 60 comparisons, folds of 12, 12, " in said
    assert "up to date" not in said
    frame, _ = read_comparisons(args.output)
    assert frame["fold"].null_count() == 0
    manifest = read_json(args.output.with_suffix(".manifest.json"))
    assert manifest["parameters"]["folds"] == 5
    assert manifest["parameters"]["scikit_learn"].count(".") >= 1
    assert manifest["counts"] == {"read": 60, "rejected": {}, "dropped": {}, "kept": 60}
    before = args.output.stat()
    main(args)
    assert "up to date" in capsys.readouterr().out
    assert args.output.stat().st_mtime_ns == before.st_mtime_ns
    assert {path.name for path in args.output.parent.iterdir()} == {"x.parquet", "x.manifest.json"}


def test_the_script_replaces_other_content_only_when_told(tmp_path):
    output = tmp_path / "x.parquet"
    source = write_csv(tmp_path / "x.csv", votes(60, 60))
    main(arguments(source, output))
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"made with folds 5; here it is folds 3; pass --overwrite"):
        main(arguments(source, output, folds=3))
    other = write_csv(tmp_path / "y.csv", votes(50, 50))
    with pytest.raises(ValueError, match=r"was made from other files than .*y\.csv; pass --overwrite"):
        main(arguments(other, output))
    assert output.read_bytes() == before
    main(arguments(other, output, overwrite=True))
    assert len(read_comparisons(output)[0]) == 50
    output.write_text("something precious")
    with pytest.raises(ValueError, match="was changed after it was made"):
        main(arguments(other, output))
    assert output.read_text() == "something precious"


def test_the_script_lists_rows_that_it_was_told_to_skip(tmp_path, capsys):
    rows = [*votes(60, 60), row(id='bad, "very"', prompt="[")]
    where = (write_csv(tmp_path / "x.csv", rows), tmp_path / "out" / "x.parquet")
    with pytest.raises(ValueError, match="malformed JSON"):
        main(arguments(*where, folds=0))
    assert not (tmp_path / "out").exists()
    main(arguments(*where, folds=0, skip_bad_rows=True))
    said = capsys.readouterr().out
    assert "bad: malformed JSON" in said
    assert "60 comparisons, no folds" in said
    rejected = pl.read_parquet(tmp_path / "out" / "x.rejected.parquet").row(0, named=True)
    assert (rejected["row"], rejected["id"], rejected["reason"]) == (62, 'bad, "very"', "malformed JSON")


def test_prompts_of_other_tables_are_left_out(tmp_path, capsys):
    first = votes(60, 60)
    main(arguments(write_csv(tmp_path / "a.csv", first[:20]), tmp_path / "a.parquet", folds=0))
    args = arguments(
        write_csv(tmp_path / "b.csv", first),
        tmp_path / "b.parquet",
        folds=0,
        exclude=(tmp_path / "a.parquet",),
    )
    main(args)
    seen = set(read_comparisons(tmp_path / "a.parquet")[0]["prompt"].list.join("|"))
    kept = read_comparisons(tmp_path / "b.parquet")[0]
    assert not seen & set(kept["prompt"].list.join("|")) and 0 < len(kept) < 60
    assert read_json(tmp_path / "b.manifest.json")["counts"]["dropped"] == {
        "prompt stands in --exclude": 60 - len(kept)
    }


def test_the_test_form_needs_no_flag(tmp_path, capsys):
    source = write_csv(tmp_path / "test.csv", [row()], TEST_HEADER)
    main(arguments(source, tmp_path / "test.parquet"))
    assert "1 comparisons, no folds" in capsys.readouterr().out
    assert read_comparisons(tmp_path / "test.parquet")[0]["fold"].to_list() == [None]


def run_script(*flags: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "data_prep" / "competition.py", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_line_ends_a_mistake_with_one_line_and_status_1(tmp_path):
    (tmp_path / "in the way").write_text("")
    source = write_csv(tmp_path / "x.csv", votes(60, 60))
    failed = run_script("--input", source, "--output", tmp_path / "in the way" / "x.parquet")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: cannot write ")
    assert len(failed.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in the way", "x.csv"]


def test_the_command_line_works(tmp_path):
    source = write_csv(tmp_path / "x.csv", votes(60, 60))
    done = run_script(
        "--input", source, "--output", tmp_path / "x.parquet", "--folds", "2", "--source", "mine"
    )
    assert done.returncode == 0, done.stderr
    frame, _ = read_comparisons(tmp_path / "x.parquet")
    assert frame["fold"].n_unique() == 2
    assert frame["source"].unique().to_list() == ["mine"]
