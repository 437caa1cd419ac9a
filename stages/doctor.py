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
    import csv
    import json
    import os
    import re
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
    from packaging.version import Version
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
CORE = ("accelerate", "transformers")
EXTRAS = {  # module: package, what installs it
    "flash_attn": ("flash-attn", "just setup gpu"),
    "transformer_engine.pytorch": ("transformer-engine", "just setup gpu"),
    "triton": ("triton", "python3 -m pip install triton"),
}
INSTALL = 'python3 -m pip install --constraint constraints.txt --editable ".[dev]"'
REFUSED = "the hub refuses access"
DRIVER = "install or update NVIDIA's driver: https://www.nvidia.com/drivers"
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


class Needs(NamedTuple):
    """What stage 1 of a recipe needs; GB are 10^9 bytes, all estimates (README.md, "The real thing")."""

    weights_gb: int  # one checkpoint on disk
    training_state_gb: int  # one state to go on from, on disk
    state_gb: float  # weights, gradients, two moments, compensation: 10 B a parameter, over all GPUs
    sums_gb: float  # gradient sums: 4 B a parameter, none where rounded stochastically, over all GPUs
    whole_weights_gb: float  # weights that stay whole on every GPU (accelerate_configs/): 2 B a parameter
    activations_gb: float  # on every GPU: 0.31, 0.43, 0.27 GB per 1,000 tokens of a micro-batch


NEEDS = {
    "gemma9b": Needs(18, 74, 92.5, 37, 18.5, 5.1),
    "gemma27b": Needs(54, 218, 272, 0, 0, 0.9),
    "armorm8b": Needs(16, 60, 75, 30, 15, 4.4),
}


class Line(NamedTuple):
    """One line of the table."""

    check: str
    is_fine: bool | None
    """None where it does not matter here."""
    found: str
    mend: str = ""
    purpose: str = "training"


class Answers(NamedTuple):
    """What was told in answer to one question, and why no more (empty if that was all)."""

    facts: dict
    failure: str = ""


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
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the symbols still gets the words
    with console.status("looking at this machine ..."):
        topics = look(args)
    sys.exit(report(topics, strict=args.strict))


def look(args: Args) -> dict[str, list[Line]]:
    """Asks everything at once, then judges; topic -> lines."""
    is_tiny = args.model.startswith("tiny")
    where = "offline" if args.offline or is_tiny else "online"
    with ThreadPoolExecutor(8) as pool:
        asked = {module: pool.submit(ask, "-c", f"import {module}") for module in (*CORE, *EXTRAS)}
        asked["torch"] = pool.submit(ask, __file__, "tell", "torch")
        asked["hub"] = pool.submit(ask, __file__, "tell", "hub", where, *args.models, timeout_s=8)
        asked["driver"] = pool.submit(ask_driver)
    answers = {question: future.result() for question, future in asked.items()}
    has_gpu = bool(answers["driver"].facts.get("gpus") or answers["driver"].failure)
    is_needed = dict.fromkeys(CHECKS, not is_tiny and (has_gpu or args.model != "all"))
    is_needed |= {"Python": True, "Data": not is_tiny, "Submission": not is_tiny}
    return {topic: judge(check, args, answers, is_needed[topic]) for topic, check in CHECKS.items()}


def judge(check: Callable, args: Args, answers: dict[str, Answers], is_needed: bool) -> list[Line]:
    """The lines of a check, up to where it fails; of one that is not needed, only the demo's may be missing."""
    lines = []
    try:
        for line in check(args, answers):
            is_spared = not (is_needed or line.is_fine or line.purpose == "the demo")
            lines.append(line._replace(is_fine=None) if is_spared else line)
    except Exception as error:  # a broken environment is what this script is for
        text = f"cannot be looked at: {type(error).__name__}: {error}"
        lines.append(Line(check.__name__, False, text, INSTALL))
    return lines


# What is asked. Whatever may crash or hang when it is imported answers from a process of its own.


