"""Report: what a run came to, as one self-contained page and a PNG of each picture.

In    an artifacts folder, whatever lies in it: stages, soft labels, evaluations, bundle; a demo's or your own
Out   <artifacts>/report/ : report.html (images and style inside, no script, no network), *.png
Run   just report
      just report --artifacts artifacts/demo

What is missing is left out, and the page says so and how to make it. Nothing is computed here that was not
measured before: the numbers are those in the JSON files. The page's words stand in report.html.j2.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.console import cli, say
from common.data.table import LABELS, is_labelled, scan
from common.files import read_json, replacing
from common.report import pictures
from common.report.page import data_uri, filled, listed, render
from common.score.metrics import ENSEMBLE, FITTED, PRIOR

TEMPLATE = Path(__file__).with_name("report.html.j2")
STAGES = ("stage1", "stage2", "stage3")
FILES = ("run", "preference", "sequences", "scores", "calibration", "manifest", "verify")
SECTIONS = "Scores|Calibration|Swap consistency|Slices|Training|Sequence lengths|Lineage|Bundle".split("|")
OF_AN_EVALUATION = (
    ("Scores", "prior", "has no prior; evaluate it again"),
    ("Calibration", "probabilities", "probabilities.parquet has no labels; evaluate it again"),
    (
        "Swap consistency",
        "pairs",
        "no labelled probabilities of both orders; evaluate checkpoints with --orders given swapped",
    ),
    ("Slices", "slices", "has no slices; evaluate it again"),
)
"""Section, what it needs of each evaluation, and what to say where that is not there."""
OF_A_RUN = (
    ("Training", "steps", "has logged no step"),
    ("Training", "is_complete", "is not finished; go on with the command it was started with"),
    ("Sequence lengths", "sequences", "has no sequences.json; train it again with this version"),
)
"""Likewise of each run of a stage."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """A page about everything in an artifacts folder."""

    artifacts: Path = Path("artifacts")
    """Tree of everything made."""
    output: Path | None = None
    """Folder that takes report.html and the pictures; by default <artifacts>/report."""


def main(args: Args) -> None:
    artifacts = args.artifacts
    output = args.output or artifacts / "report"
    trained = {stage: read_trained(artifacts / stage) for stage in STAGES}
    labellings, evaluations = read_folders(artifacts / "pseudo"), read_evaluations(artifacts)
    bundle = read_folder(artifacts / "bundle")
    if not (any(trained.values()) or labellings or evaluations or bundle["manifest"] or bundle["verify"]):
        raise ValueError(
            f"{artifacts} holds nothing to report on: no stage1/2/3, pseudo, evaluate or bundle below it. "
            "Name the folder of a run (--artifacts artifacts/demo), or make one: just demo"
        )
    found = {"trained": trained, "labellings": labellings, "evaluations": evaluations, "bundle": bundle}
    found["served"] = find_served(**found)
    missing = list_missing(**found)
    found["scored"] = [one for one in evaluations if one["pooled"]]
    found["scored"].sort(key=lambda one: one is not found["served"])  # what the bundle serves comes first
    last_first = sorted(found["scored"], key=lambda one: "stage" in one["name"])
    found["ladder"] = {one["name"]: one["rungs"] for one in reversed(last_first)}
    checks = bundle["verify"].get("checks", [])
    passed = ["passed" if check.get("passed") is True else "FAILED" for check in checks]
    found["checks"] = [check | {"result": result} for check, result in zip(checks, passed, strict=True)]
    images = draw(output, trained, found["scored"], found["ladder"])
    page = render(TEMPLATE, name=artifacts.resolve().name, pictures=images, missing=missing, **found)
    with replacing(output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    for title, lines in missing.items():
        if lines:
            say(f"{title}: {' '.join(lines)}")
    counts = f"{page.count('<figure>')} pictures, {page.count('<table>')} tables"
    say(f"report: {counts} in {output / 'report.html'}")


def read_or_empty(path: Path) -> dict:
    """The JSON object in a file that need not be there (yet)."""
    return read_json(path) if path.is_file() else {}


def read_folder(folder: Path) -> dict:
    """A run's or the bundle's `folder`, and its JSON files by stem."""
    found = {stem: read_or_empty(folder / f"{stem}.json") for stem in FILES}
    names = {"name": folder.name, "title": f"{folder.parent.name}/{folder.name}"}
    return {"folder": folder, "is_complete": found["run"].get("status") == "complete", **names, **found}


def read_folders(parent: Path) -> list[dict]:
    """All runs below a folder, finished or not, by name."""
    return [read_folder(path.parent) for path in sorted(parent.glob("*/run.json"))]


def read_trained(parent: Path) -> list[dict]:
    """All runs of a stage; beside the files `steps` (logged values), `lengths` and `origin`."""
    runs = read_folders(parent)
    for run in runs:
        path = run["folder"] / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        steps = [json.loads(line) for line in lines[:-1]]  # the last one is empty, or being written
        run["steps"] = {key: [step[key] for step in steps] for key in ("step", "loss", "lr") if steps}
        run["lengths"], run["origin"] = {}, {}
        if found := run["sequences"]:
            cut, total = found["num_truncated"], found["num_sequences"]
            share = cut / max(total, 1)
            keys = {"edges": "length_edges", "counts": "length_counts", "budget": "conversation_tokens"}
            note = f"{cut:,} of {total:,} cut ({share:.1%})"
            run["lengths"] = {"name": run["name"], "title": run["title"], "note": note, "share": share}
            run["lengths"] |= {**found, **{key: found[name] for key, name in keys.items()}}
        lineage, metrics = (run["preference"].get(key, {}) for key in ("lineage", "metrics"))
        run["held_out"] = metrics.get("log_loss")
        if lineage.get("parent"):
            sources = listed(lineage.get("train_sources", {}), "{} {:,}") or "not recorded"
            loss = f"{metrics['log_loss']:.4f}" if "log_loss" in metrics else "nothing held out"
            run["origin"] = {"title": run["title"], **lineage, "sources": sources, "loss": loss}
    return runs


def read_evaluations(artifacts: Path) -> list[dict]:
    """Every evaluation, of the last stage first; without a stage in its name, the newest first.

    Beside the files: `pooled` (the scores of what each model adds to the ensemble, and of the ensembles),
    `prior` (its scores), `floor` (log loss, None where unknown), `probabilities`, `rows` (of each table), and
    what the pictures take: `rungs`, `slices`, `claims` and `pairs`.
    """
    stages = read_or_empty(artifacts / "summary.json").get("stages", [])
    floors = {row["stage"]: row.get("floor_log_loss") for row in stages}
    evaluations = read_folders(artifacts / "evaluate")
    votes = {one["name"]: one["run"].get("inputs", {}).get("comparisons") for one in evaluations}
    floors |= {
        name: floors[stage] for name in votes for stage in floors if votes[name] == votes.get(stage, "")
    }
    for one in evaluations:
        recipe, scores = one["run"]["recipe"], one["scores"]
        orders = recipe.get("ensemble_orders") or ["both"] * len(recipe["models"])
        pairs = zip(recipe["models"], orders, strict=True)
        groups = [f"{model}/{'mean' if order == 'both' else order}" for model, order in pairs]
        pooled = {short(name): scores[name] for name in (*groups, ENSEMBLE, FITTED) if name in scores}
        one |= {"pooled": pooled, "prior": scores.pop(PRIOR, {}), "floor": floors.get(one["name"])}
        marks = {"prior": one["prior"].get("log_loss"), "floor": one["floor"]}
        rungs = {name: (score["log_loss"], *score["log_loss_interval"]) for name, score in pooled.items()}
        one["rungs"] = {"rows": rungs, "marks": {name: at for name, at in marks.items() if at is not None}}
        one["slices"] = slice_blocks(scores.get(ENSEMBLE, {}))
        found = one["probabilities"] = read_probabilities(one["folder"] / "probabilities.parquet")
        shown = groups if len(groups) == 1 else [*groups, ENSEMBLE]
        one["claims"] = {short(name): (found[name], found["labels"]) for name in shown if name in found}
        both = {model: (f"{model}/given", f"{model}/swapped") for model in recipe["models"]}
        one["pairs"] = {m: (found[a], found[b]) for m, (a, b) in both.items() if {a, b} <= found.keys()}
        one["rows"] = table_rows(one)

    def rank(one: dict) -> tuple[list[str], float]:
        return re.findall(r"stage(\d)", one["name"])[:1], (one["folder"] / "run.json").stat().st_mtime

    return sorted(evaluations, key=rank, reverse=True)


def find_served(
    trained: dict[str, list[dict]], labellings: list[dict], evaluations: list[dict], bundle: dict
) -> dict | None:
    """The scored evaluation of the bundle's ensemble: its models, orders and weights, on the validation runs.

    An earlier stage may be weighed likewise; what it scored was a teacher, or the start of another run.
    """
    models = bundle["manifest"].get("models", [])
    wanted = members(*([model.get(key) for model in models] for key in ("name", "order", "weight")))
    earlier = {one["run"].get("inputs", {}).get("teacher") for one in labellings}
    runs = (run for of_stage in trained.values() for run in of_stage)
    earlier |= {run["preference"].get("lineage", {}).get("checkpoint") for run in runs}
    for one in evaluations:
        recipe, scored = one["run"]["recipe"], one["run"].get("inputs", {}).get("checkpoints", [])
        orders = recipe.get("ensemble_orders") or ["both"] * len(recipe["models"])
        is_same = members(recipe["models"], orders, recipe.get("weights", [])) == wanted != {}
        if is_same and ENSEMBLE in one["pooled"] and not earlier & set(scored):
            return one
    return None


def members(names: list[str], orders: list[str], weights: list[float]) -> dict[str, tuple[str, float]]:
    """Model -> its order and its share of the ensemble; nothing where not all have a weight."""
    if None in weights or not sum(weights):
        return {}
    found = zip(names, orders, weights, strict=True)
    return {name: (order, round(weight / sum(weights), 4)) for name, order, weight in found}


def short(group: str) -> str:
    """`short("gemma9b/mean")` -> "gemma9b"."""
    return group.removesuffix("/mean")


def slice_blocks(ensemble: dict) -> dict[str, dict]:
    """The ensemble's log loss by turns, length and so on, as the ladder takes it."""
    blocks = {}
    for by, slices in ensemble.get("slices", {}).items():
        rows = {
            f"{name} ({score['num_comparisons']:,})": (score["log_loss"], *score["interval"])
            for name, score in slices.items()
        }
        blocks[f"by {by}"] = {"rows": rows, "marks": {"all comparisons": ensemble["log_loss"]}}
    return blocks


