"""What names stand for: raw files in folders, on the hub and below data/; and our own tables beside them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from common.console import say
from common.data.table import NUM_SHOWN, OF_AN_OUTPUT, SCHEMA, reading, scan, writing_scratch
from common.files import file_hash

KINDS = {"parquet": "parquet", "csv": "csv", **dict.fromkeys(("jsonl", "ndjson", "json"), "json")}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ENDING = re.compile(r"\.(?:(parquet)|(csv|jsonl|ndjson|json)(\.gz|\.zst)?)$", re.IGNORECASE)
"""Of every file that a reader reads, in any case."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Word in the name of a file or of a folder around it -> split."""
SPLIT_WORD = re.compile(rf"(?:^|(?<=[-._/ 0-9]))(?:{'|'.join(SPLITS)})(?=[-._/ 0-9]|$)", re.IGNORECASE)
"""Source: `datasets/data_files.py`, datasets 5.2."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PREFERENCE_SETS = {
    "capybara": "argilla/Capybara-Preferences",  # *_rating (whole), *_model; several turns
    "pku_saferlhf": "RLHFlow/PKU-SafeRLHF-30K-standard",  # *_score
    "argilla_math": "RLHFlow/Argilla-Math-DPO-standard",  # *_score
    "code_ultrafeedback": "RLHFlow/CodeUltraFeedback-standard",  # *_score
    "helpsteer": "RLHFlow/Helpsteer-preference-standard",  # *_score
}
"""Short name, which becomes the column `source` -> hub id."""
LEAK_COLUMNS = ("kind", "kinds", "other_source", "other_id", "similarity")
"""What `data_prep/leak_check.py` adds to the rows that it lists: such a table repeats rows of others."""


class RawFile(NamedTuple):
    """One file that was asked for, in a folder or from the hub perhaps."""

    path: Path
    kind: str
    """ "parquet", "csv" or "json": one object a line, whose fields may differ."""
    description: dict[str, object]
    """For a manifest: name, as the user knows it (a path, or a hub id), size in bytes and sha256."""

    @property
    def name(self) -> str:
        """As in the description."""
        return str(self.description["name"])


def find_raw(folder: Path, *names: str) -> Path | None:
    """The first of some names that is there below `folder`: a folder, or a file with an ending."""
    there = sorted(folder.iterdir()) if folder.is_dir() else ()
    places = [place for place in there if ENDING.sub("", place.name) in names and place.exists()]
    kinds = ["", *KINDS.values()]

    def rank(place: Path) -> tuple[int, int]:
        return names.index(ENDING.sub("", place.name)), kinds.index(_kind_of(place.name))

    return min(places, key=rank, default=None)


def _kind_of(name: str) -> str:
    """ "parquet", "csv" or "json", by the ending; "" for any other."""
    found = ENDING.search(name)
    return KINDS[(found[1] or found[2]).lower()] if found else ""


def find_tables(folder: Path) -> tuple[Path, ...]:
    """The comparison tables of a folder, by name; lists of leaks and of rejected rows are left out.

    Raises:
        ValueError: There is none, or a Parquet cannot be read.
    """
    tables = tuple(
        path
        for path in sorted(folder.glob("*.parquet"))
        if columns_of(path).keys() >= set(SCHEMA) and not is_leak_table(path)
    )
    if not tables:
        raise ValueError(
            f"{folder} holds no comparison table; make one with just prep, or name some with --input"
        )
    return tables


def is_leak_table(path: Path) -> bool:
    """Whether a file was written by `data_prep/leak_check.py`."""
    return columns_of(path).keys() >= set(LEAK_COLUMNS)


def columns_of(path: Path, name: str = "") -> pl.Schema:
    """Columns and types of a Parquet; ValueError, with `name` in place of its path, where it is broken."""
    with reading(name or path):
        return scan(path).collect_schema()


def fetch(inputs: Sequence[str], scratch: Path) -> tuple[RawFile, ...]:
    """Finds what is asked for: folders become their files, hub data sets temporary Parquets.

    Args:
        inputs: Paths, or hub ids OWNER/NAME (an existing path wins). A folder stands for the Parquets in it,
            or if there are none the CSV and JSON lines files, by name; where there are splits, for its train
            split alone. What is left out is said.
        scratch: Existing folder for temporary files.

    Raises:
        ValueError: No input was given, or one is not there, is empty or of an unknown kind.
    """
    if not inputs:
        raise ValueError("no input was given; name files or a hub id (OWNER/NAME) with --input")
    found: list[tuple[str, Path]] = []
    for number, name in enumerate(inputs):
        path = _expanded(name)
        if path.is_dir():
            found += [(str(file), file) for file in _files_of(path)]
        elif path.exists() or path.is_symlink():
            found.append((str(path), path))
        else:
            found.append((name, _from_hub(name, scratch / f"{number}.hub.parquet")))
    return tuple(_described(name, path) for name, path in found)


def _expanded(name: str) -> Path:
    """The path that a name stands for; "~" is a home folder unless there is a file of just that name."""
    if not name:
        raise ValueError("an --input is empty; name a file, a folder or a hub id OWNER/NAME")
    try:
        return Path(name) if os.path.lexists(name) else Path(name).expanduser()
    except RuntimeError:  # no such user
        return Path(name)


def _files_of(folder: Path) -> list[Path]:
    """A folder's files, as `fetch` takes them; ValueError for what cannot be read, lest its rows be lost."""
    endings = {file: ENDING.search(file.name) for file in sorted(_walk(folder))}
    # .json is what describes a data set
    files = [file for file, found in endings.items() if found and (found[2] or "").lower() != "json"]
    if not files:
        raise ValueError(f"{folder} holds no Parquet, CSV or JSON lines file; name another folder or a file")
    splits = {file: _splits_of(file.relative_to(folder).as_posix()) for file in files}
    found = [file for file in files if splits[file] == {"train"}]
    found = found or [file for file in files if not splits[file]]
    if not found and all(splits[file] == _splits_of(folder.name) for file in files):
        found = files  # a folder of one split that is called so: asked for by name
    if not found:
        raise ValueError(
            f"{folder} holds no train split, but {_listed(files)}; to read these, name the files themselves"
        )
    found = [file for file in found if _kind_of(file.name) == "parquet"] or found
    if left_out := [file for file in files if file not in found]:
        say(f"{folder}: {len(found)} of {len(files)} files are read; left out: {_listed(left_out)}")
    return found


