"""What lies in an artifacts folder, read for the report: trained models, soft labels, evaluations, bundle.

Reads JSON, JSON lines and tables only, needs no torch, and takes whatever is there. What is there but broken
is a ValueError that names the file.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from common.data.table import LABELS, is_labelled
from common.files import read_json

STAGES = ("stage1", "stage2", "stage3")
ENSEMBLE, FITTED, PRIOR = "ensemble", "ensemble-fitted", "prior"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """One run of a training stage, finished or not."""

    stage: str
    name: str
    is_complete: bool
    parent: str | None
    """The checkpoint that it started from; None while it is not finished."""
    parent_stage: str | None
    """None for a published checkpoint."""
    sources: dict[str, int]
    """Training comparisons by source; empty while it is not finished, or where that was not recorded."""
    log_loss: float | None
    """On the held-out fold; None where nothing was held out."""
    steps: dict[str, np.ndarray] | None
    """"step", "loss", "lr", each [logged steps]; None without a metrics.jsonl."""
    sequences: dict[str, object] | None
    """Contents of sequences.json."""

    @property
    def title(self) -> str:
        """`stage3/gemma9b-final`."""
        return f"{self.stage}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Soft labels, of one teacher or of the mean of several."""

    name: str
    teachers: tuple[str, ...]
    num_comparisons: int | None
    """None while it is not finished."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one group of probabilities."""

    num_comparisons: int
    log_loss: float
    interval: tuple[float, float]
    """95 %, of the log loss."""
    accuracy: float
    calibration_error: float
    """Of the likeliest class."""
    swap_gap: float | None
    """Mean absolute difference between both orders."""
    same_winner: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Scores and probabilities of one `evaluate` run."""

    name: str
    is_complete: bool
    members: dict[str, str]
    """Model -> the group that it adds to the ensemble ("gemma9b/mean")."""
    scores: dict[str, Score]
    """Group -> score; empty where nothing is labelled. Without the prior's."""
    prior: float | None
    """Log loss of the constant answer."""
    prior_from: str | None
    """Which labels' mean that answer is."""
    floor: float | None
    """Least log loss that can be reached, where that is known."""
    fitted: dict[str, object] | None
    """`weights`, `gain`, `gain_interval` of the fitted ensemble."""
    slices: dict[str, dict[str, tuple[int, float, float, float]]]
    """Dimension -> slice -> comparisons, log loss, its interval's low and high end; of the ensemble."""
    calibration: dict[str, dict[str, object]]
    """Model or "ensemble" -> its part of calibration.json; empty without one."""
    labels: np.ndarray | None
    """float32 [labelled comparisons, 3]; None where the table has no labels."""
    probabilities: dict[str, np.ndarray] = field(repr=False)
    """Group -> float32 [labelled comparisons, 3]."""

    @property
    def best(self) -> str | None:
        """The member, ensemble or fitted ensemble with the least log loss."""
        groups = [group for group in (*self.members.values(), ENSEMBLE, FITTED) if group in self.scores]
        return min(groups, key=lambda group: self.scores[group].log_loss, default=None)


def read_trained(artifacts: Path) -> list[Trained]:
    """Every run of the training stages, by stage and name."""
    return [
        _trained(stage, path.parent)
        for stage in STAGES
        for path in sorted((artifacts / stage).glob("*/run.json"))
    ]


def read_labellings(artifacts: Path) -> list[Labelling]:
    """Every set of soft labels, the ensemble's first."""
    found = []
    for path in sorted(
        (artifacts / "pseudo").glob("*/run.json"), key=lambda p: (p.parent.name != ENSEMBLE, p)
    ):
        with _reading(path):
            run = read_json(path)
            teachers = run["recipe"].get("teachers", [path.parent.name])
            found.append(
                Labelling(
                    name=path.parent.name,
                    teachers=tuple(map(str, teachers)),
                    num_comparisons=run.get("metrics", {}).get("num_comparisons"),
                )
            )
    return found


def read_evaluations(artifacts: Path) -> list[Evaluation]:
    """Every evaluation, of the last stage first; without a stage in its name, the newest first."""
    floors = _floors(artifacts / "summary.json")

    def rank(path: Path) -> tuple[int, float]:
        stage = re.search(r"stage(\d)", path.parent.name)
        return -(int(stage[1]) if stage else 0), -path.stat().st_mtime

    return [
        _evaluation(path.parent, floors.get(path.parent.name))
        for path in sorted((artifacts / "evaluate").glob("*/run.json"), key=rank)
    ]


def read_bundle(artifacts: Path) -> tuple[dict | None, dict | None]:
    """manifest.json and verify.json of the bundle, each None where it is absent."""
    paths = [artifacts / "bundle" / name for name in ("manifest.json", "verify.json")]
    manifest, verified = (read_json(path) if path.is_file() else None for path in paths)
    for path, found, key in zip(paths, (manifest, verified), ("models", "checks"), strict=True):
        entries = [] if found is None else found.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: {key} is not a list of objects; build and verify the bundle again")
    return manifest, verified


