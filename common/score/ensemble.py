"""What an evaluation makes of probabilities: a table of given ones, groups, the ensemble, scores, slices.

A group is the probabilities of one model in one order (`gemma9b/given`), averaged over orders
(`gemma9b/mean`), or of the ensemble. Rows are in the order of (source, id) throughout.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import polars as pl

from common.console import say
from common.data.sources import column_names, open_raw
from common.data.sources.find import fetch
from common.data.table import (
    LABEL_SUM_TOLERANCE,
    LABELS,
    ORDERS,
    WINNERS,
    Order,
    is_labelled,
    labels_array,
    reading,
    table_hash,
)
from common.score.calibration import MIN_LABELLED, cross_fit_weights, pool
from common.score.metrics import (
    ENSEMBLE,
    FITTED,
    PRIOR,
    bootstrap_interval,
    per_row_log_loss,
    score,
    swap_consistency,
)
from common.score.predict import average

NUM_MODEL_PAIRS = 10
CLASSES = ("a", "b", "tie")
TEXT_COLUMNS = ("id", "source", "model_a", "model_b", "label")
TABLE_FORM = (
    "expected id; perhaps source, model_a and model_b (names), and a label, as label (one of "
    f"{', '.join(WINNERS)}; or empty) or as {', '.join(LABELS)}; and of each model x: x_a, x_b, x_tie"
)

Groups = dict[str, np.ndarray]
"""Name -> float32 [comparisons, 3]."""
EnsembleOrder = Literal[Order, "both"]


def read_table(path: Path) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """A file of votes and of the probabilities of one or more models, in the form `TABLE_FORM`.

    Returns:
        The comparisons in the order of the file: `id`, `source` ("table" where it has none), `model_a`,
        `model_b` (null where it has none), `LABELS` (null where unlabelled).
        Model -> float32 [comparisons, 3], rows in the order of (source, id).

    Raises:
        ValueError: The file cannot be read; a column is unknown, missing or holds something else; an id is
            absent or stands twice; a label is not known; a row does not sum to 1.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a Parquet, CSV or JSON lines file")
    with TemporaryDirectory() as scratch:
        [file] = fetch([str(path)], Path(scratch))
        columns = column_names(file)
        models = _find_models(columns, path)
        numbers = (*LABELS, *itertools.chain(*models.values()))
        types = dict.fromkeys(TEXT_COLUMNS, pl.String()) | dict.fromkeys(numbers, pl.Float64())
        schema = {f"{name}?": kind for name, kind in types.items()}
        raw = open_raw([(file, schema, pl.LazyFrame.lazy)], Path(scratch))
        with reading(path):
            table = raw.frame.collect()
    if len(raw.rejected):
        _, row, key, *reason = raw.rejected.row(0)
        raise ValueError(
            f"{path}: {len(raw.rejected)} rows cannot be read, first {raw.row_unit} {row}, id {key}: "
            f"{': '.join(reason)}; {TABLE_FORM}"
        )
    table = table.with_columns(pl.when(pl.col(name) != "").then(name).alias(name) for name in TEXT_COLUMNS)
    table = table if "source" in columns else table.with_columns(source=pl.lit("table"))
    _check_keys(table, path)
    frame = table.with_columns(() if LABELS[0] in columns else _labels(table, path))
    _probabilities(frame.filter(pl.any_horizontal(pl.col(LABELS).is_not_null())), LABELS, path)
    by_key = table.sort("source", "id")
    return (
        frame.select("id", "source", "model_a", "model_b", pl.col(LABELS).cast(pl.Float32)),
        {model: _probabilities(by_key, names, path) for model, names in models.items()},
    )


def given_hash(frame: pl.DataFrame, given: Groups) -> str:
    """Names what `read_table` gives: the rows, whatever file they stood in and in which order."""
    table = frame.sort("source", "id").with_columns(group_columns(given))
    return table_hash(table, table.columns)