def _splits_of(name: str) -> set[str]:
    """data/train-00000.parquet -> {"train"}; validation/a.csv -> {"validation"}; a.csv -> set()"""
    return {SPLITS[word.lower()] for word in SPLIT_WORD.findall(name)}


def _listed(files: Sequence[Path]) -> str:
    more = f" and {len(files) - NUM_SHOWN:,} more" if len(files) > NUM_SHOWN else ""
    return ", ".join(map(str, files[:NUM_SHOWN])) + more


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links, but for hidden ones; broken links too, which nobody can read."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        is_loop = os.path.realpath(where) in seen
        seen.add(os.path.realpath(where))
        folders[:] = [] if is_loop else sorted(name for name in folders if name[0] != ".")
        yield from (Path(where) / name for name in names if name[0] != "." and not is_loop)


def _from_hub(name: str, target: Path) -> Path:
    """The train split of a hub data set as Parquet."""
    if not HUB_ID.fullmatch(name) or ENDING.search(name):
        raise ValueError(
            f"{name} does not exist; expected a file, a folder or a hub id OWNER/NAME: put it there, or name "
            "another"
        )
    import datasets  # slow to import, and only hub ids need it

    try:  # no script of a data set is run: datasets 4 and later cannot; the flag says so to any version
        train = datasets.load_dataset(name, split="train", trust_remote_code=False)
    except Exception as error:  # the library and its network stack raise anything
        reason = (str(error).splitlines() or [""])[0]
        if OF_AN_OUTPUT.search(reason):
            raise ValueError(
                f"{name} was not kept: {reason}; free some space, or set HF_HOME or TMPDIR to another folder"
            ) from error
        raise ValueError(
            f"{name} is no file here, and was not fetched from the hub: {type(error).__name__}: {reason} "
            "- check the name; accept the licence on its page and run hf auth login if it is gated; offline, "
            "download it elsewhere and name its files"
        ) from error
    with writing_scratch():
        train.to_parquet(target)
    say(f"{name}: its train split, {len(train):,} rows, from the hub")
    return target


def _described(name: str, path: Path) -> RawFile:
    if not path.is_file() or not _kind_of(path.name):
        what = "has an ending that is not known" if path.is_file() else "is not a file"
        raise ValueError(
            f"{path} {what}; expected .{', .'.join(KINDS)}, the text ones also with "
            f"{' or '.join(COMPRESSIONS)}"
        )
    if not (size := path.stat().st_size):
        raise ValueError(f"{path} is empty; get the file again")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the file name {name!r} is not UTF-8, so no manifest holds it; rename it"
        ) from error
    return RawFile(path, _kind_of(path.name), {"name": name, "bytes": size, "sha256": file_hash(path)})
