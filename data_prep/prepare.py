"""All raw files of a folder -> all comparison tables, in the order in which they exclude each other.

In    data/ : what was downloaded, under the names that it is published with (docs/data.md)
Out   artifacts/data/*.parquet with their manifests; summary.json and pictures of what came of it
Run   just prep
      just prep --hub          (also fetches what is not in data/ from the Hugging Face hub)

A table whose inputs, parameters and code did not change is left as it is. No prompt of arena55k, whose fold 0
is held out, stands in another table: `just leaks --fail-on fold` shows it.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.console import cli, say, show_table
from common.data.sources.find import PREFERENCE_SETS, find_raw
from common.files import read_json
from common.runs import manifest_path

FOLDER = Path(__file__).resolve().parent


class Source(NamedTuple):
    """One table and what it is made from."""

    table: str
    script: str
    raw: tuple[tuple[str, ...], ...]
    """Names below data/ of all parts, for each those that it may have."""
    hub: tuple[str, ...] = ()
    """Where --hub looks for the parts that are not there, one a part."""
    flags: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Tables whose prompts are left out here."""


SOURCES = (
    Source("arena55k", "competition.py", (("train",),), ("lmarena-ai/arena-human-preference-55k",)),
    Source(
        "arena33k",
        "external33k.py",
        (("lmsys-33k-deduplicated", "chatbot_arena_conversations"),),
        ("lmsys/chatbot_arena_conversations",),
        exclude=("arena55k",),
    ),
    Source("test", "competition.py", (("test",),), flags=("--source", "test", "--folds", "0")),
    Source(
        "lmsys1m_pairs",
        "lmsys1m_pairs.py",
        (("lmsys-chat-1m",),),
        ("lmsys/lmsys-chat-1m",),
        exclude=("arena55k", "arena33k"),
    ),
    Source(
        "preference_sets",
        "preference_sets.py",
        tuple((short, hub.split("/")[1]) for short, hub in PREFERENCE_SETS.items()),
        tuple(PREFERENCE_SETS.values()),
        exclude=("arena55k", "arena33k"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Every raw file into its comparison table."""

    data: Path = Path("data")
    """Folder of downloads."""
    artifacts: Path = Path("artifacts")
    """Tree of everything made; the tables go to <artifacts>/data."""
    hub: bool = False
    """Fetch what is not in the folder from the Hugging Face hub."""
    exclude: tuple[Path, ...] = ()
    """Further tables (a list of leaks, say) whose prompts are left out of all but arena55k and test."""
    skip_bad_rows: bool = False
    """Leave bad rows out and list them beside the table, instead of stopping."""
    overwrite: bool = False
    """Replace tables that were made from other files or with other parameters."""


def main(args: Args) -> None:
    output = args.artifacts / "data"
    rows, num_found = [], 0
    for source in SOURCES:
        inputs, missing = find_inputs(source, args)
        table = output / f"{source.table}.parquet"
        if missing:
            names = ", ".join(" or ".join(part) for part in missing)
            way_out = "; --hub would fetch it" if source.hub else ""
            say(f"{source.table}: not in {args.data}: {names}{way_out}")
        if not inputs:
            rows.append((source.table, "raw files missing"))
            continue
        num_found += 1
        made = make(source, inputs, table, args)
        parts = f", of {len(inputs)} of {len(source.raw)} sets" if missing else ""
        rows.append((source.table, f"{made}{parts}"))
    if not num_found:
        names = ", ".join(" or ".join(part) for source in SOURCES for part in source.raw)
        raise ValueError(f"{args.data} holds none of {names}; docs/data.md says where they are published")
    run("summary.py", "--output", output, "--input", *existing(output))
    show_table(
        f"{output}",
        ("table", "comparisons", "state"),
        [(name, count(output / f"{name}.parquet"), s) for name, s in rows],
    )


def find_inputs(source: Source, args: Args) -> tuple[list[str], list[tuple[str, ...]]]:
    """What is there of a table's raw files, with --hub the ids of the others; and the parts that are not."""
    found, missing = [], []
    for i, names in enumerate(source.raw):
        here = find_raw(args.data, *names)
        if here is not None:
            found.append(str(here))
        elif args.hub and source.hub:
            found.append(source.hub[i])
        else:
            missing.append(names)
    return found, missing


def make(source: Source, inputs: list[str], table: Path, args: Args) -> str:
    """Runs a source's script; says whether it made something."""
    before = manifest_path(table).stat().st_mtime_ns if manifest_path(table).is_file() else None
    tables = [table.with_name(f"{name}.parquet") for name in source.exclude]
    exclude = [path for path in tables if path.is_file()] + list(args.exclude if source.exclude else ())
    flags = ["--exclude", *exclude] if exclude else []
    flags += ["--skip-bad-rows"] * args.skip_bad_rows + ["--overwrite"] * args.overwrite
    began = time.monotonic()
    run(source.script, "--input", *inputs, "--output", table, *source.flags, *flags)
    if before == manifest_path(table).stat().st_mtime_ns:
        return "up to date"
    return f"made in {time.monotonic() - began:,.0f} s"


def run(script: str, *arguments: object) -> None:
    """Runs one of the scripts beside this one; ValueError where it fails."""
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    say(f"$ {shlex.join(['python', f'data_prep/{script}', *command[2:]])}")
    if status := subprocess.run(command).returncode:
        raise ValueError(f"data_prep/{script} ended with status {status}; what is wrong stands above")


def existing(output: Path) -> list[Path]:
    """The tables that are there."""
    tables = (output / f"{source.table}.parquet" for source in SOURCES)
    return [table for table in tables if table.is_file()]


def count(table: Path) -> str | None:
    """Comparisons of a table."""
    path = manifest_path(table)
    return f"{read_json(path)['counts']['kept']:,}" if path.is_file() else None


if __name__ == "__main__":
    cli(main)