def _find_models(columns: list[str], path: Path) -> dict[str, list[str]]:
    """Model -> its three columns; a ValueError where the columns are not those of `TABLE_FORM`."""
    models, faults = {}, []
    for name in columns:
        model, _, word = name.rpartition("_")
        if name in (*TEXT_COLUMNS, *LABELS):
            continue
        if model and word in CLASSES:
            models[model] = [f"{model}_{word}" for word in CLASSES]
        else:
            faults.append(f"the column {name} is not known")
    label = LABELS if set(LABELS) & set(columns) else ()
    needed = ("id", *label, *itertools.chain(*models.values()))
    faults += [f"the column {name} is missing" for name in needed if name not in columns]
    if label and "label" in columns:
        faults.append("there is more than one label")
    if not models:
        faults.append("there is no column of probabilities")
    if faults:
        raise ValueError(f"{path}: {', '.join(faults)}; {TABLE_FORM}")
    return models


def _check_keys(table: pl.DataFrame, path: Path) -> None:
    if table.is_empty():
        raise ValueError(f"{path}: no comparison in it; expected at least one")
    keys = table.select("source", "id")
    bad = keys.filter(keys.is_duplicated() | keys.select(pl.any_horizontal(pl.all().is_null())).to_series())
    if len(bad):
        raise ValueError(
            f"{path}: {len(bad)} of {len(keys)} rows have no id, no source, or an id that another row has, "
            f"first {bad['id'][0]}; expected one row an id"
        )


def _labels(table: pl.DataFrame, path: Path) -> list[pl.Expr]:
    """The column `label` as `LABELS`."""
    bad = table.filter(~pl.col("label").is_in(list(WINNERS)))
    if len(bad):
        raise ValueError(
            f"{path}: the label of id {bad['id'][0]} is {bad['label'][0]!r} ({len(bad)} of {len(table)} rows "
            f"are such); {TABLE_FORM}"
        )
    winner = pl.col("label").replace_strict(WINNERS, return_dtype=pl.Int8)
    return [(winner == i).cast(pl.Float64).alias(name) for i, name in enumerate(LABELS)]


def _probabilities(table: pl.DataFrame, columns: Sequence[str], path: Path) -> np.ndarray:
    """Three columns as float32 [rows, 3], if every row is probabilities; `id` names the row that is not."""
    values = table.select(columns).fill_null(float("nan")).to_numpy()
    bad = ~(np.abs(values.sum(axis=1) - 1) <= LABEL_SUM_TOLERANCE) | (values < 0).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{path}: {', '.join(columns)} of id {table['id'][row]} are {values[row].tolist()}; expected "
            "numbers from 0 on that sum to 1 within 0.001"
        )
    return values.astype(np.float32)


def contributed(model: str, order: EnsembleOrder) -> str:
    """The group that a model adds to the ensemble: `contributed("gemma9b", "both")` -> "gemma9b/mean"."""
    return f"{model}/{'mean' if order == 'both' else order}"


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


def group_columns(groups: Groups) -> list[pl.Series]:
    """Three columns a group, `<group>/<label>`, for a table of keys."""
    return [
        pl.Series(f"{group}/{label}", values[:, i])
        for group, values in groups.items()
        for i, label in enumerate(LABELS)
    ]


def read_group(table: pl.DataFrame, group: str) -> np.ndarray:
    """One group of `group_columns`, float32 [comparisons, 3]."""
    return table.select(f"{group}/{label}" for label in LABELS).to_numpy()


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
    masks = _by_value(frame.select(models.list.join(" and ", ignore_nulls=False)).to_series())
    rare = [masks.pop(pair) for pair in list(masks)[NUM_MODEL_PAIRS:]]
    return masks | {"other pairs": np.any(rare, axis=0)}


def interval(ends: list[float]) -> str:
    """`[0.61, 0.7]` -> "0.6100 to 0.7000"."""
    return "{:.4f} to {:.4f}".format(*ends)
