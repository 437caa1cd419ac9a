"""Pictures, each one PNG (`path`) from plain arrays: legible on a phone, in print, and without colours.

All are FIGURE_WIDTH inches wide, panels one above the other, so that a page may show them at any width from
4 inches on. What differs in colour differs in marker or line as well.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from common.files import replacing

FIGURE_WIDTH = 4.6
"""Inches. On a phone (360 CSS pixels, 3.75 inches) the 11 pt text comes out at 9 pt."""
DOTS_PER_INCH = 220
CLASS_NAMES = ("A wins", "B wins", "tie")
NUM_BINS = 10
MIN_ROWS_PER_BIN = 20

BLACK, BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()
)
"""Okabe and Ito's colours, told apart with any colour vision; without the yellow, too pale on white."""
MARKERS = "osD^vPX<>p"
LINES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 3)), (0, (3, 1)))
GREY = "#5a5a5a"
TOKENS = "tokens a sequence, with markup\n(dashed: budget of the conversation in it)"
THOUSANDS = "{x:,.10g}"
"""Of a tick: 1,500 and 0.25; text, whatever the scale."""
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "text.parse_math": False,  # names are data: a dollar sign is one
}


def reliability(path: Path, groups: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """What is claimed against what happens, a panel a class, with the distribution of claims below each.

    Claims are cut into up to NUM_BINS bins of equal size; bars are 95 % Wilson intervals (up to 4 groups: of
    each, else of the last one). On the diagonal a model is as sure as it may be.

    Args:
        groups: Name -> (probabilities [comparisons, 3], labels [comparisons, 3]), classes A, B, tie.
    """
    marks = _marks(groups)
    with _panels(path, 9.6 + 0.24 * len(groups), 6, height_ratios=(4, 1) * 3) as (figure, rows):
        for c, (class_name, (panel, strip)) in enumerate(zip(CLASS_NAMES, rows.reshape(3, 2), strict=True)):
            panel.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (1, 2)))
            limit = 0.1
            for name, (probabilities, labels) in groups.items():
                mark = marks[name]
                claimed, happened, low, high = binned(probabilities[:, c], labels[:, c])
                limit = max(limit, probabilities[:, c].max(), high.max())
                panel.plot(claimed, happened, **mark, markersize=7, markeredgecolor="white", linewidth=1.4)
                if len(groups) <= 4 or name == list(groups)[-1]:
                    panel.vlines(claimed, low, high, color=mark["color"], linewidth=1.2, alpha=0.55)
                density, edges = np.histogram(probabilities[:, c], bins=np.linspace(0, 1, 41))
                share = density / max(len(probabilities), 1)
                strip.stairs(share, edges, color=mark["color"], linestyle=mark["linestyle"], linewidth=1.2)
            limit = min(1.0, np.ceil(limit * 10) / 10)
            panel.set(title=class_name, ylabel="happened", xlim=(0, limit), ylim=(0, limit))
            panel.tick_params(labelbottom=False)
            strip.set(yticks=[], ylabel="claims", xlim=(0, limit))
        strip.set_xlabel("claimed probability")
        _legend(figure, marks)


