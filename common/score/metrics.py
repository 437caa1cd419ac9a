"""How good probabilities are: log loss, accuracy, calibration, swap consistency, and how sure one can be.

Everything takes probabilities and labels as [num_comparisons, C], classes in the order A, B, tie; labels are
one-hot votes or soft labels. Sums are in float64.
"""

import numpy as np

MIN_PROBABILITY = 1e-15
"""Probabilities are clipped here, so that a certain mistake costs 34.5 instead of infinity."""
SUM_TOLERANCE = 1e-3 + 1e-6
"""What readers let pass, in double precision, and what float32 then adds to it."""
NUM_BINS = 15
ENSEMBLE, FITTED, PRIOR = "ensemble", "ensemble-fitted", "prior"
"""What scores.json calls the given ensemble, the fitted one, and the constant answer."""


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    """The headline numbers, ready for JSON.

    Args:
        probabilities: [num_comparisons, C], rows sum to 1.
        labels: [num_comparisons, C], rows sum to 1.

    Returns:
        `num_comparisons`, `log_loss`, `log_loss_interval` (95 %, [low, high]), `accuracy`, and
        `calibration_error` as in `calibration_error`.

    Raises:
        ValueError: As in `per_row_log_loss`.
    """
    losses = per_row_log_loss(probabilities, labels)
    return {
        "num_comparisons": len(losses),
        "log_loss": float(losses.mean()),
        "log_loss_interval": list(bootstrap_interval(losses)),
        "accuracy": accuracy(probabilities, labels),
        "calibration_error": calibration_error(probabilities, labels),
    }


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean soft cross entropy in nats; for one-hot labels the competition's metric."""
    return float(per_row_log_loss(probabilities, labels).mean())


