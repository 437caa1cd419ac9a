"""Scaling that makes probabilities honest, and ensemble weights: fitted on some rows, judged on others.

Every gain reported here is out of fold: the rows are cut into five parts, each part is answered with what was
fitted on the other four. Rows of one prompt stay together, and a row's part follows from its prompt alone.
Probabilities and labels are [num_comparisons, C] as in `common.score.metrics`, which also applies a scaling
(`rescale`): this module is needed to fit one, not to serve it.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from common.score.metrics import MIN_PROBABILITY, bootstrap_interval, per_row_log_loss, rescale

NUM_PARTS = 5
MIN_LABELLED = 100
"""Labelled comparisons below which nothing is fitted: the interval of a gain would say nothing."""
PRIOR_WEIGHT = 1.0
"""Every parameter is drawn to the identity as by a normal prior of standard deviation 1. On a hundred rows
that is already weak against the data; without it, rows that a scaling separates perfectly would send the
scale to infinity, and the biases, of which only differences matter, would not be determined."""
GRADIENT_TOLERANCE = 1e-12
"""Slope of the mean loss that counts as none; a fit also ends where rounding hides what is left to gain."""
MAX_WEIGHT_STEPS = 20_000
LOSS_TOLERANCE = 1e-7
"""Nats a comparison that fitted weights may lie above the optimum."""

Scaling = tuple[np.ndarray, np.ndarray]
"""(scale [C], bias [C]) of `common.score.metrics.rescale`."""


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> Scaling:
    """One scale for all classes, no bias: below 1 for a model that is too sure.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4 (scale = 1 / temperature).

    Raises:
        ValueError: As in `per_row_log_loss`.
    """
    return _fit_scaling(probabilities, labels, per_class=False)


def fit_vector(probabilities: np.ndarray, labels: np.ndarray) -> Scaling:
    """A scale and a bias for each class: mends a class that is answered too often as well.

    Source: Guo et al. 2017, section 4.2, on log probabilities in place of logits.

    Raises:
        ValueError: As in `per_row_log_loss`.
    """
    return _fit_scaling(probabilities, labels, per_class=True)


def fit_weights(models: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Weights of the linear pool with the least log loss; they are 0 or more and sum to 1.

    The loss is convex in the weights. A model's weight is multiplied by the mean over rows of
    label x model / pool until no model's factor exceeds 1 by more than `LOSS_TOLERANCE`, which bounds the
    distance to the least loss (EM for mixture proportions).

    Args:
        models: Probabilities of each model, one or more of shape [num_comparisons, C].
        labels: [num_comparisons, C].

    Returns:
        float64 [num_models].

    Raises:
        ValueError: There is no model; as in `per_row_log_loss`.
    """
    if not len(models):
        raise ValueError("no model to weigh; expected at least one")
    values = np.exp([_log(probabilities, labels) for probabilities in models])  # [models, comparisons, C]
    labels = np.asarray(labels, dtype=np.float64)
    weights = np.full(len(models), 1 / len(models))
    for _ in range(MAX_WEIGHT_STEPS):
        pool = np.tensordot(weights, values, axes=1)
        factors = np.tensordot(values, labels / pool, axes=2) / len(labels)
        if factors.max() - 1 <= LOSS_TOLERANCE:
            break
        weights = weights * factors
        weights /= weights.sum()
    return weights


def pool(models: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weighted mean of the models' probabilities, float64 [num_comparisons, C]; weights need not sum to 1."""
    return np.average(np.asarray(models, dtype=np.float64), axis=0, weights=weights)


def calibrate(probabilities: np.ndarray, labels: np.ndarray, keys: Sequence[str]) -> dict[str, object]:
    """Fits both scalings, judges them out of fold, and keeps the better one if its gain is beyond doubt.

    Args:
        probabilities: [num_comparisons, C].
        labels: [num_comparisons, C], one-hot or soft.
        keys: One a row; rows of one key (a prompt) are fitted on together or answered together.

    Returns:
        Ready for JSON: `uncalibrated_log_loss`; under "temperature" and "vector" each `scale` and `bias`
        (fitted on all rows), `log_loss`, `gain` and `gain_interval` (out of fold, 95 %; positive is better);
        `kept`: None, "temperature" or "vector", the larger gain of those whose interval lies above 0;
        `scaling`: None or the kept `scale` and `bias`.

    Raises:
        ValueError: There are fewer than `MIN_LABELLED` rows, or too few different keys; as in
            `per_row_log_loss`.
    """
    before, parts = per_row_log_loss(probabilities, labels), assign_parts(keys)
    result: dict[str, object] = {"uncalibrated_log_loss": float(before.mean())}
    for name, fit in (("temperature", fit_temperature), ("vector", fit_vector)):
        scale, bias = fit(probabilities, labels)
        _, judged = cross_fit(
            parts,
            labels,
            before,
            fit=lambda rows, fit=fit: fit(probabilities[rows], labels[rows]),
            apply=lambda scaling, rows: rescale(probabilities[rows], *scaling),
        )
        result[name] = {"scale": scale.tolist(), "bias": bias.tolist(), **judged}
    beyond_doubt = [name for name in ("temperature", "vector") if result[name]["gain_interval"][0] > 0]
    kept = max(beyond_doubt, key=lambda name: result[name]["gain"], default=None)
    scaling = None if kept is None else {part: result[kept][part] for part in ("scale", "bias")}
    return result | {"kept": kept, "scaling": scaling}


def cross_fit_weights(
    models: Sequence[np.ndarray], labels: np.ndarray, keys: Sequence[str], given: Sequence[float]
) -> tuple[np.ndarray, dict[str, object]]:
    """Fits ensemble weights and judges them, out of fold, against the weights that were given.

    Args:
        models: Probabilities of each model, [num_comparisons, C].
        labels: [num_comparisons, C].
        keys: As in `calibrate`.
        given: The weights to compare with, one a model.

    Returns:
        The out-of-fold probabilities of the fitted ensemble, float64 [num_comparisons, C], and, ready for
        JSON, `weights` (fitted on all rows), `log_loss`, `gain` and `gain_interval` as in `calibrate`.

    Raises:
        ValueError: As in `calibrate`.
    """
    models = np.asarray(models, dtype=np.float64)
    found, judged = cross_fit(
        assign_parts(keys),
        labels,
        per_row_log_loss(pool(models, given), labels),
        fit=lambda rows: fit_weights(models[:, rows], labels[rows]),
        apply=lambda weights, rows: pool(models[:, rows], weights),
    )
    return found, {"weights": fit_weights(models, labels).tolist(), **judged}


def assign_parts(keys: Sequence[str]) -> np.ndarray:
    """The part (0 to 4) of each row, int64 [num_rows]: by a hash of its key, whatever the other rows are.

    Raises:
        ValueError: There are fewer than `MIN_LABELLED` rows, or a part stays empty.
    """
    if len(keys) < MIN_LABELLED:
        raise ValueError(
            f"{len(keys)} labelled comparisons are too few to fit anything on: at least {MIN_LABELLED} are "
            "needed, and thousands to see a gain. Take more comparisons, or leave the fit out"
        )
    digests = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys]
    parts = np.array([int.from_bytes(digest, "little") % NUM_PARTS for digest in digests])
    if len(np.unique(parts)) < NUM_PARTS:
        raise ValueError(
            f"the {len(keys)} labelled comparisons share {len(set(keys))} prompts, which do not fill "
            f"{NUM_PARTS} parts; take comparisons of more prompts, or leave the fit out"
        )
    return parts


