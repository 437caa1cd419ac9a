"""Raw files: every format gives the same rows, every broken file a clear message."""

import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import write_rows

from common.data.chats import MESSAGES
from common.data.sources import Raw, column_names, open_raw
from common.data.sources.find import _from_hub, fetch, find_raw

SCHEMA = {"id": pl.String(), "turns": pl.List(pl.String()), "score?": pl.Float64()}
ROWS = [
    {"id": "4294899228", "turns": ["nan", None, "a/b", "\U0001f600"], "score": 1.0},
    {"id": "b", "turns": [""], "score": None},
]


def open_as(schema: dict, path: Path | str, scratch: Path) -> Raw:
    files = fetch([str(path)], scratch)
    return open_raw([(file, schema, pl.LazyFrame.lazy) for file in files], scratch)


def opened(path: Path | str, tmp_path: Path):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    raw = open_as(SCHEMA, path, scratch)
    return raw.frame.collect(), raw


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_all(folder: Path) -> list[Path]:
    pl.DataFrame(ROWS).write_parquet(folder / "a.parquet")
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(ROWS).replace(b"a/b", b"a\\/b") + b"\n")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    (folder / "a.ndjson.zst").write_bytes(pa.compress(lines(ROWS), codec="zstd", asbytes=True))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "turns", "score", "more"])
        writer.writerows([r["id"], json.dumps(r["turns"]), r["score"], ""] for r in ROWS)
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_rows(tmp_path):
    (tmp_path / "in").mkdir()
    files = write_all(tmp_path / "in")
    assert len(files) == 6
    for path in files:
        frame, raw = opened(path, tmp_path)
        assert frame.drop("file", "row").rows(named=True) == ROWS, path
        assert frame["file"].to_list() == [str(path)] * 2
        assert raw.rejected.is_empty()
        assert {"id", "turns", "score"} <= set(column_names(fetch([str(path)], tmp_path)[0]))
    frame, raw = opened(tmp_path / "in", tmp_path)
    assert raw.names == (str(tmp_path / "in" / "a.parquet"),), "of a folder, the Parquets"
    assert raw.row_unit == "row"


def test_texts_that_hold_json_are_lists_wherever_they_stand(tmp_path):
    """A CSV becomes a Parquet of texts on the hub."""
    rows = [{**row, "turns": json.dumps(row["turns"])} for row in ROWS]
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    for name, first in (("a.parquet", 0), ("a.jsonl", 1)):
        frame, raw = opened(tmp_path / name, tmp_path)
        assert frame.drop("file", "row").rows(named=True) == ROWS
        assert frame["row"].to_list() == [first, first + 1]
        assert raw.rejected.is_empty()
    pl.DataFrame([*rows, {**rows[0], "turns": "no JSON"}]).write_parquet(tmp_path / "a.parquet")
    _, raw = opened(tmp_path / "a.parquet", tmp_path)
    assert raw.rejected.select("row", "id", "reason").rows() == [(2, "4294899228", "malformed JSON")]


def test_rows_that_are_not_utf8_or_have_broken_quotes_are_rejected_one_by_one(tmp_path):
    text = 'id,turns\n1,[]\ncaf\xe9,[]\n3,"[]"x\n4,[]\n5,"[\n6,[]\n'
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    frame, raw = opened(tmp_path / "a.csv", tmp_path)
    assert frame["id"].to_list() == ["1", "4"]
    assert raw.rejected.select("row", "reason").rows() == [
        (3, "not UTF-8"),
        (4, "broken quotes"),
        (6, "broken quotes"),
    ]
    assert "up to line 7" in raw.rejected["detail"][2]


