"""What this machine has: asked of the driver, of the disk, and of libraries that may be broken.

Whatever may crash, hang or fail to import runs in a process of its own: `ask("import", "flash_attn")` starts
`python -m common.doctor.machine import flash_attn`, which prints each answer as one line, a mark and a JSON
object. Answers given before a crash or a time limit are kept.
"""

import csv
import importlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MARK = "machine: "
REQUEST_SECONDS = 4
MAX_FIELD_CHARACTERS = 2**30


class Answers(NamedTuple):
    """What a process of its own said."""

    facts: dict
    failure: str
    """Why it ended early; empty if it did not."""


class Gpu(NamedTuple):
    """One GPU as the driver describes it; None where it does not say."""

    name: str
    memory_gb: float | None
    """Of 10^9 bytes."""
    capability: tuple[int, int] | None


class Driver(NamedTuple):
    """NVIDIA's driver."""

    version: str
    cuda: str
    """Newest CUDA that it knows, such as 12.4; empty if it does not say."""
    gpus: tuple[Gpu, ...]
    failure: str
    """Why nvidia-smi said nothing; empty if it did, or if it is not there."""


def ask(what: str, *words: str, timeout_s: float) -> Answers:
    """Asks `ask_torch`, `ask_imports` or `ask_hub` in a process of its own.

    Args:
        what: "torch", "import" or "hub".
        words: Their arguments.
        timeout_s: Seconds after which the process is ended.
    """
    command = [sys.executable, "-m", "common.doctor.machine", what, *words]
    # Files, not pipes: what a killed process leaves behind cannot keep this one waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout_s
            ).returncode
            failure = ""
        except subprocess.TimeoutExpired:
            status, failure = 0, f"no answer within {timeout_s:g} s"
        out.seek(0)
        err.seek(0)
        said = out.read().decode(errors="replace").splitlines()
        complaints = [line for line in err.read().decode(errors="replace").splitlines() if line.strip()]
    if status < 0:
        failure = f"crashes ({signal.Signals(-status).name})"
    elif status:
        failure = complaints[-1].strip() if complaints else f"ends with status {status}"
    facts: dict = {}
    for line in said:
        if line.startswith(MARK):
            facts |= json.loads(line.removeprefix(MARK))
    return Answers(facts, failure)


def query_driver(*, timeout_s: float = 10) -> Driver | None:
    """What nvidia-smi says, None without it. Never raises."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        overview, table = (
            subprocess.run(["nvidia-smi", *words], capture_output=True, timeout=timeout_s, check=False)
            for words in ([], [query, "--format=csv,noheader,nounits"])
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver("", "", (), f"nvidia-smi: {_first_line(error)}")
    said = table.stdout.decode(errors="replace").strip()
    if table.returncode:
        complaint = said or table.stderr.decode(errors="replace").strip()
        if "no devices" in complaint.lower():
            return Driver("", "", (), "")
        return Driver("", "", (), (complaint.splitlines() or [f"nvidia-smi: status {table.returncode}"])[0])
    rows = [[cell.strip() for cell in row] for row in csv.reader(said.splitlines()) if len(row) == 4]
    found = re.search(r"CUDA[A-Z ]* Version\s*:\s*(\d+\.\d+)", overview.stdout.decode(errors="replace"))
    return Driver(rows[0][3] if rows else "", found[1] if found else "", tuple(map(_read_gpu, rows)), "")


def _read_gpu(row: list[str]) -> Gpu:
    name, mebibytes, capability, _ = row
    memory_gb = float(mebibytes) * 2**20 / 1e9 if re.fullmatch(r"[\d.]+", mebibytes) else None
    parts = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return Gpu(name, memory_gb, (int(parts[1]), int(parts[2])) if parts else None)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, by its footer, or records of a CSV without its header.

    Raises:
        ValueError: It is neither, or cut off, or not UTF-8.
        OSError: It cannot be read.
    """
    if path.suffix == ".parquet":
        import polars as pl  # only here: what is asked of other files does not need it

        try:
            path.open("rb").close()  # an absent file or permission in Python's words, not in polars'
            return pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"not a whole Parquet file: {_first_line(error)}") from error
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    num_rows, cells = 0, []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            width = len(next(reader, []))
            for num_rows, cells in enumerate(reader, start=1):  # noqa: B007 - the last row is looked at below
                pass
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"cut off or damaged after {num_rows:,} rows: {_first_line(error)}") from error
    if num_rows and len(cells) != width:
        raise ValueError(f"cut off: the last of {num_rows:,} rows has {len(cells)} cells, the header {width}")
    if not num_rows:
        raise ValueError("it has no rows")
    return num_rows


