"""Report: what a run came to, as one self-contained page and a PNG of each picture.

In    an artifacts folder, whatever lies in it: stages, soft labels, evaluations, bundle; a demo's or your own
Out   <artifacts>/report/ : report.html (images and style inside, no script, no network), *.png
Run   just report
      just report --artifacts artifacts/demo

What is missing is left out, and the page says so and how to make it. Nothing is computed here that was not
measured before: the numbers are those in the JSON files.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from common.console import cli, say
from common.data.table import LABELS, is_labelled
from common.files import read_json, replacing
from common.report import pictures
from common.report.page import Section, render
from common.score.metrics import ENSEMBLE, FITTED, PRIOR

TEMPLATE = Path(__file__).with_name("report.html.j2")
STAGES = ("stage1", "stage2", "stage3")
FILES = ("run", "preference", "sequences", "scores", "calibration", "manifest", "verify")
COUNT, LOSS, GAIN = "{:,}", "{:.4f}", "{:+.4f}"
INTERVAL, GAIN_INTERVAL = "{0[0]:.4f} to {0[1]:.4f}", "{0[0]:+.4f} to {0[1]:+.4f}"
NO_EVALUATION = "There is no scored evaluation; make one with: just evaluate."
SWAP_INTRO = (
    "The same comparison is shown in both orders; the second answer is mirrored back, so that both speak of "
    "the same A. On the dashed line the order does not matter."
)


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
    trained = {stage: read_folders(artifacts / stage) for stage in STAGES}
    labellings, evaluations = read_folders(artifacts / "pseudo"), read_evaluations(artifacts)
    bundle = read_folder(artifacts / "bundle")
    if not (any(trained.values()) or labellings or evaluations or bundle["manifest"] or bundle["verify"]):
        raise ValueError(
            f"{artifacts} holds nothing to report on: no stage1/2/3, pseudo, evaluate or bundle below it. "
            "Name the folder of a run (--artifacts artifacts/demo), or make one: just demo"
        )
    scored = [one for one in evaluations if one["pooled"]]
    sections = [
        scores_section(evaluations, scored, output),
        by_evaluation("Calibration", scored, calibration_part, output),
        by_evaluation("Swap consistency", scored, swap_part, output, intro=SWAP_INTRO),
        by_evaluation("Slices", scored, slices_part, output),
        training_section(trained, output),
        lengths_section(trained, output),
        lineage_section(trained, labellings),
        bundle_section(bundle),
    ]
    if scored and not any(one["calibration"] for one in scored):
        way_out = "give a finished evaluation's command the flag --calibrate"
        sections[1].missing.append(f"No calibration was fitted; {way_out}.")
    for one in sections:
        parts = (one, *one.folded)
        shown, tables = sum(len(part.pictures) for part in parts), sum(len(part.tables) for part in parts)
        say(f"{one.title}: pictures {shown}, tables {tables}{''.join(f'; {line}' for line in one.missing)}")
    page = render(TEMPLATE, headlines(scored, bundle["verify"]), sections, artifacts.resolve().name)
    with replacing(output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"report: {output / 'report.html'}")


def read_folder(folder: Path) -> dict:
    """A run's or the bundle's `folder` and its JSON files by stem; one that is not there (yet) is empty."""
    paths = {stem: folder / f"{stem}.json" for stem in FILES}
    found = {stem: read_json(path) if path.is_file() else {} for stem, path in paths.items()}
    return {"folder": folder, "name": folder.name, "title": f"{folder.parent.name}/{folder.name}", **found}


def read_folders(parent: Path) -> list[dict]:
    """All runs below a folder, finished or not, by name."""
    return [read_folder(path.parent) for path in sorted(parent.glob("*/run.json"))]


def read_evaluations(artifacts: Path) -> list[dict]:
    """Every evaluation, of the last stage first; without a stage in its name, the newest first.

    Beside the files: `groups` (what each model adds to the ensemble), `pooled` (the scores of those and of
    the ensembles), `prior` and `floor` (each None where unknown), `probabilities`.
    """
    summary = artifacts / "summary.json"
    stages = read_json(summary)["stages"] if summary.is_file() else []
    floors = {row["stage"]: row.get("floor_log_loss") for row in stages}
    evaluations = read_folders(artifacts / "evaluate")
    for one in evaluations:
        recipe, scores = one["run"]["recipe"], one["scores"]
        orders = recipe.get("ensemble_orders") or ["both"] * len(recipe["models"])
        pairs = zip(recipe["models"], orders, strict=True)
        one["groups"] = [f"{model}/{'mean' if order == 'both' else order}" for model, order in pairs]
        one["prior"], one["floor"] = scores.pop(PRIOR, None), floors.get(one["name"])
        pooled = (*one["groups"], ENSEMBLE, FITTED)
        one["pooled"] = {group: scores[group] for group in pooled if group in scores}
        one["probabilities"] = read_probabilities(one["folder"] / "probabilities.parquet")

    def rank(one: dict) -> tuple[int, float]:
        stage = re.search(r"stage(\d)", one["name"])
        return -(int(stage[1]) if stage else 0), -(one["folder"] / "run.json").stat().st_mtime

    return sorted(evaluations, key=rank)


def read_probabilities(path: Path) -> dict[str, np.ndarray]:
    """Group -> float32 [labelled comparisons, 3], and "labels" likewise; empty where nothing is labelled."""
    frame = pl.read_parquet(path) if path.is_file() else pl.DataFrame()
    if LABELS[0] not in frame.columns or (frame := frame.filter(is_labelled())).is_empty():
        return {}
    groups = [name.removesuffix(f"/{LABELS[0]}") for name in frame.columns if name.endswith(f"/{LABELS[0]}")]
    found = {group: frame.select(f"{group}/{label}" for label in LABELS).to_numpy() for group in groups}
    return found | {"labels": frame.select(LABELS).to_numpy()}


def headlines(scored: list[dict], verified: dict) -> list[str]:
    """What came out, in two or three sentences."""
    told = "Nothing has been scored yet"
    for first in scored[:1]:
        best, score = min(first["pooled"].items(), key=lambda item: item[1]["log_loss"])
        told = (
            f"Best of evaluation {first['name']}: {best} with a log loss of {score['log_loss']:.4f} "
            f"(95 % {INTERVAL.format(score['log_loss_interval'])}) "
            f"on {score['num_comparisons']:,} comparisons"
        )
        if first["prior"]:
            told += f"; always giving the prior's answer scores {first['prior']['log_loss']:.4f}"
        if first["floor"] is not None:
            told += f", and the best that can be reached is {first['floor']:.4f}"
    if not verified:
        return [f"{told}.", "No bundle has been verified."]
    passed = verified.get("passed") is True
    return [f"{told}.", "The bundle is verified." if passed else "The bundle did NOT pass its verification."]


def scores_section(evaluations: list[dict], scored: list[dict], output: Path) -> Section:
    """The ladder of evaluations, and all numbers."""
    section = Section("Scores", missing=[] if scored else [NO_EVALUATION])
    for one in evaluations:
        if one["pooled"] and not one["prior"]:
            section.missing.append(f"{one['name']}: has no prior; evaluate it again.")
        if not one["pooled"]:
            is_complete = one["run"]["status"] == "complete"
            why = "had no labelled comparisons to score" if is_complete else "is not finished; start it again"
            section.missing.append(f"Evaluation {one['name']} {why}.")
    if not scored:
        return section
    section.text.append("Log loss in nats, lower is better. Bars are 95 % intervals over comparisons.")
    if sources := dict.fromkeys(one["prior"]["from"] for one in scored if one["prior"]):
        section.text.append(f"The prior always answers the mean of {' or of '.join(sources)}.")
    if all(one["floor"] is None for one in scored):
        section.text.append("The floor is known for synthetic votes only.")
    blocks = {}
    first_to_last = scored[::-1]
    for one in sorted(first_to_last, key=lambda one: "stage" not in one["name"]):
        marks = {"prior": (one["prior"] or {}).get("log_loss"), "floor": one["floor"]}
        blocks[one["name"]] = {
            "rows": {
                group.removesuffix("/mean"): (score["log_loss"], *score["log_loss_interval"])
                for group, score in one["pooled"].items()
            },
            "marks": {mark: loss for mark, loss in marks.items() if loss is not None},
        }
    alt = "Log loss with interval of every model and ensemble: " + "; ".join(
        f"{name}: {', '.join(f'{group} {row[0]:.4f}' for group, row in block['rows'].items())}"
        for name, block in blocks.items()
    )
    caption = "From the first stage to the last, then other evaluations."
    section.draw(output / "ladder.png", pictures.ladder, blocks, alt, caption)
    section.folded = [Section(one["name"]) for one in scored[1:]]
    columns = {"model / order": "{}", "comparisons": COUNT, "log loss": LOSS, "95 % interval": INTERVAL}
    columns |= {"accuracy": "{:.3f}", "calibration error": "{0[top]:.3f}"}
    keys = ("num_comparisons", "log_loss", "log_loss_interval", "accuracy", "calibration_error")
    for part, one in zip((section, *section.folded), scored, strict=True):
        rows = [(group, *(score[key] for key in keys)) for group, score in one["scores"].items()]
        if one["prior"]:
            rows.append(("prior", None, one["prior"]["log_loss"], None, None, None))
        part.tabulate(one["name"], columns, rows)
    columns = {"evaluation": "{}", "gain, across folds": GAIN, "95 % interval": GAIN_INTERVAL}
    columns |= {"weights fitted on all": "{}"}
    rows = [
        (one["name"], fitted["gain"], fitted["gain_interval"], _listed(fitted["weights"], "{} {:.3f}"))
        for one in scored
        if (fitted := one["scores"].get(FITTED))
    ]
    section.tabulate("ensemble-fitted: gain over the given weights", columns, rows)
    return section


def by_evaluation(
    title: str, scored: list[dict], part_of: Callable[[dict, Path], Section], output: Path, *, intro: str = ""
) -> Section:
    """A section of one part an evaluation: the first that shows anything is open, the others fold."""
    parts = [part_of(one, output) for one in scored]
    missing = [line for part in parts for line in part.missing] if scored else [NO_EVALUATION]
    first, *others = [part for part in parts if part.pictures or part.tables] or [Section(title)]
    text = [intro, *first.text] if intro and first.pictures else first.text
    return replace(first, title=title, text=text, missing=missing, folded=others)


def calibration_part(one: dict, output: Path) -> Section:
    """Reliability diagrams, and whether a scaling is kept."""
    name, part, claims = one["name"], Section(one["name"]), one["probabilities"]
    if not claims:
        part.missing.append(f"{name}: probabilities.parquet has no labels; evaluate it again.")
    shown = one["groups"] if len(one["groups"]) == 1 else [*one["groups"], ENSEMBLE]
    data = {g.removesuffix("/mean"): (claims[g], claims["labels"]) for g in shown if g in claims}
    if data:
        alt = f"Reliability diagrams for A wins, B wins and tie, {name}: {', '.join(data)}"
        caption = f"{name}: on the dotted line, what is claimed happens as often."
        part.draw(output / f"reliability-{name}.png", pictures.reliability, data, alt, caption)
    if one["calibration"]:
        part.text.append(decision(name, one["calibration"]))
        columns = {"model, scaling": "{}", "log loss without": LOSS, "with, across folds": LOSS}
        columns |= {"gain": GAIN, "95 % interval": GAIN_INTERVAL, "kept": "{}"}
        rows = []
        for model, found in {**one["calibration"]["per_model"], ENSEMBLE: one["calibration"]}.items():
            for kind in ("temperature", "vector"):
                numbers = [found[kind][key] for key in ("log_loss", "gain", "gain_interval")]
                kept = "yes" if found["kept"] == kind else "no"
                rows.append((f"{model}, {kind}", found["uncalibrated_log_loss"], *numbers, kept))
        part.tabulate("Scaling, judged on folds it was not fitted on", columns, rows)
    return part


def decision(evaluation: str, found: dict) -> str:
    """The decision on scaling the ensemble, with both numbers."""
    kind = found["kept"] or max(("temperature", "vector"), key=lambda kind: found[kind]["gain"])
    before, gain = f"{found['uncalibrated_log_loss']:.4f}", GAIN_INTERVAL.format(found[kind]["gain_interval"])
    after = f"{found[kind]['log_loss']:.4f} (gain {found[kind]['gain']:+.4f}, 95 % {gain})"
    if found["kept"]:
        return (
            f"Decision ({evaluation}): keep {kind} scaling. The ensemble's log loss is {before} without it "
            f"and {after} with it, judged across folds."
        )
    return (
        f"Decision ({evaluation}): no scaling. The ensemble's log loss is {before} without one; the better "
        f"one, {kind}, would give {after}, judged across folds: a gain that is not beyond doubt."
    )


def swap_part(one: dict, output: Path) -> Section:
    """p(A, B) against the mirrored p(B, A)."""
    name, part, claims = one["name"], Section(one["name"]), one["probabilities"]
    models = one["run"]["recipe"]["models"]
    orders = {model: [claims.get(f"{model}/{order}") for order in ("given", "swapped")] for model in models}
    pairs = {model: pair for model, pair in orders.items() if all(order is not None for order in pair)}
    if not pairs:
        way = "evaluate checkpoints with --orders given swapped"
        part.missing.append(f"{name}: no labelled probabilities of both orders; {way}.")
        return part
    alt = f"Probabilities with A first against B first, evaluation {name}: {', '.join(pairs)}"
    caption = f"{name}: darker squares hold more comparisons (log scale)."
    part.draw(output / f"swap-{name}.png", pictures.swap_consistency, pairs, alt, caption)
    rows = [
        (model, swap["mean_absolute_difference"], swap["same_winner"])
        for model in models
        if (swap := one["scores"].get(f"{model}/mean", {}).get("swap_consistency"))
    ]
    part.tabulate(name, {"model": "{}", "mean difference": LOSS, "same winner": "{:.1%}"}, rows)
    return part


def slices_part(one: dict, output: Path) -> Section:
    """The ensemble's log loss by turns, length, source and pair of models."""
    name, part, blocks, rows = one["name"], Section(one["name"]), {}, []
    ensemble = one["scores"].get(ENSEMBLE, {})
    for dimension, slices in ensemble.get("slices", {}).items():
        block = {"rows": {}, "marks": {"all comparisons": ensemble["log_loss"]}}
        for value, score in slices.items():
            count, loss, interval = score["num_comparisons"], score["log_loss"], score["interval"]
            block["rows"][f"{value} ({count:,})"] = (loss, *interval)
            rows.append((value, dimension, count, loss, interval))
        blocks[f"by {dimension}"] = block
    if not blocks:
        part.missing.append(f"{name}: has no slices; evaluate it again.")
        return part
    alt = f"Log loss with interval of the ensemble by {', '.join(ensemble['slices'])}, evaluation {name}"
    caption = f"{name}: the ensemble's log loss; in brackets, comparisons."
    part.draw(output / f"slices-{name}.png", pictures.ladder, blocks, alt, caption)
    columns = {"slice": "{}", "by": "{}", "comparisons": COUNT, "log loss": LOSS, "95 % interval": INTERVAL}
    part.tabulate(f"{name}, ensemble", columns, rows)
    return part


