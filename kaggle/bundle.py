"""Builds the bundle: finals as fp16 safetensors, the code that serves them, a notebook, a manifest.

In    artifacts/stage3/*-final (or --finals); with --evaluation, held-out probabilities in artifacts/evaluate
Out   artifacts/bundle/ : manifest.json, notebook.ipynb, code/, models/, wheels/
Run   just submit, which also verifies it; alone: python kaggle/bundle.py

Weights are converted one model at a time on the CPU: 9B takes about 20 GB of memory.
"""

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bundle_manifest import FORMAT, MANIFEST, files_of, read_bundle, read_manifest
from common.console import cli, say, show_table
from common.data.table import LABELS, Order, is_labelled, labels_array, scan
from common.files import file_hash, read_json, write_json
from common.locks import lock, replacing_folder
from common.models import checkpoint_hash, load_model, read_preference, save_checkpoint
from common.runs import check_whole, code_hash, read_run
from common.score.calibration import cross_fit_weights
from common.score.ensemble import contributed, interval, read_group
from common.tokenizer import load_tokenizer
from common.trained import open_prompter

ROOT = Path(__file__).resolve().parent.parent
SERVED = (
    *("__init__", "files", "console", "batching", "ops", "models", "tokenizer", "prompts", "trained"),
    *("data/__init__", "data/table", "data/votes_csv", "score/__init__", "score/metrics"),
)
"""Modules of `common` that the notebook needs."""
SCRIPTS = ("infer.py", "bundle_manifest.py")
LIBRARIES = ("torch", "transformers", "safetensors", "polars", "rich", "numpy", "huggingface-hub", "jinja2")
"""What the served code imports."""
REQUIREMENTS = {"libraries": LIBRARIES, "kernel": ("ipykernel",)}
"""What the notebook's machine has: for the served code, and to run a notebook."""