def run(*command: str, timeout_s: float) -> tuple[str, str]:
    """(what a command says, until it ends or is ended; why it fails, empty if it does not). Never raises."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(errors="replace"), f"no answer within {timeout_s:g} s"
    except OSError as error:
        return "", str(error)
    failure = ""
    if done.returncode < 0:
        failure = f"crashes ({signal.Signals(-done.returncode).name})"
    elif done.returncode:
        complaints = done.stderr.decode(errors="replace").strip().splitlines()
        failure = complaints[-1] if complaints else f"{command[0]}: status {done.returncode}"
    return done.stdout.decode(errors="replace"), failure


def ask(*words: str, timeout_s: float = 60) -> Answers:
    """What another Python tells (see `tell`), and its failure."""
    said, failure = run(sys.executable, *words, timeout_s=timeout_s)
    facts = {}
    for line in said.splitlines():
        facts |= json.loads(line) if line.startswith('{"') else {}  # a library may print, too
    return Answers(facts, failure)


def tell(**facts: object) -> None:
    """Prints facts for the process that asked."""
    print(json.dumps(facts), flush=True)


def ask_driver(timeout_s: float = 10) -> Answers:
    """Version of NVIDIA's driver and names of its GPUs; nothing without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return Answers({})
    query = ("--query-gpu=name,driver_version", "--format=csv,noheader")
    said, failure = run("nvidia-smi", *query, timeout_s=timeout_s)
    if failure and "no devices" not in said.lower():
        return Answers({}, said.partition("\n")[0] or failure)
    rows = [line.rsplit(", ", 1) for line in said.splitlines() if ", " in line]
    return Answers({"gpus": [name for name, _ in rows], "version": rows[0][1] if rows else ""})


def tell_torch() -> None:
    """PyTorch's build, what each GPU is and whether it computes, and the backends of the ops."""
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else kind
    tell(build=f"{torch.__version__}, {kind}", has_cuda=torch.version.cuda is not None)
    gpus = []
    for i in range(torch.cuda.device_count()):
        gpus.append({"failure": ""})
        try:
            gpu = torch.cuda.get_device_properties(i)
            gpus[i] |= {"name": gpu.name, "gb": gpu.total_memory / 1e9, "capability": [gpu.major, gpu.minor]}
            if (torch.ones(2, device=f"cuda:{i}") + 1).sum().item() != 4:
                gpus[i]["failure"] = "1 + 1 is not 2"
        except Exception as error:  # whatever the driver says is the answer
            gpus[i]["failure"] = str(error).partition("\n")[0]
    tell(gpus=gpus)
    tell(backends=name_backends())


def name_backends() -> str:
    """Every op with the backend that it uses here: "attention torch, rms_norm torch"."""
    from common.ops import OPS

    return ", ".join(f"{op} {next(iter(available))}" for op, available in OPS.items())  # fastest first


def tell_hub(where: str, *models: str) -> None:
    """Each model's source and its files on this machine; then access and login, unless `where` is offline."""
    from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url, whoami

    # By path: the package around it imports torch, which may be what is broken.
    zoo = runpy.run_path(str(ROOT / "common/models/zoo.py"))["ZOO"]
    sources = {model: zoo[model].source for model in models}
    files = {model: count_local_files(source) for model, source in sources.items()}
    tell(sources=sources, files=files, cache=constants.HF_HUB_CACHE, has_token=bool(get_token()))
    if where == "offline" or constants.HF_HUB_OFFLINE:
        tell(login="offline", access=dict.fromkeys(models, "offline"))
        return

    def open_config(source: str) -> str:
        # The very request that a download begins with; a gated repository's description is public.
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=4)
        return "open"

    with ThreadPoolExecutor() as pool:
        login = pool.submit(reply, lambda: f"as {whoami()['name']}")
        asked = {model: pool.submit(reply, open_config, source) for model, source in sources.items()}
        tell(access={model: future.result() for model, future in asked.items()})
        tell(login=login.result())


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


