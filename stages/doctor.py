"""What this machine has, what is missing for which purpose, and the command that mends it.

In    this machine; pyproject.toml and constraints.txt; --data, --artifacts
Out   a table on the terminal; nothing is written
Run   just doctor
      just doctor --model gemma9b --strict     (in a job script: stops before the training does)

A line is fine, missing, or not needed here. GPUs, what only they use, weights and the disk for them are
needed where this machine has an NVIDIA GPU or --model names a recipe; elsewhere the demo is the purpose.
The status is 0 as long as the demo can run, because looking is no failure; --strict makes it 1 if anything
that training needs is missing too. What only speed or a submission lacks is listed and changes no status.
"""

import sys

try:
    import os
    import tomllib  # noqa: F401 - Python 3.10 lacks it, and is told so below
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import suppress
    from dataclasses import dataclass
    from pathlib import Path
    from shlex import quote
    from typing import Literal, NamedTuple

    import tyro  # noqa: F401 - reads the command line below
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from common.console import cli, console, say
    from common.doctor import diagnosis
    from common.doctor.diagnosis import FINE, MISSING, NOT_NEEDED, Line
    from common.doctor.machine import Answers, ask, count_rows, query_driver
except ImportError as error:  # of all scripts, this one must say what to do
    sys.exit(
        f"error: Python {sys.version.split()[0]} ({sys.executable}) cannot import {error.name or error}. "
        "Wanted is Python 3.11 or newer with the project's packages, in a clone of the repository:\n"
        "    python3 -m venv .venv && . .venv/bin/activate && pip install rust-just && just setup"
    )

LOOK = {FINE: ("\N{CHECK MARK}", "green"), MISSING: ("\N{BALLOT X}", "bold red"), NOT_NEEDED: ("-", "dim")}
IMPORT_SECONDS = 60
HUB_SECONDS = 8

FETCH = (
    "kaggle competitions download -c lmsys-chatbot-arena -p {data} && "
    "unzip -d {data} {data}/lmsys-chatbot-arena.zip"
)


class Source(NamedTuple):
    """A raw file and the table made of it."""

    raw: str
    table: str
    purpose: str
    fetch: str


SOURCES = (
    Source("train.csv", "arena55k.parquet", "training", FETCH),
    Source(
        "lmsys-33k-deduplicated.csv",
        "arena33k.parquet",
        "training",
        "put lmsys-33k-deduplicated.csv into {data} (docs/data.md says where it is published)",
    ),
    Source("test.csv", "test.parquet", "a submission", FETCH),
)
POOL = ("lmsys1m_pairs.parquet", "preference_sets.parquet")


@dataclass(frozen=True, kw_only=True)
class Args:
    """What this machine has, what is missing, and the command that mends it."""

    model: Literal["all", "gemma9b", "gemma27b", "armorm8b", "tiny-gemma", "tiny-llama"] = "all"
    """Recipe whose needs are looked at; "all" takes the three real ones, if this machine has a GPU."""
    data: Path = Path("data")
    """Folder of the raw files."""
    artifacts: Path = Path("artifacts")
    """Folder of everything that the scripts write."""
    offline: bool = False
    """Ask nothing of the network (HF_HUB_OFFLINE=1 does the same)."""
    strict: bool = False
    """Status 1 also if something for training is missing."""


def main(args: Args) -> None:
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the symbols still gets the words
    with console.status("looking at this machine ..."):
        topics = look(args)
    sys.exit(report(topics, strict=args.strict))


def look(args: Args) -> dict[str, list[Line]]:
    """Asks everything at once, then judges; topic -> lines."""
    is_tiny, models = args.model.startswith("tiny"), tuple(diagnosis.NEEDS)
    if args.model != "all":
        models = tuple(model for model in models if model == args.model)
    with ThreadPoolExecutor(6) as pool:
        extras = {name: pool.submit(_ask, "import", name) for name in diagnosis.EXTRAS}
        asked_torch, asked_core = pool.submit(_ask, "torch"), pool.submit(_ask, "import", *diagnosis.CORE)
        where = "offline" if args.offline or is_tiny else "online"
        hub = ask("hub", where, *models, timeout_s=HUB_SECONDS)
        driver = query_driver()
        torch, core = asked_torch.result(), asked_core.result()
    gpus = driver.gpus if driver else ()
    has_gpu = bool(gpus) or bool(driver and driver.failure)
    needs_gpu = not is_tiny and (has_gpu or args.model != "all")
    answers = {name: asked.result() for name, asked in extras.items()}
    return {
        "Python": guarded(diagnosis.python_lines, core, torch),
        "GPU": where_needed(needs_gpu, guarded(diagnosis.gpu_lines, driver, torch, models)),
        "Ops": where_needed(needs_gpu, guarded(diagnosis.ops_lines, torch, answers, gpus)),
        "Weights": where_needed(needs_gpu, guarded(diagnosis.hub_lines, hub, models)),
        "Disk": where_needed(needs_gpu, guarded(diagnosis.disk_lines, args.artifacts, models, hub)),
        "Data": where_needed(not is_tiny, guarded(data_lines, args.data, args.artifacts / "data")),
        "Submission": where_needed(not is_tiny, guarded(diagnosis.kaggle_lines, os.environ, Path.home())),
    }


