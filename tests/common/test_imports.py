"""Imports point one way, as the design lists the rooms; what Kaggle serves needs only what is there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, make_checkpoint

from bundle import LIBRARIES, SERVED

FLOORS = (  # a room may import those of the floors above it, and those that stand before it on its own
    ("files", "locks", "console", "batching", "runs"),
    ("ops",),
    ("models",),
    ("data",),
    ("tokenizer", "prompts", "tokens", "trained"),
    ("score",),
    ("train",),
    ("report",),
)
MAX_ARROWS = 38


def imports(path: Path) -> set[str]:
    """Modules of common/ that a file names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("common.")}


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the files that do so."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / "common").rglob("*.py")):
        room = path.relative_to(ROOT / "common").parts[0].removesuffix(".py")
        for other in {name.split(".")[1] for name in imports(path)} - {room}:
            found.setdefault((room, other), []).append(path.name)
    return found


def test_rooms_import_only_what_stands_above_them_in_the_design():
    places = {room: place for place, room in enumerate(room for floor in FLOORS for room in floor)}
    entries = {path.name.removesuffix(".py") for path in (ROOT / "common").iterdir()}
    assert entries - {"__init__", "__pycache__"} == set(places)
    wrong = {pair: files for pair, files in arrows().items() if places[pair[1]] >= places[pair[0]]}
    assert not wrong
    assert len(arrows()) <= MAX_ARROWS, sorted(arrows())


def test_modules_form_no_circle():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "common").rglob("*.py")
    }
    left = {name: imports(path) & set(modules) - {name} for name, path in modules.items()}
    while free := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_scripts_are_imported_by_no_room():
    for path in (ROOT / "common").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(f"from {folder}" in text for folder in ("stages", "data_prep", "kaggle", "tests")), (
            path
        )


ABSENT = (
    "accelerate",
    "datasets",
    "pyarrow",
    "tyro",
    "optimi",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "pytest",
)

# Hides every installed package that is neither in LIBRARIES nor needed by one that is, as if it were absent.
ONLY_ALLOWED = """
import importlib.machinery, importlib.metadata as metadata, re, sys

def needed(names):
    found, todo = set(), list(names)
    while todo:
        name = re.sub("[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match("[A-Za-z0-9._-]+", line)[0] for line in required if "extra ==" not in line]
    return found

keep = needed(sys.argv[1].split(","))
hidden = {
    package
    for package, owners in metadata.packages_distributions().items()
    if not keep & {re.sub("[-_.]+", "-", owner).lower() for owner in owners}
} - {"common"}

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
for name in sys.argv[2].split(","):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not hidden")
"""


def run_with_allowed_only(code, *arguments):
    words = [
        sys.executable,
        "-c",
        ONLY_ALLOWED + code,
        ",".join(LIBRARIES),
        ",".join(ABSENT),
        *map(str, arguments),
    ]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_served_modules_need_nothing_else(tmp_path):
    make_checkpoint(tmp_path / "llama", "llama")
    code = f"""
import importlib
for name in {SERVED}:
    importlib.import_module("common." + name.replace("/", ".").removesuffix(".__init__"))
from pathlib import Path
from common.batching import pack
from common.models import load_model
from common.prompts import Prompter
from common.tokenizer import load_tokenizer
folder = Path(sys.argv[3])
model = load_model(folder, device="cpu", ops="auto")
prompter = Prompter(load_tokenizer(folder), conversation_tokens=128)
[comparison] = prompter.tokenise([(["which?"], ["this"], ["that"])])
ids = [prompter.render(comparison, swapped=swapped).input_ids for swapped in (False, True)]
assert model(pack(ids)).shape == (2, 3)
print("served")
"""
    found = run_with_allowed_only(code, tmp_path / "llama")
    assert found.returncode == 0 and found.stdout == "served\n", found.stderr


@pytest.mark.parametrize(("module", "absent"), [("tokens", "datasets"), ("train.launch", "accelerate")])
def test_what_trains_needs_more(module, absent):
    """The check above can fail."""
    found = run_with_allowed_only(f"import common.{module}")
    assert found.returncode == 1 and f"No module named '{absent}'" in found.stderr
