"""What people see in the terminal: one command-line entry, progress, tables."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import wraps
from types import NoneType
from typing import Annotated, Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_INTERVAL_SECONDS, LONGEST_INTERVAL_SECONDS = 15.0, 300.0
"""Between the first two lines of progress in a log, doubled from line to line; and at the most."""
LIVE_INTERVAL_SECONDS = 0.5
SHORT_SECONDS = 1.0
"""Work that is done within this is not worth a line."""
LIVE = "PROGRESS_LIVE"
"""Environment variable: our reader has a terminal, where a line that ends in "\r" gives way to the next."""
MAX_WHOLE = 20
"""Characters of a cell, and of a word of a heading, that a table does not fold where it fits without."""
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

    kind = next(iter(main.__annotations__.values()))
    shown = {"description": kind.__doc__, "registry": _plain_words()}
    with clear_errors():
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        main(tyro.cli(kind if arguments is None else arguments, console_outputs=is_first, **shown))


def _plain_words() -> Any:
    """How tyro shows our dataclasses: PATH, not `{None}|PATH`; a mistake as one line, not in a box."""
    from tyro.conf import arg
    from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

    registry, asking = ConstructorRegistry(), []

    @registry.primitive_rule
    def optional(info):
        kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
        if NoneType not in get_args(info.type) or len(kinds) > 1:
            return None
        found = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
        return replace(found, is_instance=lambda value: value is None or found.is_instance(value))

    @registry.struct_rule
    def struct(info):
        if asking or not is_dataclass(info.type):
            return None
        asking.append(struct)  # for tyro's own rule: this one steps aside
        found = ConstructorRegistry.get_struct_spec(info)
        asking.clear()

        @wraps(found.instantiate)
        def make(*values, **named):
            with clear_errors():
                return found.instantiate(*values, **named)

        unset = arg(help_behavior_hint="(optional)")  # the sentence says what is done then
        fields = [
            replace(field, type=Annotated[field.type, unset]) if field.default in (None, ()) else field
            for field in found.fields
        ]
        return replace(found, instantiate=make, fields=tuple(fields))

    return registry


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
    """Prints a table, from the first process only; columns after the first are right-aligned.

    What is too wide for the terminal is folded, names and numbers last.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    say(title)  # above the table, not in it: rich would fold it to the table's width
    table = Table(show_edge=False, pad_edge=False)
    texts = [["-" if value is None else str(value) for value in row] for row in rows]
    parts = [
        [*column.split(), *(line for row in texts for line in row[i].split("\n"))]
        for i, column in enumerate(columns)
    ]
    for longest in range(MAX_WHOLE, 4, -1):  # what is longer may be folded
        widths = [max((len(part) for part in found if len(part) <= longest), default=1) for found in parts]
        if sum(widths) + 3 * (len(columns) - 1) <= console.width:
            break
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(column, justify="right" if i else "left", overflow="fold", min_width=width)
    for row in texts:
        table.add_row(*row)
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
    is_live = LIVE in os.environ
    interval = LIVE_INTERVAL_SECONDS if is_live else LINE_INTERVAL_SECONDS

    def advance(n: int, note: str = "") -> None:
        nonlocal done, last, interval
        done += n
        now = time.monotonic()
        is_end = start + done >= total and now - began >= SHORT_SECONDS
        if now - last >= interval or is_end:
            last, interval = now, interval if is_live else min(2 * interval, LONGEST_INTERVAL_SECONDS)
            rate = done / max(now - began, 1e-9)
            left = (total - start - done) / max(rate, 1e-9)
            line = f"{description}: {start + done:,}/{total:,} {unit}, {rate:,.1f}/s, {left:,.0f} s left"
            end = "\r" if is_live and not is_end else "\n"
            print(f"{line}, {note}" if note else line, flush=True, end=end)

    yield advance
