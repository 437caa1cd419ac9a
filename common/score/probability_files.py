"""Probabilities that others computed: a file beside comparison tables, or a table that holds votes as well.

A table's columns are `id`, perhaps `source`, `model_a` and `model_b` (names), a label in one of several
spellings, and three columns a model, e.g. `gemma_a, gemma_b, gemma_tie`. Spelling is free within `FORMS`;
whatever could be read in two ways, or in none, stops.
"""

import re
from pathlib import Path

import numpy as np
import polars as pl

from common.console import say
from common.data.table import LABELS, SCHEMA
from common.prompts import ORDERS
from common.score.metrics import SUM_TOLERANCE

FORMS = (
    "<model>_a, <model>_b, <model>_tie; <model>_model_a, <model>_model_b, <model>_tie; "
    "<model>_winner_model_a, ..., <model>_winner_tie; <model>/winner_model_a, ...; "
    "<model>/given/winner_model_a, ... (or swapped, or mean); "
    "prob_a_<model>, prob_b_<model>, prob_tie_<model>"
)
LABEL_FORMS = (
    "a column label or winner with 0 / 1 / 2, a / b / tie, model_a / model_b / tie or "
    "winner_model_a / winner_model_b / winner_tie, or the three columns " + ", ".join(LABELS)
)
CLASSES = ("a", "b", "tie")
WINNERS = {
    spelling: i
    for i, name in enumerate(CLASSES)
    for spelling in (str(i), name, f"model_{name}", f"winner_{name}", f"winner_model_{name}")
}
WITH_SUFFIX = re.compile(r"(?P<model>.+?)[_/. :-](winner_)?(model_)?(?P<label>a|b|tie)", re.IGNORECASE)
WITH_PREFIX = re.compile(r"(prob|probability|p)_(?P<label>a|b|tie)[_/. :-](?P<model>.+)", re.IGNORECASE)
LABEL_LIKE = ("winner", "label", "model")
"""No names of models: `winner_a` could be a vote as well as a probability."""
DERIVED = re.compile(r"ensemble(-fitted)?/winner_(model_a|model_b|tie)")
"""Columns of an evaluation's own probabilities.parquet that are computed anew."""

Columns = dict[str, dict[str, list[str]]]
"""Model -> order -> the names of its three columns."""


def read_probabilities(path: Path, frame: pl.DataFrame) -> np.ndarray:
    """Given probabilities for every comparison of `frame`, joined by id (and source, where the file has it).

    Returns:
        float32 [comparisons, 3], rows in the order of (source, id).

    Raises:
        ValueError: A column is missing, an id stands twice or not at all, or a row does not sum to 1.
    """
    table = _read(path)
    if missing := {"id", *LABELS} - set(table.columns):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; found {table.columns}")
    keys = ["source", "id"] if "source" in table.columns else ["id"]
    table = table.select(pl.col(keys).cast(pl.String), *_as_floats(table, LABELS, path))
    _check_unique(table.select(keys), path)
    joined = (
        frame.sort("source", "id")
        .select("source", "id")
        .join(table, on=keys, how="left", maintain_order="left")
    )
    absent = joined.filter(pl.any_horizontal(pl.col(LABELS).is_null()))
    if len(absent):
        raise ValueError(
            f"{path} has no probabilities for {len(absent)} of {len(joined)} ids, first {absent['id'][0]}: "
            "was it made for other comparisons?"
        )
    return _checked(joined, LABELS, path)


