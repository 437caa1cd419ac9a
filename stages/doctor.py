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
    import json
    import os
    import runpy
    import shutil
    import signal
    import subprocess
    import tomllib
    from collections import Counter
    from collections.abc import Callable, Iterator
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import suppress
    from dataclasses import dataclass
    from importlib import metadata
    from pathlib import Path
    from shlex import quote
    from typing import Literal, NamedTuple

    import polars as pl
    import tyro  # noqa: F401 - reads the command line below
    from packaging.requirements import Requirement
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from common.console import cli, console, say
except ImportError as error:  # of all scripts, this one must say what to do
    sys.exit(
        f"error: Python {sys.version.split()[0]} ({sys.executable}) cannot import {error.name or error}. "
        "Wanted is Python 3.11 or newer with the project's packages, in a clone of the repository:\n"
        "    python3 -m venv .venv && . .venv/bin/activate && pip install rust-just && just setup"
    )

ROOT = Path(__file__).resolve().parents[1]
PURPOSES = ("the demo", "training", "speed", "a submission")
CORE = "accelerate, transformers"
EXTRAS = {  # module: package, what installs it, what of it is built here
    "flash_attn": ("flash-attn", "just setup gpu", "flash-attn"),
    "transformer_engine.pytorch": ("transformer-engine", "just setup gpu", "transformer-engine-torch"),
    "triton": ("triton", "python3 -m pip install triton", "triton"),
}
PIP = "python3 -m pip install --constraint constraints.txt"
INSTALL = f'{PIP} --editable ".[dev]"'
DRIVER = "install or update NVIDIA's driver: https://www.nvidia.com/drivers"
REFUSED = "the hub refuses access"
COMPETITION = (
    "kaggle competitions download -c lmsys-chatbot-arena -p {0} && unzip -d {0} {0}/lmsys-chatbot-arena.zip"
)
EXTERNAL = "put lmsys-33k-deduplicated.csv into {0} (docs/data.md says where it is published)"
RAW = {  # raw file: the table made of it, what needs them, what brings the raw file
    "train.csv": ("arena55k.parquet", "training", COMPETITION),
    "lmsys-33k-deduplicated.csv": ("arena33k.parquet", "training", EXTERNAL),
    "test.csv": ("test.parquet", "a submission", COMPETITION),
}
POOL = ("lmsys1m_pairs.parquet", "preference_sets.parquet")


Answers = dict[str, tuple[dict, str]]  # question -> facts, and why no more were told (empty if that was all)


class Needs(NamedTuple):
    """What stage 1 of a recipe needs; GB are 10^9 bytes, all estimates (README.md, "The real thing")."""

    weights_gb: int  # one checkpoint on disk
    training_state_gb: int  # one state to go on from, on disk
    state_gb: float  # weights, gradients, two moments, compensation: 10 B a parameter, over all GPUs
    sums_gb: float  # gradient sums: 4 B a parameter, none where rounded stochastically, over all GPUs
    whole_weights_gb: float  # weights that stay whole on every GPU (accelerate_configs/): 2 B a parameter
    activations_gb: float  # on every GPU: 0.31, 0.43, 0.27 GB per 1,000 tokens of a micro-batch

    def gb_per_gpu(self, num_gpus: int) -> float:
        """Memory on each of the GPUs among which the state is sharded."""
        whole_gb = self.whole_weights_gb * (1 - 1 / num_gpus)  # the own shard is counted already
        return (self.state_gb + self.sums_gb) / num_gpus + whole_gb + self.activations_gb


NEEDS = {
    "gemma9b": Needs(18, 74, 92.5, 37, 18.5, 5.1),
    "gemma27b": Needs(54, 218, 272, 0, 0, 0.9),
    "armorm8b": Needs(16, 60, 75, 30, 15, 4.4),
}


class Line(NamedTuple):
    """One line of the table; `is_fine` is None where it does not matter here."""

    check: str
    is_fine: bool | None
    found: str
    mend: str = ""
    purpose: str = "training"


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

    @property
    def models(self) -> list[str]:
        """The recipes that are looked at."""
        return [model for model in NEEDS if self.model in ("all", model)]


def main(args: Args) -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal without the symbols still gets the words
    with console.status("looking at this machine ..."):
        topics = look(args)
    sys.exit(report(topics, strict=args.strict))


