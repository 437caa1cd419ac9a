"""What the benchmarks of a GPU share: a process for each variant, timing, one table, its rows as JSON.

A script hands `run` its variants and a function that yields the rows of one. The script is then started again
for each variant, so that none inherits another's memory, patches or crash; what it has yielded before it died
counts. A row is a dict with `case` where there is more than one, and the numbers; or `error`, the reason.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import torch

from common.console import say, show_table
from common.files import write_json
from common.ops import Ops, choose

Row = dict[str, object]
WARM_UP_CALLS, LEAST_CALLS = 3, 5
SECONDS = 0.2
"""Of timed calls, at the least."""
CACHE_BYTES = 2**28
"""More than the second-level cache of any GPU."""
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "liger-kernel", "transformer-engine")


class Parser(argparse.ArgumentParser):
    """The flags that every benchmark has."""

    def __init__(self, description: str, names: Sequence[str]) -> None:
        super().__init__(description=description, allow_abbrev=False)
        every = ",".join(names)
        self.flag("--variants", str, every, "Those to measure, with commas between. (default: %(default)s)")
        self.flag("--json", Path, None, "File to write with all rows and the machine. (optional)")
        self.flag("--timeout", int, 150, "Seconds after which a variant is given up. (default: %(default)s)")
        self.flag("--total-seconds", int, 460, "Seconds for all of them together. (default: %(default)s)")
        text = "Toy sizes in fp32 on a CPU, to try the script. (optional)"
        self.add_argument("--toy", action="store_true", help=text)
        self.add_argument("--alone", help=argparse.SUPPRESS)  # the one variant that this process measures
        self.set_defaults(known=names)

    def flag(self, name: str, kind: type, default: object, text: str) -> None:
        """Adds a flag with one value."""
        self.add_argument(name, metavar=kind.__name__.upper(), type=kind, default=default, help=text)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def run(
    args: argparse.Namespace,
    ours: Sequence[str],
    measure: Callable[[str, argparse.Namespace], Iterator[Row]],
    columns: dict[str, str],
    compare: Callable[[Row, Row, list[Row]], Row],
) -> None:
    """Measures the chosen variants one after another, shows the table and writes the rows.

    Ends the process with status 1 if a variant of ours failed; one that is not installed has not failed.

    Args:
        args: The command line, of a `Parser`.
        ours: Names of the variants that are ours; ratios are to the first of them that a case has a row of.
        measure: (variant, command line) -> its rows; called in a process of the variant's own.
        columns: Heading -> format of a row's numbers, such as "{peak_gb:.1f}"; a dash where it has none.
        compare: (row, the row of ours with the same `case`, all rows) -> what is added to the row.

    Raises:
        ValueError: No GPU, or a variant that is unknown.
    """
    if not args.toy and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --toy tries the script on a CPU")
    if args.alone:
        rows = measure(args.alone, args)
        while row := attempt(lambda: next(rows, {})):
            print(json.dumps({**row, "machine": machine(args)}), flush=True)
    elif not _measure_all(args, ours, columns, compare):
        sys.exit(1)


def _measure_all(args, ours, columns, compare) -> bool:
    """Whether no variant of ours has failed."""
    names = args.variants.split(",")
    if unknown := [name for name in names if name not in args.known]:
        raise ValueError(f"--variants has {', '.join(unknown)}; known are {', '.join(args.known)}")
    began, rows, found_on = time.monotonic(), [], {}
    for name in names:
        left = args.total_seconds - (time.monotonic() - began)
        found = [{"error": "no time was left", "is_excused": True}]
        for row in _run_alone(name, min(args.timeout, left)) if left > 0 else found:
            found_on = row.pop("machine", found_on)
            rows.append({"variant": name, "is_ours": name in ours, **row})
            say(_line(rows[-1], columns))  # so that a run that is cut short has shown what it found
    measured = [row for row in rows if "error" not in row]
    for row in measured:
        same = [one for one in measured if one["is_ours"] and one.get("case") == row.get("case")]
        row |= compare(row, (same or [row])[0], measured)
    cells = [[_cell(form, row) for form in ("{variant}", *columns.values())] for row in measured]
    title = " ".join([Path(sys.argv[0]).stem, *sys.argv[1:], "on", str(found_on.get("device"))])
    show_table(title, ("variant", *columns), cells)
    for row in rows:
        if "error" in row:
            say(_line(row, columns))
    if args.json:
        write_json(args.json, {"command": " ".join(sys.argv), "machine": found_on, "rows": rows})
    return not any(row["is_ours"] and "error" in row and not row.get("is_excused") for row in rows)


def _line(row: Row, columns: dict[str, str]) -> str:
    cells = {title: _cell(form, row) for title, form in {**columns, "note": "{error}"}.items()}
    return f"{row['variant']}: " + ", ".join(f"{title} {cell}" for title, cell in cells.items() if cell)


def _cell(form: str, row: Row) -> str | None:
    try:
        return form.format(**row)
    except (KeyError, ValueError):  # not there, or text where a number is no number
        return None


def _run_alone(name: str, timeout: float) -> list[Row]:
    """Rows of this script's process for one variant, and one with the reason where it ended badly."""
    command = [sys.executable, *sys.argv, "--alone", name]
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}  # batches differ in size
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:  # a pipe may be held open by compile workers
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)
        try:
            ending = f"status {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            ending = f"no result within {timeout:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        rows = [_parsed(line) for line in out if line.startswith("{")]
        if process.returncode:
            last = next((line.strip() for line in reversed(err.readlines()) if line.strip()), "no message")
            rows.append({"error": f"{ending}: {last:.200}"})
    return rows


def _parsed(line: str) -> Row:
    """A row from its line; a loss that is not a number is a failure."""
    row = json.loads(line, parse_constant=str)
    return {"error": "some numbers are not finite", **row} if "NaN" in line or "Infinity" in line else row


def attempt(work: Callable[[], Row]) -> Row:
    """What `work` returns, or the reason why there is nothing: absent, out of memory, failed."""
    try:
        return work()
    except ImportError as error:
        return {"error": " ".join(str(error).split()), "is_excused": True}
    except torch.cuda.OutOfMemoryError:
        return {"error": f"out of memory at {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split()):.200}"}


def ops_or_absent(backend: str, *, compile: str = "auto", **asked: object) -> Ops:
    """`common.ops.choose`; a backend that is not here or cannot compute this is absent, no failure of ours.

    Raises:
        ImportError: In the words of `choose`.
    """
    try:
        return choose(backend, compile=compile, **asked)
    except ValueError as error:
        raise ImportError(error) from error


def timed(work: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of a call: median, min and max, after three calls that are not counted.

    On a GPU the caches are overwritten before each call, which also hides the launch of its first kernel.
    """
    for _ in range(WARM_UP_CALLS):
        work()
    found: list[float] = []
    scratch = torch.empty(0 if device == "cpu" else CACHE_BYTES, dtype=torch.uint8, device=device)
    while len(found) < LEAST_CALLS or sum(found) < 1e3 * SECONDS:
        if device == "cpu":
            began = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - began))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return spread(found)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak_gb(work: Callable[[], object], device: str) -> float:
    """GB that a call takes at the most, on top of what was there; 0 on a CPU, where nobody counts."""
    if device == "cpu":
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def machine(args: argparse.Namespace) -> dict[str, str | None]:
    """Card, versions and date."""
    found: dict[str, str | None] = {
        "device": "cpu" if args.toy else torch.cuda.get_device_name(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
    }
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