def make_files(folder: Path, names: str) -> None:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.mark.parametrize(
    ("taken", "left_out"),
    [
        ("train-00000-of-2.parquet train-00001-of-2.parquet", "test-0.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"),
        ("train/a.parquet", "test/a.parquet validation/a.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("a/Train.CSV", "a/Test.CSV.GZ dev.jsonl"),
        ("my_set_train.csv", "my_set_test.csv my-set-eval.csv"),
        ("training.jsonl", "valid.jsonl val.jsonl testing.jsonl evaluation.jsonl other.jsonl"),
        ("train.csv", "test.csv sample_submission.csv"),
        ("train.csv", "test.parquet"),
        ("train/train-0.parquet", "test/train-0.parquet train/train-eval.parquet"),
        ("a.csv b.csv", "a-test.csv"),
        ("contest.csv developer.csv latest.csv trainer.csv", ""),
        ("a.parquet", "b.csv"),
    ],
)
def test_a_folder_of_splits_gives_its_train_split_and_names_the_rest(tmp_path, capsys, taken, left_out):
    folder = tmp_path / "my-test"  # what it is called itself does not count
    make_files(folder, f"{taken} {left_out} dataset_infos.json README.md")
    found = fetch([str(folder)], tmp_path)
    assert [file.name for file in found] == [str(folder / name) for name in taken.split()]
    said = capsys.readouterr().out.replace("\n", "")
    assert all(str(folder / name) in said for name in left_out.split())
    assert ("left out" in said) == bool(left_out)


def test_a_folder_without_a_train_split_is_refused_unless_it_is_asked_for_by_name(tmp_path, capsys):
    make_files(tmp_path / "x", "data/test-0.parquet dev.csv")
    with pytest.raises(
        ValueError, match=r"holds no train split, but .*test-0.*dev\.csv; to read these, name"
    ):
        fetch([str(tmp_path / "x")], tmp_path)
    for named in ("x/dev.csv", "x/data/test-0.parquet"):
        assert fetch([str(tmp_path / named)], tmp_path)[0].name == str(tmp_path / named)
    make_files(tmp_path, "test/test-0.parquet test/test-1.parquet")
    assert len(fetch([str(tmp_path / "test")], tmp_path)) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no Parquet, CSV or JSON lines"):
        fetch([str(tmp_path / "empty")], tmp_path)
    assert capsys.readouterr().out == ""


def test_endings_in_any_case_are_known_everywhere(tmp_path):
    for folder in ("in", "all"):
        (tmp_path / folder).mkdir()
    for path in write_all(tmp_path / "all"):
        upper = path.rename(tmp_path / "in" / path.name.upper().replace("A.", "Big."))
        assert opened(upper, tmp_path)[0].drop("file", "row").rows(named=True) == ROWS, upper
        assert find_raw(tmp_path / "in", "no", "Big") == upper
        assert fetch([str(tmp_path / "in")], tmp_path)[0].path == upper
        upper.unlink()
    assert find_raw(tmp_path / "in", "Big") is None is find_raw(tmp_path / "nowhere", "Big")


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz", "jsonl"])
def test_columns_that_are_not_used_are_named(tmp_path, capsys, ending):
    rows = [{**row, "more": "1", "also": "x"} for row in ROWS]
    opened(write_rows(tmp_path / f"a.{ending}", rows), tmp_path)
    assert f"{tmp_path / f'a.{ending}'}: not used: more, also" in capsys.readouterr().out.replace("\n", "")


def test_categories_are_text_and_truths_are_numbers(tmp_path):
    """As pandas and Arrow write them; within lists and structs too."""
    words, chats = pa.dictionary(pa.int32(), pa.string()), [[{"role": "user", "content": "é"}]] * 2
    columns = {
        "id": pa.array(["x", "y"]).dictionary_encode(),
        "turns": pa.array([["a", None], []], pa.list_(words)),
        "chat": pa.array(
            [[{"role": "user", "content": "é"}]] * 2, pa.list_(pa.struct({"role": words, "content": words}))
        ),
    }
    schema = {"id": pl.String(), "turns": pl.List(pl.String()), "chat": MESSAGES, "vote": pl.Float64()}
    votes = ([True, False], pa.array([1, 0], pa.decimal128(5, 2)), pa.array([1, 0], pa.float16()))
    expected = [("x", ["a", None], 1.0), ("y", [], 0.0)]
    for vote in map(pa.array, votes):
        pq.write_table(pa.table(columns | {"vote": vote}), tmp_path / "a.parquet")
        frame = open_as(schema, tmp_path / "a.parquet", tmp_path).frame.collect()
        assert frame.select("id", "turns", "vote").rows() == expected
        assert frame["chat"].to_list() == chats
    enum = pl.DataFrame(
        {"id": ["1"], "turns": ['["a"]']}, schema={"id": pl.String, "turns": pl.Enum(['["a"]'])}
    )
    enum.write_parquet(tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", tmp_path)[0]["turns"].to_list() == [["a"]]
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": "1", "turns": [], "score": True}]))
    (tmp_path / "a.csv").write_text("id,turns,score\n1,[],true\n2,[],False\n3,[],TRUE\n4,[],yes\n")
    assert opened(tmp_path / "a.jsonl", tmp_path)[0]["score"].to_list() == [1.0]
    frame, raw = opened(tmp_path / "a.csv", tmp_path)
    assert frame["score"].to_list() == [1.0, 0.0, 1.0] and raw.rejected["row"].to_list() == [5]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(13, "Permission denied"),
        pl.exceptions.ComputeError("x"),
    ],
)
def test_a_scratch_folder_that_cannot_be_written_is_blamed_itself(tmp_path, monkeypatch, error):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pl.LazyFrame, "sink_parquet", fail)
    with pytest.raises(ValueError, match=r"temporary files cannot be written in .*TMPDIR") as caught:
        opened(tmp_path / "a.jsonl", tmp_path)
    assert "a.jsonl" not in str(caught.value)