def look(args: Args) -> dict[str, list[Line]]:
    """Asks everything at once, then judges; topic -> lines."""
    is_tiny = args.model.startswith("tiny")
    where = "offline" if args.offline or is_tiny else "online"
    with ThreadPoolExecutor(8) as pool:
        # What a library does at exit is no answer.
        code = "import {}, os; os._exit(0)"
        asked = {module: pool.submit(ask, "-c", code.format(module)) for module in (CORE, *EXTRAS)}
        asked["torch"] = pool.submit(ask, __file__, "tell", "torch")
        asked["hub"] = pool.submit(ask, __file__, "tell", "hub", where, *args.models, timeout_s=8)
        asked["driver"] = pool.submit(ask, __file__, "tell", "driver")
    answers = {question: future.result() for question, future in asked.items()}
    facts, failure = answers["driver"]
    needs_gpu = bool(facts.get("gpus") or failure or args.model != "all")
    is_needed = dict.fromkeys(CHECKS, needs_gpu and not is_tiny)
    is_needed |= {"Python": True, "Data": not is_tiny, "Submission": not is_tiny}
    return {topic: judge(check, args, answers, is_needed[topic]) for topic, check in CHECKS.items()}


def judge(check: Callable, args: Args, answers: Answers, is_needed: bool) -> list[Line]:
    """The lines of a check, up to where it fails; of one that is not needed, only the demo's are missing."""
    lines: list[Line] = []
    try:
        lines.extend(check(args, answers))
    except Exception as error:  # a broken environment is what this script is for
        text = f"cannot be looked at: {type(error).__name__}: {error}"
        lines.append(Line(check.__name__, False, text, INSTALL))
    return [
        line if is_needed or line.is_fine or line.purpose == "the demo" else line._replace(is_fine=None)
        for line in lines
    ]


def ask(*words: str, timeout_s: float = 60) -> tuple[dict, str]:
    """Asks another Python, since what is imported may crash or hang: (facts until then, why it failed)."""
    command, failure, facts = [sys.executable, *words], "", {}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
        said, complaints = done.stdout, done.stderr.decode(errors="replace").strip()
        if done.returncode > 0:
            failure = complaints.rpartition("\n")[2] or f"ends with status {done.returncode}"
        elif done.returncode < 0:
            failure = f"crashes ({signal.Signals(-done.returncode).name})"
    except subprocess.TimeoutExpired as error:
        said, failure = error.stdout or b"", f"no answer within {timeout_s:g} s"
    for line in said.decode(errors="replace").splitlines():
        facts |= json.loads(line) if line.startswith('{"') else {}  # a library may print, too
    return facts, failure


def tell_driver(timeout_s: float = 10) -> Iterator[dict]:
    """Version of NVIDIA's driver and names of its GPUs; nothing without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    said = done.stdout.strip() or done.stderr.strip()
    if done.returncode and "no devices" not in said.lower():
        sys.exit(said.partition("\n")[0] or f"nvidia-smi: status {done.returncode}")
    rows = [line.rsplit(", ", 1) for line in said.splitlines() if ", " in line]
    yield {"gpus": [name for name, _ in rows], "version": rows[0][1] if rows else ""}


def tell_torch() -> Iterator[dict]:
    """PyTorch's build, what each GPU is and whether it computes, and the backends of the ops."""
    import torch

    kind = f"ROCm {torch.version.hip}" if torch.version.hip else "CPU build"
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else kind
    yield {"build": f"{torch.__version__}, {kind}"}
    gpus = []
    for i in range(torch.cuda.device_count()):
        gpus.append({"failure": ""})
        try:
            gpu = torch.cuda.get_device_properties(i)
            gpus[i] |= {"name": gpu.name, "gb": gpu.total_memory / 1e9, "capability": [gpu.major, gpu.minor]}
            assert (torch.ones(2, device=f"cuda:{i}") + 1).sum().item() == 4, "1 + 1 is not 2"
        except Exception as error:  # whatever the driver says is the answer
            gpus[i]["failure"] = str(error).partition("\n")[0]
    yield {"gpus": gpus}
    from common.ops import choose

    device = "cuda" if gpus else "cpu"  # what Gemma 2 9B asks for, the most that any recipe does
    ops = choose(device=device, dtype=torch.bfloat16, head_dim=256, softcap=50.0, window=4096)
    yield {"backends": str(ops)}