def answer(**facts: object) -> None:
    """Prints facts for the process that asked (see `ask`)."""
    print(MARK + json.dumps(facts), flush=True)


def ask_torch() -> None:
    """PyTorch's build, what each GPU says to one addition, and what every op would use."""
    import torch

    answer(version=torch.__version__, cuda=torch.version.cuda, hip=getattr(torch.version, "hip", None))
    answer(gpus=[_ask_gpu(i) for i in range(torch.cuda.device_count())])
    from common.ops import OPS
    from common.ops.backends import choose_backend

    ops = {}
    for op, available in OPS.items():
        chosen = choose_backend(op, "auto", available)
        ops[op] = sorted(available, key=lambda name, table=available: table[name] is not chosen)
    answer(ops=ops)


def _ask_gpu(index: int) -> str:
    """Empty if the GPU computes, else why not."""
    import torch

    try:
        return "" if (torch.ones(2, device=f"cuda:{index}") + 1).sum().item() == 4 else "1 + 1 is not 2"
    except Exception as error:  # whatever the driver says is the answer
        return _first_line(error)


def ask_imports(*modules: str) -> None:
    """Imports one module after the other."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken extension may raise anything
            answer(**{module: f"{type(error).__name__}: {_first_line(error)}"})
        else:
            answer(**{module: ""})


def ask_hub(offline: str, *models: str) -> None:
    """Where each model's weights lie, then login and access.

    Args:
        offline: "offline" asks this machine only.
        models: Short names of the zoo.
    """
    # By path: the package around zoo.py imports torch, which may be what is broken.
    path = ROOT / "common/models/zoo.py"
    spec = importlib.util.spec_from_file_location("zoo", path)
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    from huggingface_hub import constants, get_token

    sources = {model: zoo.ZOO[model].source for model in models}
    is_offline = offline == "offline" or constants.HF_HUB_OFFLINE
    answer(sources=sources, cache=constants.HF_HUB_CACHE, offline=is_offline, token=get_token() is not None)
    for model, source in sources.items():
        answer(**{f"{model}/local": count_local_files(source)})
    if is_offline:
        return
    with ThreadPoolExecutor(len(models) + 1) as pool:
        asked = {pool.submit(_ask_access, source): f"{model}/access" for model, source in sources.items()}
        asked[pool.submit(_ask_name)] = "login"
        for done in as_completed(asked):
            answer(**{asked[done]: done.result()})


def count_local_files(source: str) -> tuple[int, int]:
    """How many of a checkpoint's files lie in the hub's cache, and how many it has (0: nothing is known)."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json")
    if not isinstance(config, str):
        return 0, 0
    folder = Path(config).parent
    index = folder / "model.safetensors.index.json"
    names = {"config.json", "tokenizer_config.json"}
    if index.exists():
        names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names.add("model.safetensors")
    return sum((folder / name).exists() for name in names), len(names)


def _ask_access(source: str) -> str:
    """ "open", "gated", "refused" or the reason why it cannot be known."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        # The very request that a download begins with; the repository's description is public for gated ones.
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=REQUEST_SECONDS)
    except GatedRepoError:
        return "gated"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        return "refused" if status in (401, 403, 404) else f"the hub answers {status}"
    except Exception as error:  # every kind of network failure, by any HTTP library
        return f"no network ({type(error).__name__})"
    return "open"


def _ask_name() -> str | None:
    """The user's name, empty if the token is refused, None if it cannot be known."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import build_hf_headers, get_session

    if get_token() is None:
        return None
    try:
        url = f"{constants.ENDPOINT}/api/whoami-v2"
        reply = get_session().get(url, headers=build_hf_headers(), timeout=REQUEST_SECONDS)
        return reply.json()["name"] if reply.status_code == 200 else "" if reply.status_code == 401 else None
    except Exception:  # as above
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    {"torch": ask_torch, "import": ask_imports, "hub": ask_hub}[sys.argv[1]](*sys.argv[2:])
