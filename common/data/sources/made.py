"""A comparison table as the scripts of data_prep/ make it: what it leaves out, and what lies beside it.

arena33k.parquet, arena33k.manifest.json (what it was made from, what became of each row) and, where rows were
bad and skipped, arena33k.rejected.parquet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from common.console import say, show_table
from common.data.chats import stable_key
from common.data.sources.find import RawFile, columns_of
from common.data.table import (
    SCHEMA,
    ReadReport,
    check_writable,
    reading,
    scan,
    table_hash,
    write_table,
    writing_table,
)
from common.files import file_hash
from common.runs import code_hash, rejected_path, write_manifest

EXCLUDED = "prompt stands in --exclude"
"""Why a row is left out."""
JOINED = "joined to its partner"
"""What became of a row that is the second half of a comparison: among the dropped, though not lost."""


def prompt_keys(paths: Sequence[Path]) -> pl.Series:
    """The different keys (`stable_key`) of all prompts in comparison tables.

    Raises:
        ValueError: A file cannot be read, or has no column of prompts.
    """
    keys = [pl.Series("prompt_key", [], dtype=pl.Binary)]
    for path in paths:
        found = columns_of(path).get("prompt")
        if found != SCHEMA["prompt"]:
            raise ValueError(
                f"--exclude {path}: the column prompt is {found or 'not there'}, expected {SCHEMA['prompt']} "
                "in a comparison Parquet (just prep makes them)"
            )
        with reading(path):
            keys.append(scan(path).select(prompt_key=stable_key(pl.col("prompt"))).collect()["prompt_key"])
    return pl.concat(keys).drop_nulls().unique()


def without_prompts(frame: pl.DataFrame, paths: Sequence[Path]) -> tuple[pl.DataFrame, dict[str, int]]:
    """`frame` less the rows whose prompt (all user turns) stands in a comparison table, and their count."""
    if not paths:
        return frame, {}
    kept = frame.filter(~stable_key(pl.col("prompt")).is_in(prompt_keys(paths).implode()))
    return kept, {EXCLUDED: len(frame) - len(kept)}


def check_output(output: Path) -> None:
    """ValueError where a table would not be written as Parquet."""
    if output.suffix != ".parquet":
        raise ValueError(f"--output is {output}; expected a name that ends in .parquet")


def made_of(
    files: Sequence[RawFile], parameters: Mapping[str, object], exclude: Sequence[Path], *, script: str
) -> dict[str, object]:
    """What decides a table's content, JSON values only.

    Args:
        files: What it is made from.
        parameters: Flags that change the result.
        exclude: Comparison tables whose prompts are left out.
        script: What makes it; its change makes the table out of date, and so does that of `common.data`.

    Raises:
        ValueError: A table of `exclude` is not there.
    """
    for path in exclude:
        if not path.is_file():
            raise ValueError(
                f"--exclude {path} is not a file; expected a comparison Parquet (just prep makes them)"
            )
    return {
        "inputs": [file.description for file in files],
        "parameters": {**parameters, "exclude": sorted(map(file_hash, exclude))},
        "code_sha256": code_hash(Path(script), Path(__file__).parents[1]),
    }


def write_made(
    output: Path,
    frame: pl.DataFrame,
    report: ReadReport,
    *,
    wanted: Mapping[str, object],
    dropped: Mapping[str, int],
) -> None:
    """Writes a comparison table, the rows that were rejected, and the manifest; prints the counts.

    Args:
        output: Comparison Parquet.
        frame: Its rows.
        report: Of the rows that were read, good and bad.
        wanted: As of `made_of`.
        dropped: Why rows were left out on purpose -> how many, in the order in which that happens.

    Raises:
        ValueError: No row is left, or a file cannot be written.
    """
    if frame.is_empty():
        why = "".join(f", {reason} {count:,}" for reason, count in dropped.items() if count)
        raise ValueError(f"no comparison is left for {output}: {report.num_read:,} rows read{why}")
    frame = check_writable(frame, output)
    rejected, side = report.rejected, rejected_path(output)
    reasons = dict(rejected["reason"].value_counts(sort=True).iter_rows())
    counts = {"read": report.num_read, "rejected": reasons, "dropped": dict(dropped), "kept": len(frame)}
    found = {"counts": counts, "notes": report.notes, "table_sha256": table_hash(frame)}
    with writing_table(frame, output) as temporary:
        if len(rejected):
            write_table(rejected, side)
        write_manifest(output, temporary, {**wanted, **found}, num_rejected=len(rejected))
    if rejected.is_empty():
        side.unlink(missing_ok=True)
    show_counts(output, counts, report.notes)
    if len(rejected):
        say(f"the rejected rows are listed in {side}")


def show_counts(output: Path, counts: Mapping[str, object], notes: Mapping[str, int]) -> None:
    """Prints rows in, out, why not, and what is worth knowing of the good ones."""
    rows = [("rows read", counts["read"])]
    rows += [(f"bad: {reason}", -count) for reason, count in counts["rejected"].items()]
    rows += [(f"dropped: {reason}", -count) for reason, count in counts["dropped"].items() if count]
    rows.append(("comparisons kept", counts["kept"]))
    rows += [(f"good rows {note}", count) for note, count in notes.items()]
    show_table(str(output), ("what", "rows"), [(what, f"{count:,}") for what, count in rows])