def tell_hub(where: str, *models: str) -> Iterator[dict]:
    """Each model's source and files on this machine; then, unless `where` is "offline", login and access."""
    from huggingface_hub import constants, get_token

    # By path: the package around it imports torch, which may be what is broken.
    zoo = runpy.run_path(str(ROOT / "common/models/zoo.py"))["ZOO"]
    yield {"cache": constants.HF_HUB_CACHE, "has_token": bool(get_token())}
    files = {model: count_local_files(zoo[model]) for model in models}
    yield {model: (zoo[model], *counts) for model, counts in files.items()}
    yield {"local": [model for model, (have, of) in files.items() if 0 < of == have]}
    if where == "offline" or constants.HF_HUB_OFFLINE:
        yield {"login": "offline", "access": dict.fromkeys(models, "offline")}
        return
    with ThreadPoolExecutor() as pool:
        access = {model: pool.submit(ask_hub, zoo[model]) for model in models}
        yield {"access": {model: told.result() for model, told in access.items()}}
        yield {"login": ask_hub()}


def count_local_files(source: str) -> tuple[int, int]:
    """How many of a checkpoint's files lie in the hub's cache, and how many it has (0: nothing is known)."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json")
    if not isinstance(config, str):
        return 0, 0
    folder, weights = Path(config).parent, ["model.safetensors"]
    with suppress(FileNotFoundError):
        index = folder / "model.safetensors.index.json"
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    names = {"config.json", "tokenizer_config.json", *weights}
    return sum((folder / name).exists() for name in names), len(names)


def ask_hub(source: str = "") -> str:
    """ "open", REFUSED or why it is not known; without a source the same of the login, with "as NAME"."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, whoami
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if not source:
            return f"as {whoami()['name']}"
        # The very request that a download begins with; a gated repository's description is public.
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=4)
        return "open"
    except HfHubHTTPError as error:
        status = error.response.status_code
        return REFUSED if status in (401, 403, 404) else f"the hub answers {status}"
    except Exception as error:  # every kind of network failure, by any HTTP library
        return f"no network ({type(error).__name__})"


def check_python(args: Args, answers: Answers) -> Iterator[Line]:
    """Python, the packages and their versions, against pyproject.toml and constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    here, wanted = "{}.{}.{}".format(*sys.version_info), project["requires-python"]
    is_new = Requirement(f"python{wanted}").specifier.contains(here, prereleases=True)
    mend = f"a virtual environment of Python {wanted}"
    yield Line("Python", is_new, f"{here} (wanted: {wanted}), {sys.executable}", mend, "the demo")

    needs = {need.name: need for need in map(Requirement, project["dependencies"])}
    lacking = [
        f"{need} (here: {version_of(name) or 'none'})"
        for name, need in needs.items()
        if not need.specifier.contains(version_of(name) or "0", prereleases=True)
    ]
    imported = ("torch", *CORE.split(", "))
    text = f"all {len(needs)}: {', '.join(f'{name} {version_of(name)}' for name in imported)} ..."
    text = f"too old or absent: {', '.join(lacking)}" if lacking else text
    yield Line("packages", not lacking, text, INSTALL, "the demo")

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    found = {name: version_of(name) or pin for name, pin in pins.items()}
    others = [name for name, pin in pins.items() if found[name].partition("+")[0] != pin]
    named = [name for name in others if name in needs]  # only what this project names itself counts
    shown = ", ".join(f"{name} {found[name]} (pinned {pins[name]})" for name in (named or others[:3]))
    text = f"{len(others)} of {len(pins)} differ: {shown}" if others else f"none of {len(pins)} differs"
    yield Line("exact versions", not named, text, INSTALL)

    facts, failure = answers["torch"]
    failures = {"torch": "" if "build" in facts else failure, CORE: answers[CORE][1]}
    broken = [f"{name}: {failure}" for name, failure in failures.items() if failure]
    mend = f"{PIP} --force-reinstall {' '.join(imported)}"
    yield Line("imports", not broken, "; ".join(broken) or f"torch, {CORE}", mend, "the demo")
    just = shutil.which("just")
    yield Line("just", just is not None, just or "not on the PATH", "pip install rust-just")


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def check_gpu(args: Args, answers: Answers) -> Iterator[Line]:
    """Driver, PyTorch's build, GPUs, bf16, memory for each recipe."""
    (driver, failure), (torch, _) = answers["driver"], answers["torch"]
    names = driver.get("gpus", [])
    text = failure or driver.get("version", "no nvidia-smi") or "present, but no GPU"
    yield Line("driver", bool(driver), text, f"restart the machine, or {DRIVER}" if failure else DRIVER)
    if "build" in torch:  # else the line "imports" says why
        problem, mend = find_problem(answers["torch"], len(names)) if names else ("", "")
        text = f"; {problem or f'computes on {len(names)} of {len(names)} GPUs'}" if names else ""
        yield Line("torch build", not problem, torch["build"] + text, mend)
    if not names:
        yield Line("GPUs", False, "none", "a machine with NVIDIA GPUs; the demo needs none")
        return
    gpus = [gpu for gpu in torch.get("gpus", []) if "gb" in gpu]
    kind = "{name}, {gb:.0f} GB, capability {capability[0]}.{capability[1]}"
    kinds = Counter(kind.format(**gpu) for gpu in gpus)
    text = "; ".join(f"{number} x {kind}" for kind, number in (kinds or Counter(names)).items())
    yield Line("GPUs", True, text if gpus else f"{text}; bf16 and memory are known once PyTorch sees them")
    if not gpus:
        return
    # By capability: torch.cuda.is_bf16_supported says True where it is only emulated.
    old = [gpu["name"] for gpu in gpus if gpu["capability"] < [8, 0]]
    text = f"not on {old[0]}: capability below 8.0" if old else "capability 8.0 or newer"
    mend = "GPUs of capability 8.0 or newer (A100, L4, H100); others serve in fp16"
    yield Line("bf16", not old, text, mend)
    smallest_gb = min(gpu["gb"] for gpu in gpus)
    for model in args.models:
        need_gb = NEEDS[model].gb_per_gpu(len(gpus))
        enough = (n for n in range(1, 65) if NEEDS[model].gb_per_gpu(n) <= smallest_gb)
        mend = f"{next(enough, 'more and larger')} GPUs of {smallest_gb:.0f} GB, or larger ones"
        text = f"about {need_gb:.0f} GB on each of {len(gpus)}, {smallest_gb:.0f} GB there"
        yield Line(f"memory for {model}", need_gb <= smallest_gb, text, mend)