OrderPolicy = Literal[Order, "both"]
POLICY: dict[str, tuple[OrderPolicy, float]] = {
    # Order in which a model sees the answers, and its weight: the original's 2 : 1. One order each is half
    # of the time, and two models that see opposite orders make up for each other's leaning. Others: both, 1.
    "gemma9b": ("given", 2.0),
    "armorm8b": ("swapped", 1.0),
    "tiny-gemma": ("given", 2.0),
    "tiny-llama": ("swapped", 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """A bundle of finished models."""

    artifacts: Path = Path("artifacts")
    """Tree of everything made; inputs and outputs are found below it unless named."""
    finals: tuple[Path, ...] = ()
    """Checkpoint folders; by default every complete one that is called <artifacts>/stage3/*-final."""
    output: Path | None = None
    """Folder of the bundle; by default <artifacts>/bundle."""
    orders: tuple[OrderPolicy, ...] = ()
    """Order in which each final sees the answers, one a final; by default by model."""
    weights: tuple[float, ...] = ()
    """Ensemble weights, one a final; by default by model."""
    evaluation: str | None = None
    """Subfolder of <artifacts>/evaluate whose kept scaling is served, and whose votes --fit-weights takes."""
    fit_weights: bool = False
    """Fit the ensemble weights on the held-out votes of --evaluation, in place of the default ones."""
    wheels: Path | None = None
    """Folder of wheels to take along, installed by the notebook without network."""
    accept_different_data: bool = False
    """Bundle finals that were trained on different votes."""
    max_shard_bytes: int = 5_000_000_000
    """Most bytes per weight file."""

    def __post_init__(self) -> None:
        if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"--weights is {self.weights}, expected numbers >= 0 with a sum above 0")
        if self.fit_weights and self.weights:
            raise ValueError(f"--fit-weights and --weights {self.weights} exclude each other; leave one out")
        if self.fit_weights and self.evaluation is None:
            raise ValueError(
                "--fit-weights needs votes that the validation runs have not seen: name their evaluation, "
                "such as --evaluation stage3 (made by just evaluate --name stage3)"
            )
        if self.wheels is not None and not list(self.wheels.glob("*.whl")):
            raise ValueError(f"--wheels {self.wheels} holds no .whl file")


def main(args: Args) -> None:
    output = args.output or args.artifacts / "bundle"
    with lock(output):
        build(describe(args), args, output)


def build(manifest: dict, args: Args, output: Path, *, earlier: tuple[Path, ...] = ()) -> None:
    """Makes a bundle, unless it lies there whole; the folder appears when it is whole.

    Args:
        manifest: As of `describe`.
        args: Whence code and weights come.
        output: Folder to make or replace.
        earlier: Further bundles, from which models that did not change are taken.

    Raises:
        ValueError: A weight does not fit fp16, nothing can be written, or the folder holds something else.
    """
    if is_same(output, manifest):
        say(f"{output} is up to date")
        return
    made = converted_models(*earlier, output)
    with replacing_folder(output) as folder:
        for name, source in contents(args.wheels).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(source, folder / name)
        for model in manifest["models"]:
            final, target = Path(model["checkpoint"]), folder / model["folder"]
            if (same := made.get(model["checkpoint_hash"])) is not None:
                say(f"{final}: unchanged since the last bundle")
                shutil.copytree(same, target, copy_function=link_or_copy)
            else:
                convert(final, target, max_shard_bytes=args.max_shard_bytes)
        files = {name: file_hash(folder / name) for name in files_of(folder)}
        write_json(folder / MANIFEST, {**manifest, "files": files})
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    say(f"{output}: {len(manifest['models'])} models, {size / 1e9:.3f} GB")


def is_same(output: Path, manifest: dict) -> bool:
    """Whether the bundle that lies there is whole and says the same, its files aside.

    Raises:
        ValueError: The folder holds something else than a bundle.
    """
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / MANIFEST).is_file():
        raise ValueError(f"{output} holds files but no {MANIFEST}; choose another --output or empty it")
    try:
        found = read_manifest(output)
        if found != {**manifest, "files": found["files"]}:
            return False
        read_bundle(output)
    except ValueError as error:
        say(f"{error}; building it again")
        return False
    return True


def describe(args: Args) -> dict[str, object]:
    """The manifest of the bundle that these arguments ask for, without its files.

    Raises:
        ValueError: The finals are missing, broken or do not fit together.
    """
    stage3 = args.artifacts / "stage3"
    finals = args.finals or [path.parent for path in sorted(stage3.glob("*-final/run.json"))]
    if not finals:
        raise ValueError(
            f"{stage3} holds no final (*-final); make one with just stage3 MODEL --final, or name --finals"
        )
    models = [describe_final(path) for path in finals]
    check_together(models, accept_different_data=args.accept_different_data)
    set_policy(models, args)
    rows = [
        (m["name"], m["checkpoint"], m["order"], f"{m['weight']:g}", m["template_hash"][:12]) for m in models
    ]
    show_table("bundle", ("model", "final", "order", "weight", "template"), rows)
    return {
        "format": FORMAT,
        "classes": list(LABELS),
        "prior": np.mean([model.pop("label_prior") for model in models], axis=0).tolist(),
        "models": models,
        "scaling": find_scaling(args, models),
        "code": code_hash(*contents(args.wheels).values(), Path(__file__)),
        "requirements": {name: needed_distributions(of) for name, of in REQUIREMENTS.items()},
    }


