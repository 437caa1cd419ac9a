"""What a stage says before it trains."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from common.train.recipe import Recipe
from common.train.steps import describe


@pytest.mark.parametrize(
    ("num_rows", "per_step", "epochs", "lost"),
    [
        (797, 400, 1, "397; with --comparisons-per-step 398: 1"),
        (800, 400, 1, "0"),
        (801, 400, 1, "1"),  # nothing near loses less
        (799, 400, 1, "399; with --comparisons-per-step 399: 1"),
        (120, 113, 1, "7; with --comparisons-per-step 120: 0"),
        (1_999, 1_000, 1, "999; with --comparisons-per-step 999: 1"),
        (3, 2, 1, "1; with --comparisons-per-step 1: 0"),
        (7, 1, 1, "0"),
    ],
)
def test_comparisons_lost_by_an_incomplete_last_step_are_counted(capsys, num_rows, per_step, epochs, lost):
    assert lost_of(capsys, num_rows, per_step, epochs) == lost


def test_another_epoch_takes_most_of_what_the_first_one_lost(capsys):
    once, four_times = (int(lost_of(capsys, 797, 400, epochs).split(";")[0]) for epochs in (1, 4))
    assert once == 397 and 20 < four_times < 80  # a sixteenth of 797 is 49


def lost_of(capsys, num_rows, per_step, epochs):
    """What is said of them at the start."""
    recipe = Recipe(comparisons_per_step=per_step, epochs=epochs)
    numbers = {name: np.ones(num_rows, dtype=int) for name in ("lengths", "truncated", "became_identical")}

    class Sequences(SimpleNamespace):
        def __len__(self):
            return num_rows

    describe("stage", recipe, recipe, Sequences(frame=range(num_rows), **numbers), 1)
    [told] = re.findall(r"comparisons that no step takes (.*); processes", capsys.readouterr().out)
    return told
