"""Run folders: what is being made, from what, how far it is, and the state to go on from.

run.json        recipe, inputs (hashes), status; of a finished run size and sha256 of its results
metrics.jsonl   one line a logged step
state/step-N/   sharded training state, in PyTorch's own format (read back from here only)

And single files that say the same of themselves: x.parquet, made of what x.manifest.json says beside it.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import progress, say
from common.files import LARGE, file_hash, known_hash, read_json, replacing, text_hash, write_json
from common.locks import hold, leftovers, recover, remove

if TYPE_CHECKING:  # slow to import, and only training states need it
    import torch

# A single process saving alone is what is meant, not an oversight.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

RETIRED = frozenset({"max_tokens_per_micro_batch", "activation_checkpointing"})
"""In recipes of older runs, though they change no result: such a run is continued, or complete, as it is."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One output folder and the recipe that it is made by."""

    folder: Path
    description: dict[str, object]
    """`recipe`, `inputs` and `code`, JSON values only."""
    is_complete: bool

    @classmethod
    def open(
        cls, folder: Path, *, recipe: dict[str, object], inputs: dict[str, object], code: str | None = None
    ) -> "Run":
        """Opens a folder for a recipe: new, to be continued, or already complete and whole.

        It takes the folder's lock until the process ends, so it is for the first process alone
        (`common.train.launch.on_first`), and sweeps what killed starts of this run left.

        Args:
            recipe: JSON values, by name.
            inputs: Hashes of what goes in, by name.
            code: Hash of the code, where a run that other code has completed is to be made again.

        Raises:
            ValueError: The folder holds a run with another recipe or other inputs (the field is named), or
                files that are no run; a result of a finished run is not what it was; another process has
                the folder open.
        """
        hold(folder)
        description = json.loads(json.dumps({"recipe": recipe, "inputs": inputs, "code": code}))
        path = folder / "run.json"
        if not path.is_file():
            if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
                raise ValueError(f"{folder} holds files but no run.json; choose another --output or empty it")
            stored = {"status": "started", **description}
        else:
            stored = read_run(folder)
        differs = _first_difference(stored, description)
        if differs is not None:
            field, theirs, ours = differs
            raise ValueError(
                f"{folder} holds a run in which {field} is {theirs}; here it is {ours}. Nothing was changed: "
                "write elsewhere (--output; of evaluate, --name), or move that folder away"
            )
        is_complete = stored["status"] == "complete" and stored.get("code") == code
        if is_complete:
            check_whole(folder, stored)
            remove([folder / "state"])
        left = [*leftovers(folder), *leftovers(folder / "shards")]
        remove(one for one in left if one.is_file())  # a folder belongs to a writer below this run
        remove([*folder.glob(".saving-*"), *(folder / "state").glob("step-*.tmp")])
        return cls(folder=folder, description=description, is_complete=is_complete)

    def write(self, name: str, value: object) -> None:
        """Writes a JSON file into the folder (first process only)."""
        write_json(self.folder / name, value)

    def begin(self) -> None:
        """Writes run.json (first process only)."""
        write_json(self.folder / "run.json", {**self.description, "status": "started"})

    def finish(self, metrics: dict[str, object]) -> None:
        """Marks the run complete, notes its results, and drops the training state, which is needless now."""
        found = {"metrics": metrics, "files": _fingerprints(self.folder, _results(self.folder))}
        write_json(self.folder / "run.json", {**self.description, "status": "complete", **found})
        remove([self.folder / "state"])

    @property
    def metrics(self) -> dict[str, object]:
        """What `finish` was told."""
        return read_json(self.folder / "run.json").get("metrics", {})

    @property
    def metrics_path(self) -> Path:
        """JSON lines, one a logged step."""
        return self.folder / "metrics.jsonl"

    def keep_metrics_until(self, step: int) -> None:
        """Drops the logged lines after `step`, which a resumed run will write again."""
        if self.metrics_path.is_file():
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            with replacing(self.metrics_path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def log(self, record: dict[str, object]) -> None:
        """Appends one line to metrics.jsonl (first process only)."""
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise ValueError(
                f"cannot write {self.metrics_path}: {error.strerror}; is the disk full?"
            ) from error

    def saved_steps(self) -> list[int]:
        """Steps after which a whole training state lies in the folder, ascending."""
        folders = (self.folder / "state").glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in folders if path.name[5:].isdigit())

    def save_state(
        self, step: int, tensors: "dict[str, torch.Tensor]", *, keep: int, is_writer: bool, barrier
    ) -> None:
        """Saves training state after `step`; it counts only once every process has written its part.

        Args:
            tensors: Name -> tensor or DTensor; every process passes its own.
            keep: How many states stay, the newest first.
            is_writer: Whether this process names the folder and removes old ones.
            barrier: Waits for all processes.

        Raises:
            ValueError: The state could not be written; the previous one stays.
        """
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        final = self.folder / "state" / f"step-{step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        if is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        try:
            dcp.save(tensors, checkpoint_id=str(temporary), no_dist=not dist.is_initialized())
        except (OSError, dcp.api.CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = str(error).strip().splitlines()[-1]  # torch puts a traceback into the message
            raise ValueError(
                f"cannot save the training state in {temporary}: {reason}. Is the disk full? Start the same "
                "command again to go on from the state before"
            ) from error
        barrier()
        if is_writer:
            temporary.replace(final)
            for old in self.saved_steps()[:-keep]:
                shutil.rmtree(self.folder / "state" / f"step-{old:08d}")

    def load_state(self, step: int, tensors: "dict[str, torch.Tensor]") -> None:
        """Fills `tensors` in place with the state saved after `step`, at any number of processes.

        Nothing in the folder is executed, whoever wrote it: PyTorch reads the tensors with weights_only, and
        its `.metadata`, a pickle, is first read by `StateUnpickler`, which knows no other entries than
        tensors (others PyTorch would unpickle freely). That the numbers are this run's own, only the folder's
        access rights say.

        Raises:
            ValueError: The state cannot be read, or names something else than tensors.
        """
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        folder = self.folder / "state" / f"step-{step:08d}"
        try:
            with (folder / ".metadata").open("rb") as file:
                StateUnpickler(file).load()
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
        except (Exception, dcp.api.CheckpointException) as error:  # a torn file makes torch raise anything
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"the training state {folder} cannot be read: {reason}. Delete it, to go on from the state "
                "before it or from the start"
            ) from error