def read_table(path: Path) -> tuple[pl.DataFrame, dict[str, dict[str, np.ndarray]]]:
    """A table of votes and of the probabilities of one or more models.

    Returns:
        The comparisons in the order of the file: `source` (the file's name where it has none), `id`,
        `model_a`, `model_b` (null where it has none) and `LABELS` (null where unlabelled).
        Model -> order ("given", where the columns do not say) -> float32 [comparisons, 3], rows in the order
        of (source, id).

    Raises:
        ValueError: The file cannot be read; a column is unknown, missing, incomplete or ambiguous; an id
            stands twice; a label is not known; a row does not sum to 1.
    """
    table = _read(path)
    if "id" not in table.columns:
        raise ValueError(f"{path} lacks the column id; found {', '.join(table.columns)}")
    if table.is_empty():
        raise ValueError(f"{path}: no comparison in it; expected at least one")
    named = [name for name in ("model_a", "model_b") if table.schema.get(name) == pl.String]
    frame = table.select(
        pl.col("id").cast(pl.String),
        (pl.col("source").cast(pl.String) if "source" in table.columns else pl.lit(path.stem)).alias(
            "source"
        ),
        *(
            (pl.col(name) if name in named else pl.lit(None, pl.String)).alias(name)
            for name in ("model_a", "model_b")
        ),
    )
    if nulls := frame.select(pl.any_horizontal(pl.col("id", "source").is_null()).sum()).item():
        raise ValueError(f"{path}: {nulls} of {len(frame)} rows have no id or no source; expected both")
    _check_unique(frame.select("source", "id"), path)
    label_columns = _find_label(table.columns, path)
    rest = [name for name in table.columns if name not in {"id", "source", *named, *label_columns}]
    frame = frame.with_columns(_labels(table, label_columns, path))
    order = frame.select(rows=pl.arg_sort_by("source", "id")).to_series()
    models = {}
    for model, orders in group_columns(rest, path).items():
        for name, columns in orders.items():
            values = pl.concat(
                [frame.select("id"), table.select(_as_floats(table, columns, path))], how="horizontal"
            )
            models.setdefault(model, {})[name] = _checked(values, columns, path)[order.to_numpy()]
    return frame.select(name for name in SCHEMA if name in frame.columns), models


def group_columns(names: list[str], path: Path | str) -> Columns:
    """Sorts columns of probabilities by model and order, each triple as A, B, tie.

    `["gemma_a", "gemma_b", "gemma_tie"]` -> `{"gemma": {"given": ["gemma_a", "gemma_b", "gemma_tie"]}}`.

    Raises:
        ValueError: A column fits no form of `FORMS` or more than one, two columns mean the same, or a model
            lacks one of its three.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    derived = [name for name in names if DERIVED.fullmatch(name)]
    if derived:
        say(f"{path}: {len(derived)} columns of an earlier ensemble are left out; it is computed anew")
    for name in names:
        if name in derived:
            continue
        model, order, label = _read_column(name, path)
        triple = found.setdefault((model, order), {})
        if label in triple:
            raise ValueError(
                f"{path}: the columns {triple[label]} and {name} both are the probability of {label} "
                f"of model {model}; remove or rename one"
            )
        triple[label] = name
    if not found:
        raise ValueError(f"{path} holds no column of probabilities; expected three a model: {FORMS}")
    models: Columns = {}
    for (model, order), triple in found.items():
        if missing := [label for label in CLASSES if label not in triple]:
            raise ValueError(
                f"{path}: model {model} has the columns {', '.join(triple.values())}, but none for "
                f"{' and '.join(missing)}; expected three a model: {FORMS}"
            )
        models.setdefault(model, {})[order] = [triple[label] for label in CLASSES]
    for orders in models.values():  # the mean follows from the orders
        if len(orders) > 1:
            orders.pop("mean", None)
    return models


def _read_column(name: str, path: Path | str) -> tuple[str, str, str]:
    """(model, order, class) of a column of probabilities."""
    matches = [match for pattern in (WITH_SUFFIX, WITH_PREFIX) if (match := pattern.fullmatch(name))]
    if not matches:
        raise ValueError(
            f"{path}: the column {name} is not known. Remove or rename it; expected id, optionally source, "
            f"model_a and model_b (names), {LABEL_FORMS}, and three columns a model: {FORMS}"
        )
    if len(matches) > 1 or matches[0]["model"].lower() in LABEL_LIKE:
        readings = [f"class {match['label'].lower()} of model {match['model']}" for match in matches]
        readings += ["a label"] * (len(matches) == 1)
        raise ValueError(
            f"{path}: the column {name} can be read as {' or '.join(readings)}. Rename it; a label is "
            f"{LABEL_FORMS}, a model has three columns: {FORMS}"
        )
    model, label = matches[0]["model"], matches[0]["label"].lower()
    stem, slash, last = model.rpartition("/")
    return (stem, last, label) if slash and last in (*ORDERS, "mean") else (model, "given", label)


def _find_label(columns: list[str], path: Path) -> list[str]:
    """The label's columns: none, one, or three in the order of `LABELS`."""
    single = [name for name in columns if name.lower() in ("label", "winner")]
    triple = [name for label in LABELS for name in columns if name.lower() == label]
    if len(single) + bool(triple) > 1:
        raise ValueError(
            f"{path} has more than one label: {', '.join(single + triple)}; keep one of them, {LABEL_FORMS}"
        )
    if triple and [name.lower() for name in triple] != list(LABELS):
        raise ValueError(
            f"{path} has of the label's columns only {', '.join(triple)}; expected {LABEL_FORMS}"
        )
    return single or triple