def table_rows(one: dict) -> dict[str, list[dict]]:
    """What the tables of an evaluation show: its JSON, a line a row."""
    scores, scaling = one["scores"], one["calibration"]
    prior = [{"name": "prior", "log_loss": one["prior"]["log_loss"]}] if one["prior"] else []
    fitted = {**scaling.get("per_model", {}), ENSEMBLE: scaling} if scaling else {}
    return {
        "scores": [{"name": group, **score} for group, score in scores.items()] + prior,
        "fitted": [
            {**score, "name": one["name"], "weights": listed(score["weights"], "{} {:.3f}")}
            for group, score in scores.items()
            if group == FITTED
        ],
        "scaling": [
            {"name": f"{model}, {kind}", "without": found["uncalibrated_log_loss"], **found[kind]}
            | {"kept": "yes" if found["kept"] == kind else "no"}
            for model, found in fitted.items()
            for kind in ("temperature", "vector")
        ],
        "swap": [
            {"name": model, **score["swap_consistency"]}
            for model in one["pairs"]
            if "swap_consistency" in (score := scores.get(f"{model}/mean", {}))
        ],
        "slices": [
            {"name": name, "by": by, **score}
            for by, slices in scores.get(ENSEMBLE, {}).get("slices", {}).items()
            for name, score in slices.items()
        ],
    }


