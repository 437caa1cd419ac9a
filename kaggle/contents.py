"""What a bundle holds besides models: the served code, the notebook, wheels, the libraries it needs."""

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.files import file_hash, text_hash

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "kaggle/notebook.ipynb"
SERVED = (
    *("files", "console", "batching", "ops", "models", "data/__init__", "data/table", "data/votes_csv"),
    *("prompts", "trained", "score/__init__", "score/metrics"),
)
"""Modules of `common` that the notebook needs."""
SCRIPTS = ("infer.py", "bundle_manifest.py")
LIBRARIES = ("torch", "transformers", "safetensors", "polars", "rich", "numpy", "huggingface-hub", "jinja2")
"""What the served code imports; the notebook's machine has them."""
KERNEL = ("ipykernel",)
"""What runs a notebook; the notebook's machine has it."""


def needed_distributions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed distributions that `names` need, themselves included: name -> version, sorted."""
    found, todo = {}, [canonicalize_name(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise ValueError(
                f"{name} is not installed, but the bundle serves with it; run just setup"
            ) from error
        found[name] = installed.version
        for line in installed.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(requirement.name))
    return dict(sorted(found.items()))


def code_files() -> dict[str, Path]:
    """Name within the bundle's code/ -> file of this repository."""
    files = {name: ROOT / "kaggle" / name for name in SCRIPTS} | {
        "common/__init__.py": ROOT / "common/__init__.py"
    }
    for name in SERVED:
        path = ROOT / "common" / name
        sources = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        files |= {source.relative_to(ROOT).as_posix(): source for source in sources}
    return files


def code_hash(wheels: Path | None) -> str:
    """Identity of everything in a bundle but its models."""
    files = [
        *code_files().values(),
        NOTEBOOK,
        Path(__file__),
        *(sorted(wheels.glob("*.whl")) if wheels else ()),
    ]
    return text_hash(*(f"{path.name} {file_hash(path)}" for path in files))


def write_code(folder: Path, wheels: Path | None) -> None:
    """Copies the served code, the wheels and the notebook."""
    for name, source in code_files().items():
        (folder / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / "code" / name)
    (folder / "wheels").mkdir()
    for wheel in wheels.glob("*.whl") if wheels else ():
        shutil.copyfile(wheel, folder / "wheels" / wheel.name)
    shutil.copyfile(NOTEBOOK, folder / NOTEBOOK.name)
