"""What was found on a machine, judged: fine, missing (with the command that mends it), or not needed here.

Every function takes what `common.doctor.machine` found and yields lines of the doctor's table.
"""

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from common.doctor.machine import ROOT, Answers, Driver, Gpu, existing_parent

FINE, MISSING, NOT_NEEDED = "fine", "missing", "not needed here"
PURPOSES = ("the demo", "training", "speed", "a submission")


class Needs(NamedTuple):
    """What stage 1 of a recipe needs; GB are 10^9 bytes, all estimates."""

    weights_gb: int
    """One checkpoint on disk (README.md, "The real thing")."""
    training_state_gb: int
    """One state to go on from, on disk (the same)."""
    state_gb: float
    """Weights, gradients, two moments and Kahan's compensation in bf16: 10 B a parameter, over all GPUs."""
    sums_gb: float
    """Gradient sums: 4 B a parameter in fp32, none where rounded stochastically, over all GPUs."""
    whole_weights_gb: float
    """Weights that stay whole on every GPU (accelerate_configs/), 2 B a parameter."""
    activations_gb: float
    """A GPU's, recomputed layer by layer: 0.31, 0.43, 0.27 GB per 1,000 tokens of a micro-batch."""


NEEDS = {
    "gemma9b": Needs(18, 74, 92.5, 37, 18.5, 5.1),
    "gemma27b": Needs(54, 218, 272, 0, 0, 0.9),
    "armorm8b": Needs(16, 60, 75, 30, 15, 4.4),
}


class Line(NamedTuple):
    """One line of the table."""

    check: str
    state: str
    found: str
    mend: str = ""
    purpose: str = "training"


INSTALL = 'python3 -m pip install --constraint constraints.txt --editable ".[dev]"'
REINSTALL_TORCH = (
    "python3 -m pip uninstall -y torch && python3 -m pip install --constraint constraints.txt torch"
)
DRIVER = "install or update NVIDIA's driver: https://www.nvidia.com/drivers"
CORE = ("accelerate", "transformers")
EXTRAS = {"flash_attn": "flash-attn", "transformer_engine.pytorch": "transformer-engine", "triton": "triton"}
NEEDS_CAPABILITY_8 = ("flash_attn", "transformer_engine.pytorch")