def per_row_log_loss(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Soft cross entropy of each row in nats, float64 [num_comparisons].

    `[[0.5, 0.25, 0.25]]` against `[[1, 0, 0]]` -> `[0.693]`. Probabilities are clipped at MIN_PROBABILITY.

    Raises:
        ValueError: The shapes differ or are not [1 or more, 2 or more]; a value is negative or not finite; a
            row does not sum to 1 within `SUM_TOLERANCE`.
    """
    probabilities, labels = _checked(probabilities, labels)
    return -(labels * np.log(np.clip(probabilities, MIN_PROBABILITY, 1.0))).sum(axis=1)


def prior_log_loss(train_labels: np.ndarray, labels: np.ndarray) -> float:
    """Log loss on `labels` of always answering the mean of `train_labels`: what knowing nothing scores."""
    (train_labels,) = _checked(train_labels)
    prior = train_labels.mean(axis=0)
    return log_loss(np.broadcast_to(prior, (len(labels), len(prior))), labels)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose likeliest class is the label's; the first of equals counts (A, B, tie)."""
    probabilities, labels = _checked(probabilities, labels)
    return float((probabilities.argmax(axis=1) == labels.argmax(axis=1)).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    """Expected calibration error: how far what is claimed lies from what happens, over 15 equal-mass bins.

    Rows are sorted by the claimed probability and cut into bins of (nearly) equal size; equal claims share a
    bin, so the order of the rows does not matter. The error is the mean over rows of
    |mean claim - mean label| of the row's bin. By chance alone it is about 0.4 x sqrt(bins / rows): 0.03 for
    2,000 rows.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2; equal-mass bins and errors
        per class after Nixon et al. 2019, "Measuring Calibration in Deep Learning".

    Returns:
        `top`: of the likeliest class against the label's weight on it. `per_class`: C errors, each over the
        probability of that class in all rows.
    """
    probabilities, labels = _checked(probabilities, labels)
    rows, top = np.arange(len(labels)), probabilities.argmax(axis=1)
    return {
        "top": _binned_error(probabilities[rows, top], labels[rows, top]),
        "per_class": [_binned_error(*pair) for pair in zip(probabilities.T, labels.T, strict=True)],
    }


def _binned_error(claimed: np.ndarray, happened: np.ndarray) -> float:
    edges = np.quantile(claimed, np.arange(1, NUM_BINS) / NUM_BINS, method="inverted_cdf")
    bins = np.searchsorted(edges, claimed, side="left")
    gaps = np.bincount(bins, weights=claimed - happened)
    return float(np.abs(gaps).sum() / len(claimed))


def rescale(probabilities: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Calibrated probabilities: softmax(scale x log p + bias) over the classes.

    `[[0.8, 0.1, 0.1]]` with scale 0.5 and bias 0 for each class -> `[[0.586, 0.207, 0.207]]`: half as sure.

    Args:
        probabilities: [num_comparisons, C], rows sum to 1; clipped at MIN_PROBABILITY before the logarithm.
        scale: [C], 1 leaves a class as it is.
        bias: [C], in nats, 0 leaves a class as it is.

    Returns:
        float64 [num_comparisons, C], rows sum to 1.

    Raises:
        ValueError: As in `per_row_log_loss`; scale or bias is not C finite numbers.
    """
    (probabilities,) = _checked(probabilities)
    scale, bias = np.asarray(scale, dtype=np.float64), np.asarray(bias, dtype=np.float64)
    num_classes = probabilities.shape[1]
    for name, values in (("scale", scale), ("bias", bias)):
        if values.shape != (num_classes,) or not np.isfinite(values).all():
            raise ValueError(
                f"{name} is {values.tolist()}, expected {num_classes} finite numbers, one a class"
            )
    logits = scale * np.log(np.clip(probabilities, MIN_PROBABILITY, 1.0)) + bias
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def mirror(values: np.ndarray) -> np.ndarray:
    """Exchanges A and B: `[[0.6, 0.3, 0.1]]` -> `[[0.3, 0.6, 0.1]]`; further classes stay."""
    order = np.arange(values.shape[1])
    order[:2] = (1, 0)
    return values[:, order]


def swap_consistency(given: np.ndarray, mirrored: np.ndarray) -> dict[str, float]:
    """How much the answer depends on which response is shown first.

    Args:
        given: [num_comparisons, C], probabilities of the order A, B.
        mirrored: [num_comparisons, C], probabilities of the order B, A, already mirrored back: both arguments
            speak of the same A.

    Returns:
        `mean_absolute_difference`: over rows and classes, 0 for a model that does not care about the order.
        `same_winner`: share of rows whose likeliest class is the same in both.
    """
    given, mirrored = _checked(given, mirrored)
    return {
        "mean_absolute_difference": float(np.abs(given - mirrored).mean()),
        "same_winner": float((given.argmax(axis=1) == mirrored.argmax(axis=1)).mean()),
    }


def bootstrap_interval(
    values: np.ndarray, *, num_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-row values.

    Args:
        values: [num_rows], e.g. of `per_row_log_loss`.
        num_resamples: Resamples of the rows, with replacement.
        seed: The same seed gives the same interval.
        level: Share of resampled means within the interval.

    Returns:
        (low, high); both the value itself where there is one row only.

    Raises:
        ValueError: There is no row, or not one finite number a row.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected one finite number a row, at least one row; got shape {values.shape}")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _checked(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays as float64, all of one shape [1 or more, 2 or more] and rows of probabilities."""
    arrays = [np.asarray(array, dtype=np.float64) for array in arrays]
    for array in arrays:
        if array.ndim != 2 or array.shape != arrays[0].shape or array.shape[0] < 1 or array.shape[1] < 2:
            shapes = " and ".join(str(array.shape) for array in arrays)
            raise ValueError(f"expected the same shape [comparisons, classes], not empty; got {shapes}")
        sums = array.sum(axis=1)
        is_bad = ~np.isfinite(array).all(axis=1) | (array < 0).any(axis=1) | ~(abs(sums - 1) <= SUM_TOLERANCE)
        if is_bad.any():
            row = int(is_bad.argmax())
            raise ValueError(
                f"{int(is_bad.sum())} of {len(array)} rows are no probabilities: row {row} is "
                f"{array[row].tolist()}, sum {sums[row]:.4f}; expected finite numbers from 0 on that sum to 1"
            )
    return arrays
