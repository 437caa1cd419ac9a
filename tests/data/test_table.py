"""The comparison table: what is read back, what is refused, and hashes that mean the same everywhere."""

import ast
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest
from helpers import ROOT, read_competition_file
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import write_rows

from common.data.table import (
    LABELS,
    REJECTED_SCHEMA,
    SCHEMA,
    TEXTS,
    content_hashes,
    is_labelled,
    labels_array,
    read_comparisons,
    swap,
    table_hash,
    write_comparisons,
    write_table,
)
from common.score.ensemble import read_table
from common.score.metrics import log_loss

ROW = {
    "id": "1",
    "source": "votes",
    "model_a": "left",
    "model_b": None,
    "prompt": ["Hi", None],
    "response_a": ["nan", ""],
    "response_b": ["né\u2028", "null"],
    "winner_model_a": 1.0,
    "winner_model_b": 0.0,
    "winner_tie": 0.0,
    "fold": 3,
}
UNLABELLED = dict.fromkeys(LABELS)
TURNS = st.lists(
    st.none() | st.sampled_from(["", "null", "a", "ab"]) | st.text(max_size=5), min_size=2, max_size=2
)


def table(*changes: dict) -> pl.DataFrame:
    return pl.DataFrame([{**ROW, "id": str(i), **change} for i, change in enumerate(changes)], schema=SCHEMA)


@st.composite
def tables(draw):
    labels = st.sampled_from(
        [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.2, 0.3, 0.5), (None,) * 3]
    )
    rows = [
        {
            **dict(
                zip(("prompt", "response_a", "response_b"), draw(st.tuples(TURNS, TURNS, TURNS)), strict=True)
            ),
            **dict(zip(LABELS, draw(labels), strict=True)),
            "model_a": draw(st.none() | st.just("m")),
            "fold": draw(st.none() | st.integers(0, 4)),
        }
        for _ in range(draw(st.integers(1, 6)))
    ]
    return table(*rows)


@contextmanager
def file_size_limit(num_bytes):
    """As good as a full disk: no file of this process can grow beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_schema_is_the_contract():
    text, turns, label = pl.String, pl.List(pl.String), pl.Float32
    assert list(SCHEMA.items()) == [
        *(("id", text), ("source", text), ("model_a", text), ("model_b", text)),
        *(("prompt", turns), ("response_a", turns), ("response_b", turns)),
        *(("winner_model_a", label), ("winner_model_b", label), ("winner_tie", label), ("fold", pl.Int8)),
    ]


@settings(max_examples=30, deadline=None)
@given(frame=tables())
def test_what_is_written_is_read_back(tmp_path_factory, frame):
    path = tmp_path_factory.mktemp("round") / "x.parquet"
    write_comparisons(frame.with_columns(score=pl.lit(0.5)), path)
    found, report = read_comparisons(path)
    assert found.equals(frame.with_columns(score=pl.lit(0.5)), null_equal=True)
    assert (report.num_read, report.num_kept, len(report.rejected)) == (len(frame), len(frame), 0)


def test_files_are_read_in_the_order_given_with_their_further_columns(tmp_path):
    """Columns come back in the schema's order; brackets and = in a name are no pattern."""
    first, second = tmp_path / "x=[1].parquet", tmp_path / "a.parquet"
    table({"id": "9"}, {"id": "8"}).select(reversed(SCHEMA.names())).write_parquet(first)
    table({"id": "7"}).with_columns(margin=pl.lit(2)).write_parquet(second)
    frame, report = read_comparisons([first, second])
    assert frame.columns == [*SCHEMA.names(), "margin"]
    assert frame["id"].to_list() == ["9", "8", "7"]
    assert frame["margin"].to_list() == [None, None, 2]
    assert report.paths == (first, second)


