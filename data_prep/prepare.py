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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from common.console import cli, say, show_table
from common.data.sources.find import PREFERENCE_SETS, find_raw
from common.data.table import scan
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
    tables = {source.table: output / f"{source.table}.parquet" for source in SOURCES}
    states = {}
    for source in SOURCES:
        inputs, missing = find_inputs(source, args)
        if missing:
            names = ", ".join(" or ".join(part) for part in missing)
            way_out = "; --hub would fetch it" if source.hub else ""
            say(f"{source.table}: not in {args.data}: {names}{way_out}")
        if inputs:
            states[source.table] = make(source, inputs, tables, args)
            states[source.table] += f", of {len(inputs)} of {len(source.raw)} sets" if missing else ""
    if not states:
        names = ", ".join(" or ".join(part) for source in SOURCES for part in source.raw)
        raise ValueError(f"{args.data} holds none of {names}; docs/data.md says where they are published")
    there = {name: table for name, table in tables.items() if table.is_file()}
    run("summary.py", "--output", output, "--input", *there.values())
    counts = {name: f"{scan(t).select(pl.len()).collect().item():,}" for name, t in there.items()}
    rows = [(name, counts.get(name), states.get(name, "raw files missing")) for name in tables]
    show_table(f"{output}", ("table", "comparisons", "state"), rows)


def find_inputs(source: Source, args: Args) -> tuple[list[str], list[tuple[str, ...]]]:
    """What is there of a table's raw files, with --hub the ids of the others; and the parts that are not."""
    hub = source.hub if args.hub and source.hub else [None] * len(source.raw)
    found = [
        find_raw(args.data, *names) or elsewhere for names, elsewhere in zip(source.raw, hub, strict=True)
    ]
    missing = [names for names, one in zip(source.raw, found, strict=True) if one is None]
    return [str(one) for one in found if one is not None], missing


def make(source: Source, inputs: list[str], tables: Mapping[str, Path], args: Args) -> str:
    """Runs a source's script; says whether it made something."""
    manifest = manifest_path(tables[source.table])
    before = manifest.stat().st_mtime_ns if manifest.is_file() else None
    exclude = [tables[name] for name in source.exclude if tables[name].is_file()]
    exclude += args.exclude if source.exclude else ()
    flags = [*source.flags, *(["--exclude", *exclude] if exclude else [])]
    flags += ["--skip-bad-rows"] * args.skip_bad_rows + ["--overwrite"] * args.overwrite
    began = time.monotonic()
    run(source.script, "--input", *inputs, "--output", tables[source.table], *flags)
    is_new = manifest.stat().st_mtime_ns != before
    return f"made in {time.monotonic() - began:,.0f} s" if is_new else "up to date"


def run(script: str, *arguments: object) -> None:
    """Runs one of the scripts beside this one; ValueError where it fails."""
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    say(f"$ {shlex.join(['python', f'data_prep/{script}', *command[2:]])}")
    if status := subprocess.run(command).returncode:
        raise ValueError(f"data_prep/{script} ended with status {status}; what is wrong stands above")


if __name__ == "__main__":
    cli(main)