def describe_final(path: Path) -> dict[str, object]:
    """What the manifest says of a final, after checking that it is one.

    Raises:
        ValueError: It is not finished, not trained by a stage, a validation run, or its classes or its prompt
            are not what this code gives.
    """
    for name in ("run.json", "preference.json", "config.json", "trained_on.parquet"):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: it is no finished final; run just stage3 MODEL --final")
    if (status := (run := read_run(path))["status"]) != "complete":
        raise ValueError(f"{path} is not finished (status {status}): give its stage's command again")
    check_whole(path, run)
    preference = read_preference(path)
    if preference["classes"] != list(LABELS):
        raise ValueError(
            f"{path} answers in the class order {preference['classes']}, this code serves {list(LABELS)}: "
            "its probabilities would land in the wrong columns. Train it with this code"
        )
    if preference["lineage"]["held_out"] is not None:
        raise ValueError(
            f"{path} is a validation run: it was not trained on its held-out fold. Bundle the final instead: "
            "just stage3 MODEL --final"
        )
    prompter = open_prompter(str(path), preference)
    name = path.name.removesuffix("-final")
    return {
        "name": name,
        "folder": f"models/{name}",
        "model": preference["model"],
        "stage": preference["stage"],
        "format": preference["formats"][0],
        "template_hash": prompter.template_hash,
        "prompt_hash": prompter.prompt_hash,
        "checkpoint": str(path),
        "checkpoint_hash": checkpoint_hash(path),
        "lineage": preference["lineage"],
        "label_prior": preference["label_prior"],
    }


def check_together(models: list[dict], *, accept_different_data: bool) -> None:
    """ValueError where two finals do not go into one ensemble: names, weights, stages, votes."""
    for a, b in itertools.combinations(models, 2):
        votes = [model["lineage"]["train"] for model in (a, b)]
        faults = {
            "would have one name in the bundle; rename a folder": a["name"] == b["name"],
            "hold the same weights; name each final once": a["checkpoint_hash"] == b["checkpoint_hash"],
            f"are of the stages {a['stage']} and {b['stage']}; take one stage": a["stage"] != b["stage"],
            f"were trained on different votes ({votes[0][:12]} and {votes[1][:12]}); train both on the same, "
            "or say --accept-different-data": votes[0] != votes[1] and not accept_different_data,
        }
        for fault, is_there in faults.items():
            if is_there:
                raise ValueError(f"{a['checkpoint']} and {b['checkpoint']} {fault}")


def set_policy(models: list[dict], args: Args) -> None:
    """Gives every model its order and its weight."""
    for flag, given in (("orders", args.orders), ("weights", args.weights)):
        if len(given) not in (0, len(models)):
            names = " ".join(model["name"] for model in models)
            raise ValueError(
                f"--{flag} has {len(given)} entries for {len(models)} finals ({names}); give one each"
            )
    for i, model in enumerate(models):
        order, weight = POLICY.get(model["model"], ("both", 1.0))
        model["order"] = args.orders[i] if args.orders else order
        model["weight"] = float(args.weights[i]) if args.weights else weight
    if args.fit_weights:
        fit_weights(models, args.artifacts / "evaluate" / args.evaluation)


def fit_weights(models: list[dict], evaluation: Path) -> None:
    """Replaces the weights by those fitted on held-out votes, and says what that gains."""
    path = evaluation / "probabilities.parquet"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; make it with just evaluate --name {evaluation.name}")
    table = scan(path).filter(is_labelled()).collect()
    groups = [contributed(model["name"], model["order"]) for model in models]
    for group in groups:
        if f"{group}/{LABELS[0]}" not in table.columns:
            raise ValueError(
                f"{path} has no probabilities {group}; evaluate the validation runs of the same models in "
                "both orders, under the finals' names without -final"
            )
    given = [model["weight"] for model in models]
    keys = ["/".join(key) for key in table.select("source", "id").rows()]
    _, found = cross_fit_weights(
        [read_group(table, group) for group in groups], labels_array(table), keys, given
    )
    for model, weight in zip(models, found["weights"], strict=True):
        model["weight"] = round(weight, 4)
    say(
        f"weights fitted on {len(table):,} votes of {evaluation.name}: gain over {given} across folds "
        f"{found['gain']:+.4f} ({interval(found['gain_interval'])})"
        + ("" if found["gain_interval"][0] > 0 else "; the interval holds 0: the default is as good")
    )


