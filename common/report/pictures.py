"""Pictures of a run, each one PNG from plain arrays: legible on a phone, in print, and without colours.

All are FIGURE_WIDTH inches wide, panels one above the other, so that a page may show them at any width from
4 inches on. What differs in colour differs in marker or line as well.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from common.files import replacing

FIGURE_WIDTH = 4.6
"""Inches. On a phone (360 CSS pixels, 3.75 inches) the 11 pt text comes out at 9 pt."""
DOTS_PER_INCH = 220
CLASS_NAMES = ("A wins", "B wins", "tie")
NUM_BINS = 10
MIN_ROWS_PER_BIN = 20
NORMAL_QUANTILE = 1.96
"""Of a 95 % interval."""

BLACK, BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()
)
"""Okabe and Ito's colours, told apart with any colour vision; without the yellow, too pale on white."""
MARKERS = "osD^vPX<>p"
LINES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 3)), (0, (3, 1)))
GREY = "#5a5a5a"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "figure.facecolor": "white",
    "text.parse_math": False,  # names are data: a dollar sign is one
}
ON_GRID = [withStroke(linewidth=4, foreground="white")]
"""Of text that the lines of the grid do not cross."""


def reliability(path: Path, groups: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """What is claimed against what happens, a panel a class, with the distribution of claims below each.

    Claims are cut into up to NUM_BINS bins of equal size; bars are 95 % Wilson intervals (up to 4 groups: of
    each, else of the last one). On the diagonal a model is as sure as it may be.

    Args:
        path: PNG to write.
        groups: Name -> (probabilities [comparisons, 3], labels [comparisons, 3]), classes A, B, tie.
    """
    with matplotlib.rc_context(STYLE):
        figure = new_figure(9.6 + 0.24 * len(groups))
        rows = figure.subplots(6, 1, height_ratios=(4, 1) * 3)
        for c, class_name in enumerate(CLASS_NAMES):
            panel, strip = rows[2 * c], rows[2 * c + 1]
            panel.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (1, 2)))
            limit = 0.1
            for i, (probabilities, labels) in enumerate(groups.values()):
                claimed, happened, low, high = binned(probabilities[:, c], labels[:, c])
                limit = max(limit, probabilities[:, c].max(), high.max())
                mark = _mark(i)
                panel.plot(claimed, happened, **mark, markersize=7, markeredgecolor="white", linewidth=1.4)
                if len(groups) <= 4 or i == len(groups) - 1:
                    panel.vlines(claimed, low, high, color=mark["color"], linewidth=1.2, alpha=0.55)
                density, edges = np.histogram(probabilities[:, c], bins=np.linspace(0, 1, 41))
                share = density / max(len(probabilities), 1)
                strip.stairs(share, edges, color=mark["color"], linestyle=mark["linestyle"], linewidth=1.2)
            limit = min(1.0, np.ceil(limit * 10) / 10)
            panel.set(title=class_name, ylabel="happened", xlim=(0, limit), ylim=(0, limit))
            panel.tick_params(labelbottom=False)
            strip.set(yticks=[], ylabel="claims", xlim=(0, limit))
        rows[-1].set_xlabel("claimed probability")
        _legend(figure, [_line(_mark(i)) for i in range(len(groups))], list(groups))
        save(figure, path)


