"""What people see: one line for a mistake, progress with and without a terminal, one process that speaks."""

import io
import re
import runpy
import signal
import sys
from dataclasses import dataclass

import pytest
from calling import call
from helpers import ROOT
from rich.console import Console
from tyro.extras import subcommand_type_from_defaults

from common import console
from common.console import cli, progress, say, show_table
from common.models.zoo import ZOO


@dataclass(frozen=True)
class Args:
    """A command."""

    number: int = 1
    """Any number."""

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"--number is {self.number}, expected at least 0")


@pytest.fixture
def command(monkeypatch):
    """Calls `cli` with a command line; returns the exit status (0 when it just returns)."""

    def run(main, *words, arguments=None):
        monkeypatch.setattr(sys, "argv", ["command", *words])
        try:
            cli(main, arguments=arguments)
        except SystemExit as end:
            return end.code
        return 0

    return run


@pytest.fixture
def terminal(monkeypatch):
    """A screen that somebody watches."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(console, "console", screen)
    return screen.file


# cli


def test_arguments_reach_main(command):
    seen = []

    def main(args: Args) -> None:
        seen.append(args.number)

    assert command(main, "--number", "7") == 0 and command(main) == 0
    assert seen == [7, 1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("prompt has 2 turns"), "error: prompt has 2 turns"),
        (
            OSError(28, "No space left on device", "/x"),
            "error: OSError: [Errno 28] No space left on device: '/x'",
        ),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_1(command, capsys, error, line):
    def main(args: Args) -> None:
        raise error

    assert command(main) == 1
    assert capsys.readouterr() == ("", line + "\n")


@pytest.fixture
def launched(monkeypatch):
    """Makes this process one of several; returns the seconds that it slept, in which it may be ended."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("signal.signal", lambda *what: None)

    def launch(rank, local_rank):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        return seconds

    return launch


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "seconds", "said"),
    [
        ("0", "0", ValueError("no"), [], ["error: no"]),
        ("8", "0", ValueError("no"), [], ["error (process 8): no"]),  # the first of another machine
        ("3", "3", ValueError("no"), [5], ["error (process 3): no"]),
        ("3", "3", OSError("no"), [5], ["error (process 3): OSError: no"]),
        ("0", "0", RuntimeError("lost"), [1], ["Traceback", "RuntimeError: lost"]),  # by another's end?
        ("3", "3", RuntimeError("lost"), [5], ["Traceback", "RuntimeError: lost"]),
        ("3", "3", SystemExit(1), [5], []),
    ],
)
def test_of_several_processes_others_give_the_first_time_to_speak(
    command, capsys, launched, rank, local_rank, error, seconds, said
):
    def main(args: Args) -> None:
        raise error

    slept = launched(rank, local_rank)
    assert command(main) == 1 and slept == seconds
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(" ")]
    assert [line.removesuffix(" (most recent call last):") for line in lines] == said


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_an_interruption_and_a_bad_flag_are_told_once(command, capsys, launched, local_rank):
    def main(args: Args) -> None:
        raise KeyboardInterrupt

    launched(local_rank, local_rank)
    assert command(main) == 130
    interruption = capsys.readouterr().err
    assert command(main, "--nubmer", "1") == 2
    parsing = capsys.readouterr()
    if local_rank == "0":
        assert interruption.startswith("interrupted: ") and "--nubmer" in parsing.err + parsing.out
    else:
        assert interruption + parsing.err + parsing.out == ""


def test_a_second_interruption_does_not_disturb_the_first(command, capsys, monkeypatch):
    """The terminal interrupts every process, the launcher then once more."""

    def main(args: Args) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            print("tidied")

    monkeypatch.setenv("LOCAL_RANK", "0")
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert command(main) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    found = capsys.readouterr()
    assert found.out == "tidied\n" and found.err.startswith("interrupted: ")


def test_an_interruption_says_how_to_go_on(command, capsys):
    def main(args: Args) -> None:
        raise KeyboardInterrupt

    assert command(main) == 130
    assert "start the same command again to continue" in capsys.readouterr().err


