"""Default tables: those that are there, the others named; an error where none is."""

from itertools import combinations

import polars as pl
import pytest
from helpers import make_comparisons

from common.data.held_out import default_tables, read_trained_on
from common.data.table import write_comparisons

NAMES = ("arena55k", "arena33k", "other")


@pytest.mark.parametrize("there", [names for n in range(4) for names in combinations(NAMES, n)])
def test_default_tables_are_those_that_are_there(tmp_path, capsys, there):
    paths = {name: tmp_path / f"data/{name}.parquet" for name in NAMES}
    for name in there:
        write_comparisons(make_comparisons(3), paths[name])
    if not there:
        with pytest.raises(ValueError, match=r"none .* there: .*Make arena55k\.parquet with") as caught:
            default_tables(tmp_path, *NAMES)
        assert all(str(path) in str(caught.value) for path in paths.values())
        return
    assert default_tables(tmp_path, *NAMES) == tuple(paths[name] for name in there)
    said = capsys.readouterr().out.replace("\n", "")
    assert ("left out" in said) == (len(there) < len(NAMES))
    assert all((str(path) in said) == (name not in there) for name, path in paths.items())


def test_a_default_table_that_leads_nowhere_is_not_passed_over(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/arena55k.parquet").symlink_to(tmp_path / "nowhere")
    assert default_tables(tmp_path, "arena55k", "other") == (tmp_path / "data/arena55k.parquet",)


def test_what_a_checkpoint_was_trained_on_is_not_read_from_elsewhere(tmp_path):
    checkpoint, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere.parquet"
    checkpoint.mkdir()
    pl.DataFrame({"content_hash": ["a"]}).write_parquet(elsewhere)
    (checkpoint / "trained_on.parquet").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"leads to .*elsewhere\.parquet, outside of"):
        read_trained_on(checkpoint)