def binned(claimed: np.ndarray, happened: np.ndarray) -> tuple[np.ndarray, ...]:
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
    z2 = 1.96**2  # of the normal distribution's 95 %
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def curves(path: Path, runs: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Loss (each step faint, its running mean strong) and learning rate over the share of steps done.

    Args:
        runs: Name -> {"step", "loss", "lr"}, each [logged steps].
    """
    marks, height = _marks(runs), 5.2 + 0.24 * len(runs)
    with _panels(path, height, 2, sharex=True, height_ratios=(2, 1)) as (figure, (top, bottom)):
        strong = []
        for i, (name, logged) in enumerate(runs.items()):
            step, loss, rate = (np.asarray(logged[key], np.float64) for key in ("step", "loss", "lr"))
            gap = max(1, len(loss) // 8)
            smooth = running_mean(loss, gap)
            if len(runs) <= 2:
                top.plot(step, loss, color=marks[name]["color"], linewidth=0.5, alpha=0.18)
            every = (i * gap // len(runs), gap)  # markers of one run between those of the others
            top.plot(step, smooth, **marks[name], markevery=every, markersize=6, linewidth=1.8)
            bottom.plot(step, rate, **marks[name], markevery=every, markersize=6, linewidth=1.5)
            strong.append(smooth[np.isfinite(smooth)])
        shown = np.concatenate(strong)
        if len(shown):
            margin = max(0.4 * np.ptp(shown), 0.02)
            top.set_ylim(max(0, shown.min() - margin), shown.max() + margin)
        top.set(title="Training loss", ylabel="nats a comparison")
        bottom.set(title="Learning rate", xlabel="optimiser step", ylim=(0, None))
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=False)
        _legend(figure, marks)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, fewer at the ends; what is not finite is left out."""
    finite = pl.Series(np.where(np.isfinite(values), values, np.nan)).fill_nan(None)
    return finite.rolling_mean(window, min_samples=1, center=True).to_numpy()


def ladder(path: Path, blocks: Mapping[str, Mapping[str, object]]) -> None:
    """Log loss with its 95 % interval, a row a model, blocks one below the other, against given marks.

    Args:
        blocks: Title -> {"rows": name -> (log loss, low, high), "marks": name -> log loss}: marks, such as
            the prior or the floor, become a vertical line in each row of the block.
    """
    num_rows = sum(len(block["rows"]) for block in blocks.values())
    marks = dict.fromkeys(name for block in blocks.values() for name in block.get("marks", {}))
    kinds = zip(marks, (VERMILLION, BLUE, PURPLE, GREEN), LINES[1:], strict=False)
    styles = {name: {"color": color, "linestyle": line, "linewidth": 1.6} for name, color, line in kinds}
    height = 0.9 + 0.46 * num_rows + 0.5 * len(blocks) + 0.24 * len(marks)
    with _panels(path, height) as (figure, (axes,)):
        y = 0.0
        for title, block in blocks.items():
            axes.text(0, y, title, transform=axes.get_yaxis_transform(), weight="bold", va="bottom", size=12)
            for name, (value, low, high) in block["rows"].items():
                y += 1
                color, marker = (BLACK, "D") if name.startswith("ensemble") else (BLUE, "o")
                band = {"color": color, "linewidth": 2.4, "alpha": 0.5, "solid_capstyle": "butt"}
                axes.plot([low, high], [y + 0.12] * 2, **band)
                axes.plot(value, y + 0.12, marker=marker, color=color, markersize=7)
                _above(axes, y - 0.1, shortened(name, 36), f"{value:.4f}")
                for mark, at in block.get("marks", {}).items():
                    axes.vlines(at, y - 0.06, y + 0.34, **styles[mark])  # beside the row's text, not across
            y += 1.3
        axes.set(xlabel="log loss, nats (lower is better)", yticks=[], ylim=(y - 0.8, -0.9))
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        _legend(figure, styles)


def swap_consistency(path: Path, groups: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Probabilities of the order A, B against those of B, A: on the diagonal the order does not matter.

    Args:
        groups: Name -> (given, mirrored), each [comparisons, 3]; both speak of the same A.
    """
    height, bins = 0.4 + 2.35 * len(groups), np.linspace(0, 1, 41)
    with _panels(path, height, len(groups), 2, sharex=True, sharey=True) as (_, panels):
        rows = panels.reshape(-1, 2)
        for axes, (name, (given, mirrored)) in zip(rows, groups.items(), strict=True):
            for panel, c in zip(axes, (0, 2), strict=True):
                shades = {"cmap": "cividis_r", "norm": "log", "vmin": 0.5}  # one comparison is not pale
                panel.hist2d(given[:, c], mirrored[:, c], bins=bins, cmin=1, **shades)
                panel.plot([0, 1], [0, 1], color=VERMILLION, linewidth=1, linestyle="--")
                gap = np.abs(given[:, c] - mirrored[:, c]).mean()
                panel.text(0.04, 0.95, f"{CLASS_NAMES[c]}\ngap {gap:.3f}", va="top", size=11)
                panel.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
            axes[0].set(title=shortened(name, 40), ylabel="shown B, A")
        for panel in rows[-1]:
            panel.set_xlabel("shown A, B")


def lengths(
    path: Path,
    runs: Mapping[str, Mapping],
    *,
    unit: str = "sequences",
    xlabel: str = TOKENS,
    xscale: str = "linear",
) -> None:
    """Histogram of training sequence lengths (or others) with the budget's line, a panel a run.

    Args:
        runs: Name -> {"edges" [bins + 1], "counts" [bins], "budget": tokens, "note": shown in the corner}.
        unit: What is counted.
        xlabel: Below the last panel.
        xscale: Of matplotlib.
    """
    with _panels(path, 0.5 + 1.75 * len(runs), len(runs), sharex=True) as (_, rows):
        for axes, (name, found) in zip(rows, runs.items(), strict=True):
            bars = {"facecolor": SKY, "edgecolor": BLUE, "linewidth": 0.8}
            axes.stairs(found["counts"], found["edges"], fill=True, **bars)
            axes.axvline(found["budget"], ymax=0.72, color=VERMILLION, linestyle="--", linewidth=1.6)
            axes.set(title=shortened(name, 40), ylabel=unit, xscale=xscale)
            axes.set_ylim(0, 1.55 * max(*found["counts"], 1))
            axes.text(0.99, 0.97, found["note"], transform=axes.transAxes, ha="right", va="top", size=11)
            axes.yaxis.set(major_locator=MaxNLocator(3, integer=True), major_formatter=THOUSANDS)
            axes.xaxis.set_major_formatter(THOUSANDS)
        axes.set_xlabel(xlabel)


def character_lengths(path: Path, tables: Mapping[str, np.ndarray]) -> None:
    """Histogram of characters a comparison on a logarithmic scale, a panel a table, its median dashed.

    Args:
        tables: Name -> characters of prompt and both answers, [comparisons].
    """
    low = min(max(values.min(), 1) for values in tables.values())
    top = max(values.max() for values in tables.values())
    edges = np.geomspace(low, max(top, 10 * low) * 1.01, 49)
    panels = {}
    for name, values in tables.items():
        counts, _ = np.histogram(np.maximum(values, 1), bins=edges)
        median = np.median(values)
        panels[name] = {"edges": edges, "counts": counts, "budget": median, "note": f"median {median:,.0f}"}
    xlabel = "characters a comparison (dashed: median)"
    lengths(path, panels, unit="comparisons", xlabel=xlabel, xscale="log")


def kept_rows(path: Path, tables: Mapping[str, Mapping[str, int]]) -> None:
    """Shares of the rows read that were kept, dropped on purpose and rejected as bad, a bar a table.

    Args:
        tables: Name -> {"kept", "dropped", "rejected"}, numbers of rows, not all 0.
    """
    parts = ("kept", "dropped", "rejected")
    bars = {}
    for name, counts in tables.items():
        total = sum(counts[part] for part in parts)
        bars[name] = ([counts[part] / total for part in parts], f"{counts['kept']:,} of {total:,} kept")
    _shares(path, parts, bars, xlabel="share of the rows read", hatch="xx")


def label_shares(path: Path, tables: Mapping[str, Sequence[float]]) -> None:
    """How the label weight is shared by the classes, a bar a table.

    Args:
        tables: Name -> shares of A, B, tie.
    """
    bars = {}
    for name, shares in tables.items():
        bars[name] = (shares, " / ".join(f"{100 * share:.0f}" for share in shares) + " %")
    _shares(path, CLASS_NAMES, bars, xlabel="share of the labels", hatch="..")


def shortened(name: str, limit: int) -> str:
    """The name in at most `limit` characters, its middle left out: names differ at their ends."""
    if len(name) <= limit:
        return name
    head = (limit - 1) // 2
    return f"{name[:head]}…{name[len(name) - (limit - 1 - head) :]}"


@contextmanager
def _panels(path: Path, height: float, *shape: int, **layout: object) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure of `height` inches and its empty axes, from above; written as PNG, atomically, on success."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
        yield figure, figure.subplots(*shape, squeeze=False, **layout).ravel()
        with replacing(path) as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in any script
            figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def _shares(path: Path, parts: Sequence[str], bars: dict[str, tuple], *, xlabel: str, hatch: str) -> None:
    """Stacked bars of three parts, name -> (shares, note), both above; `hatch` is the white part's."""
    styles = (  # white lines keep neighbours apart where there is no colour
        {"facecolor": BLUE, "edgecolor": "white"},
        {"facecolor": ORANGE, "edgecolor": "white", "hatch": "//"},
        {"facecolor": "white", "edgecolor": GREY, "hatch": hatch},
    )
    with _panels(path, 1.2 + 0.62 * len(bars)) as (figure, (axes,)):
        for y, (name, (shares, note)) in enumerate(bars.items()):
            left = 0.0
            for style, share in zip(styles, shares, strict=True):
                if share:  # the outline of nothing would look like something
                    axes.barh(y + 0.14, share, left=left, height=0.36, **style)
                left += share
            _above(axes, y - 0.1, shortened(name, 26), note)
        handles = [Patch(**style, label=part) for part, style in zip(parts, styles, strict=True)]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(parts))
        axes.set(xlabel=xlabel, yticks=[], xlim=(0, 1), ylim=(len(bars) - 0.5, -0.6))
        axes.xaxis.set(major_locator=MaxNLocator(5), major_formatter=THOUSANDS)
        axes.spines["left"].set_visible(False)


def _above(axes: Axes, y: float, left: str, right: str) -> None:
    """Two texts at the ends of a row, not crossed by the lines of the grid."""
    style = {"va": "bottom", "transform": axes.get_yaxis_transform()}
    style["path_effects"] = [withStroke(linewidth=4, foreground="white")]
    axes.text(0, y, left, **style)
    axes.text(1, y, right, ha="right", **style)


def _marks(names: Iterable[str]) -> dict[str, dict[str, object]]:
    """Colour, marker and line of each; 7 colours, 10 markers and 7 lines: no two alike below 70."""
    colors = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
    kinds = zip(names, cycle(colors), cycle(MARKERS), cycle(LINES))
    return {name: {"color": color, "marker": mark, "linestyle": line} for name, color, mark, line in kinds}


def _legend(figure: Figure, styles: Mapping[str, Mapping[str, object]]) -> None:
    """Names above the panels; two columns where they fit."""
    if styles:
        names = [shortened(name, 36) for name in styles]
        lines = [Line2D([], [], **{"linewidth": 1.6, "markersize": 6, **style}) for style in styles.values()]
        columns = 2 if max(map(len, names)) <= 15 else 1
        figure.legend(lines, names, loc="outside upper left", ncols=columns)
