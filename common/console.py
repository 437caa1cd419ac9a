"""What people see in the terminal: one command-line entry, progress, tables."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_INTERVAL_SECONDS = 15.0
SECONDS_FIRST_WAITS, SECONDS_OTHERS_WAIT = 1, 5

console = Console()
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 120  # a log file, whose readers should not get tables folded to rich's 80


def cli(main: Callable[[Any], None], *, arguments: Any = None) -> None:
    """Runs a script: parses the command line, calls `main`, ends a user's mistake with one line and status 1.

    Args:
        main: Takes one frozen dataclass of arguments.
        arguments: What tyro should parse, where it is more than the annotation of `main`'s argument
            (one subcommand a model, say).
    """
    import tyro  # only command lines need it, the notebook does not have it

    kind = arguments if arguments is not None else next(iter(main.__annotations__.values()))
    with clear_errors():
        main(tyro.cli(kind, console_outputs=os.environ.get("LOCAL_RANK", "0") == "0"))


@contextmanager
def clear_errors() -> Iterator[None]:
    """Ends the process with one line and status 1 where the block raises for a user's mistake or a disk.

    Of several processes on a machine one speaks: the launcher ends the others as soon as one has failed, so
    that those whose failure may be another's, or the same, wait for that before they say anything.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    is_launched = "LOCAL_RANK" in os.environ
    who = f" (process {rank})" if rank else ""
    if is_launched:
        signal.signal(signal.SIGINT, _interrupt_once)
    try:
        yield
    except KeyboardInterrupt:
        if local_rank == 0:
            print("interrupted: start the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:
        is_mistake = isinstance(error, ValueError | OSError)  # OSError: a disk, a network, no defect of ours
        if local_rank or (is_launched and not is_mistake):  # such as a lost connection
            time.sleep(SECONDS_OTHERS_WAIT if local_rank else SECONDS_FIRST_WAITS)
        if is_mistake:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            print(f"error{who}: {kind}{error}", file=sys.stderr)
        elif is_launched and not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        else:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        (os._exit if is_launched else sys.exit)(1)  # at once: tearing down may last until others have spoken


def _interrupt_once(*_: object) -> None:
    """A terminal interrupts every process, and the launcher then passes its own interruption on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def say(text: str) -> None:
    """Prints one line, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table, from the first process only; columns after the first are right-aligned."""
    if os.environ.get("RANK", "0") != "0":
        return
    say(title)  # above the table, not in it: rich would fold it to the table's width
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row))
    console.print(table)


@contextmanager
def progress(description: str, total: int, unit: str, *, start: int = 0) -> Iterator[Callable[..., None]]:
    """Shows how far long work is: a bar with rate and time left, or a line an interval where nobody watches.

    Args:
        description: What is being done.
        total: Number of units in the whole work.
        unit: What is counted, in the plural ("steps").
        start: Units done before this process began (resumed work), not part of the rate.

    Yields:
        `advance(n, note="")`: n more units are done; `note` is shown at the end of the line.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda n, note="": None
    elif console.is_terminal:
        yield from _bar(description, total, unit, start)
    else:
        yield from _lines(description, total, unit, start)


def _bar(description: str, total: int, unit: str, start: int) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[rate]}}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began = time.monotonic()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=start, note="", rate="")
        done = 0

        def advance(n: int, note: str = "") -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(task, advance=n, note=note, rate=f"{rate:,.1f}/s")

        yield advance


def _lines(description: str, total: int, unit: str, start: int) -> Iterator[Callable[..., None]]:
    began = last = time.monotonic()
    done = 0

    def advance(n: int, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_INTERVAL_SECONDS or start + done >= total:
            last = now
            rate = done / max(now - began, 1e-9)
            left = (total - start - done) / max(rate, 1e-9)
            line = f"{description}: {start + done:,}/{total:,} {unit}, {rate:,.1f}/s, {left:,.0f} s left"
            print(f"{line}, {note}" if note else line, flush=True)

    yield advance