def python_lines(core: Answers, torch: Answers, *, folder: Path = ROOT) -> Iterator[Line]:
    """Python, the packages and their versions, against pyproject.toml and constraints.txt in `folder`."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    here, wanted = "{}.{}.{}".format(*sys.version_info), project["requires-python"]
    is_new_enough = Requirement(f"python{wanted}").specifier.contains(here, prereleases=True)
    yield Line(
        "Python",
        FINE if is_new_enough else MISSING,
        f"{here} (wanted: {wanted}), {sys.executable}",
        f"a virtual environment of Python {wanted}",
        "the demo",
    )
    wanted = [Requirement(line) for line in project["dependencies"]]
    found = {requirement.name: _version(requirement.name) for requirement in wanted}
    lacking = [
        f"{requirement} (here: {found[requirement.name] or 'none'})"
        for requirement in wanted
        if not (version := found[requirement.name])
        or not requirement.specifier.contains(version, prereleases=True)
    ]
    text = (
        f"all {len(wanted)}: " + ", ".join(f"{name} {found.get(name)}" for name in ("torch", *CORE)) + " ..."
    )
    if lacking:
        text = f"too old or absent: {', '.join(lacking)}"
    yield Line("packages", MISSING if lacking else FINE, text, INSTALL, "the demo")
    yield _pins_line((folder / "constraints.txt").read_text(encoding="utf-8"), direct=set(found))
    broken = [f"{name}: {core.facts.get(name) or core.failure}" for name in CORE if core.facts.get(name, "?")]
    if "version" not in torch.facts:
        broken.insert(0, f"torch: {torch.failure}")
    text = "; ".join(broken) or f"torch, {', '.join(CORE)}"
    mend = "python3 -m pip install --force-reinstall --constraint constraints.txt torch " + " ".join(CORE)
    yield Line("imports", MISSING if broken else FINE, text, mend, "the demo")
    just = shutil.which("just")
    yield Line("just", FINE if just else MISSING, just or "not on the PATH", "pip install rust-just")


def _pins_line(constraints: str, *, direct: set[str]) -> Line:
    """Installed versions beside the exact ones; only a package that this project names itself counts."""
    pins = dict(line.split("==") for line in constraints.splitlines() if line and not line.startswith("#"))
    found = {name: _version(name) for name in pins}
    others = {
        name: f"{name} {version} (pinned {pins[name]})"
        for name, version in found.items()
        if version and Version(version).public != Version(pins[name]).public
    }
    named = [text for name, text in others.items() if name in direct]
    text = f"{len(others)} of {len(pins)} differ" if others else f"none of {len(pins)} differs"
    if others:
        text += f": {', '.join(named or list(others.values())[:3])}" + (" ..." if len(others) > 3 else "")
    return Line("exact versions", MISSING if named else FINE, text, INSTALL)


def gpu_lines(driver: Driver | None, torch: Answers, models: tuple[str, ...]) -> Iterator[Line]:
    """Driver, PyTorch's build, GPUs, bf16, memory for each recipe."""
    gpus = driver.gpus if driver else ()
    if driver is None:
        yield Line("driver", MISSING, "no nvidia-smi", DRIVER)
    elif driver.failure:
        yield Line("driver", MISSING, driver.failure, f"restart the machine, or {DRIVER}")
    else:
        text = f"{driver.version or 'version unknown'}, CUDA up to {driver.cuda or 'unknown'}"
        yield Line("driver", FINE, text if gpus else "present, but no GPU")
    if "version" in torch.facts:  # else the line "imports" says why
        yield _build_line(driver, torch.facts, torch.failure)
    if not gpus:
        yield Line("GPUs", MISSING, "none", "a machine with NVIDIA GPUs; the demo needs none")
        return
    text = "; ".join(f"{gpus.count(gpu)} x {_describe(gpu)}" for gpu in dict.fromkeys(gpus))
    yield Line("GPUs", FINE, text)
    # By capability: torch.cuda.is_bf16_supported says True where it is only emulated.
    if old := [gpu.name for gpu in gpus if gpu.capability and gpu.capability < (8, 0)]:
        text = f"not on {old[0]}: capability below 8.0"
        yield Line(
            "bf16", MISSING, text, "GPUs of capability 8.0 or newer (A100, L4, H100); others serve in fp16"
        )
    elif not all(gpu.capability for gpu in gpus):
        yield Line("bf16", MISSING, "nvidia-smi does not tell the capability", DRIVER)
    else:
        yield Line("bf16", FINE, "capability 8.0 or newer")
    for model in models:
        yield _memory_line(model, gpus)


def _describe(gpu: Gpu) -> str:
    memory = f"{gpu.memory_gb:.0f} GB" if gpu.memory_gb else "memory unknown"
    capability = "{}.{}".format(*gpu.capability) if gpu.capability else "unknown"
    return f"{gpu.name}, {memory}, capability {capability}"