def test_our_own_defects_keep_their_traceback(command):
    def main(args: Args) -> None:
        raise AssertionError("an invariant")

    with pytest.raises(AssertionError, match="an invariant"):
        command(main)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(("--nubmer", "1"), "--nubmer"), (("--number", "x"), "'x'")],
)
def test_an_unreadable_command_line_is_status_2(command, capsys, words, expected):
    def main(args: Args) -> None:
        pytest.fail("main must not run")

    assert command(main, *words) == 2
    found = capsys.readouterr()
    assert expected in found.err + found.out and "Traceback" not in found.err


@dataclass(frozen=True)
class Pair:
    """Two of them."""

    inner: Args


def test_a_value_that_its_dataclass_refuses_is_one_line_and_status_1(command, capsys):
    def main(args: Args) -> None:
        pytest.fail("main must not run")

    def nested(args: Pair) -> None:
        main(args.inner)

    def by_model(args: Args) -> None:
        main(args)

    choice = subcommand_type_from_defaults({"small": Args(), "large": Args(number=5)})
    for one, words, arguments in (
        (main, ["--number"], None),
        (nested, ["--inner.number"], None),
        (by_model, ["small", "--number"], choice),
    ):
        assert command(one, *words, "-1", arguments=arguments) == 1
        assert capsys.readouterr() == ("", "error: --number is -1, expected at least 0\n")


SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("stages", "data_prep", "kaggle", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "cli(main" in path.read_text(encoding="utf-8") or "parse_args" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_gives_every_flag_a_sentence(script, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    model = ["tiny-gemma"] if "by_model(" in (ROOT / script).read_text(encoding="utf-8") else []
    text = call(f"../{script.with_suffix('')}", *model, "--help").stdout
    assert not re.search(r"\{None|\(default: (None)?\)|tyro|dummy|\bArgs\b", text)
    assert all(len(line) <= width for line in text.splitlines() if not line.startswith("usage:"))
    flags = re.split(r"\n[│| ]{,2}(?=--[a-z])", text)[1:]
    assert len(flags) >= 2
    for flag in flags:
        assert re.search(
            r" [A-Za-z][^.]{11,}.* \((default: .+|optional|required)\)", re.sub(r"[│|\s]+", " ", flag)
        ), flag


def test_help_says_what_each_model_is():
    for stage in ("stage1", "stage2", "stage3"):
        text = " ".join(call(stage, "--help").stdout.replace("│", " ").split())
        for name in runpy.run_path(str(ROOT / "stages" / f"{stage}.py"))["RECIPES"]:
            assert re.search(
                rf"• {name} {ZOO[name]}: [\w .]*\d parameters", text.replace(" billion", "").replace(",", "")
            ), name


# progress


def drawn(screen):
    """What stands on the screen in the end, without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()[-1]


def test_a_bar_where_somebody_watches(terminal):
    with progress("training", 4, "steps", start=1) as advance:
        advance(1, "loss 1.1")
        advance(2, "loss 0.9")
    last = drawn(terminal)
    assert "training" in last and "4/4" in last and "steps" in last and "/s" in last
    assert "loss 0.9" in last and "loss 1.1" not in last


def test_lines_where_nobody_watches(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with progress("training", 1005, "steps", start=1000) as advance:
        for loss in (5, 4, 3, 2, 1):
            advance(1, f"loss {loss}")
    assert capsys.readouterr().out.splitlines() == [
        "training: 1,003/1,005 steps, 0.1/s, 13 s left, loss 3",  # 15 seconds have passed: 3 steps in 20
        "training: 1,005/1,005 steps, 0.1/s, 0 s left, loss 1",
    ]


def test_lines_of_long_work_become_rarer(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with progress("training", 300, "steps") as advance:
        for _ in range(299):
            advance(1)
    told = [5 * int(steps) for steps in re.findall(r"training: (\d+)/300", capsys.readouterr().out)]
    assert told == [15, 45, 105, 225, 465, 765, 1065, 1365]


def test_lines_for_a_terminal_elsewhere_replace_each_other(capsys, monkeypatch):
    clock = iter([0.0, 0.3, 0.6, 0.9, 1.2])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setenv(console.LIVE, "1")
    with progress("training", 4, "steps") as advance:
        for _ in range(4):
            advance(1)
    assert (
        capsys.readouterr().out
        == "training: 2/4 steps, 3.3/s, 1 s left\rtraining: 4/4 steps, 3.3/s, 0 s left\n"
    )


def test_the_end_is_told_of_what_took_a_while(capsys, monkeypatch):
    clock = iter([0.0, 0.1, 1.0, 2.0, 2.9])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with progress("tokenising", 3, "rows") as advance:
        advance(2)
        advance(1)
    assert capsys.readouterr().out == "tokenising: 3/3 rows, 3.0/s, 0 s left\n"
    with progress("tokenising", 3, "rows") as advance:
        advance(3)
    assert capsys.readouterr().out == "", "what took less than a second is not worth a line"


@pytest.mark.parametrize("watched", [True, False])
def test_an_error_passes_through_progress(watched, request):
    if watched:
        request.getfixturevalue("terminal")
    with pytest.raises(ValueError, match="in the midst"), progress("training", 2, "steps") as advance:
        advance(1)
        raise ValueError("in the midst")


# One process speaks for all


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("hello")
    show_table("title", ("a",), [(1,)])
    with progress("training", 1, "steps") as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_a_line_is_printed_as_it_is(capsys):
    text = "[bold]not markup[/bold] " + "x" * 300
    say(text)
    assert capsys.readouterr().out == text + "\n"


def test_a_table_shows_every_cell_whole(capsys):
    name = "tiny-gemma/swapped-and-a-rather-long-name"
    show_table("scores", ("model", "log loss"), [(name, 1.25), ("ensemble", None)])
    rows = [re.split(r"\s*│\s*", line) for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert rows == [[name, "1.25"], ["ensemble", "-"]]


PATH, RANGE = "artifacts/demo/stage3/tiny-gemma-final", "(-0.0030 to 0.0045)"
WIDE = {  # heading -> cell, of our widest tables
    "scores": {
        "model / order": "tiny-gemma/swapped",
        "log loss": "0.7128",
        "95 % interval": "0.6720 to 0.7570",
    }
    | {"accuracy": "0.711", "ECE": "0.042", "swap": "0.059"},
    "calibration": {"model": "tiny-gemma", "without": "0.6520", "temperature": f"0.6513\n+0.0007\n{RANGE}"}
    | {"vector": f"0.6513\n+0.0007\n{RANGE}", "kept": "temperature"},
    "bundle": {
        "model": "tiny-gemma",
        "final": PATH,
        "order": "swapped",
        "weight": "2",
        "template": "91a622357c79",
    },
    "verification": {"check": "test: probabilities within 0.001 of the stages'", "result": "passed"}
    | {"detail": "64 rows, largest difference 1e-4 (id 600203568)"},
    "leaks": {"sources": "lmsys1m_pairs and preference_sets"} | dict.fromkeys("abcde", "1,234,567"),
    "recipe": {"recipe": "max_tokens_per_micro_batch", "value": "('PAB', 'PAPB')", "table": "('PAB',)"},
}


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("cells", WIDE.values(), ids=WIDE)
def test_a_wide_table_folds_long_texts_and_no_number(terminal, cells, width):
    console.console.width = width - 2  # less what the demo puts before its children's lines
    show_table("title", tuple(cells), [tuple(cells.values())])
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()[1:]
    assert max(map(len, lines)) <= width - 2
    columns = list(zip(*(re.split("[│┃╇]", line) for line in lines), strict=True))
    for (heading, cell), column in zip(cells.items(), columns, strict=True):
        assert max(map(len, column)) > 5 or len(cell) < 6
        found = [part.strip() for part in column]
        for text in [*heading.split(), *cell.split("\n")]:
            assert (
                text in " ".join(found)
                if len(text) <= 20
                else text.replace(" ", "") in "".join(found).replace(" ", "")
            )
