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
    from concurrent.futures import ThreadPoolExecutor, as_completed
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
    from common.data.table import scan
except ImportError as error:  # of all scripts, this one must say what to do
    sys.exit(
        f"error: Python {sys.version.split()[0]} ({sys.executable}) cannot import {error.name or error}. "
        "Wanted is Python 3.11 or newer with the project's packages, in a clone of the repository:\n"
        "    python3 -m venv .venv && . .venv/bin/activate && pip install rust-just && just setup"
    )

ROOT = Path(__file__).resolve().parents[1]
CORE = "torch, accelerate, transformers"
EXTRAS = {  # module: package, what installs it, what of it is built here
    "flash_attn": ("flash-attn", "just setup gpu", "flash-attn"),
    "transformer_engine.pytorch": ("transformer-engine", "just setup gpu", "transformer-engine-torch"),
    "triton": ("triton", "python3 -m pip install triton", "triton"),
}
PIP = "python3 -m pip install --constraint constraints.txt"
INSTALL = f'{PIP} --editable ".[dev]"'
DRIVER = "install or update NVIDIA's driver, and restart the machine: https://www.nvidia.com/drivers"
HERE = "on this machine"
UNREACHED = "not on this machine; the hub is not reached"  # not asked, no network, no answer in time
REFUSED = "not on this machine; the hub refuses access"
WEIGHTS = {  # what keeps a model's weights away: what mends it
    UNREACHED: "where there is a network: hf download {0}; or pass --checkpoint FOLDER to the stage",
    REFUSED: "accept the licence at https://huggingface.co/{0}, then: hf auth login",
}
COMPETITION = "kaggle competitions download -c lmsys-chatbot-arena -p {0} && unzip -d {0} {0}/lmsys*.zip"
EXTERNAL = "put lmsys-33k-deduplicated.csv into {0} (docs/data.md says what takes its place)"
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
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    with console.status("looking at this machine ..."):
        topics = look(args)
    sys.exit(report(topics, strict=args.strict))


def look(args: Args) -> dict[str, list[Line]]:
    """Asks everything at once, then judges; topic -> lines."""
    is_tiny = args.model.startswith("tiny")
    with ThreadPoolExecutor(8) as pool:
        # What a library does at exit is no answer.
        asked = {name: pool.submit(ask, "-c", f"import {name}, os; os._exit(0)") for name in (CORE, *EXTRAS)}
        asked |= {question: pool.submit(ask, __file__, "tell", question) for question in ("driver", "build")}
        asked["hub"] = pool.submit(ask, __file__, "tell", "hub", *args.models, timeout_s=8)
    answers = {question: future.result() for question, future in asked.items()}
    facts, failure = answers["driver"]
    needs_gpu = not is_tiny and bool(facts.get("gpus") or failure or args.model != "all")
    checks = (check_python, check_gpu, check_ops, check_weights, check_disk, check_data, check_kaggle)
    is_needed = dict.fromkeys(checks, needs_gpu)
    is_needed |= {check_python: True, check_data: not is_tiny, check_kaggle: not is_tiny}
    return {check.__name__: judge(check, args, answers, is_needed[check]) for check in checks}


def judge(check: Callable, args: Args, answers: Answers, is_needed: bool) -> list[Line]:
    """The lines of a check, up to where it fails; of one that is not needed, only the demo's are missing."""
    lines: list[Line] = []
    try:
        lines.extend(check(args, answers))
    except Exception as error:  # a broken environment is what this script is for
        lines.append(Line(check.__name__, False, f"cannot be looked at: {error!r}", INSTALL))
    idle = () if is_needed else ("training", "speed", "a submission")
    return [line._replace(is_fine=line.is_fine or None) if line.purpose in idle else line for line in lines]


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


