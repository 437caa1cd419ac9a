"""Pictures of comparison tables: what became of the rows, labels, lengths. The style is `pictures`'."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from common.report.pictures import (
    BLUE,
    CLASS_NAMES,
    GREY,
    ON_GRID,
    ORANGE,
    SKY,
    STYLE,
    VERMILLION,
    new_figure,
    save,
    shortened,
)

WHITE = "#ffffff"


def kept_rows(path: Path, tables: Mapping[str, Mapping[str, int]]) -> None:
    """Shares of the rows read that were kept, dropped on purpose and rejected as bad, a bar a table.

    Args:
        path: PNG to write.
        tables: Name -> {"kept", "dropped", "rejected"}, numbers of rows, not all 0.
    """
    parts = {"kept": (BLUE, ""), "dropped": (ORANGE, "//"), "rejected": (WHITE, "xx")}
    totals = {name: sum(counts[part] for part in parts) for name, counts in tables.items()}
    values = {name: [counts[part] / totals[name] for part in parts] for name, counts in tables.items()}
    notes = {name: f"{counts['kept']:,} of {totals[name]:,} kept" for name, counts in tables.items()}
    _bars(path, parts, values, notes, "share of the rows read")


def label_shares(path: Path, tables: Mapping[str, Sequence[float]]) -> None:
    """How the label weight is shared by the classes, a bar a table.

    Args:
        path: PNG to write.
        tables: Name -> shares of A, B, tie.
    """
    parts = dict(zip(CLASS_NAMES, ((BLUE, ""), (ORANGE, "//"), (WHITE, "..")), strict=True))
    notes = {
        name: " / ".join(f"{100 * share:.0f}" for share in shares) + " %" for name, shares in tables.items()
    }
    _bars(path, parts, tables, notes, "share of the labels")


def character_lengths(path: Path, tables: Mapping[str, np.ndarray]) -> None:
    """Histogram of characters a comparison on a logarithmic scale, a panel a table, its median dashed.

    Args:
        path: PNG to write.
        tables: Name -> characters of prompt and both answers, [comparisons].
    """
    low = min(max(values.min(), 1) for values in tables.values())
    top = max(values.max() for values in tables.values())
    edges = np.geomspace(low, max(top, 10 * low) * 1.01, 49)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.5 + 1.75 * len(tables))
        rows = figure.subplots(len(tables), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (name, values) in zip(rows, tables.items(), strict=True):
            counts, _ = np.histogram(np.maximum(values, 1), bins=edges)
            panel.stairs(counts, edges, fill=True, color=SKY)
            panel.stairs(counts, edges, color=BLUE, linewidth=0.8)
            panel.axvline(np.median(values), ymax=0.72, color=VERMILLION, linestyle="--", linewidth=1.6)
            panel.set(title=shortened(name, 40), xscale="log", ylim=(0, 1.45 * max(counts.max(), 1)))
            panel.set_ylabel("comparisons")
            note = f"median {np.median(values):,.0f}"
            panel.text(0.99, 0.97, note, transform=panel.transAxes, ha="right", va="top", size=11)
            panel.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, integer=True))
            panel.yaxis.set_major_formatter(_thousands())
            panel.xaxis.set_major_formatter(_thousands())
        rows[-1].set_xlabel("characters a comparison (dashed: median)")
        save(figure, path)


def _bars(
    path: Path,
    parts: Mapping[str, tuple[str, str]],
    tables: Mapping[str, Sequence[float]],
    notes: Mapping[str, str],
    unit: str,
) -> None:
    """Stacked bars of shares, a table a row, its name and note above; `parts` are name -> (colour, hatch)."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(1.2 + 0.62 * len(tables))
        axes = figure.subplots()
        for y, (name, values) in enumerate(tables.items()):
            left = 0.0
            for (color, hatch), value in zip(parts.values(), values, strict=True):
                if not value:
                    continue  # its outline would look like something
                # white lines keep neighbours apart where there is no colour
                style = {"facecolor": color, "hatch": hatch, "edgecolor": GREY if color == WHITE else "white"}
                axes.barh(y + 0.14, value, left=left, height=0.36, **style)
                left += value
            _above(axes, y - 0.1, shortened(name, 26), notes[name])
        handles = [
            matplotlib.patches.Patch(
                facecolor=color, hatch=hatch, edgecolor=GREY if color == WHITE else "white", label=part
            )
            for part, (color, hatch) in parts.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(parts))
        axes.set(xlabel=unit, yticks=[], xlim=(0, 1), ylim=(len(tables) - 0.5, -0.6))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(_thousands())
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        save(figure, path)


def _above(axes: Axes, y: float, left: str, right: str) -> None:
    """Two texts at the ends of a row."""
    across = axes.get_yaxis_transform()
    above = {"va": "bottom", "transform": across, "path_effects": ON_GRID}
    axes.text(0, y, left, **above)
    axes.text(1, y, right, ha="right", **above)


def _thousands() -> FuncFormatter:
    """1,500 and 0.25; text, whatever the scale."""
    return FuncFormatter(lambda value, _: f"{value:,.0f}" if value == int(value) else f"{value:g}")