def find_problem(torch: tuple[dict, str], expected: int) -> tuple[str, str]:
    """(why PyTorch does not compute on each of the expected GPUs, what mends it), empty if it does."""
    facts, failure = torch
    gpus = facts.get("gpus", [])
    if "CUDA" not in facts["build"]:
        return f"though NVIDIA GPUs are here: {expected}", f"python3 -m pip uninstall -y torch && {PIP} torch"
    if "gpus" not in facts:
        return f"looking at the GPUs: {failure}", DRIVER
    if broken := [f"GPU {i}: {gpu['failure']}" for i, gpu in enumerate(gpus) if gpu["failure"]]:
        mend = "nvidia-smi    # who holds the GPU?"
        if "driver" in broken[0]:  # too old: PyTorch names the version that it found
            mend = f"{DRIVER}; or a build for that driver: https://pytorch.org/get-started/locally"
        return "; ".join(broken), mend
    if len(gpus) < expected:
        fewer = f", or: just gpus={len(gpus)} stage1 ..." if gpus else ""
        return f"sees {len(gpus)} of {expected} GPUs", f"unset CUDA_VISIBLE_DEVICES{fewer}"
    return "", ""


def check_ops(args: Args, answers: Answers) -> Iterator[Line]:
    """The fast packages, present and importable, and what each op uses."""
    facts, failure = answers["torch"]
    backends = facts.get("backends", "")
    is_plain = backends and all(op.endswith(" torch") for op in backends.split(", "))
    unused = "; every op uses torch" if is_plain else ""
    has_old = any(gpu.get("capability", [8, 0]) < [8, 0] for gpu in facts.get("gpus", []))
    for module, (package, install, built) in EXTRAS.items():
        version, broken = version_of(package), answers[module][1]
        if not broken:
            yield Line(package, True, f"{version}, importable{unused}")
        elif has_old and package != "triton":
            yield Line(package, None, "for GPUs of capability 8.0 or newer")
        elif version:
            mend = "python3 -m pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir"
            yield Line(package, False, f"{version}, import fails: {broken}", f"{mend} {built}", "speed")
        else:
            needs_nvcc = package == "flash-attn" and shutil.which("nvcc") is None
            text = "not installed" + "; its build needs nvcc, which is not on the PATH" * needs_nvcc
            yield Line(package, False, text + unused, install, "speed")
    yield Line("backends", bool(backends), backends or f"cannot be known: {failure}", INSTALL, "the demo")