def tell_driver() -> Iterator[dict]:
    """Version of NVIDIA's driver, and what its GPUs are; nothing without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return
    fields = "name,memory.total,compute_cap,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = done.stdout.strip() or done.stderr.strip()
    if done.returncode and "no devices" not in said.lower():
        sys.exit(said.partition("\n")[0] or f"nvidia-smi: status {done.returncode}")
    rows = [line.rsplit(", ", 3) for line in said.splitlines() if ", " in line]
    sizes = (int(mib) * 2**20 / 1e9 if mib.isdecimal() else None for _, mib, *_ in rows)  # "[N/A]": shared
    gpus = [(name, gb, float(capability)) for (name, _, capability, _), gb in zip(rows, sizes, strict=True)]
    yield {"gpus": gpus, "version": rows[0][3] if rows else ""}


def tell_build() -> Iterator[dict]:
    """PyTorch's build, on how many GPUs it computes, and the backends of the ops."""
    import torch

    yield {"torch": torch.__version__, "cuda": torch.version.cuda}
    num_gpus, failure = torch.cuda.device_count(), ""
    try:
        for i in range(num_gpus):
            assert (torch.ones(2, device=f"cuda:{i}") + 1).sum().item() == 4, "1 + 1 is not 2"
    except Exception as error:  # whatever the driver says is the answer
        failure = f"GPU {i}: {error}".partition("\n")[0]
    yield {"num_gpus": num_gpus, "failure": failure}
    from common.ops import choose

    device = "cuda" if num_gpus and not failure else "cpu"
    # What Gemma 2 9B asks for, the most that any recipe does.
    ops = choose(device=device, dtype=torch.bfloat16, head_dim=256, softcap=50.0, window=4096)
    yield {"backends": str(ops)}


def tell_hub(*models: str) -> Iterator[dict]:
    """The hub's cache, its token, and where each model's weights are, as soon as it is known."""
    from huggingface_hub import constants, get_token

    # By path: the package around it imports torch, which may be what is broken.
    zoo = runpy.run_path(str(ROOT / "common/models/zoo.py"))["ZOO"]
    yield {"cache": constants.HF_HUB_CACHE, "token": bool(get_token()), "zoo": zoo}
    with ThreadPoolExecutor() as pool:
        asked = {pool.submit(find_weights, zoo[model]): model for model in models}
        yield from ({asked[found]: found.result()} for found in as_completed(asked))


def find_weights(source: str) -> str:
    """HERE if all of a checkpoint's weights lie in the hub's cache, else whether the hub hands them out."""
    import huggingface_hub as hub

    with suppress(Exception):  # nothing is there, or the download was cut off, or a file is damaged
        hub.get_local_safetensors_metadata(Path(hub.try_to_load_from_cache(source, "config.json")).parent)
        return HERE
    try:  # what a download begins with; a gated repository's description would be public
        hub.get_hf_file_metadata(hub.hf_hub_url(source, "config.json"), timeout=4)
        return "to be had from the hub"
    except hub.errors.HfHubHTTPError as error:
        return REFUSED if error.response.status_code in (401, 403, 404) else UNREACHED
    except Exception:  # every kind of network failure, by any HTTP library
        return UNREACHED


def check_python(args: Args, answers: Answers) -> Iterator[Line]:
    """Python, the packages and their versions, against pyproject.toml and constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # An older Python cannot import what stands above.
    yield Line("Python", True, f"{sys.version.split()[0]}, {sys.executable}")
    needs = [Requirement(need) for need in project["dependencies"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    pins = [Requirement(line) for need in needs for line in lines if line.startswith(f"{need.name}==")]
    for check, wanted, purpose in (("packages", needs, "the demo"), ("exact versions", pins, "training")):
        unmet = [f"{need} (here: {version_of(need.name) or 'none'})" for need in wanted if not is_met(need)]
        yield Line(check, not unmet, ", ".join(unmet) or f"all {len(wanted)}", INSTALL, purpose)
    failure, packages = answers[CORE][1], CORE.split(", ")
    text = failure or ", ".join(f"{package} {version_of(package)}" for package in packages)
    yield Line("imports", not failure, text, f"{PIP} --force-reinstall {' '.join(packages)}", "the demo")
    yield Line("just", bool(just := shutil.which("just")), just or "not on PATH", "pip install rust-just")


def is_met(need: Requirement) -> bool:
    """Whether the installed version is one that the requirement allows."""
    version = version_of(need.name)
    return version is not None and need.specifier.contains(version, prereleases=True)


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    return next((found.version for found in metadata.distributions(name=package)), None)


def check_gpu(args: Args, answers: Answers) -> Iterator[Line]:
    """Driver, PyTorch's build, GPUs, bf16, memory for each recipe."""
    driver, failure = answers["driver"]
    gpus = driver.get("gpus", [])
    text = failure or driver.get("version", "no nvidia-smi") or "present, but no GPU"
    yield Line("driver", bool(driver), text, DRIVER)
    if "torch" in answers["build"][0]:  # else the line "imports" says why
        yield judge_build(*answers["build"], len(gpus))
    kinds = Counter(f"{name}, {in_gb(gb)}, capability {capability}" for name, gb, capability in gpus)
    text = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    yield Line("GPUs", bool(gpus), text or "none", "a machine with NVIDIA GPUs; the demo needs none")
    if not gpus:
        return
    # By capability: torch.cuda.is_bf16_supported says True where it is only emulated.
    old = [name for name, _, capability in gpus if capability < 8]
    text = f"not on {old[0]}: capability below 8.0" if old else "capability 8.0 or newer"
    yield Line("bf16", not old, text, "GPUs of capability 8.0 or newer (A100, L4); others serve in fp16")
    smallest_gb = min((gb for _, gb, _ in gpus), key=lambda gb: gb or 0)
    for model in args.models:
        need_gb = NEEDS[model].gb_per_gpu(len(gpus))
        enough = (n for n in range(1, 65) if NEEDS[model].gb_per_gpu(n) <= (smallest_gb or 0))
        mend = f"{next(enough, 'more and larger')} GPUs of {in_gb(smallest_gb)}, or larger ones"
        text = f"about {need_gb:.0f} GB on each of {len(gpus)}, {in_gb(smallest_gb)} there"
        yield Line(f"memory for {model}", smallest_gb and need_gb <= smallest_gb, text, mend)


