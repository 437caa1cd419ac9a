"""What a comparison table was made from, beside it: inputs, parameters, code, counts by reason.

arena33k.parquet -> arena33k.manifest.json: whether a table is up to date, and what became of each row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from common.console import say, show_table
from common.data.sources.frames import RawFile
from common.data.table import ReadReport, check_writable, table_hash, write_rejected, writing_table
from common.files import file_hash, read_json, text_hash, write_json

JOINED = "joined to its partner"
"""What became of a row that is the second half of a comparison: among the dropped, though not lost."""


def check_output(output: Path) -> None:
    """ValueError where a table would not be written as Parquet."""
    if output.suffix != ".parquet":
        raise ValueError(f"--output is {output}; expected a name that ends in .parquet")


def made_of(
    files: Sequence[RawFile], parameters: Mapping[str, object], code: Sequence[Path]
) -> dict[str, object]:
    """What decides a table's content, JSON values only.

    Args:
        files: What it is made from.
        parameters: Flags that change the result.
        code: Source files whose change makes the table out of date, beside those of `common` that read rows.
    """
    code = [*code, *sorted(Path(__file__).with_name("data").rglob("*.py"))]
    return {
        "inputs": [file.description for file in files],
        "parameters": dict(parameters),
        "code_sha256": text_hash(*(f"{path.name} {file_hash(path)}" for path in code)),
    }


def is_made(
    output: Path,
    files: Sequence[RawFile],
    wanted: Mapping[str, object],
    *,
    overwrite: bool,
    skip_bad_rows: bool,
) -> bool:
    """Whether `output` is there and made of just this, and says so; of inputs the bytes count, not the names.

    Raises:
        ValueError: It, its manifest or its list of rejected rows is an input or a folder. Or, unless
            `overwrite`: it is there, made of something else or by hand, or without rows that are bad and may
            not be skipped now; or it is not there, and files of others have the names of those beside it.
    """
    _check_places(output, files)
    manifest = _read_manifest(manifest_path(output))
    if not output.exists():
        others = [path for path in _beside(output) if path.exists()] if manifest is None else []
        if others and not overwrite:
            raise ValueError(
                f"{others[0]} is there, but no {output} that it belongs to; pass --overwrite to replace it, "
                "or another --output"
            )
        return False
    reason = _difference(output, manifest, wanted, skip_bad_rows)
    if reason is not None and not overwrite:
        raise ValueError(f"{reason}; pass --overwrite to replace it, or another --output")
    if reason is None:
        assert manifest is not None
        if manifest.get("code_sha256") != wanted["code_sha256"]:
            reason = f"{output} was made by other code"
        elif manifest.get("output_sha256") != file_hash(output):
            reason = f"{output}: writing it was interrupted"
        elif manifest.get("rejected_sha256") != _hash_if_there(rejected_path(output)):
            reason = f"{rejected_path(output)} is not what was written with {output}"
    say(f"{output} is up to date" if reason is None else f"{reason}: making it again")
    return reason is None


def _check_places(output: Path, files: Sequence[RawFile]) -> None:
    for path in (output, *_beside(output)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a file to write; name another --output")
        if path.resolve() in {file.path.resolve() for file in files}:
            raise ValueError(f"{path} is an input and would be replaced; name another --output")


def _read_manifest(path: Path) -> dict | None:
    """A manifest as `write_made` writes it; None where there is none, or something else of that name."""
    try:
        found = read_json(path)
    except ValueError:
        return None
    counts, inputs = found.get("counts"), found.get("inputs")
    rejected = counts.get("rejected") if isinstance(counts, dict) else None
    is_ours = (
        isinstance(rejected, dict)
        and all(isinstance(count, int) for count in rejected.values())
        and isinstance(inputs, list)
        and all(isinstance(one, dict) for one in inputs)
        and isinstance(found.get("parameters"), dict)
    )
    return found if is_ours else None


def _difference(
    output: Path, found: Mapping | None, wanted: Mapping[str, object], skip_bad_rows: bool
) -> str | None:
    """Why a table must not be replaced unasked; None where only the code differs, or a run did not end."""
    if found is None:
        path = manifest_path(output)
        return f"{output} is there, but {path} is not or cannot be read, so what it was made of is not known"
    if file_hash(output) not in (found.get("output_sha256"), found.get("replaces_sha256")):
        return f"{output} was changed after it was made"
    if _hashes(found["inputs"]) != _hashes(wanted["inputs"]):
        return f"{output} was made from other files than {', '.join(one['name'] for one in wanted['inputs'])}"
    theirs, ours = found["parameters"], wanted["parameters"]
    if differing := [name for name in ours if theirs.get(name) != ours[name]]:
        then, now = (", ".join(_shown(name, one.get(name)) for name in differing) for one in (theirs, ours))
        return f"{output} was made with {then}; here it is {now}"
    num_rejected = sum(found["counts"]["rejected"].values())
    if num_rejected and not skip_bad_rows:
        return f"{output} was made without {num_rejected:,} bad rows; pass --skip-bad-rows to keep it"
    return None


def _hashes(inputs: Sequence[Mapping[str, object]]) -> list[str]:
    """Of inputs as a manifest lists them."""
    return sorted(str(one.get("sha256")) for one in inputs)


def _hash_if_there(path: Path) -> str | None:
    return file_hash(path) if path.is_file() else None


def _shown(name: str, value: object) -> str:
    """A parameter for a message; of hashes the first digits."""
    if isinstance(value, list):
        value = ", ".join(str(one)[:12] for one in value) or "none"
    return f"{name} {value}"


def write_made(
    output: Path,
    frame: pl.DataFrame,
    report: ReadReport,
    *,
    wanted: Mapping[str, object],
    dropped: Mapping[str, int],
) -> None:
    """Writes a comparison table, the rows that were rejected, and the manifest; prints the counts.

    The manifest comes first and names the old table too: killed in between, the next run knows what it sees.

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
    reasons = dict(report.rejected["reason"].value_counts(sort=True).iter_rows())
    counts = {"read": report.num_read, "rejected": reasons, "dropped": dict(dropped), "kept": len(frame)}
    with writing_table(frame, output) as temporary:
        if len(report.rejected):
            write_rejected(report, rejected_path(output))
        write_json(
            manifest_path(output),
            {
                **wanted,
                "counts": counts,
                "notes": report.notes,
                "table_sha256": table_hash(frame),
                "output_sha256": file_hash(temporary),
                "replaces_sha256": _hash_if_there(output),
                "rejected_sha256": _hash_if_there(rejected_path(output)) if len(report.rejected) else None,
            },
        )
    if report.rejected.is_empty():
        rejected_path(output).unlink(missing_ok=True)
    show_counts(output, counts, report.notes)
    if len(report.rejected):
        say(f"the rejected rows are listed in {rejected_path(output)}")


def manifest_path(output: Path) -> Path:
    """data/x.parquet -> data/x.manifest.json"""
    return output.with_suffix(".manifest.json")


def rejected_path(output: Path) -> Path:
    """data/x.parquet -> data/x.rejected.parquet"""
    return output.with_suffix(".rejected.parquet")


def _beside(output: Path) -> tuple[Path, Path]:
    """What may lie beside a table."""
    return manifest_path(output), rejected_path(output)


def show_counts(output: Path, counts: Mapping[str, object], notes: Mapping[str, int]) -> None:
    """Prints rows in, out, why not, and what is worth knowing of the good ones."""
    rows = [("rows read", counts["read"])]
    rows += [(f"bad: {reason}", -count) for reason, count in counts["rejected"].items()]
    rows += [(f"dropped: {reason}", -count) for reason, count in counts["dropped"].items() if count]
    rows.append(("comparisons kept", counts["kept"]))
    rows += [(f"good rows {note}", count) for note, count in notes.items()]
    show_table(str(output), ("what", "rows"), [(what, f"{count:,}") for what, count in rows])