def test_the_report_counts_what_is_worth_knowing(tmp_path):
    same = {"prompt": ["p"], "response_a": [None], "response_b": [None]}
    plain = {"prompt": ["p"], "response_a": ["a"], "response_b": ["b"]}
    table({}, same, plain, {**plain, **UNLABELLED}).write_parquet(tmp_path / "x.parquet")
    _, report = read_comparisons(tmp_path / "x.parquet")
    assert report.notes == {
        "with a null turn": 2,
        "with an empty answer": 1,
        "with identical answers": 1,
        "without a label": 1,
    }
    told = "4 comparisons read, 4 kept, 2 with a null turn, 1 with an empty answer, 1 with identical answers"
    assert str(report) == f"{tmp_path / 'x.parquet'}: {told}, 1 without a label"


BAD_ROWS = {
    "unequal turn counts": ({"response_b": ["x"]}, "prompt has 2 turns, response_a 2, response_b 1"),
    "no turns": ({"prompt": [], "response_a": [], "response_b": []}, "prompt has 0 turns"),
    "no turns at all": ({"response_a": None}, "response_a null"),
    "labels that do not sum to 1": ({"winner_tie": 0.5}, "found 1.0, 0.0, 0.5, sum 1.5, expected 1"),
    "labels of zeros": ({"winner_model_a": 0.0}, "sum 0.0"),
    "labels beyond the tolerance": ({"winner_tie": 0.0011}, "sum 1.0011"),
    "labels that are no probabilities": (
        {"winner_model_a": 1.5, "winner_model_b": -0.5},
        "found 1.5, -0.5, 0.0",
    ),
    "a label that is not finite": ({"winner_tie": float("nan")}, "found 1.0, 0.0, NaN"),
    "an infinite label": ({"winner_tie": float("inf")}, "found 1.0, 0.0, inf"),
    "a label missing": ({"winner_tie": None}, "found 1.0, 0.0, null"),
    "no id": ({"id": None}, "id is null, source is votes"),
    "an empty source": ({"source": ""}, 'source is ""'),
    "repeated key": ({"id": "0"}, "source votes has it in"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_the_run_or_is_left_out(tmp_path, name):
    change, detail = BAD_ROWS[name]
    path = tmp_path / "x.parquet"
    table({}, change, {}).write_parquet(path)
    with pytest.raises(ValueError) as caught:
        read_comparisons(path)
    message = str(caught.value)
    assert f"1 of 3 rows of {path} are bad" in message
    assert f"{path} row 1, id {change.get('id', '1') or 'missing'}: " in message
    assert detail in message
    assert "--skip-bad-rows" in message

    frame, report = read_comparisons(path, skip_bad_rows=True)
    assert frame["id"].to_list() == ["0", "2"]
    assert (report.num_read, report.num_kept) == (3, 2)
    assert report.rejected.schema == REJECTED_SCHEMA
    assert report.rejected.select("file", "row").row(0) == (str(path), 1)
    assert f"1 rejected: {report.rejected['reason'][0]}" in str(report)
    with pytest.raises(ValueError, match="1 of 3 rows"):
        write_comparisons(table({}, change, {}), tmp_path / "y.parquet")
    assert not (tmp_path / "y.parquet").exists()


def test_labels_within_the_tolerance_and_soft_ones_pass(tmp_path):
    soft = dict(zip(LABELS, (0.3333, 0.3333, 0.3333), strict=True))
    table(soft, {"winner_tie": 0.0009}).write_parquet(tmp_path / "x.parquet")
    assert len(read_comparisons(tmp_path / "x.parquet")[0]) == 2


def test_ten_bad_rows_are_listed_and_all_are_counted(tmp_path):
    table({}, *[{"winner_tie": 1.0}] * 12).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError) as caught:
        read_comparisons(tmp_path / "x.parquet")
    lines = str(caught.value).splitlines()
    assert "12 of 13 rows" in lines[0]
    assert [line.split()[2] for line in lines[1:11]] == [f"{row}," for row in range(1, 11)]
    assert lines[11].strip() == "and 2 more"


def test_keys_repeat_across_files_but_not_across_sources(tmp_path):
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    table({}, {"source": "other", "id": "0"}).write_parquet(first)
    table({"id": "5"}, {"id": "0"}).write_parquet(second)
    with pytest.raises(ValueError, match=f"{second} row 1, id 0: repeated key: .* {first} row 0"):
        read_comparisons([first, second])
    with pytest.raises(ValueError, match="2 of 4 rows"):
        read_comparisons([first, first])


def test_bad_rows_of_several_files_are_listed_in_the_order_of_the_files(tmp_path):
    paths = [tmp_path / name for name in ("z.parquet", "a.parquet", "m.parquet")]
    bad = {"response_a": ["x"]}
    for number, path in enumerate(paths):
        rows = [{"id": f"{number}{i}"} for i in range(3)]
        table(*rows, *([{"id": f"{number}0"}, {"id": f"{number}4", **bad}] * (number > 0))).write_parquet(
            path
        )
    _, report = read_comparisons(paths, skip_bad_rows=True)
    found = report.rejected.select("file", "row", "reason").rows()
    assert found == [
        (str(path), row, reason)
        for path in paths[1:]
        for row, reason in ((3, "repeated key"), (4, "unequal turn counts"))
    ]


def test_a_good_row_survives_a_bad_one_of_the_same_key(tmp_path):
    table({"id": "5", "winner_tie": 1.0}, {"id": "5"}).write_parquet(tmp_path / "x.parquet")
    frame, report = read_comparisons(tmp_path / "x.parquet", skip_bad_rows=True)
    assert len(frame) == 1
    assert report.rejected["reason"].to_list() == ["labels that do not sum to 1"]


def test_a_file_without_a_good_row_is_an_error_even_when_skipping(tmp_path):
    table({"winner_tie": 1.0}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="No row is good"):
        read_comparisons(tmp_path / "x.parquet", skip_bad_rows=True)


def test_a_wrong_schema_names_file_column_found_and_expected(tmp_path):
    path = tmp_path / "x.parquet"
    table({}).drop("winner_tie", "fold").write_parquet(path)
    with pytest.raises(
        ValueError, match=rf"{path} lacks the columns winner_tie, fold; found id, source, .*expected id"
    ):
        read_comparisons(path)
    table({}).with_columns(pl.col("id").cast(pl.Int64)).write_parquet(path)
    with pytest.raises(ValueError, match=rf"{path}: column id is Int64, expected String"):
        read_comparisons(path)
    table({}).with_columns(pl.col("winner_tie").cast(pl.String)).write_parquet(path)
    with pytest.raises(ValueError, match="winner_tie is String, expected Float32"):
        read_comparisons(path)
    with pytest.raises(ValueError, match="lacks the column fold"):
        write_comparisons(table({}).drop("fold"), path)


def test_further_columns_of_one_name_and_two_types_are_refused(tmp_path):
    table({}).with_columns(extra=pl.lit(1)).write_parquet(tmp_path / "a.parquet")
    table({"id": "x"}).with_columns(extra=pl.lit("1")).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, .*b\.parquet have a column of one name"):
        read_comparisons([tmp_path / "a.parquet", tmp_path / "b.parquet"])


@pytest.mark.parametrize("source", [pl.Categorical, pl.Enum(["votes"])])
@pytest.mark.parametrize(
    "label", [pl.Boolean, pl.Float64, pl.Float16, pl.Int8, pl.Decimal(5, 2)], ids=lambda kind: str(kind)
)
def test_categories_and_votes_of_any_type_read_as_the_schema_has_them(tmp_path, source, label):
    frame = table({}, {"winner_model_a": 0.0, "winner_tie": 1.0})
    other = frame.cast({"source": source, **dict.fromkeys(LABELS, label)})
    other.write_parquet(tmp_path / "x.parquet")
    assert read_comparisons(tmp_path / "x.parquet")[0].equals(frame)
    write_comparisons(other, tmp_path / "y.parquet")
    assert pl.read_parquet(tmp_path / "y.parquet").equals(frame)


SUMS = {
    "0.333,0.333,0.334": True,
    "0.333,0.333,0.333": True,
    "0.3335,0.3335,0.3335": True,
    "0.334,0.333,0.334": True,
    "0.3336666,0.3336666,0.3336668": True,
    "0.3336667,0.3336667,0.3336667": False,
    "0.33,0.33,0.33": False,
    "0.3329999,0.333,0.333": False,
    "0.2,0.8,0.00099999": True,
    "0.1000003,0.9,0.001": False,
}
"""Labels as a file has them -> whether their sum is 1 within 0.001."""


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz", "jsonl"])
@pytest.mark.parametrize("reader", ["comparisons", "competition", "labels", "probabilities"])
@pytest.mark.parametrize(("cells", "is_good"), SUMS.items())
def test_sums_are_judged_in_double_precision_by_every_reader(tmp_path, cells, is_good, reader, ending):
    path, labels = tmp_path / f"x.{ending}", dict(zip(LABELS, map(float, cells.split(",")), strict=True))
    if reader == "comparisons":
        path = tmp_path / "x.parquet"
        table({}).with_columns(**{name: pl.lit(value) for name, value in labels.items()}).write_parquet(path)
        read = read_comparisons
    elif reader == "competition":
        write_rows(path, [{name: ROW[name] for name in ("id", *TEXTS)} | labels])
        read = read_competition_file
    else:
        given = dict(zip(("m_a", "m_b", "m_tie"), labels.values(), strict=True))
        right = {"m_a": 1.0, "m_b": 0.0, "m_tie": 0.0}
        write_rows(path, [{"id": "1"} | (given if reader == "probabilities" else right | labels)])
        read = read_table
    if is_good:
        found = read(path)
        values = found[1]["m"] if reader == "probabilities" else labels_array(found[0])
        np.testing.assert_array_equal(values[0], np.float32(list(labels.values())))
        assert log_loss(values, values) > 0, "what is read can be scored"
    else:
        with pytest.raises(ValueError, match=r"0\.001"):
            read(path)


FOLDERS = ("common", "stages", "kaggle", "data_prep", "benchmarks")


def test_tables_are_read_in_one_way():
    """What polars opens by a name elsewhere would be a pattern, and a folder x=1 a column."""
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if re.fullmatch(r"(pl|polars)\.(read|scan)_\w+", name):
                off = {word.arg for word in node.keywords if ast.unparse(word.value) == "False"}
                found.append((path.name, name, {"glob", "hive_partitioning"} & off))
    assert found == [
        ("table.py", "pl.scan_parquet", {"glob", "hive_partitioning"}),
        ("doctor.py", "pl.read_csv", {"glob"}),
    ]


@pytest.mark.parametrize(
    "damage", ["absent", "folder", "empty", "text", "cut", "garbled", "no rows", "not readable"]
)
def test_a_file_that_is_no_parquet_gives_one_clear_message(tmp_path, damage):
    path = tmp_path / "x.parquet"
    table(*[{}] * 50).write_parquet(path)
    data = path.read_bytes()
    match damage:
        case "absent":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("id,prompt\n" * 20)
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "garbled":
            path.write_bytes(data[:8] + bytes(len(data) // 4) + data[8 + len(data) // 4 :])
        case "no rows":
            table({}).head(0).write_parquet(path)
        case "not readable":
            path.chmod(0)
            if os.access(path, os.R_OK):
                pytest.skip("this user may read everything")
    with pytest.raises(ValueError) as caught:
        read_comparisons(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_is_an_error():
    with pytest.raises(ValueError, match="no comparison file"):
        read_comparisons([])


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.parquet"
    write_comparisons(table({}), path)
    before = path.read_bytes()
    noise = [{"prompt": [os.urandom(2_000).hex()] * 2} for _ in range(200)]
    with file_size_limit(100_000), pytest.raises(ValueError, match=f"cannot write {path}"):
        write_comparisons(table(*noise), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        write_comparisons(table({}), tmp_path / "file" / "x.parquet")


def test_rejected_rows_are_written_as_csv_and_as_parquet(tmp_path):
    table({}, {"id": 'a,"b"\nc', "winner_tie": 1.0}).write_parquet(tmp_path / "x.parquet")
    _, report = read_comparisons(tmp_path / "x.parquet", skip_bad_rows=True)
    write_table(report.rejected, tmp_path / "r.csv")
    write_table(report.rejected, tmp_path / "r.parquet")
    assert pl.read_csv(tmp_path / "r.csv", schema=REJECTED_SCHEMA).equals(report.rejected)
    assert pl.read_parquet(tmp_path / "r.parquet").equals(report.rejected)


@settings(max_examples=50, deadline=None)
@given(frame=tables())
def test_swap_is_its_own_inverse_and_moves_everything(frame):
    swapped = swap(frame)
    assert swap(swapped).equals(frame)
    assert swapped["prompt"].equals(frame["prompt"])
    for a, b in (("model_a", "model_b"), ("response_a", "response_b"), LABELS[:2]):
        assert swapped[a].to_list() == frame[b].to_list()
        assert swapped[b].to_list() == frame[a].to_list()
    assert swapped.columns == frame.columns


def test_labels_are_in_class_order_and_nan_where_there_are_none():
    frame = table({}, {"winner_model_a": 0.2, "winner_model_b": 0.3, "winner_tie": 0.5}, UNLABELLED)
    found = labels_array(frame)
    assert found.dtype == np.float32
    assert found.shape == (3, 3)
    assert found.flags.c_contiguous
    assert found[:2] == pytest.approx(np.array([[1, 0, 0], [0.2, 0.3, 0.5]]))
    assert np.isnan(found[2]).all()
    assert frame.filter(is_labelled())["id"].to_list() == ["0", "1"]
    assert labels_array(swap(frame))[1] == pytest.approx([0.3, 0.2, 0.5])
    assert labels_array(frame.head(0)).shape == (0, 3)


@settings(max_examples=100, deadline=None)
@given(frame=tables())
def test_content_hashes_follow_the_content_only(frame):
    """Equal hash if and only if the prompt and the unordered pair of answers are equal."""
    hashes = content_hashes(frame).to_list()
    assert content_hashes(swap(frame)).to_list() == hashes
    assert content_hashes(frame.reverse()).to_list() == hashes[::-1]
    contents = [
        (prompt, sorted((a, b), key=repr))
        for prompt, a, b in frame.select("prompt", "response_a", "response_b").iter_rows()
    ]
    for i, first in enumerate(contents):
        for j, second in enumerate(contents):
            assert (hashes[i] == hashes[j]) == (first == second)


def test_content_hashes_tell_null_the_word_null_and_nothing_apart():
    """Nor does text that moves over a turn's or a column's end keep its hash."""
    variants = [
        {"prompt": ["p", None]},
        {"prompt": ["p", "null"]},
        {"prompt": ["p", ""]},
        {"prompt": ["pn", ""]},
        {"prompt": ["", "p"]},
        {"prompt": ["p"], "response_a": ["", "nan"]},
        {"prompt": ["p"], "response_a": ["nan", ""]},
    ]
    assert content_hashes(table(*variants)).n_unique() == len(variants)


def test_hashes_are_the_same_in_every_process_and_for_ever():
    """The digits stand in published checkpoints: a change of them is a break."""
    assert content_hashes(table({})).to_list() == ["55573bcdbcaebf63dc88e86dda35f0cf"]
    assert table_hash(table({})) == "4eac381f5bdc0324b803b7729d1fdb74f29f931fd350be56a26b7bff9b251691"
    code = "from test_table import *; print(content_hashes(table({}))[0], table_hash(table({})))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [content_hashes(table({}))[0], table_hash(table({}))]


@settings(max_examples=50, deadline=None)
@given(frame=tables(), seed=st.integers(0, 1000))
def test_table_hash_does_not_depend_on_row_order_or_further_columns(frame, seed):
    shuffled = frame.sample(fraction=1, shuffle=True, seed=seed).with_columns(extra=pl.lit(1))
    assert table_hash(shuffled) == table_hash(frame)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"},
        {"source": "x"},
        {"model_a": None},
        {"prompt": ["Hi", "None"]},
        {"response_a": ["né\u2028", "null"], "response_b": ["nan", ""]},
        {"winner_model_a": 0.0, "winner_tie": 1.0},
        UNLABELLED,
        {"fold": 2},
        {"fold": None},
    ],
)
def test_table_hash_sees_every_column(change):
    assert table_hash(table({}, change)) != table_hash(table({}, {}))


def test_table_hash_sees_a_row_that_is_there_twice():
    assert table_hash(pl.concat([table({}), table({})])) != table_hash(table({}))