class StateUnpickler(pickle.Unpickler):
    """Reads the `.metadata` of a training state: no name in it but those that describe tensors."""

    NAMES = frozenset(
        {"Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"}
        | {"_MEM_FORMAT_ENCODING", "StorageMeta", "_StorageInfo"}
    )

    def find_class(self, module: str, name: str) -> object:
        import torch

        is_known = (
            (module.startswith("torch.distributed.checkpoint.") and name in self.NAMES)
            or (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
            or (module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"))
        )
        if not is_known:
            raise ValueError(f"it names {module}.{name}, which no training state of ours does")
        return super().find_class(module, name)


NO_RESULTS = {"run.json", "state", "shards", "logs", "tokens", "report", "verify.json"}
"""Names of what may go, grow or be made anew after a run has finished, wherever in its folder."""


def _results(folder: Path) -> list[str]:
    """Names of the files that a run has made, relative to its folder; hidden ones are nobody's result."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (name for name in names if not any(part in NO_RESULTS or part[0] == "." for part in name.parts))
    return sorted(name.as_posix() for name in kept)


def _fingerprints(folder: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    """Name -> size and sha256; shows how far it is where there is much to read."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    is_shown = sum(sizes.values()) > 10 * LARGE
    bar = progress(f"reading {folder}", len(sizes), "files") if is_shown else nullcontext(lambda _: None)
    found = {}
    with bar as advance:
        for name, size in sizes.items():
            found[name] = {"bytes": size, "sha256": known_hash(folder / name)}
            advance(1)
    return found


def read_run(folder: Path) -> dict:
    """A folder's run.json.

    Raises:
        ValueError: It cannot be read, or no run writes such a one.
    """
    path = folder / "run.json"
    way_out = f"put it back from a copy, or move {folder} away and start again"
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error
    parts = {name: found.get(name, {}) for name in ("recipe", "inputs", "metrics", "files")}
    wrong = [name for name, value in parts.items() if not isinstance(value, dict)]
    if found.get("status") not in ("started", "complete"):
        wrong.append("status")
    fits = (isinstance(one, dict) and set(one) == {"bytes", "sha256"} for one in parts["files"].values())
    if not wrong and not all(fits):
        wrong.append("files")
    if wrong:
        raise ValueError(f"{path} has {wrong[0]} {found.get(wrong[0])!r}, which no run writes; {way_out}")
    return found


def check_whole(folder: Path, run: Mapping) -> None:
    """ValueError where a result of a finished run is not what its run.json says; sizes first, then hashes."""
    files = run.get("files", {})  # runs of old have none

    def compare(what: str, found: Mapping[str, object]) -> None:
        for name, recorded in files.items():
            if found[name] != recorded[what]:
                raise ValueError(
                    f"{folder / name}: {what} {found[name]}, but {recorded[what]} when the run was finished. "
                    f"Put it back from a copy, or move {folder} away and start again"
                )

    paths = {name: folder / name for name in files}
    compare("bytes", {name: one.stat().st_size if one.is_file() else None for name, one in paths.items()})
    compare("sha256", {name: one["sha256"] for name, one in _fingerprints(folder, files).items()})


def find_complete(folder: Path) -> tuple[Path, ...]:
    """Folders of finished validation runs below `folder`, by name; finals are left out.

    Raises:
        ValueError: There is none, or a result of one is not what it was.
    """
    runs = {path.parent: read_run(path.parent) for path in sorted(folder.glob("*/run.json"))}
    found = {path: run for path, run in runs.items() if run["status"] == "complete"}
    found = {path: run for path, run in found.items() if not path.name.endswith("-final")}
    if not found:
        raise ValueError(f"{folder} holds no finished run; train one first, or name checkpoints")
    for path, run in found.items():
        check_whole(path, run)
    return tuple(found)


def _first_difference(
    stored: Mapping, ours: Mapping, parts: Sequence[str] = ("recipe", "inputs")
) -> tuple[str, object, object] | None:
    """The first field of recipe or inputs (or other parts) that differs: its name and both values."""
    for part in parts:
        theirs, mine = stored.get(part, {}), ours[part]
        for field in sorted({*theirs, *mine} - RETIRED):
            if theirs.get(field) != mine.get(field):
                return f"{part}.{field}", theirs.get(field), mine.get(field)
    return None


CODE = (".py", ".ipynb", ".j2")
"""What a folder of code consists of; nothing else in it changes a result."""


def code_hash(*paths: Path) -> str:
    """sha256 of source files, whatever folder the repository lies in.

    Args:
        paths: Files, and folders, which stand for all Python, notebooks and templates below them.
    """
    lines = []
    for path in paths:
        files = sorted(one for one in path.rglob("*") if one.suffix in CODE) if path.is_dir() else [path]
        lines += [f"{file.relative_to(path.parent).as_posix()} {file_hash(file)}" for file in files]
    return text_hash(*lines)


def manifest_path(output: Path) -> Path:
    """data/x.parquet -> data/x.manifest.json"""
    return output.with_suffix(".manifest.json")


def rejected_path(output: Path) -> Path:
    """data/x.parquet -> data/x.rejected.parquet"""
    return output.with_suffix(".rejected.parquet")


def write_manifest(
    output: Path, temporary: Path, content: Mapping[str, object], *, num_rejected: int = 0
) -> None:
    """Says beside a file what it was made from, before that file takes its name.

    It names the old file too: killed in between, the next run knows what it sees.

    Args:
        output: The file.
        temporary: Where it lies until then, whole.
        content: `inputs` (a list, each with a name and a sha256), `parameters`, `code_sha256`, and more.
        num_rejected: Bad rows of the inputs that were left out; they are listed in `rejected_path(output)`.
    """
    ours = {
        "num_rejected": num_rejected,
        "output_sha256": file_hash(temporary),
        "replaces_sha256": _hash_if_there(output),
        "rejected_sha256": _hash_if_there(rejected_path(output)) if num_rejected else None,
    }
    write_json(manifest_path(output), {**content, **ours})


def is_made(
    output: Path, wanted: Mapping[str, object], *, overwrite: bool = False, skip_bad_rows: bool = False
) -> bool:
    """Whether a file is there and made of just this, and says so; of inputs the bytes count, not the names.

    It takes the file's lock until the process ends.

    Args:
        output: The file.
        wanted: `inputs`, `parameters` and `code_sha256`, as of `write_manifest`.
        overwrite: Replace what was made of something else.
        skip_bad_rows: Bad rows may have been left out.

    Raises:
        ValueError: It, its manifest or its list of rejected rows is an input or a folder; another process
            makes it. Or, unless `overwrite`: it is there, made of something else or by hand, or without rows
            that are bad and may not be skipped now; or it is not there, and files of others have the names of
            those beside it.
    """
    hold(output)
    beside = (manifest_path(output), rejected_path(output))
    for path in beside:
        recover(path)
    inputs = {Path(one["name"]).resolve() for one in wanted["inputs"]}
    for path in (output, *beside):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a file to write; name another --output")
        if path.resolve() in inputs:
            raise ValueError(f"{path} is an input and would be replaced; name another --output")
    found = _read_manifest(manifest_path(output))
    reason, is_ours = None, True
    if output.exists():
        reason, is_ours = _difference(output, found, wanted, skip_bad_rows)
    elif found is None and (others := [path for path in beside if path.exists()]):
        reason, is_ours = f"{others[0]} is there, but no {output} that it belongs to", False
    if not is_ours and not overwrite:
        raise ValueError(f"{reason}; pass --overwrite to replace it, or another --output")
    if not output.exists():
        return False
    say(f"{output} is up to date" if reason is None else f"{reason}: making it again")
    return reason is None


def _read_manifest(path: Path) -> dict | None:
    """A manifest; None where there is none, or something else of that name."""
    try:
        found = read_json(path)
        parts = {"parameters": dict(found["parameters"]), "output_sha256": str(found["output_sha256"])}
        return {**found, **parts, "hashes": _hashes(found)}
    except (ValueError, LookupError, TypeError):
        return None


def _difference(
    output: Path, found: dict | None, wanted: Mapping[str, object], skip_bad_rows: bool
) -> tuple[str | None, bool]:
    """What differs from what is wanted, and whether the file may be replaced unasked."""
    if found is None:
        where = f"{output} is there, but {manifest_path(output)} is not or cannot be read"
        return f"{where}, so what it was made of is not known", False
    output_sha256 = file_hash(output)
    if output_sha256 not in (found["output_sha256"], found.get("replaces_sha256")):
        return f"{output} was changed after it was made", False
    if found["hashes"] != _hashes(wanted):
        names = ", ".join(one["name"] for one in wanted["inputs"])
        return f"{output} was made from other files than {names}", False
    if differs := _first_difference(found, wanted, ("parameters",)):
        name = differs[0].removeprefix("parameters.")
        then, now = map(_shown, differs[1:])
        return f"{output} was made with {name} {then}; here it is {name} {now}", False
    if not skip_bad_rows and (num_rejected := found.get("num_rejected")):
        return f"{output} was made without {num_rejected:,} bad rows; pass --skip-bad-rows to keep it", False
    if found.get("code_sha256") != wanted["code_sha256"]:
        return f"{output} was made by other code", True
    if found["output_sha256"] != output_sha256:
        return f"{output}: writing it was interrupted", True
    if found.get("rejected_sha256") != _hash_if_there(rejected_path(output)):
        return f"{rejected_path(output)} is not what was written with {output}", True
    return None, True


def _hashes(manifest: Mapping) -> list[str]:
    return sorted(one["sha256"] for one in manifest["inputs"])


def _hash_if_there(path: Path) -> str | None:
    return file_hash(path) if path.is_file() else None


def _shown(value: object) -> object:
    """A parameter for a message; of hashes the first digits."""
    return (", ".join(str(one)[:12] for one in value) or "none") if isinstance(value, list) else value