def reply(request: Callable[..., str], *arguments: str) -> str:
    """What a request to the hub returns, REFUSED, or why neither is known."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return request(*arguments)
    except HfHubHTTPError as error:
        status = error.response.status_code
        return REFUSED if status in (401, 403, 404) else f"the hub answers {status}"
    except Exception as error:  # every kind of network failure, by any HTTP library
        return f"no network ({type(error).__name__})"


# What is judged: each check yields the lines of one topic.


def check_python(args: Args, answers: dict[str, Answers]) -> Iterator[Line]:
    """Python, the packages and their versions, against pyproject.toml and constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    here, wanted = "{}.{}.{}".format(*sys.version_info), project["requires-python"]
    is_new = Requirement(f"python{wanted}").specifier.contains(here, prereleases=True)
    mend = f"a virtual environment of Python {wanted}"
    yield Line("Python", is_new, f"{here} (wanted: {wanted}), {sys.executable}", mend, "the demo")

    wanted = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    found = {name: version_of(name) for name in wanted}
    lacking = [
        f"{name}{wanted[name]} (here: {version or 'none'})"
        for name, version in found.items()
        if not version or not wanted[name].contains(version, prereleases=True)
    ]
    text = f"all {len(found)}: {', '.join(f'{name} {found.get(name)}' for name in ('torch', *CORE))} ..."
    text = f"too old or absent: {', '.join(lacking)}" if lacking else text
    yield Line("packages", not lacking, text, INSTALL, "the demo")

    pins = re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    others = {
        name: f"{name} {version} (pinned {pin})"
        for name, pin in pins
        if (version := version_of(name)) and Version(version).public != pin
    }
    named = [text for name, text in others.items() if name in found]  # only what this project names counts
    text = f"{len(others) or 'none'} of {len(pins)} differ"
    text += f": {', '.join(named or list(others.values())[:3])}" if others else ""
    yield Line("exact versions", not named, text, INSTALL)

    failures = {"torch": "" if "build" in answers["torch"].facts else answers["torch"].failure}
    failures |= {name: answers[name].failure for name in CORE}
    broken = [f"{name}: {failure}" for name, failure in failures.items() if failure]
    mend = f"python3 -m pip install --force-reinstall --constraint constraints.txt {' '.join(failures)}"
    yield Line("imports", not broken, "; ".join(broken) or ", ".join(failures), mend, "the demo")
    just = shutil.which("just")
    yield Line("just", just is not None, just or "not on the PATH", "pip install rust-just")


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def check_gpu(args: Args, answers: dict[str, Answers]) -> Iterator[Line]:
    """Driver, PyTorch's build, GPUs, bf16, memory for each recipe."""
    driver, torch = answers["driver"], answers["torch"]
    names = driver.facts.get("gpus", [])
    text = driver.facts.get("version", "no nvidia-smi") or "present, but no GPU"
    if driver.failure:
        yield Line("driver", False, driver.failure, f"restart the machine, or {DRIVER}")
    else:
        yield Line("driver", bool(driver.facts), text, DRIVER)
    if "build" in torch.facts:  # else the line "imports" says why
        problem, mend = find_problem(torch, len(names))
        text = problem or (f"computes on all {len(names)} GPUs" if names else "")
        yield Line("torch build", not problem, "; ".join(filter(None, [torch.facts["build"], text])), mend)
    if not names:
        yield Line("GPUs", False, "none", "a machine with NVIDIA GPUs; the demo needs none")
        return
    gpus = [gpu for gpu in torch.facts.get("gpus", []) if "gb" in gpu]
    kinds = Counter(
        "{name}, {gb:.0f} GB, capability {capability[0]}.{capability[1]}".format(**gpu) for gpu in gpus
    )
    text = "; ".join(f"{number} x {kind}" for kind, number in (kinds or Counter(names)).items())
    if not gpus:
        yield Line("GPUs", True, f"{text}; bf16 and memory are known once PyTorch sees them")
        return
    yield Line("GPUs", True, text)
    # By capability: torch.cuda.is_bf16_supported says True where it is only emulated.
    old = [gpu["name"] for gpu in gpus if gpu["capability"] < [8, 0]]
    text = f"not on {old[0]}: capability below 8.0" if old else "capability 8.0 or newer"
    yield Line(
        "bf16", not old, text, "GPUs of capability 8.0 or newer (A100, L4, H100); others serve in fp16"
    )
    smallest_gb = min(gpu["gb"] for gpu in gpus)
    for model in args.models:
        need_gb = memory_gb_per_gpu(NEEDS[model], len(gpus))
        enough = (n for n in range(1, 65) if memory_gb_per_gpu(NEEDS[model], n) <= smallest_gb)
        mend = f"{next(enough, 'more and larger')} GPUs of {smallest_gb:.0f} GB, or larger ones"
        text = f"about {need_gb:.0f} GB on each of {len(gpus)}, {smallest_gb:.0f} GB there"
        yield Line(f"memory for {model}", need_gb <= smallest_gb, text, mend)