def read_probabilities(path: Path) -> dict[str, np.ndarray]:
    """Group -> float32 [labelled comparisons, 3], and "labels" likewise; empty where nothing is labelled."""
    frame = scan(path).collect() if path.is_file() else pl.DataFrame()
    if LABELS[0] not in frame.columns or (frame := frame.filter(is_labelled())).is_empty():
        return {}
    groups = [name.removesuffix(f"/{LABELS[0]}") for name in frame.columns if name.endswith(f"/{LABELS[0]}")]
    found = {group: frame.select(f"{group}/{label}" for label in LABELS).to_numpy() for group in groups}
    return found | {"labels": frame.select(LABELS).to_numpy()}


def list_missing(
    trained: dict[str, list[dict]],
    labellings: list[dict],
    evaluations: list[dict],
    bundle: dict,
    served: dict | None,
) -> dict[str, list[str]]:
    """Section, in the page's order -> sentences on what is not there and how to make it."""
    scored = [one for one in evaluations if one["pooled"]]
    runs = [run for runs in trained.values() for run in runs]
    lines = []
    for title, key, sentence in OF_AN_EVALUATION:
        if not scored:
            lines.append((title, "There is no scored evaluation; make one with: just evaluate."))
        lines += [(title, f"{one['name']}: {sentence}.") for one in scored if not one[key]]
    for one in evaluations:
        if not one["pooled"] and one["is_complete"]:
            lines.append(("Scores", f"Evaluation {one['name']} had no labelled comparisons to score."))
        elif not one["pooled"]:
            lines.append(("Scores", f"Evaluation {one['name']} is not finished; start it again."))
    for stage in (stage for stage, of_stage in trained.items() if not of_stage):
        lines.append(("Training", f"Nothing was trained in {stage}; do it with: just {stage} MODEL."))
    for title, key, sentence in OF_A_RUN:
        lines += [(title, f"{run['title']} {sentence}.") for run in runs if not run[key]]
    is_calibrated = any(one["calibration"] for one in scored)
    calibrate = "give a finished evaluation's command the flag --calibrate"
    train = "train one with: just stage1 MODEL"
    models = bundle["manifest"].get("models", [])
    flags = [("ensemble-orders", "{order}"), ("weights", "{weight:g}")]
    words = [f"--{flag} {' '.join(filled(model, form) for model in models)}" for flag, form in flags]
    serve = f"score its models' validation runs with: just evaluate {' '.join(words)} --name served"
    has_origin = any(run["origin"] for run in runs)
    for title, is_there, sentence in (
        (
            "Scores",
            served or not bundle["manifest"],
            f"No evaluation scores what the bundle serves; {serve}.",
        ),
        ("Calibration", is_calibrated or not scored, f"No calibration was fitted; {calibrate}."),
        ("Sequence lengths", runs, "Nothing was trained; begin with: just stage1 MODEL."),
        ("Lineage", labellings, "There are no pseudo labels; make them with: just pseudo-label."),
        ("Lineage", has_origin, f"No finished checkpoint tells its origin; {train}."),
        ("Bundle", bundle["manifest"], "There is no bundle; build one with: just submit."),
        ("Bundle", bundle["verify"], "No bundle has been verified; do it with: just submit."),
    ):
        if not is_there:
            lines.append((title, sentence))
    return {title: [line for where, line in lines if where == title] for title in SECTIONS}


def draw(output: Path, trained: dict[str, list[dict]], scored: list[dict], ladder: dict) -> dict[str, str]:
    """Paints what there is to paint; returns the pictures as data URIs, by name."""
    work = {"ladder": (pictures.ladder, ladder)}
    for one in scored:
        work[f"reliability-{one['name']}"] = (pictures.reliability, one["claims"])
        work[f"swap-{one['name']}"] = (pictures.swap_consistency, one["pairs"])
        work[f"slices-{one['name']}"] = (pictures.ladder, one["slices"])
    for stage, runs in trained.items():
        logged = {run["name"]: run["steps"] for run in runs if run["steps"]}
        work[f"curves-{stage}"] = (pictures.curves, logged)
        lengths = {run["name"]: run["lengths"] for run in runs if run["lengths"]}
        work[f"lengths-{stage}"] = (pictures.lengths, lengths)
    uris = {}
    for name, (painter, data) in work.items():
        if data:
            painter(output / f"{name}.png", data)
            uris[name] = data_uri(output / f"{name}.png")
    return uris


if __name__ == "__main__":
    cli(main)