def _trained(stage: str, folder: Path) -> Trained:
    with _reading(folder / "run.json"):
        run = read_json(folder / "run.json")
        status = run["status"]
    preference = read_json(folder / "preference.json") if (folder / "preference.json").is_file() else {}
    with _reading(folder / "preference.json"):
        lineage = preference.get("lineage", {})
        loss = preference.get("metrics", {}).get("log_loss")
        sources = {str(name): int(count) for name, count in lineage.get("train_sources", {}).items()}
        parent, parent_stage = lineage.get("parent"), lineage.get("parent_stage")
    path = folder / "sequences.json"
    sequences = None
    if path.is_file():
        with _reading(path):
            sequences = read_json(path)
            for key in ("num_sequences", "num_truncated", "conversation_tokens"):
                sequences[key] = int(sequences[key])
            for key in ("length_edges", "length_counts"):
                sequences[key] = np.asarray(sequences[key], np.float64)
            if len(sequences["length_edges"]) != len(sequences["length_counts"]) + 1:
                raise ValueError("there must be one edge more than counts")
    return Trained(
        stage=stage,
        name=folder.name,
        is_complete=status == "complete",
        parent=parent,
        parent_stage=parent_stage,
        sources=sources,
        log_loss=None if loss is None else float(loss),
        steps=_read_steps(folder / "metrics.jsonl"),
        sequences=sequences,
    )


def _read_steps(path: Path) -> dict[str, np.ndarray] | None:
    """The logged steps; a last line without its end is being written, or was when the run was stopped."""
    if not path.is_file():
        return None
    with _reading(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        with _reading(path, f" (line {number})"):
            record = json.loads(line)
            rows.append([float(record[key]) for key in ("step", "loss", "lr")])
    if not rows:
        return None
    return dict(zip(("step", "loss", "lr"), np.array(rows).T, strict=True))


def _evaluation(folder: Path, floor: float | None) -> Evaluation:
    with _reading(folder / "run.json"):
        run = read_json(folder / "run.json")
        recipe = run["recipe"]
        models = [str(model) for model in recipe["models"]]
        orders = recipe.get("ensemble_orders") or ["both"] * len(models)
        members = {
            model: f"{model}/{'mean' if order == 'both' else order}"
            for model, order in zip(models, orders, strict=True)
        }
        is_complete = run["status"] == "complete"
    path = folder / "scores.json"
    with _reading(path):
        found = read_json(path) if path.is_file() else {}
        prior = found.pop(PRIOR, {})
        prior_loss, prior_from = prior.get("log_loss"), prior.get("from")
        scores = {str(group): _score(one) for group, one in found.items()}
        slices = {
            str(dimension): {
                str(name): (int(one["num_comparisons"]), float(one["log_loss"]), *map(float, one["interval"]))
                for name, one in groups.items()
            }
            for dimension, groups in found.get(ENSEMBLE, {}).get("slices", {}).items()
        }
        fitted = found.get(FITTED)
        if fitted is not None:
            fitted = {key: fitted[key] for key in ("weights", "gain", "gain_interval")}
    path = folder / "calibration.json"
    with _reading(path):
        calibration = _calibration(read_json(path)) if path.is_file() else {}
    groups = {group for group in scores if group != PRIOR}
    groups |= {f"{model}/{order}" for model in models for order in ("given", "swapped")} | {ENSEMBLE}
    labels, probabilities = _read_probabilities(folder / "probabilities.parquet", sorted(groups))
    return Evaluation(
        name=folder.name,
        is_complete=is_complete,
        members=members,
        scores=scores,
        prior=None if prior_loss is None else float(prior_loss),
        prior_from=prior_from,
        floor=floor,
        fitted=fitted,
        slices=slices,
        calibration=calibration,
        labels=labels,
        probabilities=probabilities,
    )


def _score(one: dict) -> Score:
    swap = one.get("swap_consistency") or {}
    low, high = map(float, one["log_loss_interval"])
    return Score(
        num_comparisons=int(one["num_comparisons"]),
        log_loss=float(one["log_loss"]),
        interval=(low, high),
        accuracy=float(one["accuracy"]),
        calibration_error=float(one["calibration_error"]["top"]),
        swap_gap=swap.get("mean_absolute_difference"),
        same_winner=swap.get("same_winner"),
    )


def _calibration(found: dict) -> dict[str, dict[str, object]]:
    results = {**found.get("per_model", {}), ENSEMBLE: found}
    for one in results.values():
        float(one["uncalibrated_log_loss"])
        for name in ("temperature", "vector"):
            float(one[name]["log_loss"]), float(one[name]["gain"])
            low, high = one[name]["gain_interval"]
            float(low), float(high)
        if one["kept"] not in (None, "temperature", "vector"):
            raise ValueError(f"kept is {one['kept']!r}, expected null, temperature or vector")
    return results


def _read_probabilities(path: Path, groups: Sequence[str]) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """Labels and the probabilities of `groups`, as far as the table has them, on its labelled rows."""
    if not path.is_file():
        return None, {}
    with _reading(path):
        names = pl.scan_parquet(path).collect_schema().names()
        if not set(LABELS) <= set(names):
            return None, {}
        present = {
            group: [f"{group}/{label}" for label in LABELS]
            for group in groups
            if all(f"{group}/{label}" in names for label in LABELS)
        }
        columns = [*LABELS, *(column for found in present.values() for column in found)]
        table = pl.read_parquet(path, columns=columns).filter(is_labelled())
        if table.is_empty():
            return None, {}
        return table.select(LABELS).to_numpy(), {
            group: table.select(found).to_numpy() for group, found in present.items()
        }


def _floors(path: Path) -> dict[str, float]:
    """Evaluation -> the least log loss that can be reached, from a demo's summary."""
    if not path.is_file():
        return {}
    with _reading(path):
        rows = read_json(path)["stages"]
        return {row["stage"]: float(f) for row in rows if (f := row.get("floor_log_loss")) is not None}


@contextmanager
def _reading(path: Path, where: str = "") -> Iterator[None]:
    """Turns whatever goes wrong with a file's contents into a ValueError that names the file."""
    way_out = "make it again, or move its folder away"
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}{where} lacks {error}; {way_out}") from error
    except (ValueError, TypeError, AttributeError, OSError, pl.exceptions.PolarsError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}{where} is broken: {reason}; {way_out}") from error
