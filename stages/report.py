"""Report: what a run came to, as one self-contained page and a PNG of each picture.

In    an artifacts folder, whatever lies in it: stages, soft labels, evaluations, bundle; a demo's or your own
Out   <artifacts>/report/ : report.html (images and style inside, no script, no network), *.png
Run   just report
      just report --artifacts artifacts/demo

What is missing is left out, and the page says so and how to make it. Nothing is computed here that was not
measured before: the numbers are those in the JSON files.
"""

from dataclasses import dataclass
from pathlib import Path

from common.console import cli, say
from common.files import replacing
from common.report import pictures
from common.report.artifacts import (
    STAGES,
    Evaluation,
    Labelling,
    Trained,
    read_bundle,
    read_evaluations,
    read_labellings,
    read_trained,
)
from common.report.evaluations import reliability_section, scores_section, slices_section, swap_section
from common.report.lineage import lineage, trace
from common.report.page import Section, Table, picture, render

TEMPLATE = Path(__file__).with_name("report.html.j2")


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
    trained, labellings = read_trained(artifacts), read_labellings(artifacts)
    evaluations = read_evaluations(artifacts)
    manifest, verified = read_bundle(artifacts)
    if not (trained or labellings or evaluations or manifest or verified):
        raise ValueError(
            f"{artifacts} holds nothing to report on: no stage1/2/3, pseudo, evaluate or bundle below it. "
            "Name the folder of a run (--artifacts artifacts/demo), or make one: just demo"
        )
    scored = [evaluation for evaluation in evaluations if evaluation.best is not None]
    sections = []
    for section in (
        scores_section(evaluations, output),
        reliability_section(scored, output),
        swap_section(scored, output),
        slices_section(scored, output),
        training_section(trained, output),
        lengths_section(trained, output),
        lineage_section(trained, labellings, output),
        bundle_section(manifest, verified),
    ):
        sections.append(section)
        shown = sum(len(part.pictures) for part in (section, *section.folded))
        tables = sum(len(part.tables) for part in (section, *section.folded))
        say(f"{section.title}: pictures {shown}, tables {tables}{''.join(f'; {m}' for m in section.missing)}")
    page = render(TEMPLATE, headline(scored, verified), sections, artifacts.resolve().name)
    with replacing(output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"report: {output / 'report.html'}")


def headline(scored: list[Evaluation], verified: dict | None) -> list[str]:
    """What came out, in two or three sentences."""
    if scored:
        first = scored[0]
        score = first.scores[first.best]
        low, high = score.interval
        told = (
            f"Best of evaluation {first.name}: {first.best} with a log loss of {score.log_loss:.4f} "
            f"(95 % {low:.4f} to {high:.4f}) on {score.num_comparisons:,} comparisons"
        )
        if first.prior is not None:
            told += f"; always giving the prior's answer scores {first.prior:.4f}"
        if first.floor is not None:
            told += f", and the best that can be reached is {first.floor:.4f}"
        sentences = [f"{told}."]
    else:
        sentences = ["Nothing has been scored yet."]
    if verified is None:
        sentences.append("No bundle has been verified.")
    else:
        passed = verified.get("passed") is True
        sentences.append("The bundle is verified." if passed else "The bundle did NOT pass its verification.")
    return sentences


def training_section(trained: list[Trained], output: Path) -> Section:
    """Loss and learning rate, a picture a stage."""
    found, missing = [], []
    for stage in STAGES:
        runs = [run for run in trained if run.stage == stage]
        if not runs:
            missing.append(f"Nothing was trained in {stage}; do it with: just {stage} MODEL.")
        missing += [f"{run.title} has logged no step." for run in runs if run.steps is None]
        missing += [
            f"{run.title} is not finished; go on with the command it was started with."
            for run in runs
            if not run.is_complete
        ]
        logged = {run.name: run.steps for run in runs if run.steps is not None}
        if logged:
            path = output / f"curves-{stage}.png"
            pictures.curves(path, logged)
            alt = f"Training loss and learning rate over optimiser steps, {stage}: {', '.join(logged)}"
            found.append(
                picture(path, alt, f"{stage}: running mean of the loss over an eighth of the steps.")
            )
    return Section(title="Training", missing=tuple(missing), pictures=tuple(found))