def check_weights(args: Args, answers: Answers) -> Iterator[Line]:
    """Login, and each model's weights: on this machine, or to be had."""
    facts, failure = answers["hub"]
    if "local" not in facts:
        yield Line("hub", False, f"huggingface_hub cannot be asked: {failure}", INSTALL)
        return
    access = dict.fromkeys(args.models, "no network") | facts.get("access", {})
    needs_login = any(access[model] != "open" and model not in facts["local"] for model in args.models)
    login = facts.get("login", "no network")
    mend = "hf auth login    # token: https://huggingface.co/settings/tokens"
    if facts["has_token"]:
        text = login if login.startswith("as ") else f"a token is there; {login}"
        yield Line("login", login != REFUSED, text, mend)
    else:
        text = "no token" if needs_login else "no token; these weights need none"
        yield Line("login", False if needs_login else None, text, mend)
    for model in args.models:
        source, have, of = facts[model]
        text = f"{source}: " + (f"{have} of {of} files on this machine" if of else "not on this machine")
        if model in facts["local"]:
            yield Line(model, True, f"{source}: on this machine, all {of} files")
        elif access[model] == "open":
            yield Line(model, True, f"{text}, to be had from the hub")
        elif access[model] == REFUSED:
            mend = f"accept the licence at https://huggingface.co/{source}, then: hf auth login"
            yield Line(model, False, f"{text}, {REFUSED}", mend)
        else:
            mend = f"where there is a network: hf download {source}; or pass --checkpoint FOLDER to the stage"
            yield Line(model, False, f"{text}, access cannot be known: {access[model]}", mend)


def check_disk(args: Args, answers: Answers) -> Iterator[Line]:
    """Free space for a checkpoint, a training state, and the download if the hub's cache is on that disk."""
    hub, _ = answers["hub"]
    paths = (args.artifacts.absolute(), Path(hub.get("cache", "/")))
    folder, cache = (next(p for p in (path, *path.parents) if p.exists()) for path in paths)
    if not os.access(folder, os.W_OK):
        mend = f"sudo chown -R $USER {folder}, or another --artifacts"
        yield Line(str(args.artifacts), False, f"{folder} cannot be written", mend)
        return
    shares_disk = cache.stat().st_dev == folder.stat().st_dev
    free_gb, cache_gb = (shutil.disk_usage(path).free / 1e9 for path in (folder, cache))
    local = hub.get("local", ())
    downloads_gb = {model: 0 if model in local else NEEDS[model].weights_gb for model in args.models}
    for model, download_gb in downloads_gb.items():
        parts = {"weights": NEEDS[model].weights_gb, "state": NEEDS[model].training_state_gb}
        parts |= {"download": download_gb} if shares_disk and download_gb else {}
        need_gb = sum(parts.values())
        text = ", ".join(f"{name} {gb}" for name, gb in parts.items())
        text = f"{free_gb:,.0f} GB free; needs about {need_gb} ({text})"
        mend = f"free {need_gb - free_gb:.0f} GB on the disk of {folder}, or --artifacts FOLDER on another"
        yield Line(model, need_gb <= free_gb, text, mend)
    if not shares_disk and (need_gb := sum(downloads_gb.values())):
        text = f"{cache_gb:,.0f} GB free in {cache}; downloads about {need_gb}"
        yield Line("hub cache", need_gb <= cache_gb, text, "export HF_HOME=/a/larger/disk/huggingface")


def check_data(args: Args, answers: Answers) -> Iterator[Line]:
    """Raw files and the tables made of them, with their numbers of rows."""
    data, tables, prep = quote(str(args.data)), args.artifacts / "data", "just prep"
    if (args.data, args.artifacts) != (Path("data"), Path("artifacts")):
        prep += f" --data {data} --artifacts {quote(str(args.artifacts))}"
    for raw, (table, purpose, fetch) in RAW.items():
        if (tables / table).exists() and not (args.data / raw).exists():
            yield Line(raw, None, f"not there, but {table} is")
        else:
            yield judge_file(args.data / raw, purpose, fetch.format(data))
        yield judge_file(tables / table, purpose, prep, f"{prep} --overwrite")
    for name in POOL:
        yield judge_file(tables / name, "training", f"{prep} --hub", f"{prep} --hub --overwrite")
    named = {*POOL, *(table for table, _, _ in RAW.values())}
    for path in sorted(path for path in tables.glob("*.parquet") if path.name not in named):
        yield judge_file(path, "training", "make it again")