def test_a_hub_set_that_holds_a_script_runs_nothing(tmp_path, monkeypatch):
    """Why standard input need not be closed: the library asks nothing, it refuses."""
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, "owner/name.txt")
    script = tmp_path / "owner/name/name.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match="was not fetched from the hub"):
        _from_hub("owner/name", tmp_path / "x.parquet")
    assert not (tmp_path / "ran").exists()
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **flags: asked.update(flags) or 1 / 0)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        _from_hub("owner/name", tmp_path / "x.parquet")
    assert asked == {"split": "train", "trust_remote_code": False}


def test_a_cache_that_is_full_is_no_fault_of_the_hub(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(ValueError, match=r"owner/name was not kept: .*No space left.*HF_HOME") as caught:
        _from_hub("owner/name", tmp_path / "x.parquet")
    assert "licence" not in str(caught.value)


def test_whole_numbers_become_text_and_absent_columns_null(tmp_path):
    pl.DataFrame({"id": [2**40], "turns": [["a"]]}).write_parquet(tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", tmp_path)[0].row(0)[:3] == (str(2**40), ["a"], None)


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "\\ud83d", "turns": ["\\ud83d\\ude00", "\\udc00"]}\n')
    frame, raw = opened(tmp_path / "a.jsonl", tmp_path)
    assert frame.row(0)[:2] == ("\ufffd", ["\U0001f600", "\ufffd"])
    assert raw.notes == {"with a lone surrogate replaced by U+FFFD": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "1", "turns": ["a"', "malformed JSON"),
        (b'["a"]', "no JSON object"),
        (b'{"id": "1", "\\ud800": 1}', "missing field"),
        (b'{"id": "\\ud800", "turns": "a"}', "malformed JSON"),
        (b'{"id": "1", "turns": "{}"}', "wrong type"),
        (b'{"id": "1", "turns": "null"}', "wrong type"),
        (b'{"id": "1", "turns": [1]}', "wrong type"),
        (b'{"id": true, "turns": []}', "wrong type"),
        (b'{"id": "1", "turns": [], "score": Infinity}', "wrong type"),
        (b'{"id": "1", "turns": [], "score": 1' + b"0" * 400 + b"}", "wrong type"),
        (b'{"id": "caf\xe9", "turns": []}', "not UTF-8"),
        (b"[" * 100_000, "malformed JSON"),
    ],
)
def test_a_bad_line_is_rejected_with_its_number(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS) + line + b"\n" + lines(ROWS[:1]))
    frame, raw = opened(tmp_path / "a.jsonl", tmp_path)
    assert len(frame) == 3
    assert raw.rejected.select("row", "reason").rows() == [(3, reason)]