def in_gb(gb: float | None) -> str:
    """A GPU's memory for people."""
    return "a memory that nvidia-smi does not tell" if gb is None else f"{gb:.0f} GB"


def judge_build(build: dict, failure: str, num_gpus: int) -> Line:
    """PyTorch's build, and whether it computes on each of the machine's GPUs."""
    failure, seen, mend = build.get("failure", failure), build.get("num_gpus", 0), ""
    if num_gpus and build["cuda"] is None:
        mend = f"python3 -m pip uninstall -y torch && {PIP} torch"
    elif "driver" in failure:  # too old
        mend = f"{DRIVER}; or a build for this one: https://pytorch.org/get-started/locally"
    elif failure:
        mend = "nvidia-smi    # who holds the GPU?"
    elif seen < num_gpus:
        mend = "unset CUDA_VISIBLE_DEVICES, or train on fewer: just gpus=N stage1 ..."
    text = failure or f"computes on {seen} of {num_gpus} GPUs"
    return Line("torch build", not mend, f"{build['torch']}, CUDA {build['cuda'] or 'none'}; {text}", mend)


def check_ops(args: Args, answers: Answers) -> Iterator[Line]:
    """The fast packages, present and importable, and what each op uses."""
    facts, failure = answers["build"]
    has_old = any(capability < 8 for _, _, capability in answers["driver"][0].get("gpus", []))
    for module, (package, install, built) in EXTRAS.items():
        version, broken = version_of(package), answers[module][1]
        if broken and has_old and package != "triton":
            yield Line(package, None, "for GPUs of capability 8.0 or newer")
        elif version or not broken:
            text = f"{version}, import fails: {broken}" if broken else f"{version}, importable"
            mend = "python3 -m pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir"
            yield Line(package, not broken, text, f"{mend} {built}", "speed")
        else:
            needs_nvcc = package == "flash-attn" and shutil.which("nvcc") is None
            text = "not installed" + "; its build needs nvcc, which is not on the PATH" * needs_nvcc
            yield Line(package, False, text, install, "speed")
    yield Line("backends", "backends" in facts, facts.get("backends", failure), INSTALL, "the demo")


def check_weights(args: Args, answers: Answers) -> Iterator[Line]:
    """Login, and each model's weights: on this machine, or to be had."""
    facts, failure = answers["hub"]
    if not facts:
        yield Line("hub", False, f"huggingface_hub cannot be asked: {failure}", INSTALL)
        return
    weights = {model: facts.get(model, UNREACHED) for model in args.models}
    needs_login = bool(WEIGHTS.keys() & weights.values())
    text = "a token is there" if facts["token"] else "no token"
    mend = "hf auth login    # token: https://huggingface.co/settings/tokens"
    yield Line("login", facts["token"] or (False if needs_login else None), text, mend)
    for model, found in weights.items():
        source = facts["zoo"][model]
        yield Line(model, found not in WEIGHTS, f"{source}: {found}", WEIGHTS.get(found, "").format(source))