def _ask(*words: str) -> Answers:
    return ask(*words, timeout_s=IMPORT_SECONDS)


def guarded(check: Callable[..., Iterator[Line]], *arguments: object) -> list[Line]:
    """The lines of a check; where it fails, a last line says so."""
    lines = []
    try:
        for line in check(*arguments):
            lines.append(line)
    except Exception as error:  # a broken environment is what this script is for
        name = check.__name__.removesuffix("_lines")
        text = f"cannot be looked at: {type(error).__name__}: {error}"
        lines.append(Line(name, MISSING, text, diagnosis.INSTALL))
    return lines


def where_needed(needed: bool, lines: list[Line]) -> list[Line]:
    """The lines; of a topic that is not needed, nothing is missing but what the demo needs."""
    if needed:
        return lines
    return [
        line._replace(state=NOT_NEEDED) if line.state == MISSING and line.purpose != "the demo" else line
        for line in lines
    ]


def data_lines(data: Path, tables: Path) -> Iterator[Line]:
    """Raw files and the tables made of them, with their numbers of rows."""
    prep = f"just prep --data {quote(str(data))} --artifacts {quote(str(tables.parent))}"
    if (data, tables.parent) == (Path("data"), Path("artifacts")):
        prep = "just prep"
    for source in SOURCES:
        raw, table = data / source.raw, tables / source.table
        if not raw.exists() and table.exists():
            yield Line(source.raw, NOT_NEEDED, f"not there, but {source.table} is")
        else:
            yield _file_line(raw, source.fetch.format(data=quote(str(data))), source.purpose)
        yield _file_line(table, prep, source.purpose, redo=f"{prep} --overwrite")
    for name in POOL:
        yield _file_line(tables / name, f"{prep} --hub", "training", redo=f"{prep} --hub --overwrite")
    named = {*POOL, *(source.table for source in SOURCES)}
    for path in sorted(tables.glob("*.parquet")):
        if path.name not in named:
            yield _file_line(path, "", "training")


def _file_line(path: Path, mend: str, purpose: str, redo: str = "") -> Line:
    try:
        return Line(path.name, FINE, f"{count_rows(path):,} rows")
    except FileNotFoundError:
        return Line(path.name, MISSING, f"not in {path.parent}", mend, purpose)
    except PermissionError:
        return Line(path.name, MISSING, "no permission to read it", f"chmod u+r {quote(str(path))}", purpose)
    except (OSError, ValueError) as error:
        again = redo or f"rm -r {quote(str(path))}    # then: {mend or 'make it again'}"
        return Line(path.name, MISSING, str(error), again, purpose)


def report(topics: Mapping[str, list[Line]], *, strict: bool) -> int:
    """Prints the table, then the commands in whole lines, so that they can be copied.

    Returns:
        The status: 1 if the demo cannot run, or, with `strict`, if something for training is missing.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("check", overflow="fold", min_width=28)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for topic, lines in topics.items():
        table.add_section()
        table.add_row(Text(topic, style="bold"))
        for line in lines:
            symbol, style = LOOK[line.state]
            state = Text(f"{symbol} {line.state}", style=style)
            table.add_row(Text(f"  {line.check}"), state, Text(line.found))
    console.print(table)

    missing = [(topic, line) for topic, lines in topics.items() for line in lines if line.state == MISSING]
    if missing:
        say("What mends what is missing:")
    for topic, mend in dict.fromkeys((topic, line.mend) for topic, line in missing):
        lines = [line for other, line in missing if (other, line.mend) == (topic, mend)]
        purposes = " and ".join(dict.fromkeys(line.purpose for line in lines))
        say(f"  {topic}: {', '.join(line.check for line in lines)} (for {purposes})\n      {mend}")
    counts = {purpose: sum(line.purpose == purpose for _, line in missing) for purpose in diagnosis.PURPOSES}
    named = ", ".join(f"{count} for {purpose}" for purpose, count in counts.items() if count)
    demo = "the demo cannot run yet" if counts["the demo"] else "the demo runs here: just demo"
    say(f"{len(missing)} missing{f' ({named})' if named else ''}; {demo}")
    return int(bool(counts["the demo"] or (strict and counts["training"])))


if __name__ == "__main__":
    cli(main)