def training_section(trained: dict[str, list[dict]], output: Path) -> Section:
    """Loss and learning rate, a picture a stage."""
    section = Section("Training")
    for stage, runs in trained.items():
        if not runs:
            section.missing.append(f"Nothing was trained in {stage}; do it with: just {stage} MODEL.")
        logged = {}
        for run in runs:
            path = run["folder"] / "metrics.jsonl"
            lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            steps = [json.loads(line) for line in lines[:-1]]  # the last one is empty, or being written
            if steps:
                logged[run["name"]] = {key: [step[key] for step in steps] for key in ("step", "loss", "lr")}
            else:
                section.missing.append(f"{run['title']} has logged no step.")
            if run["run"]["status"] != "complete":
                way = "go on with the command it was started with"
                section.missing.append(f"{run['title']} is not finished; {way}.")
        if logged:
            alt = f"Training loss and learning rate over optimiser steps, {stage}: {', '.join(logged)}"
            caption = f"{stage}: running mean of the loss over an eighth of the steps."
            section.draw(output / f"curves-{stage}.png", pictures.curves, logged, alt, caption)
    return section


def lengths_section(trained: dict[str, list[dict]], output: Path) -> Section:
    """How long the training sequences are, and what the budget cut."""
    section, rows = Section("Sequence lengths"), []
    for stage, runs in trained.items():
        shown, notes = {}, []
        for run in runs:
            found = run["sequences"]
            if not found:
                way = "train it again with this version"
                section.missing.append(f"{run['title']} has no sequences.json; {way}.")
                continue
            total, cut, budget = found["num_sequences"], found["num_truncated"], found["conversation_tokens"]
            share = cut / max(total, 1)
            rows.append((run["title"], total, budget, cut, share, found.get("num_became_identical")))
            note = f"{cut:,} of {total:,} cut ({share:.1%})"
            notes.append(f"{run['name']}: {note}")
            edges, counts = found["length_edges"], found["length_counts"]
            shown[run["name"]] = {"edges": edges, "counts": counts, "budget": budget, "note": note}
        if shown:
            alt = f"Histogram of sequence lengths with the budget, {stage}: {'; '.join(notes)}"
            caption = f"{stage}: whole sequences, against the conversation's budget."
            section.draw(output / f"lengths-{stage}.png", pictures.lengths, shown, alt, caption)
    if not any(trained.values()):
        section.missing.append("Nothing was trained; begin with: just stage1 MODEL.")
    if rows:
        section.text.append(
            "The budget is for the conversation alone; the template around it comes on top, so that a "
            "sequence may be a little longer."
        )
    columns = {"run": "{}", "sequences": COUNT, "budget, tokens": COUNT, "cut": COUNT, "share cut": "{:.1%}"}
    section.tabulate("Truncation", columns | {"answers made identical": COUNT}, rows)
    return section


