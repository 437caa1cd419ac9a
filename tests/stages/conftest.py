"""A small world for whole scripts: checkpoints, votes and a pool, made once."""

import pytest
from helpers import make_checkpoint, make_comparisons

from common.data.table import write_comparisons


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with gemma/ and llama/ checkpoints, votes.parquet (labelled, folds) and pool.parquet."""
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "gemma", "gemma")
    make_checkpoint(folder / "llama", "llama")
    write_comparisons(make_comparisons(150, seed=1, source="votes"), folder / "votes.parquet")
    write_comparisons(make_comparisons(60, seed=2, source="pool", labelled=False), folder / "pool.parquet")
    return folder