def binned(
    claimed: np.ndarray, happened: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean claim and mean label in bins of equal size; equal claims share a bin.

    Args:
        claimed: [rows], probabilities of one class.
        happened: [rows], the label's weight on it.

    Returns:
        Mean claim, mean label, and the label's 95 % interval's low and high end, each [bins], ascending.
    """
    claimed, happened = np.asarray(claimed, np.float64), np.asarray(happened, np.float64)
    num_bins = int(np.clip(len(claimed) // MIN_ROWS_PER_BIN, 1, NUM_BINS))
    edges = np.quantile(claimed, np.arange(1, num_bins) / num_bins, method="inverted_cdf")
    bins = np.searchsorted(edges, claimed, side="left")
    counts = np.bincount(bins)
    used = counts > 0
    means = [np.bincount(bins, weights=values)[used] / counts[used] for values in (claimed, happened)]
    return *means, *wilson_interval(means[1], counts[used])


def wilson_interval(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share seen in `count` draws: 0 of 10 -> (0, 0.278).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z2 = NORMAL_QUANTILE**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_QUANTILE * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def curves(path: Path, runs: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Loss (each step faint, its running mean strong) and learning rate over the share of steps done.

    Args:
        path: PNG to write.
        runs: Name -> {"step", "loss", "lr"}, each [logged steps].
    """
    with matplotlib.rc_context(STYLE):
        figure = new_figure(5.2 + 0.24 * len(runs))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        strong = []
        for i, logged in enumerate(runs.values()):
            step, loss, rate = (np.asarray(logged[key], np.float64) for key in ("step", "loss", "lr"))
            mark = _mark(i)
            smooth = running_mean(loss, max(1, len(loss) // 8))
            if len(runs) <= 2:
                top.plot(step, loss, color=mark["color"], linewidth=0.5, alpha=0.18)
            gap = max(len(loss) // 8, 1)  # markers of one run between those of the others
            every = {"markevery": (i * gap // len(runs), gap), "markersize": 6}
            top.plot(step, smooth, **mark, **every, linewidth=1.8)
            bottom.plot(step, rate, **mark, **every, linewidth=1.5)
            strong.append(smooth[np.isfinite(smooth)])
        shown = np.concatenate(strong)
        if len(shown):
            margin = max(0.4 * np.ptp(shown), 0.02)
            top.set_ylim(max(0, shown.min() - margin), shown.max() + margin)
        top.set(title="Training loss", ylabel="nats a comparison")
        bottom.set(title="Learning rate", xlabel="optimiser step", ylim=(0, None))
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=False)
        _legend(figure, [_line(_mark(i)) for i in range(len(runs))], list(runs))
        save(figure, path)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, fewer at the ends; what is not finite is left out."""
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + (window + 1) // 2, len(values))
    seen = counts[high] - counts[low]
    return np.where(seen > 0, (totals[high] - totals[low]) / np.maximum(seen, 1), np.nan)


def ladder(path: Path, blocks: Mapping[str, Mapping[str, object]]) -> None:
    """Log loss with its 95 % interval, a row a model, blocks one below the other, against given marks.

    Args:
        path: PNG to write.
        blocks: Title -> {"rows": name -> (log loss, low, high), "marks": name -> log loss}: marks, such as
            the prior or the floor, become a vertical line in each row of the block.
    """
    num_rows = sum(len(block["rows"]) for block in blocks.values())
    marks = list(dict.fromkeys(name for block in blocks.values() for name in block.get("marks", {})))
    styles = {
        name: {"color": color, "linestyle": line, "linewidth": 1.6}
        for name, color, line in zip(marks, (VERMILLION, BLUE, PURPLE, GREEN), LINES[1:], strict=False)
    }
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.9 + 0.46 * num_rows + 0.5 * len(blocks) + 0.24 * len(marks))
        axes = figure.subplots()
        y = 0.0
        for title, block in blocks.items():
            axes.text(0, y, title, transform=axes.get_yaxis_transform(), weight="bold", va="bottom", size=12)
            for name, (value, low, high) in block["rows"].items():
                y += 1
                _dot_row(axes, y, name, value, low, high)
                for mark, at in block.get("marks", {}).items():
                    axes.vlines(at, y - 0.06, y + 0.34, **styles[mark])  # beside the row's text, not across
            y += 1.3
        axes.set(xlabel="log loss, nats (lower is better)", yticks=[], ylim=(y - 0.8, -0.9))
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        _legend(figure, [_line({**styles[name], "marker": ""}) for name in styles], list(styles))
        save(figure, path)


def swap_consistency(path: Path, groups: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Probabilities of the order A, B against those of B, A: on the diagonal the order does not matter.

    Args:
        path: PNG to write.
        groups: Name -> (given, mirrored), each [comparisons, 3]; both speak of the same A.
    """
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.4 + 2.35 * len(groups))
        rows = figure.subplots(len(groups), 2, sharex=True, sharey=True, squeeze=False)
        for axes, (name, (given, mirrored)) in zip(rows, groups.items(), strict=True):
            for panel, c in zip(axes, (0, 2), strict=True):
                bins = np.linspace(0, 1, 41)
                counts, *_ = np.histogram2d(given[:, c], mirrored[:, c], bins=bins)
                panel.pcolormesh(
                    bins, bins, np.log1p(np.where(counts > 0, counts, np.nan)).T, cmap="cividis_r", vmin=0
                )
                panel.plot([0, 1], [0, 1], color=VERMILLION, linewidth=1, linestyle="--")
                gap = np.abs(given[:, c] - mirrored[:, c]).mean()
                panel.text(0.04, 0.95, f"{CLASS_NAMES[c]}\ngap {gap:.3f}", va="top", size=11)
                panel.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
            axes[0].set_title(shortened(name, 40))
            axes[0].set_ylabel("shown B, A")
        for panel in rows[-1]:
            panel.set_xlabel("shown A, B")
        save(figure, path)


def lengths(path: Path, runs: Mapping[str, Mapping[str, object]]) -> None:
    """Histogram of training sequence lengths with the budget's line, a panel a run.

    Args:
        path: PNG to write.
        runs: Name -> {"edges" [bins + 1], "counts" [bins], "budget": tokens, "note": shown in the corner}.
    """
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.5 + 1.75 * len(runs))
        rows = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (name, found) in zip(rows, runs.items(), strict=True):
            panel.stairs(found["counts"], found["edges"], fill=True, color=SKY)
            panel.stairs(found["counts"], found["edges"], color=BLUE, linewidth=0.8)
            panel.axvline(found["budget"], ymax=0.72, color=VERMILLION, linestyle="--", linewidth=1.6)
            panel.set_title(shortened(name, 40))
            panel.set_ylim(0, 1.55 * max(*found["counts"], 1))
            panel.text(0.99, 0.97, found["note"], transform=panel.transAxes, ha="right", va="top", size=11)
            panel.yaxis.set_major_locator(MaxNLocator(3, integer=True))
            panel.set_ylabel("sequences")
        rows[-1].set_xlabel("tokens a sequence, with markup\n(dashed: budget of the conversation in it)")
        save(figure, path)


def shortened(name: str, limit: int) -> str:
    """The name in at most `limit` characters, its middle left out: names differ at their ends."""
    if len(name) <= limit:
        return name
    head = (limit - 1) // 2
    return f"{name[:head]}…{name[len(name) - (limit - 1 - head) :]}"


def _dot_row(axes: Axes, y: float, name: str, value: float, low: float, high: float) -> None:
    """One value with its interval; name and numbers above it."""
    is_ensemble = name.startswith("ensemble")
    color, marker = (BLACK, "D") if is_ensemble else (BLUE, "o")
    axes.plot([low, high], [y + 0.12] * 2, color=color, linewidth=2.4, alpha=0.5, solid_capstyle="butt")
    axes.plot(value, y + 0.12, marker=marker, color=color, markersize=7)
    across = axes.get_yaxis_transform()
    above = {
        "va": "bottom",
        "transform": across,
        "path_effects": ON_GRID,
    }
    axes.text(0, y - 0.1, shortened(name, 36), **above)
    axes.text(1, y - 0.1, f"{value:.4f}", ha="right", **above)


def _mark(i: int) -> dict[str, object]:
    """Colour, marker and line of the i-th group; 7 colours, 10 markers and 7 lines: no two alike below 70."""
    colors = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
    return {"color": colors[i % 7], "marker": MARKERS[i % 10], "linestyle": LINES[i % 7]}


def _line(style: dict[str, object]) -> Line2D:
    return Line2D([], [], **{"linewidth": 1.6, "markersize": 6, **style})


def _legend(figure: Figure, handles: list[Line2D], names: Sequence[str]) -> None:
    """Names above the panels; two columns where they fit."""
    if not handles:
        return
    names = [shortened(name, 36) for name in names]
    columns = 2 if max(map(len, names)) <= 15 else 1
    figure.legend(handles, names, loc="outside upper left", ncols=columns)


def new_figure(height: float) -> Figure:
    """An empty figure, FIGURE_WIDTH wide and `height` inches high; to be made within STYLE."""
    return Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in any script
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)
