"""The report's sections on evaluations: scores, calibration, swap consistency, slices."""

from pathlib import Path

from common.report import pictures
from common.report.artifacts import ENSEMBLE, FITTED, Evaluation
from common.report.page import Section, Table, first_open, picture

NO_EVALUATION = "There is no scored evaluation; make one with: just evaluate."


def scores_section(evaluations: list[Evaluation], output: Path) -> Section:
    """The ladder of evaluations, and all numbers."""
    scored = [one for one in evaluations if one.best is not None]
    unscored = tuple(
        f"Evaluation {one.name} "
        + ("had no labelled comparisons to score." if one.is_complete else "is not finished; start it again.")
        for one in evaluations
        if one.best is None
    )
    if not scored:
        return Section(title="Scores", missing=(NO_EVALUATION, *unscored))
    blocks = {}
    from_first_to_last = scored[::-1]
    for one in sorted(from_first_to_last, key=lambda one: "stage" not in one.name):
        groups = [group for group in (*one.members.values(), ENSEMBLE, FITTED) if group in one.scores]
        marks = {"prior": one.prior, "floor": one.floor}
        blocks[one.name] = {
            "rows": {
                group.removesuffix("/mean"): (one.scores[group].log_loss, *one.scores[group].interval)
                for group in groups
            },
            "marks": {name: value for name, value in marks.items() if value is not None},
        }
    path = output / "ladder.png"
    pictures.ladder(path, blocks)
    alt = "Log loss with interval of every model and ensemble: " + "; ".join(
        f"{name}: {', '.join(f'{model} {row[0]:.4f}' for model, row in block['rows'].items())}"
        for name, block in blocks.items()
    )
    text = ["Log loss in nats, lower is better. Bars are 95 % intervals over comparisons."]
    sources = dict.fromkeys(one.prior_from for one in scored if one.prior is not None and one.prior_from)
    if sources:
        text.append(f"The prior always answers the mean of {' or of '.join(map(str, sources))}.")
    missing = [f"{one.name}: has no prior; evaluate it again." for one in scored if one.prior is None]
    if not any(one.floor is not None for one in scored):
        text.append("The floor is known for synthetic votes only.")
    return Section(
        title="Scores",
        text=tuple(text),
        missing=(*missing, *unscored),
        pictures=(picture(path, alt, "From the first stage to the last, then other evaluations."),),
        tables=(score_table(scored[0]), *fitted_table(scored)),
        folded=tuple(Section(title=one.name, tables=(score_table(one),)) for one in scored[1:]),
    )


def score_table(one: Evaluation) -> Table:
    """Every group of one evaluation."""
    rows = [
        (
            group,
            f"{score.num_comparisons:,}",
            f"{score.log_loss:.4f}",
            "{:.4f} to {:.4f}".format(*score.interval),
            f"{score.accuracy:.3f}",
            f"{score.calibration_error:.3f}",
        )
        for group, score in one.scores.items()
    ]
    if one.prior is not None:
        rows.append(("prior", "", f"{one.prior:.4f}", "", "", ""))
    columns = ("model / order", "comparisons", "log loss", "95 % interval", "accuracy", "calibration error")
    return Table(caption=one.name, columns=columns, rows=rows)


def fitted_table(scored: list[Evaluation]) -> tuple[Table, ...]:
    """What fitted ensemble weights gain over the given ones; no table where none were fitted."""
    rows = [
        (
            one.name,
            signed(one.fitted["gain"]),
            signed_range(one.fitted["gain_interval"]),
            ", ".join(f"{model} {weight:.3f}" for model, weight in one.fitted["weights"].items()),
        )
        for one in scored
        if one.fitted is not None
    ]
    columns = ("evaluation", "gain, across folds", "95 % interval", "weights fitted on all")
    caption = "ensemble-fitted: gain over the given weights"
    return (Table(caption=caption, columns=columns, rows=rows),) if rows else ()


def reliability_section(scored: list[Evaluation], output: Path) -> Section:
    """Reliability diagrams, and whether a scaling is kept."""
    parts, missing = [], []
    for one in scored:
        if one.labels is None:
            missing.append(f"{one.name}: probabilities.parquet has no labels; evaluate it again.")
        groups = {
            group.removesuffix("/mean"): (one.probabilities[group], one.labels)
            for group in dict.fromkeys((*one.members.values(), ENSEMBLE))
            if group in one.probabilities
        }
        if len(one.members) == 1:
            groups.pop(ENSEMBLE, None)  # the same numbers once more
        found = []
        if groups:
            path = output / f"reliability-{one.name}.png"
            pictures.reliability(path, groups)
            alt = f"Reliability diagrams for A wins, B wins and tie, {one.name}: {', '.join(groups)}"
            found.append(
                picture(path, alt, f"{one.name}: on the dotted line, what is claimed happens as often.")
            )
        text = (decision(one),) if one.calibration else ()
        if found or text:
            tables = (calibration_table(one),) if one.calibration else ()
            parts.append(Section(title=one.name, text=text, pictures=tuple(found), tables=tables))
    if not scored:
        missing.append(NO_EVALUATION)
    elif not any(one.calibration for one in scored):
        missing.append(
            "No calibration was fitted; give a finished evaluation's command the flag --calibrate."
        )
    return first_open("Calibration", parts, missing)


