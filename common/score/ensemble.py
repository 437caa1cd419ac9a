"""What an evaluation makes of probabilities: groups, the ensemble, the prior, scores, slices; their tables.

A group is the probabilities of one model in one order (`gemma9b/given`), averaged over orders
(`gemma9b/mean`), or of the ensemble. Rows are in the order of (source, id) throughout.
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from common.console import say, show_table
from common.data.table import LABELS, is_labelled, labels_array
from common.files import read_json
from common.prompts import ORDERS, Order
from common.score.calibration import MIN_LABELLED, cross_fit_weights, pool
from common.score.metrics import bootstrap_interval, per_row_log_loss, score, swap_consistency
from common.score.predict import average

ENSEMBLE = "ensemble"
FITTED = "ensemble-fitted"
PRIOR = "prior"
NUM_MODEL_PAIRS = 10

Groups = dict[str, np.ndarray]
"""Name -> float32 [comparisons, 3]."""
EnsembleOrder = Literal[Order, "both"]


def contributed(model: str, order: EnsembleOrder) -> str:
    """The group that a model adds to the ensemble: `contributed("gemma9b", "both")` -> "gemma9b/mean"."""
    return f"{model}/{'mean' if order == 'both' else order}"


def check_ensemble_orders(orders: tuple[EnsembleOrder, ...], computed: dict[str, tuple[str, ...]]) -> None:
    """One order a model, each among those that are computed.

    Args:
        orders: As given on the command line.
        computed: Model -> orders.

    Raises:
        ValueError: The counts differ, or an order is not computed.
    """
    if len(orders) != len(computed):
        raise ValueError(
            f"--ensemble-orders has {len(orders)} entries ({' '.join(orders)}) for {len(computed)} models "
            f"({' '.join(computed)}); give one a model, in that order"
        )
    for order, (model, found) in zip(orders, computed.items(), strict=True):
        if order not in ("both", *found):
            raise ValueError(
                f"--ensemble-orders asks for {order} of {model}, of which only {' and '.join(found)} is "
                f"there; say both or {' or '.join(found)}, or have {order} computed (--orders)"
            )


def make_groups(
    frame: pl.DataFrame,
    orders: dict[str, dict[str, np.ndarray]],
    weights: tuple[float, ...],
    ensemble_orders: tuple[EnsembleOrder, ...],
) -> tuple[Groups, dict[str, object] | None]:
    """Every model's orders and mean, the ensemble, and with two or more models the fitted ensemble.

    Args:
        frame: The comparisons, labelled or not.
        orders: Model -> order -> probabilities.
        weights: Of the ensemble, one a model.
        ensemble_orders: What each model adds to the ensemble.

    Returns:
        The groups, and what `cross_fit_weights` says of the fitted weights (by model), or None. The fitted
        ensemble answers labelled rows out of fold, others with the weights fitted on all labelled ones.
    """
    groups = {f"{name}/{order}": values for name, found in orders.items() for order, values in found.items()}
    groups |= {f"{name}/mean": average(found) for name, found in orders.items()}
    models = [groups[contributed(name, order)] for name, order in zip(orders, ensemble_orders, strict=True)]
    groups[ENSEMBLE] = pool(models, weights).astype(np.float32)
    labelled = labelled_rows(frame)
    if len(orders) < 2 or not labelled.any():
        return groups, None
    if labelled.sum() < MIN_LABELLED:
        say(f"{labelled.sum()} labelled comparisons are too few to fit weights on, {MIN_LABELLED} are needed")
        return groups, None
    found, fit = cross_fit_weights(
        [values[labelled] for values in models],
        labels_array(frame)[labelled],
        group_keys(frame.filter(labelled)),
        weights,
    )
    fitted = pool(models, fit["weights"])
    fitted[labelled] = found
    groups[FITTED] = fitted.astype(np.float32)
    return groups, fit | {"weights": dict(zip(orders, fit["weights"], strict=True))}


def labelled_rows(frame: pl.DataFrame) -> np.ndarray:
    """bool [comparisons]."""
    return frame.select(is_labelled()).to_series().to_numpy()


def group_keys(frame: pl.DataFrame) -> list[str]:
    """What must not be on both sides of a fit: the prompt, or the key where there are no texts."""
    if "prompt" in frame.columns:
        return [json.dumps(prompt) for prompt in frame["prompt"].to_list()]
    return [json.dumps(key) for key in frame.select("source", "id").rows()]


def probability_table(frame: pl.DataFrame, groups: Groups) -> pl.DataFrame:
    """`source`, `id`, the label, then three columns a group: `<group>/<label>`."""
    columns = [
        pl.Series(f"{group}/{label}", values[:, i])
        for group, values in groups.items()
        for i, label in enumerate(LABELS)
    ]
    return frame.select("source", "id", *LABELS).with_columns(columns)


def read_group(table: pl.DataFrame, group: str) -> np.ndarray:
    """One group of a `probability_table`, float32 [comparisons, 3]."""
    return table.select(f"{group}/{label}" for label in LABELS).to_numpy()


def checkpoint_prior(checkpoints: tuple[Path, ...]) -> list[float] | None:
    """Mean of the label frequencies that the checkpoints were trained on; None where none of them says."""
    found = [read_json(path / "preference.json").get("label_prior") for path in checkpoints]
    found = [prior for prior in found if prior]
    return np.mean(found, axis=0).tolist() if found else None


def score_groups(
    frame: pl.DataFrame, groups: Groups, prior: list[float] | None, fit: dict[str, object] | None
) -> dict[str, dict]:
    """Scores of all groups and of the prior on the labelled comparisons, ready for JSON.

    Args:
        frame: The comparisons.
        groups: As of `make_groups`.
        prior: The constant answer to compare with; None takes the mean of these labels.
        fit: As of `make_groups`.

    Returns:
        Group -> what `common.score.metrics.score` says, with `swap_consistency` (a model's mean), `slices`
        (the ensemble), `weights`, `gain` and `gain_interval` (the fitted ensemble), `from` (the prior). Empty
        where nothing is labelled.
    """
    labelled = labelled_rows(frame)
    if not labelled.any():
        return {}
    frame, labels = frame.filter(labelled), labels_array(frame)[labelled]
    groups = {name: values[labelled] for name, values in groups.items()}
    constant = labels.mean(axis=0, dtype=np.float64) if prior is None else np.asarray(prior)
    scores = {
        PRIOR: score(np.broadcast_to(constant, labels.shape), labels)
        | {"from": "these labels" if prior is None else "training labels"}
    }
    scores |= {name: score(values, labels) for name, values in groups.items()}
    for name in groups:
        pair = [f"{name.removesuffix('/mean')}/{order}" for order in ORDERS]
        if name.endswith("/mean") and all(part in groups for part in pair):
            scores[name]["swap_consistency"] = swap_consistency(*(groups[part] for part in pair))
    if fit is not None:
        scores[FITTED] |= {name: fit[name] for name in ("weights", "gain", "gain_interval")}
    scores[ENSEMBLE]["slices"] = slices(frame, groups[ENSEMBLE], labels)
    return scores


def slices(
    frame: pl.DataFrame, probabilities: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, dict[str, object]]]:
    """Log loss with interval by turns, quarter of the answers' length, source and pair of models.

    Args:
        frame: Labelled comparisons; without texts there are no turns and no length, without names no pairs.
        probabilities: [comparisons, 3].
        labels: [comparisons, 3].

    Returns:
        Dimension -> slice -> `num_comparisons`, `log_loss`, `interval`; no slice is empty.
    """
    losses = per_row_log_loss(probabilities, labels)
    dimensions = {**_by_text(frame), "source": _by_value(frame["source"]), "model pair": _by_models(frame)}
    found = {
        dimension: {
            name: {
                "num_comparisons": int(mask.sum()),
                "log_loss": float(losses[mask].mean()),
                "interval": list(bootstrap_interval(losses[mask])),
            }
            for name, mask in masks.items()
            if mask.any()
        }
        for dimension, masks in dimensions.items()
    }
    return {dimension: groups for dimension, groups in found.items() if groups}


def _by_text(frame: pl.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    if "prompt" not in frame.columns:
        return {}
    turns = frame["prompt"].list.len().to_numpy()
    answers = pl.col("response_a", "response_b").list.eval(pl.element().str.len_chars()).list.sum()
    characters = frame.select(answers).sum_horizontal().to_numpy()
    quarter = np.searchsorted(np.quantile(characters, (0.25, 0.5, 0.75)), characters, side="left")
    names = ("shortest", "second", "third", "longest")
    return {
        "turns": {"1 turn": turns == 1, "2 turns": turns == 2, "3 or more turns": turns >= 3},
        "length": {f"{name} quarter of answers": quarter == i for i, name in enumerate(names)},
    }


def _by_value(values: pl.Series) -> dict[str, np.ndarray]:
    """A mask a value, the most frequent first; nulls are in none."""
    counts = values.drop_nulls().value_counts().sort("count", values.name, descending=[True, False])
    return {value: (values == value).fill_null(False).to_numpy() for value in counts[values.name]}


def _by_models(frame: pl.DataFrame) -> dict[str, np.ndarray]:
    """The most frequent unordered pairs of models, and the others together."""
    models = pl.concat_list("model_a", "model_b").list.sort()
    pairs = frame.select(
        pair=pl.when(pl.all_horizontal(pl.col("model_a", "model_b").is_not_null())).then(
            models.list.join(" and ")
        )
    )["pair"]
    masks = _by_value(pairs)
    frequent = dict(list(masks.items())[:NUM_MODEL_PAIRS])
    others = pairs.is_not_null().to_numpy() & ~np.any(list(frequent.values()) or [False], axis=0)
    return {**frequent, "other pairs": others}


def show_scores(title: str, scores: dict[str, dict]) -> None:
    """Prints one row a model and order, then the fitted weights and the ensemble's slices."""
    if not scores:
        say("the comparisons are unlabelled: no score")
        return
    show_table(
        title,
        ("model / order", "comparisons", "log loss", "95 % interval", "accuracy", "calibration", "swap"),
        [
            (
                group,
                f"{found['num_comparisons']:,}",
                f"{found['log_loss']:.4f}",
                interval(found["log_loss_interval"]),
                f"{found['accuracy']:.3f}",
                f"{found['calibration_error']['top']:.3f}",
                f"{found['swap_consistency']['mean_absolute_difference']:.3f}"
                if "swap_consistency" in found
                else None,
            )
            for group, found in scores.items()
        ],
    )
    say(f"prior: always the mean of {scores['prior']['from']}")
    if fitted := scores.get(FITTED):
        weights = ", ".join(f"{name} {weight:.3f}" for name, weight in fitted["weights"].items())
        gain = f"gain {fitted['gain']:.4f} ({interval(fitted['gain_interval'])})"
        say(f"{FITTED}: {gain} over the given weights, across folds; weights fitted on all: {weights}")
    show_table(
        f"{title}, {ENSEMBLE} by slice",
        ("slice", "by", "comparisons", "log loss", "95 % interval"),
        [
            (name, dimension, f"{s['num_comparisons']:,}", f"{s['log_loss']:.4f}", interval(s["interval"]))
            for dimension, groups in scores[ENSEMBLE]["slices"].items()
            for name, s in groups.items()
        ],
    )


def show_calibration(title: str, found: dict[str, dict]) -> None:
    """Prints one row a model, and the ensemble: both scalings with their gain, and what is kept."""

    def judged(one: dict) -> str:
        return f"{one['log_loss']:.4f}\n{one['gain']:+.4f} ({interval(one['gain_interval'])})"

    show_table(
        f"{title}, calibrated across folds: log loss; gain (95 % interval)",
        ("model", "uncalibrated", "temperature", "vector", "kept"),
        [
            (
                name,
                f"{one['uncalibrated_log_loss']:.4f}",
                judged(one["temperature"]),
                judged(one["vector"]),
                one["kept"] or "neither",
            )
            for name, one in {**found["per_model"], ENSEMBLE: found}.items()
        ],
    )


def interval(ends: list[float]) -> str:
    """`[0.61, 0.7]` -> "0.6100 to 0.7000"."""
    return "{:.4f} to {:.4f}".format(*ends)