def find_problem(torch: Answers, expected: int) -> tuple[str, str]:
    """(why PyTorch does not compute on each of the expected GPUs, what mends it), empty if it does."""
    gpus = torch.facts.get("gpus")
    if expected and not torch.facts["has_cuda"]:
        reinstall = (
            "python3 -m pip uninstall -y torch && python3 -m pip install --constraint constraints.txt torch"
        )
        return f"though NVIDIA GPUs are here: {expected}", reinstall
    if expected and gpus is None:
        return f"looking at the GPUs: {torch.failure}", DRIVER
    if broken := [f"GPU {i}: {gpu['failure']}" for i, gpu in enumerate(gpus or ()) if gpu["failure"]]:
        is_old = "driver" in broken[0]  # PyTorch names the version that it found
        older = f"{DRIVER}; or a build for that driver: https://pytorch.org/get-started/locally"
        return "; ".join(broken), older if is_old else "nvidia-smi    # who holds the GPU?"
    if len(gpus or ()) < expected:
        fewer = f", or: just gpus={len(gpus)} stage1 ..." if gpus else ""
        return f"sees {len(gpus)} of {expected} GPUs", f"unset CUDA_VISIBLE_DEVICES{fewer}"
    return "", ""


def memory_gb_per_gpu(needs: Needs, num_gpus: int) -> float:
    """Estimated memory of stage 1 on each of the GPUs among which its state is sharded."""
    whole = needs.whole_weights_gb * (1 - 1 / num_gpus)  # the own shard is counted already
    return (needs.state_gb + needs.sums_gb) / num_gpus + whole + needs.activations_gb


def check_ops(args: Args, answers: dict[str, Answers]) -> Iterator[Line]:
    """The fast packages, present and importable, and what each op uses."""
    facts, failure = answers["torch"]
    backends = facts.get("backends", "")
    is_plain = backends and all(op.endswith(" torch") for op in backends.split(", "))
    unused = "; every op uses torch" if is_plain else ""
    has_old = any(gpu.get("capability", [8, 0]) < [8, 0] for gpu in facts.get("gpus", []))
    for module, (package, install) in EXTRAS.items():
        version, broken = version_of(package), answers[module].failure
        if not broken:
            yield Line(package, True, f"{version}, importable{unused}")
        elif has_old and package != "triton":
            yield Line(package, None, "for GPUs of capability 8.0 or newer")
        elif not version:
            needs_nvcc = package == "flash-attn" and shutil.which("nvcc") is None
            text = "not installed" + "; its build needs nvcc, which is not on the PATH" * needs_nvcc
            yield Line(package, False, text + unused, install, "speed")
        else:
            built = "transformer-engine-torch" if package == "transformer-engine" else package
            mend = "python3 -m pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir"
            yield Line(package, False, f"{version}, import fails: {broken}", f"{mend} {built}", "speed")
    yield Line("backends", bool(backends), backends or f"cannot be known: {failure}", INSTALL, "the demo")