def find_scaling(args: Args, models: list[dict]) -> dict[str, list[float]] | None:
    """The scaling that the evaluation kept, if it was fitted on this very ensemble.

    Raises:
        ValueError: It was fitted on other models, orders or weights.
    """
    if args.evaluation is None:
        return None
    path = args.artifacts / "evaluate" / args.evaluation / "calibration.json"
    if not path.is_file():
        say(f"{path} does not exist (just evaluate --calibrate): served without scaling")
        return None
    found = read_json(path)
    if found["kept"] is None:
        say(f"{path}: no scaling gains beyond doubt: served without")
        return None
    names, orders, weights = ([model[field] for model in models] for field in ("name", "order", "weight"))
    fitted = [found["models"], found["orders"], shares(found["weights"])]
    served = [names, orders, shares(weights)]
    if fitted != served:
        raise ValueError(
            f"{path} was fitted on the models, orders and weights {fitted}, but the bundle serves {served}; "
            f"run just evaluate --calibrate --ensemble-orders {' '.join(orders)} "
            f"--weights {' '.join(map(str, weights))} on the validation runs, or leave --evaluation out"
        )
    return found["scaling"]


def shares(weights: list[float]) -> list[float]:
    """Weights as shares of their sum, to four digits."""
    return [round(weight / sum(weights), 4) for weight in weights]


def convert(final: Path, folder: Path, *, max_shard_bytes: int) -> None:
    """Writes a final as fp16 checkpoint; what fp16 cannot hold is an error that names the tensor."""
    say(f"{final}: to fp16")
    model = load_model(final, dtype=torch.float16)
    save_checkpoint(
        folder,
        model=model,
        tokenizer=load_tokenizer(final),
        preference=model.preference,
        max_shard_bytes=max_shard_bytes,
    )


def converted_models(*bundles: Path) -> dict[str, Path]:
    """checkpoint_hash of a final -> the folder that it became, in those of the bundles that are whole."""
    found = {}
    for bundle in bundles:
        with suppress(ValueError):
            models = read_bundle(bundle)["models"]
            found |= {model["checkpoint_hash"]: bundle / model["folder"] for model in models}
    return found


def copy(source: Path | str, target: Path | str) -> None:
    """Copies a file; one that cannot be read is a ValueError, what cannot be written an OSError."""
    with Path(target).open("wb") as file:
        for piece in pieces(source):
            file.write(piece)


def pieces(source: Path | str) -> Iterator[bytes]:
    """The bytes of a file, in pieces; ValueError where it cannot be read."""
    try:
        with Path(source).open("rb") as file:
            while piece := file.read(2**20):
                yield piece
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror or error}; make it readable") from error


def link_or_copy(source: str, target: str) -> None:
    """A hard link, which costs no disk; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        copy(source, target)


def needed_distributions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed distributions that `names` need, themselves included: name -> version, sorted."""
    found, todo = {}, [canonicalize_name(name) for name in names]
    for name in todo:  # which grows
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise ValueError(f"{name} is not installed, but the bundle needs it; run just setup") from error
        found[name] = installed.version
        for requirement in map(Requirement, installed.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(requirement.name))
    return dict(sorted(found.items()))


def contents(wheels: Path | None) -> dict[str, Path]:
    """Everything in a bundle but its models: name within the bundle -> the file that is copied there."""
    files = {f"code/{name}": ROOT / "kaggle" / name for name in SCRIPTS}
    files["notebook.ipynb"] = ROOT / "kaggle/notebook.ipynb"
    for name in SERVED:
        path = ROOT / "common" / name
        for source in sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            files[f"code/{source.relative_to(ROOT).as_posix()}"] = source
    return files | {f"wheels/{path.name}": path for path in sorted(wheels.glob("*.whl") if wheels else ())}


if __name__ == "__main__":
    cli(main)
