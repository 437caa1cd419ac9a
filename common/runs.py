"""Run folders: what is being made, from what, how far it is, and the state to go on from.

run.json        recipe, inputs (hashes), status
metrics.jsonl   one line a logged step
state/step-N/   sharded training state, in PyTorch's own format (read back from here only)
"""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common.files import read_json, replacing, write_json

# A single process saving alone is what is meant, not an oversight.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# These change speed and memory, not what is computed: a run may be continued with others.
EXECUTION_FIELDS = frozenset({"max_tokens_per_micro_batch", "activation_checkpointing"})


@dataclass(frozen=True, kw_only=True)
class Run:
    """One output folder and the recipe that it is made by."""

    folder: Path
    description: dict[str, object]
    """`recipe` and `inputs`, JSON values only."""
    is_complete: bool

    @classmethod
    def open(
        cls, folder: Path, *, recipe: dict[str, object], inputs: dict[str, object], code: str | None = None
    ) -> "Run":
        """Opens a folder for a recipe: new, to be continued, or already complete. Writes nothing.

        Args:
            code: Hash of the code that makes it; a complete run of other code is made again, never refused.

        Raises:
            ValueError: The folder holds a run with another recipe or other inputs (the field is named), or
                files that are no run.
        """
        description = json.loads(json.dumps({"recipe": recipe, "inputs": inputs}))
        description |= {} if code is None else {"code": code}
        path = folder / "run.json"
        if not path.is_file():
            if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
                raise ValueError(f"{folder} holds files but no run.json; choose another --output or empty it")
            return cls(folder=folder, description=description, is_complete=False)
        stored = read_json(path)
        differs = _first_difference(stored, description)
        if differs is not None:
            field, theirs, ours = differs
            raise ValueError(
                f"{folder} holds a run in which {field} is {theirs}; here it is {ours}. Nothing was changed: "
                "write elsewhere (--output; of evaluate, --name), or move that folder away"
            )
        is_complete = stored.get("status") == "complete" and stored.get("code") == code
        return cls(folder=folder, description=description, is_complete=is_complete)

    def begin(self) -> None:
        """Writes run.json (first process only)."""
        write_json(self.folder / "run.json", {**self.description, "status": "started"})

    def finish(self, metrics: dict[str, object]) -> None:
        """Marks the run complete and drops the training state, which the checkpoint has made needless."""
        write_json(self.folder / "run.json", {**self.description, "status": "complete", "metrics": metrics})
        shutil.rmtree(self.folder / "state", ignore_errors=True)

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
        self, step: int, tensors: dict[str, torch.Tensor], *, keep: int, is_writer: bool, barrier
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

    def load_state(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Fills `tensors` in place with the state saved after `step`, at any number of processes.

        Raises:
            ValueError: The state cannot be read.
        """
        folder = self.folder / "state" / f"step-{step:08d}"
        try:
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
        except (Exception, dcp.api.CheckpointException) as error:  # a torn file makes torch raise anything
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"the training state {folder} cannot be read: {reason}. Delete it, to go on from the state "
                "before it or from the start"
            ) from error


def _first_difference(stored: dict, ours: dict) -> tuple[str, object, object] | None:
    """The first field of recipe or inputs that differs: its name and both values."""
    for part in ("recipe", "inputs"):
        theirs, mine = stored.get(part, {}), ours[part]
        for field in sorted({*theirs, *mine} - EXECUTION_FIELDS):
            if theirs.get(field) != mine.get(field):
                return f"{part}.{field}", theirs.get(field), mine.get(field)
    return None