def lengths_section(trained: list[Trained], output: Path) -> Section:
    """How long the training sequences are, and what the budget cut."""
    found, rows, missing = [], [], []
    for stage in STAGES:
        runs = [run for run in trained if run.stage == stage]
        shown = {}
        for run in runs:
            if run.sequences is None:
                missing.append(f"{run.title} has no sequences.json; train it again with this version.")
                continue
            total, cut = run.sequences["num_sequences"], run.sequences["num_truncated"]
            share = f"{cut / max(total, 1):.1%}"
            budget = run.sequences["conversation_tokens"]
            same = run.sequences.get("num_became_identical")
            rows.append(
                (
                    run.title,
                    f"{total:,}",
                    f"{budget:,}",
                    f"{cut:,}",
                    share,
                    "" if same is None else f"{same:,}",
                )
            )
            shown[run.name] = {
                "edges": run.sequences["length_edges"],
                "counts": run.sequences["length_counts"],
                "budget": budget,
                "note": f"{cut:,} of {total:,} cut ({share})",
            }
        if shown:
            path = output / f"lengths-{stage}.png"
            pictures.lengths(path, shown)
            alt = f"Histogram of sequence lengths with the budget, {stage}: " + "; ".join(
                f"{name}: {one['note']}" for name, one in shown.items()
            )
            found.append(picture(path, alt, f"{stage}: whole sequences, against the conversation's budget."))
    if not trained:
        missing.append("Nothing was trained; begin with: just stage1 MODEL.")
    columns = ("run", "sequences", "budget, tokens", "cut", "share cut", "answers made identical")
    tables = (Table(caption="Truncation", columns=columns, rows=rows),) if rows else ()
    text = (
        "The budget is for the conversation alone; the template around it comes on top, so that a sequence "
        "may be a little longer.",
    )
    return Section(
        title="Sequence lengths",
        text=text if rows else (),
        missing=tuple(missing),
        pictures=tuple(found),
        tables=tables,
    )


def lineage_section(trained: list[Trained], labellings: list[Labelling], output: Path) -> Section:
    """What was trained on what."""
    missing = []
    if not labellings:
        missing.append("There are no pseudo labels; make them with: just pseudo-label.")
    finished = [run for run in trained if run.parent is not None]
    rows = trace(finished, labellings)
    if not finished:
        missing.append("No finished checkpoint tells its origin; train one with: just stage1 MODEL.")
        return Section(title="Lineage", missing=tuple(missing))
    path = output / "lineage.png"
    lineage(path, rows)
    table = Table(
        caption="Origins",
        columns=("model", "starts from", "trained on", "held-out log loss"),
        rows=[
            (
                run.title,
                run.parent,
                ", ".join(f"{name} {count:,}" for name, count in run.sources.items()) or "not recorded",
                "nothing held out" if run.log_loss is None else f"{run.log_loss:.4f}",
            )
            for run in finished
        ],
    )
    alt = "What was trained on what: " + "; ".join(
        f"{row[0]} from {row[1]} on {row[2]}" for row in table.rows
    )
    caption = "Time runs downwards; losses are of the held-out fold, one order."
    found = (picture(path, alt, caption),)
    return Section(title="Lineage", missing=tuple(missing), pictures=found, tables=(table,))


def bundle_section(manifest: dict | None, verified: dict | None) -> Section:
    """What is served, and whether it passed its checks."""
    tables, missing, text = [], [], []
    if manifest is None:
        missing.append("There is no bundle; build one with: just submit.")
    else:
        rows = [
            tuple("" if model.get(key) is None else str(model[key]) for key in ("name", "order", "weight"))
            for model in manifest.get("models", [])
        ]
        tables.append(Table(caption="Models served", columns=("model", "order", "weight"), rows=rows))
    if verified is None:
        missing.append("No bundle has been verified; do it with: just submit.")
    else:
        text.append("Verified." if verified.get("passed") is True else "The verification did NOT pass.")
        rows = [
            (
                str(check.get("name", "")),
                "passed" if check.get("passed") is True else "FAILED",
                str(check.get("detail", "")),
            )
            for check in verified.get("checks", [])
        ]
        tables.append(Table(caption="Verification", columns=("check", "result", "detail"), rows=rows))
    return Section(title="Bundle", text=tuple(text), missing=tuple(missing), tables=tuple(tables))


if __name__ == "__main__":
    cli(main)
