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
from common.data_manifest import manifest_path
from common.files import read_json

FOLDER = Path(__file__).resolve().parent


class Source(NamedTuple):
    """One table and what it is made from."""

    table: str
    script: str
    raw: tuple[str, ...]
    """Names below data/, files or folders; of alternatives ("a|b") the first that is there."""
    hub: tuple[str, ...] = ()
    """Where --hub looks for those that are not there, one a name."""
    flags: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Tables whose prompts are left out here."""


SOURCES = (
    Source("arena55k", "competition.py", ("train.csv",), ("lmarena-ai/arena-human-preference-55k",)),
    Source(
        "arena33k",
        "external33k.py",
        ("lmsys-33k-deduplicated.csv|chatbot_arena_conversations|chatbot_arena_conversations.parquet",),
        ("lmsys/chatbot_arena_conversations",),
        exclude=("arena55k",),
    ),
    Source("test", "competition.py", ("test.csv",), flags=("--source", "test", "--folds", "0")),
    Source(
        "lmsys1m_pairs",
        "lmsys1m_pairs.py",
        ("lmsys-chat-1m",),
        ("lmsys/lmsys-chat-1m",),
        exclude=("arena55k", "arena33k"),
    ),
    Source(
        "preference_sets",
        "preference_sets.py",
        (
            "Capybara-Preferences",
            "PKU-SafeRLHF-30K-standard",
            "Argilla-Math-DPO-standard",
            "CodeUltraFeedback-standard",
            "Helpsteer-preference-standard",
        ),
        (
            "argilla/Capybara-Preferences",
            "RLHFlow/PKU-SafeRLHF-30K-standard",
            "RLHFlow/Argilla-Math-DPO-standard",
            "RLHFlow/CodeUltraFeedback-standard",
            "RLHFlow/Helpsteer-preference-standard",
        ),
        exclude=("arena55k", "arena33k"),
    ),
)
ENDINGS = ("", ".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Every raw file into its comparison table."""

    data: Path = Path("data")
    """Folder of downloads."""
    artifacts: Path = Path("artifacts")
    """Tree of everything made; the tables go to <artifacts>/data."""
    hub: bool = False
    """Fetch what is not in the folder from the Hugging Face hub."""
    skip_bad_rows: bool = False
    """Leave bad rows out and list them beside the table, instead of stopping."""
    overwrite: bool = False
    """Replace tables that were made from other files or with other parameters."""


def main(args: Args) -> None:
    output = args.artifacts / "data"
    rows, num_found = [], 0
    for source in SOURCES:
        inputs = find_inputs(source, args)
        table = output / f"{source.table}.parquet"
        if not inputs:
            say(f"{source.table}: none of {', '.join(source.raw)} in {args.data}; --hub would fetch it")
            rows.append((source.table, "raw files missing"))
            continue
        num_found += 1
        rows.append((source.table, make(source, inputs, table, args)))
    if not num_found:
        names = ", ".join(name for source in SOURCES for name in source.raw)
        raise ValueError(f"{args.data} holds none of {names}; docs/data.md says where they are published")
    run("summary.py", "--output", output, "--input", *existing(output))
    show_table(
        f"{output}",
        ("table", "comparisons", "state"),
        [(name, count(output / f"{name}.parquet"), s) for name, s in rows],
    )


def find_inputs(source: Source, args: Args) -> list[str]:
    """The raw files of a table that are there, and with --hub the ids of the others."""
    found = []
    for i, names in enumerate(source.raw):
        places = [args.data / f"{name}{ending}" for name in names.split("|") for ending in ENDINGS]
        here = next((str(place) for place in places if place.exists()), None)
        if here is None and args.hub and source.hub:
            here = source.hub[i]
        found += [here] if here else []
    return found


def make(source: Source, inputs: list[str], table: Path, args: Args) -> str:
    """Runs a source's script; says whether it made something."""
    before = manifest_path(table).stat().st_mtime_ns if manifest_path(table).is_file() else None
    exclude = [table.with_name(f"{name}.parquet") for name in source.exclude]
    flags = (
        ["--exclude", *(path for path in exclude if path.is_file())]
        if any(map(Path.is_file, exclude))
        else []
    )
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