def test_bad_cells_of_a_csv_are_rejected_with_their_line(tmp_path):
    (tmp_path / "a.csv").write_text('id,turns,score\n1,"[""a\\n""]",2\n2,[,1\n3,[],x\n4\n5,"""a""",\n')
    frame, raw = opened(tmp_path / "a.csv", tmp_path)
    assert frame["id"].to_list() == ["1"]
    assert raw.rejected["row"].to_list() == [3, 4, 5, 6]
    assert raw.rejected["id"].to_list() == ["2", "3", "4", "5"]
    assert raw.rejected["reason"].to_list() == [
        "malformed JSON",
        "wrong type",
        "wrong number of cells",
        "wrong type",
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"x", "has an ending that is not known"),
        ("a.parquet.gz", b"x", "has an ending that is not known"),
        ("a.parquet", b"PAR1 no parquet", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS * 500))[:-30], "is it cut off"),
        ("a.csv.gz", b"no gzip", "is it cut off"),
        ("a.jsonl.zst", pa.compress(lines(ROWS * 500), codec="zstd", asbytes=True)[:-9], "is it cut off"),
        ("a.csv", b'"id,turns\n1,[]\n', "Is the file cut off"),
        ("a.csv", b"id,turns,caf\xe9\n1,[],1\n", "is not UTF-8"),
        ("a.csv", b"id\n1\n", "lacks the column turns; found id"),
        ("a.csv", b"id,id,turns\n1,1,[]\n", "has id more than once"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path / name, tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert csv.field_size_limit() < 2**30


def test_every_cut_of_a_parquet_is_refused(tmp_path):
    pl.DataFrame(ROWS).write_parquet(tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    for end in range(1, len(data), 37):
        (tmp_path / "cut.parquet").write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"cut\.parquet cannot be read"):
            opened(tmp_path / "cut.parquet", tmp_path)


@pytest.mark.parametrize("turns", [[{"a": "b"}], [1], [[1]]])
def test_a_column_of_another_type_names_both(tmp_path, turns):
    pl.DataFrame({"id": ["1"], "turns": turns}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column turns is .*, expected List\(String\)"):
        opened(tmp_path / "a.parquet", tmp_path)


def test_a_message_without_content_is_a_bad_row(tmp_path):
    schema = {"chat": MESSAGES}
    good = {"role": "user", "content": None, "more": 1}
    rows = [{"chat": [good]}, {"chat": [good, {"role": "assistant", "text": "x"}]}, {"chat": [{}]}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    raw = open_as(schema, tmp_path / "a.jsonl", tmp_path)
    assert len(raw.frame.collect()) == 1
    assert raw.rejected.select("row", "reason", "detail").rows() == [
        (2, "missing field", "chat[1] has role, text, but no content"),
        (3, "missing field", "chat[0] has nothing, but no role, content"),
    ]


def test_a_json_list_is_told(tmp_path):
    (tmp_path / "a.json").write_text('\n [\n{"id": "1"}\n]')
    with pytest.raises(ValueError, match=r"a\.json begins with a list; expected one JSON object a line"):
        opened(tmp_path / "a.json", tmp_path)


def test_nothing_of_a_folder_is_lost_silently(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    pl.DataFrame(ROWS).write_parquet(folder / "train-0.parquet")
    pl.DataFrame(ROWS).write_parquet(elsewhere / "train-1.parquet")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    assert len(opened(folder, tmp_path)[0]) == 4
    (folder / "train-2.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"train-2\.parquet is not a file"):
        opened(folder, tmp_path)


def test_a_column_called_row_or_file_is_no_obstacle(tmp_path):
    frame = pl.DataFrame(ROWS).with_columns(row=pl.lit("x"), file=1)
    frame.write_parquet(tmp_path / "a.parquet")
    frame, _ = opened(tmp_path / "a.parquet", tmp_path)
    assert frame["row"].to_list() == [0, 1]


def test_names_with_a_tilde_and_names_that_are_not_utf8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pl.DataFrame(ROWS).write_parquet("~a.parquet")
    assert len(opened("~a.parquet", tmp_path)[0]) == 2
    with pytest.raises(ValueError, match=r"~nobody-of-this-name/x\.parquet does not exist"):
        opened("~nobody-of-this-name/x.parquet", tmp_path)
    Path("\udcff.parquet").write_bytes(Path("~a.parquet").read_bytes())
    with pytest.raises(ValueError, match="is not UTF-8, so no manifest holds it"):
        opened("\udcff.parquet", tmp_path)
    with pytest.raises(ValueError, match="an --input is empty"):
        opened("", tmp_path)


def test_no_input_and_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no input was given"):
        fetch([], tmp_path)
    for name in (str(tmp_path / "absent.csv"), "data/absent.jsonl.gz"):  # no hub id, though it looks like one
        with pytest.raises(ValueError, match="does not exist; expected a file, a folder or a hub id"):
            opened(name, tmp_path)
