"""Manifests: up to date, changed, made of something else, damaged."""

import json
from pathlib import Path

import polars as pl
import pytest
from helpers import HELD, held_elsewhere

from common.data.sources.find import fetch
from common.data.sources.made import made_of, write_made
from common.data.table import REJECTED_SCHEMA, SCHEMA, ReadReport
from common.runs import code_hash, is_made, manifest_path

TABLE = pl.DataFrame(
    [["1", "s", None, None, ["p"], ["a"], ["b"], 1.0, 0.0, 0.0, None]], schema=SCHEMA, orient="row"
)


NO_MANIFESTS = {
    "json": "{",
    "fields": '{"inputs": [1]}',
    "deep": "[" * 9999,
    "counts": '{"inputs": [], "parameters": {}, "counts": {"rejected": {"a": null}}}',
}


def wanted(folder: Path, text: str = "raw", **parameters: object) -> dict:
    (folder / "raw.csv").write_text(text)
    return made_of(fetch([str(folder / "raw.csv")], folder), parameters, (), script=__file__)


def written(folder: Path, rejected: int = 0) -> Path:
    rows = [("raw.csv", i, None, "malformed", "x") for i in range(rejected)]
    bad = pl.DataFrame(rows, schema=REJECTED_SCHEMA, orient="row")
    report = ReadReport(paths=(Path("raw.csv"),), num_read=3 + rejected, num_kept=3, rejected=bad)
    write_made(folder / "x.parquet", TABLE, report, wanted=wanted(folder, seed=1), dropped={"repeat": 2})
    return folder / "x.parquet"


def made(output: Path, wanted: dict, *, overwrite: bool = False, skip_bad_rows: bool = False) -> bool:
    return is_made(output, wanted, overwrite=overwrite, skip_bad_rows=skip_bad_rows)


def test_counts_add_up_and_rejected_rows_come_and_go(tmp_path, capsys):
    manifest = json.loads(manifest_path(written(tmp_path, rejected=2)).read_text())
    counts = manifest["counts"]
    assert counts == {"read": 5, "rejected": {"malformed": 2}, "dropped": {"repeat": 2}, "kept": 1}
    assert len(pl.read_parquet(tmp_path / "x.rejected.parquet")) == 2
    assert "bad: malformed" in capsys.readouterr().out
    written(tmp_path)
    assert not (tmp_path / "x.rejected.parquet").exists()


def test_only_the_same_bytes_and_flags_are_up_to_date(tmp_path):
    output = tmp_path / "x.parquet"
    assert not made(output, wanted(tmp_path, seed=1))
    written(tmp_path)
    renamed = wanted(tmp_path, seed=1)
    renamed["inputs"][0]["name"] = "elsewhere.csv"
    assert made(output, renamed)
    for other, message in (
        (wanted(tmp_path, seed=2), "made with seed 1; here it is seed 2"),
        (wanted(tmp_path, "other", seed=1), "made from other files than .*raw.csv"),
    ):
        with pytest.raises(ValueError, match=f"{message}; pass --overwrite"):
            made(output, other)
        assert not made(output, other, overwrite=True)


def test_a_table_has_one_writer_from_the_look_at_it_to_its_end(tmp_path):
    output = tmp_path / "x.parquet"
    with held_elsewhere(output), pytest.raises(ValueError, match=HELD):
        made(output, wanted(tmp_path, seed=1))
    assert not made(output, wanted(tmp_path, seed=1))
    assert (tmp_path / ".x.parquet.lock").exists()
    written(tmp_path)
    assert (tmp_path / ".x.parquet.lock").exists()


def test_what_a_killed_start_left_of_a_table_is_swept(tmp_path):
    for name in ("x.parquet", "x.manifest.json", "x.rejected.parquet", "y.parquet"):
        (tmp_path / f".{name}.abcdefgh.tmp").touch()
    assert not made(tmp_path / "x.parquet", wanted(tmp_path, seed=1))
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".y.parquet.abcdefgh.tmp"]


def test_other_code_makes_it_again_without_asking(tmp_path):
    output = written(tmp_path)
    assert not made(
        output, {**wanted(tmp_path, seed=1), "code_sha256": "new"}, overwrite=False, skip_bad_rows=False
    )


