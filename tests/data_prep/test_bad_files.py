"""Whatever is wrong with a file: one clear line, status 1, nothing lost; or the bad rows in a side file."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
from samples import SOURCES, Source, chat, write_rows

from common.console import clear_errors
from common.data.chats import NOT_ALTERNATING
from common.data.table import REJECTED_SCHEMA, read_comparisons
from common.files import read_json
from common.runs import manifest_path

NUM_ROWS = 300


def run(source: Source, *inputs: Path | str, output: Path, capsys, **flags: object) -> tuple[int, str]:
    """(exit status, what it said on stderr)."""
    capsys.readouterr()
    try:
        with clear_errors():
            source.run(*inputs, output=output, **flags)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


class Broken(NamedTuple):
    """A file that cannot be read at all."""

    name: str
    write: Callable[[Path, Source], None]
    message: str
    """Of the error, a regular expression."""


def whole(path: Path, source: Source) -> bytes:
    return write_rows(path, source.rows(NUM_ROWS)).read_bytes()


def damage(path: Path, source: Source) -> None:
    data = bytearray(whole(path, source))
    data[40 : len(data) // 2] = b"\xff" * (len(data) // 2 - 40)
    path.write_bytes(data)


def truncate(path: Path, source: Source) -> None:
    path.write_bytes(whole(path, source)[:-20])


def retype(path: Path, source: Source) -> None:
    whole(path, source)
    frame = pl.read_parquet(path).with_columns(pl.lit(7).alias(source.column))
    frame.write_parquet(path)


def without_column(path: Path, source: Source) -> None:
    rows = [{k: v for k, v in row.items() if k != source.column} for row in source.rows(3)]
    write_rows(path, rows)


def header_alone(path: Path, source: Source) -> None:
    path.write_bytes(whole(path, source).split(b"\n")[0])


def no_row(path: Path, source: Source) -> None:
    pl.DataFrame(source.rows(1)).clear().write_parquet(path)


def as_utf16(path: Path, source: Source) -> None:
    path.write_bytes(whole(path, source).decode().encode("utf-16"))


BROKEN = (
    Broken("damaged.parquet", damage, "cannot be read"),
    Broken("truncated.parquet", truncate, "cannot be read"),
    Broken("truncated.csv.gz", truncate, "cannot be read"),
    Broken("truncated.jsonl.zst", truncate, "cannot be read"),
    Broken("wrong type.parquet", retype, r", expected List\("),
    Broken("lacking.parquet", without_column, "lacks the column"),
    Broken("lacking.csv", without_column, "lacks the column"),
    Broken("lacking.jsonl", without_column, "missing field"),
    Broken("empty.csv", lambda path, _: path.write_bytes(b""), "is empty"),
    Broken("header.csv", header_alone, "no .* in it"),
    Broken("empty.parquet", no_row, "no .* in it"),
    Broken("blank.jsonl", lambda path, _: path.write_bytes(b"\n\n"), "no .* in it|has the columns none"),
    Broken("utf16.csv", as_utf16, "is not UTF-8"),
    Broken("not.parquet", lambda path, _: path.write_bytes(b"PAR1 not at all"), "cannot be read"),
    Broken("strange.txt", lambda path, _: path.write_bytes(b"x"), "has an ending that is not known"),
    Broken("folder", lambda path, _: path.mkdir(), "holds no Parquet, CSV or JSON lines"),
    Broken("absent.parquet", lambda path, _: None, "does not exist"),
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
@pytest.mark.parametrize("name", SOURCES)
def test_a_broken_file_is_named_and_the_old_table_stays(tmp_path, capsys, name, broken):
    source, output = SOURCES[name], tmp_path / "out" / "x.parquet"
    good = write_rows(tmp_path / "good.parquet", source.rows(NUM_ROWS))
    assert run(source, good, output=output, capsys=capsys)[0] == 0
    before = files_of(output.parent)
    path = tmp_path / broken.name
    broken.write(path, source)
    status, said = run(source, path, output=output, capsys=capsys, overwrite=True, skip_bad_rows=True)
    assert status == 1
    assert said.startswith("error: ") and re.search(broken.message, said) and str(path) in said
    assert "Traceback" not in said
    assert files_of(output.parent) == before


def no_list(row: dict, source: Source) -> dict:
    return row | {source.column: {"valid": "JSON"}}


def text_list(row: dict, source: Source) -> dict:
    return row | {source.column: "[1, 2]"}


def no_json(row: dict, source: Source) -> dict:
    return row | {source.column: '["never closed'}


BAD_ROWS = {
    "no list": (no_list, "wrong type"),
    "numbers": (text_list, "wrong type"),
    "cut": (no_json, "malformed JSON"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_bad_row_stops_the_run_or_lands_in_the_side_file(tmp_path, capsys, name, ending, kind):
    source, output = SOURCES[name], tmp_path / "out" / "x.parquet"
    change, reason = BAD_ROWS[kind]
    rows = source.rows(NUM_ROWS)
    rows[100] = change(rows[100], source)
    path = write_rows(tmp_path / f"x.{ending}", rows)
    line = 101 if ending == "jsonl" else 102
    check_bad_row(source, path, output, capsys, line, reason)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("name", SOURCES)
def test_mixed_encodings(tmp_path, capsys, name, ending):
    source, output = SOURCES[name], tmp_path / "out" / "x.parquet"
    path = write_rows(tmp_path / f"x.{ending}", source.rows(NUM_ROWS))
    lines = path.read_bytes().split(b"\n")
    lines[150] = lines[150].replace(b'"', b'"\xe9', 1)
    path.write_bytes(b"\n".join(lines))
    check_bad_row(source, path, output, capsys, 151, "not UTF-8")


@pytest.mark.parametrize("name", SOURCES)
def test_a_csv_cut_in_the_middle_of_a_row(tmp_path, capsys, name):
    source, output = SOURCES[name], tmp_path / "out" / "x.parquet"
    path = write_rows(tmp_path / "x.csv", source.rows(NUM_ROWS))
    last = path.read_bytes().rstrip().rfind(b"\n")
    path.write_bytes(path.read_bytes()[: last + 45])
    status, said = run(source, path, output=output, capsys=capsys)
    assert status == 1 and "cut off" in said
    check_bad_row(source, path, output, capsys, NUM_ROWS + 1, "")


def check_bad_row(source: Source, path: Path, output: Path, capsys, line: int, reason: str) -> None:
    status, said = run(source, path, output=output, capsys=capsys)
    assert status == 1 and f"{path} line {line}, id" in said and reason in said
    assert "--skip-bad-rows" in said and not output.parent.exists()
    status, said = run(source, path, output=output, capsys=capsys, skip_bad_rows=True)
    assert (status, said) == (0, "")
    rejected = pl.read_parquet(output.with_suffix(".rejected.parquet"))
    assert rejected.schema == REJECTED_SCHEMA
    ((file, row, found),) = rejected.select("file", "row", "reason").rows()
    assert (file, row) == (str(path), line) and reason in found
    counts = read_json(manifest_path(output))["counts"]
    assert counts["rejected"] == {found: 1}
    assert counts["read"] == NUM_ROWS == counts["kept"] + 1 + sum(counts["dropped"].values())
    assert len(read_comparisons(output)[0]) == counts["kept"]


ASSISTANT_FIRST = chat("a", "b")[::-1]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "competition"])
def test_a_chat_that_starts_with_the_assistant_is_counted_and_left_out(tmp_path, capsys, name):
    source, output = SOURCES[name], tmp_path / "x.parquet"
    rows = source.rows(NUM_ROWS)
    rows[7][source.column] = ASSISTANT_FIRST
    path = write_rows(tmp_path / "x.jsonl", rows)
    assert run(source, path, output=output, capsys=capsys) == (0, "")
    dropped = read_json(manifest_path(output))["counts"]["dropped"]
    assert dropped[NOT_ALTERNATING] == 1


@pytest.mark.parametrize("name", SOURCES)
def test_a_hub_id_that_cannot_be_reached(tmp_path, capsys, name):
    """The tests run with HF_HUB_OFFLINE=1."""
    status, said = run(SOURCES[name], "nobody/nothing-here", output=tmp_path / "x.parquet", capsys=capsys)
    assert status == 1
    assert said.startswith("error: nobody/nothing-here is no file here, and was not fetched from the hub: ")
    assert "hf auth login" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SOURCES)
def test_a_folder_that_cannot_be_written(tmp_path, capsys, name):
    source = SOURCES[name]
    path = write_rows(tmp_path / "x.jsonl", source.rows(NUM_ROWS))
    (tmp_path / "out").write_text("a file, no folder")
    status, said = run(source, path, output=tmp_path / "out" / "x.parquet", capsys=capsys)
    assert status == 1 and said.startswith("error: cannot write ") and "stands where" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "x.jsonl"]


@pytest.mark.parametrize(
    "reason", ["No space left on device", "Read-only file system", "Disk quota exceeded"]
)
@pytest.mark.parametrize("method", ["sink_parquet", "touch", "write_parquet", "collect"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_failed_write_blames_the_output(tmp_path, capsys, monkeypatch, name, method, reason):
    """Of temporary files and of the table; `collect` stands for a stream that writes while it reads."""
    ending = "parquet" if method == "touch" else "csv"
    path = write_rows(tmp_path / f"x.{ending}", SOURCES[name].rows(NUM_ROWS))

    def fail(*_: object, **__: object) -> None:
        raise OSError(reason) if method == "touch" else pl.exceptions.ComputeError(f"{reason} (os error 1)")

    owner = {"touch": Path, "write_parquet": pl.DataFrame}.get(method, pl.LazyFrame)
    monkeypatch.setattr(owner, method, fail)
    status, said = run(SOURCES[name], path, output=tmp_path / "out/x.parquet", capsys=capsys)
    if method == "touch" and name != "lmsys1m_pairs":
        assert status == 0, "only that script makes a file so"
        return
    assert status == 1 and reason in said and "Traceback" not in said
    assert ("cannot write" if method == "write_parquet" else "temporary files cannot be written") in said
    assert str(path) not in said and "cannot be read" not in said


@pytest.mark.parametrize("moment", ["reading", "writing"])
@pytest.mark.parametrize("name", SOURCES)
def test_an_interrupted_run_leaves_the_old_files(tmp_path, capsys, monkeypatch, name, moment):
    source, output = SOURCES[name], tmp_path / "out" / "x.parquet"
    rows = source.rows(NUM_ROWS)
    path = write_rows(tmp_path / "x.parquet", rows)
    run(source, path, output=output, capsys=capsys)
    before = files_of(output.parent)
    random.Random(0).shuffle(rows)
    write_rows(path, rows[: NUM_ROWS // 2])

    def interrupt(self: object, *arguments: object, **_: object) -> None:
        if moment == "writing":
            Path(arguments[0]).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, method = {
            "reading": (pl.LazyFrame, "collect"),
            "writing": (pl.DataFrame, "write_parquet"),
        }[moment]
        patch.setattr(owner, method, interrupt)
        status, said = run(source, path, output=output, capsys=capsys, overwrite=True)
    assert status == 130 and "start the same command again" in said
    assert files_of(output.parent) == before
    assert run(source, path, output=output, capsys=capsys, overwrite=True)[0] == 0
    assert files_of(output.parent) != before