def check_weights(args: Args, answers: dict[str, Answers]) -> Iterator[Line]:
    """Login, and each model's weights: on this machine, or to be had."""
    facts, failure = answers["hub"]
    if "sources" not in facts:
        yield Line("hub", False, f"huggingface_hub cannot be asked: {failure}", INSTALL)
        return
    access = dict.fromkeys(args.models, "no network") | facts.get("access", {})
    needs_login = any(access[model] != "open" and not is_local(answers, model) for model in args.models)
    mend, login = (
        "hf auth login    # token: https://huggingface.co/settings/tokens",
        facts.get("login", "no network"),
    )
    if facts["has_token"]:
        text = login if login.startswith("as ") else f"a token is there; {login}"
        yield Line("login", login != REFUSED, text, mend)
    elif needs_login:
        yield Line("login", False, "no token", mend)
    else:
        yield Line("login", None, "no token; these weights need none")
    for model in args.models:
        source, (have, of) = facts["sources"][model], facts["files"][model]
        text = f"{source}: " + (f"{have} of {of} files on this machine" if of else "not on this machine")
        if is_local(answers, model):
            yield Line(model, True, f"{source}: on this machine, all {of} files")
        elif access[model] == "open":
            yield Line(model, True, f"{text}, to be had from the hub")
        elif access[model] == REFUSED:
            mend = f"accept the licence at https://huggingface.co/{source}, then: hf auth login"
            yield Line(model, False, f"{text}, {REFUSED}", mend)
        else:
            mend = f"where there is a network: hf download {source}; or pass --checkpoint FOLDER to the stage"
            yield Line(model, False, f"{text}, access cannot be known: {access[model]}", mend)


def is_local(answers: dict[str, Answers], model: str) -> bool:
    """Whether all files of a model's published checkpoint lie on this machine."""
    have, of = answers["hub"].facts.get("files", {}).get(model, (0, 0))
    return 0 < of == have


def check_disk(args: Args, answers: dict[str, Answers]) -> Iterator[Line]:
    """Free space for a checkpoint, a training state, and the download if the hub's cache is on that disk."""
    artifacts, cache = args.artifacts.absolute(), Path(answers["hub"].facts.get("cache", "/"))
    folder, cache = (next(p for p in (path, *path.parents) if p.exists()) for path in (artifacts, cache))
    if not os.access(folder, os.W_OK):
        mend = f"sudo chown -R $USER {folder}, or another --artifacts"
        yield Line(str(args.artifacts), False, f"{folder} cannot be written", mend)
        return
    shares_disk = cache.stat().st_dev == folder.stat().st_dev
    free_gb, cache_gb = (shutil.disk_usage(path).free / 1e9 for path in (folder, cache))
    downloads_gb = {
        model: 0 if is_local(answers, model) else NEEDS[model].weights_gb for model in args.models
    }
    for model, download_gb in downloads_gb.items():
        parts = {"weights": NEEDS[model].weights_gb, "state": NEEDS[model].training_state_gb}
        parts |= {"download": download_gb} if shares_disk and download_gb else {}
        need_gb = sum(parts.values())
        text = f"{free_gb:,.0f} GB free; needs about {need_gb} "
        text += f"({', '.join(f'{name} {gb}' for name, gb in parts.items())})"
        mend = f"free {need_gb - free_gb:.0f} GB on the disk of {folder}, or --artifacts FOLDER on another"
        yield Line(model, need_gb <= free_gb, text, mend)
    if not shares_disk and (need_gb := sum(downloads_gb.values())):
        text = f"{cache_gb:,.0f} GB free in {cache}; downloads about {need_gb}"
        yield Line("hub cache", need_gb <= cache_gb, text, "export HF_HOME=/a/larger/disk/huggingface")


def check_data(args: Args, answers: dict[str, Answers]) -> Iterator[Line]:
    """Raw files and the tables made of them, with their numbers of rows."""
    data, tables, prep = quote(str(args.data)), args.artifacts / "data", "just prep"
    if (args.data, args.artifacts) != (Path("data"), Path("artifacts")):
        prep += f" --data {data} --artifacts {quote(str(args.artifacts))}"
    for raw, (table, purpose, fetch) in RAW.items():
        if (tables / table).exists() and not (args.data / raw).exists():
            yield Line(raw, None, f"not there, but {table} is")
        else:
            again = f"rm -r {quote(str(args.data / raw))}    # then: {fetch.format(data)}"
            yield judge_file(args.data / raw, purpose, fetch.format(data), again)
        yield judge_file(tables / table, purpose, prep, f"{prep} --overwrite")
    for name in POOL:
        yield judge_file(tables / name, "training", f"{prep} --hub", f"{prep} --hub --overwrite")
    named = {*POOL, *(table for table, _, _ in RAW.values())}
    for path in sorted(path for path in tables.glob("*.parquet") if path.name not in named):
        yield judge_file(path, "training", "", f"rm -r {quote(str(path))}    # then: make it again")