@pytest.mark.parametrize("damage", ["table", "manifest", *NO_MANIFESTS])
def test_what_was_changed_by_hand_is_replaced_only_when_told(tmp_path, damage):
    output = written(tmp_path)
    if damage == "table":
        output.write_text("mine")
    elif damage == "manifest":
        manifest_path(output).unlink()
    else:
        manifest_path(output).write_text(NO_MANIFESTS[damage])
    with pytest.raises(ValueError, match="--overwrite"):
        made(output, wanted(tmp_path, seed=1))
    assert not made(output, wanted(tmp_path, seed=1), overwrite=True)


def test_a_table_without_a_row_is_refused_and_nothing_written(tmp_path):
    report = ReadReport(paths=(Path("raw.csv"),), num_read=2, num_kept=2)
    with pytest.raises(ValueError, match=r"no comparison is left for .*2 rows read, repeat 2"):
        write_made(tmp_path / "x.parquet", TABLE.clear(), report, wanted={}, dropped={"repeat": 2})
    assert list(tmp_path.iterdir()) == []


def test_a_table_made_without_bad_rows_is_up_to_date_only_where_they_may_be_skipped(tmp_path):
    output = written(tmp_path, rejected=2)
    assert made(output, wanted(tmp_path, seed=1), skip_bad_rows=True)
    with pytest.raises(ValueError, match="made without 2 bad rows; pass --skip-bad-rows"):
        made(output, wanted(tmp_path, seed=1))
    written(tmp_path)
    assert made(output, wanted(tmp_path, seed=1)) and made(
        output, wanted(tmp_path, seed=1), skip_bad_rows=True
    )


def test_a_side_file_that_is_not_what_was_written_is_made_again(tmp_path, capsys):
    output = written(tmp_path, rejected=2)
    side = tmp_path / "x.rejected.parquet"
    side.unlink()
    assert not made(output, wanted(tmp_path, seed=1), skip_bad_rows=True)
    assert f"{side} is not what was written with {output}: making it again" in capsys.readouterr().out
    written(tmp_path)
    side.write_text("of a run that was killed")
    assert not made(output, wanted(tmp_path, seed=1))


@pytest.mark.parametrize("name", ["x.parquet", "x.manifest.json", "x.rejected.parquet"])
def test_an_input_a_folder_and_what_belongs_to_others_are_never_replaced(tmp_path, name):
    inputs = wanted(tmp_path)
    output, path = tmp_path / "x.parquet", tmp_path / name
    path.mkdir()
    with pytest.raises(ValueError, match=f"{name} is a folder"):
        made(output, inputs, overwrite=True)
    path.rmdir()
    if path != output:
        path.write_text("{}")
        with pytest.raises(ValueError, match=f"{name} is there, but no .*x.parquet that it belongs to"):
            made(output, inputs)
        assert not made(output, inputs, overwrite=True)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "raw.csv")
    with pytest.raises(ValueError, match=f"{name} is an input and would be replaced; name another --output"):
        made(output, inputs, overwrite=True)


@pytest.mark.parametrize("old", [False, True])
def test_killed_between_manifest_and_table_the_next_run_goes_on_unasked(tmp_path, monkeypatch, old, capsys):
    output = tmp_path / "x.parquet"
    if old:
        written(tmp_path)
        before = output.read_bytes()
        monkeypatch.setattr(f"{__name__}.TABLE", TABLE.with_columns(id=pl.lit("2")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(self: Path, target: Path) -> None:
            if Path(target) == output:
                raise KeyboardInterrupt
            self.rename(target)

        patch.setattr(Path, "replace", killed)
        written(tmp_path)
    assert manifest_path(output).exists()
    assert output.read_bytes() == before if old else not output.exists()
    assert not made(output, wanted(tmp_path, seed=1))
    assert ("writing it was interrupted: making it again" in capsys.readouterr().out) == old
    written(tmp_path)
    assert made(output, wanted(tmp_path, seed=1))


def test_code_is_every_source_file_below_a_folder_wherever_that_lies(tmp_path):
    hashes = set()
    for name in ("one", "two"):
        folder = tmp_path / name / "code"
        (folder / "deep").mkdir(parents=True)
        (folder / "a.py").write_text("a")
        (folder / "deep/b.j2").write_text("b")
        (folder / f"{name}.pyc").write_text(name)
        hashes.add(code_hash(folder / "a.py", folder))
    assert len(hashes) == 1
    for path, text in ((folder / "a.py", "c"), (folder / "deep/b.j2", "c"), (folder / "new.ipynb", "")):
        path.write_text(text)
        hashes.add(code_hash(folder / "a.py", folder))
    (folder / "new.ipynb").rename(folder / "newer.ipynb")
    assert len(hashes | {code_hash(folder / "a.py", folder)}) == 5