def judge_file(path: Path, purpose: str, fetch: str, again: str = "") -> Line:
    """Number of rows, or why it is not known; `fetch` brings an absent file, `again` a damaged one."""
    try:
        path.open("rb").close()  # what is absent or forbidden in Python's words, not in polars'
        return Line(path.name, True, f"{count_rows(path):,} rows")
    except FileNotFoundError:
        return Line(path.name, False, f"not in {path.parent}", fetch, purpose)
    except PermissionError:
        return Line(path.name, False, "no permission to read it", f"chmod u+r {quote(str(path))}", purpose)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        text = f"cut off or damaged: {error}".partition("\n")[0]
        return Line(path.name, False, text, again or f"rm -r {quote(str(path))}    # then: {fetch}", purpose)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, by its footer, or of a raw CSV; polars' errors, or a ValueError, if damaged."""
    if path.suffix == ".parquet":
        return pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    rows = pl.read_csv(path, infer_schema=False, glob=False)
    if rows.is_empty() or rows[-1, -1] is None:  # the last column of every raw file is filled
        raise ValueError(f"{len(rows):,} rows, and the last is not whole")
    return len(rows)


def check_kaggle(args: Args, answers: Answers) -> Iterator[Line]:
    """Client and credentials of an upload; the client is not imported, since that logs in."""
    only, purpose, version = "only an upload to Kaggle uses it", "a submission", version_of("kaggle")
    text = version or f"not installed; {only}"
    yield Line("kaggle", version is not None, text, "python3 -m pip install kaggle", purpose)
    folders = [os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle", "~/.kaggle", "~/.config/kaggle"]
    paths = [Path(folder).expanduser() for folder in folders]
    files = [path / name for path in paths for name in ("access_token", "kaggle.json")]
    path = next((path for path in files if path.exists()), None)
    variable = next((name for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY") if os.environ.get(name)), None)
    mend = "make a token at https://www.kaggle.com/settings (API), and put it into ~/.kaggle/"
    if variable == "KAGGLE_API_TOKEN" or (variable and os.environ.get("KAGGLE_USERNAME")):
        yield Line("kaggle token", True, f"in {variable}")
    elif path is None:
        yield Line("kaggle token", False, f"none; {only}", mend, purpose)
    else:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        is_token = '"username"' in text and '"key"' in text if path.suffix else bool(text)
        text = f"{path}" if is_token else f"{path} cannot be read as a token"
        yield Line("kaggle token", is_token, text, mend, purpose)


CHECKS = {
    "Python": check_python,
    "GPU": check_gpu,
    "Ops": check_ops,
    "Weights": check_weights,
    "Disk": check_disk,
    "Data": check_data,
    "Submission": check_kaggle,
}


def report(topics: dict[str, list[Line]], *, strict: bool) -> int:
    """Prints the table, then the commands in whole lines, so that they can be copied.

    Returns:
        The status: 1 if the demo cannot run, or, with `strict`, if something for training is missing.
    """
    looks = {True: ("\N{CHECK MARK} fine", "green"), False: ("\N{BALLOT X} missing", "bold red")}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("check", overflow="fold", min_width=28)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    missing, mends = Counter(), {}
    for topic, lines in topics.items():
        table.add_section()
        table.add_row(Text(topic, style="bold"))
        for line in lines:
            state = Text(*looks.get(line.is_fine, ("- not needed here", "dim")))
            table.add_row(Text(f"  {line.check}"), state, Text(line.found))
            if line.is_fine is False:
                missing[line.purpose] += 1
                mends.setdefault((topic, line.mend), []).append(line)
    console.print(table)
    if mends:
        say("What mends what is missing:")
    for (topic, mend), lines in mends.items():
        purposes = " and ".join(dict.fromkeys(line.purpose for line in lines))
        say(f"  {topic}: {', '.join(line.check for line in lines)} (for {purposes})\n      {mend}")
    named = ", ".join(f"{missing[purpose]} for {purpose}" for purpose in PURPOSES if missing[purpose])
    demo = "the demo cannot run yet" if missing["the demo"] else "the demo runs here: just demo"
    say(f"{missing.total()} missing{f' ({named})' if named else ''}; {demo}")
    return int(bool(missing["the demo"] or (strict and missing["training"])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["tell"]:
        tell = {"driver": tell_driver, "torch": tell_torch, "hub": tell_hub}[sys.argv[2]]
        for facts in tell(*sys.argv[3:]):
            print(json.dumps(facts), flush=True)
    else:
        cli(main)