def _labels(table: pl.DataFrame, columns: list[str], path: Path) -> list[pl.Series]:
    """`LABELS` as float32, null where unlabelled."""
    if not columns:
        return [pl.Series(label, [None] * len(table), dtype=pl.Float32) for label in LABELS]
    if len(columns) == 3:
        floats = table.select(_as_floats(table, columns, path)).rename(
            dict(zip(columns, LABELS, strict=True))
        )
        labelled = floats.select(pl.any_horizontal(pl.all().is_not_null())).to_series()
        ids = table.select(pl.col("id").cast(pl.String))
        _checked(pl.concat([ids, floats], how="horizontal").filter(labelled), LABELS, path)
        return floats.get_columns()
    values = table[columns[0]]
    if values.dtype.is_float():
        values = values.map_elements(lambda v: f"{v:g}", return_dtype=pl.String)  # 1.0 where a row has none
    winners = values.cast(pl.String).str.strip_chars().str.to_lowercase()
    known = winners.replace_strict(WINNERS, default=None, return_dtype=pl.Int8)
    if (bad := winners.is_not_null() & known.is_null()).any():
        row = bad.arg_max()
        raise ValueError(
            f"{path}: the {columns[0]} of id {table['id'][row]} is {table[columns[0]][row]!r} "
            f"({bad.sum()} of {len(table)} rows are such); expected {LABEL_FORMS}"
        )
    return [(known == i).cast(pl.Float32).alias(label) for i, label in enumerate(LABELS)]


def _read(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a Parquet or CSV")
    try:
        if path.suffix == ".csv":
            return pl.read_csv(path, schema_overrides={"id": pl.String}, infer_schema_length=None)
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _as_floats(table: pl.DataFrame, columns: tuple[str, ...] | list[str], path: Path) -> list[pl.Series]:
    try:
        return [table[name].cast(pl.Float32) for name in columns]
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: the columns {', '.join(columns)} are not all numbers: {reason}") from error


def _check_unique(keys: pl.DataFrame, path: Path) -> None:
    if (repeated := keys.is_duplicated()).any():
        first = keys.filter(repeated)["id"][0]
        raise ValueError(f"{path} has more than one row for an id, first {first}; expected one")


def _checked(table: pl.DataFrame, columns: tuple[str, ...] | list[str], path: Path) -> np.ndarray:
    """Three columns as float32 [rows, 3], if every row is probabilities; `id` names the row that is not."""
    values = table.select(columns).fill_null(float("nan")).to_numpy()
    if (bad := ~(np.abs(values.sum(1) - 1) <= SUM_TOLERANCE) | (values < 0).any(1)).any():
        row = table.row(int(bad.argmax()), named=True)
        what = "probabilities" if tuple(columns) == LABELS else f"columns {', '.join(columns)}"
        raise ValueError(
            f"{path}: the {what} of id {row['id']} are {[row[name] for name in columns]}; expected "
            "numbers from 0 on that sum to 1"
        )
    return values