def _build_line(driver: Driver | None, facts: dict, failure: str) -> Line:
    """PyTorch's build: what counts is whether every GPU computes; the versions explain why it does not."""
    name, cuda, hip = "torch build", facts["cuda"], facts["hip"]
    build = f"{facts['version']}, " + (f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU build")
    expected = len(driver.gpus) if driver else 0
    if not expected:
        return Line(name, FINE, build)
    if not cuda:
        return Line(name, MISSING, f"{build}, though NVIDIA GPUs are here: {expected}", REINSTALL_TORCH)
    if "gpus" not in facts:
        return Line(name, MISSING, f"{build}; looking at the GPUs: {failure}", DRIVER)
    seen = facts["gpus"]
    if not seen and driver.cuda and Version(driver.cuda) < Version(cuda):
        mend = f"{DRIVER}; or a build for CUDA {driver.cuda}: https://pytorch.org/get-started/locally"
        return Line(name, MISSING, f"{build}; the driver knows CUDA {driver.cuda} only", mend)
    if broken := [f"GPU {i}: {reason}" for i, reason in enumerate(seen) if reason]:
        return Line(name, MISSING, f"{build}; {'; '.join(broken)}", "nvidia-smi    # who holds the GPU?")
    if len(seen) < expected:
        mend = "unset CUDA_VISIBLE_DEVICES" + (f", or: just gpus={len(seen)} stage1 ..." if seen else "")
        return Line(name, MISSING, f"{build}; sees {len(seen)} of {expected} GPUs", mend)
    return Line(name, FINE, f"{build}; computes on {len(seen)} of {expected} GPUs")


def memory_gb_per_gpu(needs: Needs, num_gpus: int) -> float:
    """Estimated memory of stage 1 on each of the GPUs among which its state is sharded."""
    whole = needs.whole_weights_gb * (1 - 1 / num_gpus)  # the own shard is counted already
    return (needs.state_gb + needs.sums_gb) / num_gpus + whole + needs.activations_gb


def _memory_line(model: str, gpus: tuple[Gpu, ...]) -> Line:
    sizes = [gpu.memory_gb for gpu in gpus]
    need = memory_gb_per_gpu(NEEDS[model], len(gpus))
    text = f"about {need:.0f} GB on each of {len(gpus)}"
    if None in sizes:
        return Line(f"memory for {model}", FINE, f"{text}; nvidia-smi does not tell how much there is")
    smallest = min(sizes)
    enough = (n for n in range(1, 65) if memory_gb_per_gpu(NEEDS[model], n) <= smallest)
    mend = f"{next(enough, 'more and larger')} GPUs of {smallest:.0f} GB, or larger ones"
    state = FINE if need <= smallest else MISSING
    return Line(f"memory for {model}", state, f"{text}, {smallest:.0f} GB there", mend)


def ops_lines(torch: Answers, extras: Mapping[str, Answers], gpus: tuple[Gpu, ...]) -> Iterator[Line]:
    """The fast packages, present and importable, and what each op uses: its own table is asked."""
    ops = torch.facts.get("ops", {})
    is_plain = bool(ops) and all(backends == ["torch"] for backends in ops.values())
    unused = "; no op has another backend than torch" if is_plain else ""
    for module, name in EXTRAS.items():
        answer = extras[module].facts.get(module)
        reason = extras[module].failure if answer is None else answer
        if not reason:
            yield Line(name, FINE, f"{_version(name)}, importable{unused}")
        elif module in NEEDS_CAPABILITY_8 and any(gpu.capability and gpu.capability < (8, 0) for gpu in gpus):
            yield Line(name, NOT_NEEDED, "for GPUs of capability 8.0 or newer")
        elif util.find_spec(module.partition(".")[0]) is None:
            text = "not installed"
            if name == "flash-attn" and shutil.which("nvcc") is None:
                text += "; its build needs nvcc, which is not on the PATH"
            mend = "python3 -m pip install triton" if name == "triton" else "just setup gpu"
            yield Line(name, MISSING, text + unused, mend, "speed")
        else:
            built = "transformer-engine-torch" if name == "transformer-engine" else name
            flags = "--force-reinstall --no-deps --no-build-isolation --no-cache-dir"
            mend = f"python3 -m pip install {flags} {built}"
            yield Line(name, MISSING, f"{_version(name)}, import fails: {reason}", mend, "speed")
    if not ops:
        text = f"their tables cannot be read: {torch.failure}"
        yield Line("backends", MISSING, text, INSTALL, "the demo")
    for backends in dict.fromkeys(map(tuple, ops.values())):
        using = ", ".join(op for op, names in ops.items() if tuple(names) == backends)
        others = f"; also: {', '.join(backends[1:])}" if backends[1:] else ", the only backend"
        yield Line("backends", FINE, f"{using}: {backends[0]}{others}")


def hub_lines(hub: Answers, models: tuple[str, ...]) -> Iterator[Line]:
    """Login, and each model's weights: on this machine, or to be had."""
    facts = hub.facts
    if "sources" not in facts:
        yield Line("hub", MISSING, f"huggingface_hub cannot be asked: {hub.failure}", INSTALL)
        return
    access = {model: facts.get(f"{model}/access", "no network") for model in models}
    if facts["offline"]:
        access = dict.fromkeys(models, "offline")
    lacking = [model for model in models if not _is_local(facts, model)]
    needs_login = any(access[model] != "open" for model in lacking)
    login = "hf auth login    # token: https://huggingface.co/settings/tokens"
    name = facts.get("login")
    if facts["token"] and name == "":
        yield Line("login", MISSING, "a token is there, but the hub refuses it", login)
    elif facts["token"]:
        yield Line("login", FINE, f"as {name}" if name else "a token is there; no network to check it")
    else:
        reason = "no token" if needs_login else "no token; these weights need none"
        yield Line("login", MISSING if needs_login else NOT_NEEDED, reason, login)
    for model in models:
        yield _weights_line(model, facts, access[model])


def _is_local(facts: dict, model: str) -> bool:
    have, of = facts.get(f"{model}/local", (0, 0))
    return 0 < of == have


def _weights_line(model: str, facts: dict, access: str) -> Line:
    source = facts["sources"][model]
    have, of = facts.get(f"{model}/local", (0, 0))
    if _is_local(facts, model):
        return Line(model, FINE, f"{source}: on this machine, all {of} files")
    text = f"{source}: {have} of {of} files on this machine, " if of else f"{source}: not on this machine, "
    if access == "open":
        return Line(model, FINE, f"{text}to be had from the hub")
    if access in ("gated", "refused"):
        mend = f"accept the licence at https://huggingface.co/{source}, then: hf auth login"
        return Line(model, MISSING, f"{text}the hub refuses access", mend)
    mend = f"where there is a network: hf download {source}; or pass --checkpoint FOLDER to the stage"
    return Line(model, MISSING, f"{text}access cannot be known: {access}", mend)


def disk_lines(artifacts: Path, models: tuple[str, ...], hub: Answers) -> Iterator[Line]:
    """Free space for a checkpoint, a training state, and the download if the hub's cache is on that disk."""
    folder = existing_parent(artifacts)
    if not os.access(folder, os.W_OK):
        mend = f"sudo chown -R $USER {folder}, or another --artifacts"
        yield Line(str(artifacts), MISSING, f"{folder} cannot be written", mend)
        return
    free_gb = shutil.disk_usage(folder).free / 1e9
    cache = existing_parent(Path(hub.facts.get("cache", folder)))
    shares_disk = cache.stat().st_dev == folder.stat().st_dev
    loads = {model: 0 if _is_local(hub.facts, model) else NEEDS[model].weights_gb for model in models}
    for model in models:
        needs, download = NEEDS[model], loads[model] if shares_disk else 0
        need = needs.weights_gb + needs.training_state_gb + download
        parts = f"weights {needs.weights_gb}, state {needs.training_state_gb}"
        parts += f", download {download}" if download else ""
        state = FINE if need <= free_gb else MISSING
        mend = f"free {need - free_gb:.0f} GB on the disk of {folder}, or --artifacts FOLDER on another"
        yield Line(f"{model}", state, f"{free_gb:,.0f} GB free; needs about {need} ({parts})", mend)
    if not shares_disk and sum(loads.values()):
        cache_gb, need = shutil.disk_usage(cache).free / 1e9, sum(loads.values())
        mend = "export HF_HOME=/a/larger/disk/huggingface"
        text = f"{cache_gb:,.0f} GB free in {cache}; downloads about {need}"
        yield Line("hub cache", FINE if need <= cache_gb else MISSING, text, mend)


def kaggle_lines(environment: Mapping[str, str], home: Path) -> Iterator[Line]:
    """Client and credentials of an upload; the client is not imported, since that logs in."""
    only = "only an upload to Kaggle uses it"
    found = _version("kaggle")
    text = found or f"not installed; {only}"
    yield Line("kaggle", FINE if found else MISSING, text, "python3 -m pip install kaggle", "a submission")
    mend = "make a token at https://www.kaggle.com/settings (API), and put it into ~/.kaggle/"
    folders = [Path(environment[name]) for name in ("KAGGLE_CONFIG_DIR",) if environment.get(name)]
    folders += [home / ".kaggle", home / ".config/kaggle"]
    files = [folder / name for folder in folders for name in ("access_token", "kaggle.json")]
    if environment.get("KAGGLE_API_TOKEN"):
        yield Line("kaggle token", FINE, "in KAGGLE_API_TOKEN")
    elif environment.get("KAGGLE_USERNAME") and environment.get("KAGGLE_KEY"):
        yield Line("kaggle token", FINE, "in KAGGLE_USERNAME and KAGGLE_KEY")
    elif path := next((path for path in files if path.exists()), None):
        whole = _is_token(path)
        text = str(path) if whole else f"{path} cannot be read as a token"
        yield Line("kaggle token", FINE if whole else MISSING, text, mend, "a submission")
    else:
        yield Line("kaggle token", MISSING, f"none; {only}", mend, "a submission")


def _is_token(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8").strip()
        return {"username", "key"} <= set(json.loads(text)) if path.suffix == ".json" else bool(text)
    except (OSError, ValueError, TypeError):
        return False


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None