def judge_file(path: Path, purpose: str, fetch: str, again: str) -> Line:
    """Number of rows, or why there is none; what brings an absent file; what replaces a damaged one."""
    try:
        return Line(path.name, True, f"{count_rows(path):,} rows")
    except FileNotFoundError:
        return Line(path.name, False, f"not in {path.parent}", fetch, purpose)
    except PermissionError:
        return Line(path.name, False, "no permission to read it", f"chmod u+r {quote(str(path))}", purpose)
    except (OSError, ValueError, csv.Error, pl.exceptions.PolarsError) as error:
        return Line(path.name, False, f"cut off or damaged: {error}".partition("\n")[0], again, purpose)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, by its footer, or records of a CSV without its header.

    Raises:
        csv.Error, polars' errors, ValueError, OSError: It is cut off, no such file, or cannot be read.
    """
    path.open("rb").close()  # an absent file or permission in Python's words, not in polars'
    if path.suffix == ".parquet":
        return pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    csv.field_size_limit(2**30)
    with path.open(encoding="utf-8", newline="") as file:
        widths = [len(cells) for cells in csv.reader(file, strict=True)]
    if len(widths) < 2:
        raise ValueError("it has no rows")
    if widths[-1] != widths[0]:
        raise ValueError(
            f"the last of {len(widths) - 1:,} rows has {widths[-1]} cells, the header {widths[0]}"
        )
    return len(widths) - 1


def check_kaggle(args: Args, answers: dict[str, Answers]) -> Iterator[Line]:
    """Client and credentials of an upload; the client is not imported, since that logs in."""
    only, purpose, version = "only an upload to Kaggle uses it", "a submission", version_of("kaggle")
    text = version or f"not installed; {only}"
    yield Line("kaggle", version is not None, text, "python3 -m pip install kaggle", purpose)
    mend = "make a token at https://www.kaggle.com/settings (API), and put it into ~/.kaggle/"
    for names in (["KAGGLE_API_TOKEN"], ["KAGGLE_USERNAME", "KAGGLE_KEY"]):
        if all(os.environ.get(name) for name in names):
            yield Line("kaggle token", True, f"in {' and '.join(names)}")
            return
    folders = [os.environ.get("KAGGLE_CONFIG_DIR", "~/.kaggle"), "~/.kaggle", "~/.config/kaggle"]
    paths = [
        Path(folder).expanduser() / name for folder in folders for name in ("access_token", "kaggle.json")
    ]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        yield Line("kaggle token", False, f"none; {only}", mend, purpose)
        return
    try:
        text = path.read_text(encoding="utf-8").strip()
        is_token = {"username", "key"} <= set(json.loads(text)) if path.suffix else bool(text)
    except (OSError, ValueError, TypeError):
        is_token = False
    yield Line(
        "kaggle token",
        is_token,
        f"{path}" if is_token else f"{path} cannot be read as a token",
        mend,
        purpose,
    )


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
    mends, counts = {}, Counter()
    for topic, lines in topics.items():
        table.add_section()
        table.add_row(Text(topic, style="bold"))
        for line in lines:
            state = Text(*looks.get(line.is_fine, ("- not needed here", "dim")))
            table.add_row(Text(f"  {line.check}"), state, Text(line.found))
            if line.is_fine is False:
                mends.setdefault((topic, line.mend), []).append(line)
                counts[line.purpose] += 1
    console.print(table)
    if mends:
        say("What mends what is missing:")
    for (topic, mend), lines in mends.items():
        purposes = " and ".join(dict.fromkeys(line.purpose for line in lines))
        say(f"  {topic}: {', '.join(line.check for line in lines)} (for {purposes})\n      {mend}")
    named = ", ".join(f"{counts[purpose]} for {purpose}" for purpose in PURPOSES if counts[purpose])
    demo = "the demo cannot run yet" if counts["the demo"] else "the demo runs here: just demo"
    say(f"{counts.total()} missing{f' ({named})' if named else ''}; {demo}")
    return int(bool(counts["the demo"] or (strict and counts["training"])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["tell"]:
        {"torch": tell_torch, "hub": tell_hub}[sys.argv[2]](*sys.argv[3:])
    else:
        cli(main)