def lineage_section(trained: dict[str, list[dict]], labellings: list[dict]) -> Section:
    """What was trained on what."""
    section, rows = Section("Lineage"), []
    counts = {one["name"]: one["run"].get("metrics", {}).get("num_comparisons") for one in labellings}
    if counts := {name: count for name, count in counts.items() if count is not None}:
        section.text.append(f"Comparisons with pseudo labels: {_listed(counts, '{} {:,}')}.")
    if not labellings:
        section.missing.append("There are no pseudo labels; make them with: just pseudo-label.")
    for run in (run for runs in trained.values() for run in runs):
        lineage, metrics = (run["preference"].get(key, {}) for key in ("lineage", "metrics"))
        if lineage.get("parent"):
            sources = _listed(lineage.get("train_sources", {}), "{} {:,}") or "not recorded"
            loss = LOSS.format(metrics["log_loss"]) if "log_loss" in metrics else "nothing held out"
            rows.append((run["title"], lineage["parent"], sources, loss))
    if rows:
        section.text.append("Losses are of the held-out fold, one order.")
    else:
        section.missing.append("No finished checkpoint tells its origin; train one with: just stage1 MODEL.")
    columns = ("model", "starts from", "trained on", "held-out log loss")
    section.tabulate("Origins", dict.fromkeys(columns, "{}"), rows)
    return section


def bundle_section(bundle: dict) -> Section:
    """What is served, and whether it passed its checks."""
    section, served, verified = Section("Bundle"), bundle["manifest"], bundle["verify"]
    if not served:
        section.missing.append("There is no bundle; build one with: just submit.")
    rows = [[model.get(key) for key in ("name", "order", "weight")] for model in served.get("models", [])]
    section.tabulate("Models served", {"model": "{}", "order": "{}", "weight": "{}"}, rows)
    if not verified:
        section.missing.append("No bundle has been verified; do it with: just submit.")
        return section
    section.text.append("Verified." if verified.get("passed") is True else "The verification did NOT pass.")
    checks = []
    for check in verified.get("checks", []):
        result = "passed" if check.get("passed") is True else "FAILED"
        checks.append((check.get("name"), result, check.get("detail")))
    section.tabulate("Verification", {"check": "{}", "result": "{}", "detail": "{}"}, checks)
    return section


def _listed(values: dict[str, float], form: str) -> str:
    return ", ".join(form.format(*item) for item in values.items())


if __name__ == "__main__":
    cli(main)