def decision(one: Evaluation) -> str:
    """The decision on scaling the ensemble, with both numbers."""
    found = one.calibration[ENSEMBLE]
    before = float(found["uncalibrated_log_loss"])
    kept = found["kept"]
    name = kept or max(("temperature", "vector"), key=lambda name: found[name]["gain"])
    after = f"{found[name]['log_loss']:.4f} (gain {signed(found[name]['gain'])}, "
    after += f"95 % {signed_range(found[name]['gain_interval'])})"
    if kept:
        return (
            f"Decision ({one.name}): keep {kept} scaling. The ensemble's log loss is {before:.4f} without it "
            f"and {after} with it, judged across folds."
        )
    return (
        f"Decision ({one.name}): no scaling. The ensemble's log loss is {before:.4f} without one; the better "
        f"one, {name}, would give {after}, judged across folds: a gain that is not beyond doubt."
    )


def calibration_table(one: Evaluation) -> Table:
    """Both scalings of every model and of the ensemble, judged across folds."""
    rows = []
    for model, found in one.calibration.items():
        for name in ("temperature", "vector"):
            scaling = found[name]
            rows.append(
                (
                    f"{model}, {name}",
                    f"{found['uncalibrated_log_loss']:.4f}",
                    f"{scaling['log_loss']:.4f}",
                    signed(scaling["gain"]),
                    signed_range(scaling["gain_interval"]),
                    "yes" if found["kept"] == name else "no",
                )
            )
    columns = ("model, scaling", "log loss without", "with, across folds", "gain", "95 % interval", "kept")
    return Table(caption="Scaling, judged on folds it was not fitted on", columns=columns, rows=rows)


def swap_section(scored: list[Evaluation], output: Path) -> Section:
    """p(A, B) against the mirrored p(B, A)."""
    parts, missing = [], []
    for one in scored:
        pairs = {}
        for model in one.members:
            orders = [one.probabilities.get(f"{model}/{order}") for order in ("given", "swapped")]
            if all(order is not None for order in orders):
                pairs[model] = tuple(orders)
        if not pairs:
            missing.append(
                f"{one.name}: no labelled probabilities of both orders; evaluate checkpoints with --orders "
                "given swapped."
            )
            continue
        path = output / f"swap-{one.name}.png"
        pictures.swap_consistency(path, pairs)
        alt = f"Probabilities with A first against B first, evaluation {one.name}: {', '.join(pairs)}"
        caption = f"{one.name}: darker squares hold more comparisons (log scale)."
        rows = [
            (model, f"{score.swap_gap:.4f}", f"{score.same_winner:.1%}")
            for model in one.members
            if (score := one.scores.get(f"{model}/mean")) is not None and score.swap_gap is not None
        ]
        table = Table(caption=one.name, columns=("model", "mean difference", "same winner"), rows=rows)
        found = (picture(path, alt, caption),)
        parts.append(Section(title=one.name, pictures=found, tables=(table,) if rows else ()))
    if not scored:
        missing.append(NO_EVALUATION)
    text = (
        "The same comparison is shown in both orders; the second answer is mirrored back, so that both speak "
        "of the same A. On the dashed line the order does not matter.",
    )
    return first_open("Swap consistency", parts, missing, text if parts else ())


def slices_section(scored: list[Evaluation], output: Path) -> Section:
    """The ensemble's log loss by turns, length, source and pair of models."""
    parts, missing = [], []
    for one in scored:
        if not one.slices:
            missing.append(f"{one.name}: has no slices; evaluate it again.")
            continue
        everything = {"all comparisons": one.scores[ENSEMBLE].log_loss}
        blocks = {
            f"by {dimension}": {
                "rows": {f"{name} ({n:,})": loss for name, (n, *loss) in groups.items()},
                "marks": everything,
            }
            for dimension, groups in one.slices.items()
        }
        path = output / f"slices-{one.name}.png"
        pictures.ladder(path, blocks)
        rows = [
            (name, dimension, f"{n:,}", f"{loss:.4f}", f"{low:.4f} to {high:.4f}")
            for dimension, groups in one.slices.items()
            for name, (n, loss, low, high) in groups.items()
        ]
        columns = ("slice", "by", "comparisons", "log loss", "95 % interval")
        table = Table(caption=f"{one.name}, ensemble", columns=columns, rows=rows)
        alt = f"Log loss with interval of the ensemble by {', '.join(one.slices)}, evaluation {one.name}"
        found = (picture(path, alt, f"{one.name}: the ensemble's log loss; in brackets, comparisons."),)
        parts.append(Section(title=one.name, pictures=found, tables=(table,)))
    if not scored:
        missing.append(NO_EVALUATION)
    return first_open("Slices", parts, missing)


def signed(value: float) -> str:
    """`0.0123` -> "+0.0123"."""
    return f"{value:+.4f}"


def signed_range(ends: list[float]) -> str:
    """`[-0.01, 0.02]` -> "-0.0100 to +0.0200"."""
    return f"{signed(ends[0])} to {signed(ends[1])}"