def cross_fit(
    parts: np.ndarray, labels: np.ndarray, before: np.ndarray, *, fit: Callable, apply: Callable
) -> tuple[np.ndarray, dict[str, object]]:
    """Answers each part with what was fitted on all others, and judges the answers.

    Args:
        parts: int [num_comparisons].
        labels: [num_comparisons, C].
        before: [num_comparisons], the losses in nats to compare with.
        fit: Rows (bool [num_comparisons]) -> parameters.
        apply: Parameters and rows -> probabilities [rows, C].

    Returns:
        The answers, float64 [num_comparisons, C]; their `log_loss`, `gain` and `gain_interval`.
    """
    found = np.empty(labels.shape)
    for part in np.unique(parts):
        rows = parts == part
        found[rows] = apply(fit(~rows), rows)
    after = per_row_log_loss(found, labels)
    return found, {
        "log_loss": float(after.mean()),
        "gain": float((before - after).mean()),
        "gain_interval": list(bootstrap_interval(before - after)),
    }


def _log(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Clipped log probabilities, float64 [num_comparisons, C], after the checks of `per_row_log_loss`."""
    per_row_log_loss(probabilities, labels)
    return np.log(np.clip(np.asarray(probabilities, dtype=np.float64), MIN_PROBABILITY, 1.0))


def _fit_scaling(probabilities: np.ndarray, labels: np.ndarray, *, per_class: bool) -> Scaling:
    """Makes least the sum of the rows' losses plus PRIOR_WEIGHT / 2 x |parameters|^2, as a mean over rows.

    The parameters are 0 for the identity: one number that is added to every scale, or for each class one for
    its scale and one for its bias. The loss is convex in them.
    """
    logs, labels = _log(probabilities, labels), np.asarray(labels, dtype=np.float64)
    labels = labels / labels.sum(axis=1, keepdims=True)  # 1 up to rounding, which the gradient relies on
    num_rows, num_classes = logs.shape
    directions = np.eye(2 * num_classes) if per_class else np.repeat([[1.0, 0.0]], num_classes, axis=1)
    scale_part, bias_part = np.split(directions, 2, axis=1)
    features = logs[:, :, None] * scale_part.T + bias_part.T  # [rows, C, P]
    penalty = PRIOR_WEIGHT / num_rows

    def loss(parameters: np.ndarray) -> float:
        losses = -(labels * log_softmax(logs + features @ parameters, axis=1)).sum(axis=1)
        return losses.mean() + penalty / 2 * parameters @ parameters

    def gradient(parameters: np.ndarray) -> np.ndarray:
        errors = softmax(logs + features @ parameters, axis=1) - labels
        return np.einsum("rcp,rc->p", features, errors) / num_rows + penalty * parameters

    def hessian(parameters: np.ndarray) -> np.ndarray:
        answers = softmax(logs + features @ parameters, axis=1)
        means = np.einsum("rcp,rc->rp", features, answers)
        squares = np.einsum("rcp,rc,rcq->pq", features, answers, features, optimize=True)
        return (squares - means.T @ means) / num_rows + penalty * np.eye(len(parameters))

    start = np.zeros(len(directions))
    found = minimize(loss, start, method="trust-exact", jac=gradient, hess=hessian, tol=GRADIENT_TOLERANCE).x
    scale, bias = np.split(found @ directions, 2)
    return 1.0 + scale, bias
