"""What the demo prints: its children's lines at the terminal's width, live where there is one; its table."""

import io
import re
import sys
import time

import pytest
from rich.console import Console

from common import console
from common.console import say
from stages import demo

CHILD = """
import os, sys
print(os.environ["COLUMNS"], "PROGRESS_LIVE" in os.environ)
sys.stdout.write("training: 1/2 steps\\rtraining: 2/2 steps\\n")
print("last line")
sys.exit(int(sys.argv[2]))
"""


class Recording(dict):
    """What was ever shown of a command."""

    def __init__(self):
        self.shown = []

    def __setitem__(self, key, value):
        self.shown.append(value)
        super().__setitem__(key, value)


@pytest.fixture
def screen(monkeypatch):
    """Puts a console of a width in place of ours; returns it."""

    def make(width: int, is_terminal: bool) -> Console:
        made = Console(file=io.StringIO(), force_terminal=is_terminal, width=width)
        for module in (console, demo):
            monkeypatch.setattr(module, "console", made)
        return made

    return make


def plain(made: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", made.file.getvalue())


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    ("width", "model", "prefix"), [(80, "tiny-gemma", "  [tiny-gemma] "), (133, "x", "  ")]
)
def test_children_get_the_width_and_show_how_far_they_are(
    screen, tmp_path, is_terminal, width, model, prefix
):
    (tmp_path / "child.py").write_text(CHILD)
    made, command = screen(width, is_terminal), [sys.executable, str(tmp_path / "child.py"), model, "0"]
    running = Recording()
    assert demo.run_one(command, running) is None
    lines = [f"{width - len(prefix)} {is_terminal}", "training: 2/2 steps", "last line"]
    assert plain(made).splitlines()[1:] == [prefix + line for line in lines]
    assert running.shown == [f"{prefix}training: 1/2 steps"] and not running


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_under_way_stands_below_the_lines_of_a_terminal(screen, monkeypatch, is_terminal):
    made = screen(70, is_terminal)

    def run_one(name, running):
        running[name] = f"  [{name}] training: " + "x" * 99
        time.sleep(0.4)
        say(f"  [{name}] done")
        del running[name]

    monkeypatch.setattr(demo, "run_one", run_one)
    demo.together(["a", "b"])
    said = plain(made)
    assert sorted(re.findall(r"\[(.)\] done", said)) == ["a", "b"]
    assert {f"  [{name}] training: {'x' * 53}…" in said for name in "ab"} == {is_terminal}


def test_a_childs_last_line_is_in_the_error(screen, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    screen(80, False)
    with pytest.raises(ValueError, match=r"child\.py x 3 ended with status 3: last line"):
        demo.together([[sys.executable, str(tmp_path / "child.py"), "x", "3"]])


@pytest.mark.parametrize("floor", [0.5733, None])
def test_the_final_table_fits_80_columns(screen, floor):
    made = screen(80, True)
    bounds = {"prior_log_loss": 0.999, "floor_log_loss": floor}
    scores = {"log_loss": 0.7004, "log_loss_interval": (0.6601, 0.7413), "accuracy": 0.715}
    models = (*demo.MODELS, "ensemble")
    demo.show_summary([{"stage": s, "model": m} | scores | bounds for s in demo.STAGES for m in models])
    lines = plain(made).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 2 + 2 + 9
    assert lines[1] == ("prior 0.9990, floor 0.5733" if floor else "prior 0.9990")
    gap = "70%" if floor else "-"
    assert lines[4].split() == [
        "stage1",
        "│",
        "tiny-gemma",
        "│",
        "0.7004",
        "│",
        *"0.6601 to 0.7413 │ 0.715 │".split(),
        gap,
    ]