def check_disk(args: Args, answers: Answers) -> Iterator[Line]:
    """Free space for a checkpoint, a training state, and the download if the hub's cache is on that disk."""
    hub, _ = answers["hub"]
    paths = (args.artifacts.absolute(), Path(hub.get("cache", "/")))
    folder, cache = (next(p for p in (path, *path.parents) if p.exists()) for path in paths)
    mend = f"sudo chown -R $USER {folder}, or another --artifacts"
    yield Line("artifacts", os.access(folder, os.W_OK), f"written into {folder}", mend)
    free_gb = shutil.disk_usage(folder).free / 1e9
    for model in args.models:
        parts = {"weights": NEEDS[model].weights_gb, "state": NEEDS[model].training_state_gb}
        if cache.stat().st_dev == folder.stat().st_dev and hub.get(model) != HERE:
            parts["download"] = NEEDS[model].weights_gb
        need_gb = sum(parts.values())
        text = ", ".join(f"{name} {gb}" for name, gb in parts.items())
        text = f"{free_gb:,.0f} GB free; needs about {need_gb} ({text})"
        mend = f"free {need_gb - free_gb:.0f} GB on the disk of {folder}, or --artifacts FOLDER on another"
        yield Line(model, need_gb <= free_gb, text, mend)


def check_data(args: Args, answers: Answers) -> Iterator[Line]:
    """Raw files and the tables made of them, with their numbers of rows."""
    data, tables, prep = quote(str(args.data)), args.artifacts / "data", "just prep"
    if (args.data, args.artifacts) != (Path("data"), Path("artifacts")):
        prep += f" --data {data} --artifacts {quote(str(args.artifacts))}"
    for raw, (table, purpose, fetch) in RAW.items():
        if (tables / table).exists() and not (args.data / raw).exists():
            yield Line(raw, None, f"not there, but {table} is")
        else:
            again = f"rm -r {data}/{raw}    # then: {fetch.format(data)}"
            yield judge_file(args.data / raw, purpose, fetch.format(data), again)
        yield judge_file(tables / table, purpose, prep, f"{prep} --overwrite")
    for name in POOL:
        yield judge_file(tables / name, "training", f"{prep} --hub", f"{prep} --hub --overwrite")


def judge_file(path: Path, purpose: str, fetch: str, again: str) -> Line:
    """Number of rows, or why it is not known; `fetch` brings an absent file, `again` a damaged one."""
    try:
        if path.suffix == ".parquet":
            rows = scan(path).select(pl.len()).collect().item()
        else:
            rows = pl.read_csv(path, infer_schema=False, glob=False).height
        return Line(path.name, rows > 0, f"{rows:,} rows", again, purpose)
    except FileNotFoundError:
        return Line(path.name, False, f"not in {path.parent}", fetch, purpose)
    except (OSError, pl.exceptions.PolarsError) as error:
        mend = f"chmod u+r {quote(str(path))}" if isinstance(error, PermissionError) else again
        return Line(path.name, False, f"cannot be read: {error}".partition("\n")[0], mend, purpose)


def check_kaggle(args: Args, answers: Answers) -> Iterator[Line]:
    """Client and credentials of an upload; the client is not imported, since that logs in."""
    version, purpose = version_of("kaggle"), "a submission"
    yield Line("kaggle", bool(version), version or "not installed", "python3 -m pip install kaggle", purpose)
    variables = (("KAGGLE_API_TOKEN",), ("KAGGLE_USERNAME", "KAGGLE_KEY"))
    found = [" and ".join(names) for names in variables if all(map(os.environ.get, names))]
    folders = (os.environ.get("KAGGLE_CONFIG_DIR", "~/.kaggle"), "~/.kaggle", "~/.config/kaggle")
    files = [Path(folder, name) for folder in folders for name in ("access_token", "kaggle.json")]
    found += [str(path) for path in files if path.expanduser().exists()]
    mend = "make a token at https://www.kaggle.com/settings (API), and put it into ~/.kaggle/"
    yield Line("kaggle token", bool(found), found[0] if found else "none", mend, purpose)


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
        topic = topic.removeprefix("check_")
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
    named = ", ".join(f"{number} for {purpose}" for purpose, number in missing.items())
    demo = "the demo cannot run yet" if missing["the demo"] else "the demo runs here: just demo"
    say(f"{missing.total()} missing{f' ({named})' if named else ''}; {demo}")
    return int(bool(missing["the demo"] or (strict and missing["training"])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["tell"]:
        for facts in globals()[f"tell_{sys.argv[2]}"](*sys.argv[3:]):
            print(json.dumps(facts), flush=True)
    else:
        cli(main)
