"""The picture of what was trained on what: data on the left, one column a model, time runs downwards."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline

from common.report.artifacts import Labelling, Trained
from common.report.pictures import BLUE, FIGURE_WIDTH, STYLE, VERMILLION, save, shortened

DATA_WIDTH, MIN_COLUMN_WIDTH, GUTTER, LINE_HEIGHT = 1.4, 1.4, 0.24, 0.19
ROW_GAP = 0.55
"""All in inches."""
MAX_SOURCES = 5
DATA_FILL, LABELS_FILL, MODEL_FILL = "#dcedf8", "#fdebc8", "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Models trained on the same data, or one source of soft labels."""

    data: tuple[str, ...]
    """Lines of the box on the left, the first one its title; none: no box."""
    models: dict[str, tuple[str, ...]]
    """Column -> lines of the model's box, the first one its title; one column "" spans all the columns."""
    parents: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Column -> (row, column) of the model that it started from."""
    labels_from: int | None = None
    """Row of the soft labels that are this row's data."""


def trace(trained: Sequence[Trained], labellings: Sequence[Labelling]) -> list[Row]:
    """The rows of the picture: stages in order, soft labels before the students that learn from them.

    Args:
        trained: Runs; those that are not finished are left out.
        labellings: The first one is taken as the students' teacher.
    """
    rows: list[Row] = []
    places: dict[tuple[str, str], tuple[int, str]] = {}
    kinds = (("stage1", False), ("labels", False), ("stage2", False), ("stage3", False), ("stage3", True))
    labels_row = None
    for stage, is_final in kinds:
        if stage == "labels":
            if labellings:
                labels_row = len(rows)
                rows.append(_labels_row(labellings[0], places))
            continue
        runs = [
            run
            for run in trained
            if run.stage == stage and run.parent is not None and run.name.endswith("-final") == is_final
        ]
        by_sources: dict[tuple, list[Trained]] = {}
        for run in runs:
            by_sources.setdefault(tuple(run.sources.items()), []).append(run)
        for group in by_sources.values():
            labels_from = labels_row if stage == "stage2" else None
            rows.append(
                _stage_row(
                    group, "final" if is_final else stage.replace("stage", "stage "), places, labels_from
                )
            )
            places |= {
                (run.stage, run.name): (len(rows) - 1, run.name.removesuffix("-final")) for run in group
            }
    return rows


def _labels_row(labelling: Labelling, places: dict) -> Row:
    teachers = labelling.teachers
    who = f"mean of {len(teachers)} teachers" if len(teachers) > 1 else f"of {teachers[0]}"
    count = labelling.num_comparisons
    lines = ("pseudo labels", who, "not finished" if count is None else f"{count:,} comparisons")
    parents = {name: places["stage1", name] for name in teachers if ("stage1", name) in places}
    return Row(data=(), models={"": lines}, parents=parents)


def _stage_row(group: Sequence[Trained], title: str, places: dict, labels_from: int | None) -> Row:
    sources = sorted(group[0].sources.items(), key=lambda item: -item[1])
    data = [f"{name} {count:,}" for name, count in sources[:MAX_SOURCES]]
    if rest := sources[MAX_SOURCES:]:
        data.append(f"{len(rest)} more {sum(count for _, count in rest):,}")
    models, parents = {}, {}
    for run in group:
        column = run.name.removesuffix("-final")
        loss = "nothing held out" if run.log_loss is None else f"loss {run.log_loss:.4f}"
        models[column] = (title, run.name, loss)
        parent = (run.parent_stage, Path(run.parent).name)
        if parent in places:
            parents[column] = places[parent]
    kind = "soft labels" if group[0].stage == "stage2" else "votes"
    return Row(data=(kind, *(data or ["unknown"])), models=models, parents=parents, labels_from=labels_from)


def lineage(path: Path, rows: Sequence[Row]) -> None:
    """Draws data, models and soft labels with arrows: solid "trained on", dashed "starts from".

    A figure of many models is wider than the others; a page lets it scroll.

    Args:
        path: PNG to write.
        rows: From the first to the last.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.models if name))
    column_width = max(MIN_COLUMN_WIDTH, (FIGURE_WIDTH - DATA_WIDTH) / max(len(columns), 1))
    width = max(FIGURE_WIDTH, DATA_WIDTH + column_width * len(columns))
    data = [_wrapped(row.data, DATA_WIDTH - GUTTER) for row in rows]
    models = [
        {
            name: _wrapped(lines, width - DATA_WIDTH - GUTTER if name == "" else column_width - GUTTER)
            for name, lines in row.models.items()
        }
        for row in rows
    ]
    heights = [
        max(len(lines) for lines in (*found.values(), on_left)) * LINE_HEIGHT + 0.16
        for found, on_left in zip(models, data, strict=True)
    ]
    height = sum(heights) + ROW_GAP * len(rows) + 0.4
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        boxes: dict[tuple[int, str | None], tuple[float, float, float, float]] = {}
        top = 0.3
        for i, row in enumerate(rows):
            if row.data:
                boxes[i, None] = (0.06, top, DATA_WIDTH - GUTTER, heights[i])
                _box(axes, boxes[i, None], data[i], DATA_FILL)
            for name, lines in models[i].items():
                x = DATA_WIDTH + (columns.index(name) * column_width if name else 0)
                wide = (width - DATA_WIDTH if name == "" else column_width) - GUTTER
                boxes[i, name] = (x, top, wide, heights[i])
                _box(axes, boxes[i, name], lines, MODEL_FILL if name else LABELS_FILL)
            top += heights[i] + ROW_GAP
        _edges(axes, rows, boxes)
        handles = [
            Line2D([], [], color=BLUE, linewidth=1.6),
            Line2D([], [], color=VERMILLION, linewidth=1.6, linestyle=(0, (4, 2))),
        ]
        figure.legend(handles, ["trained on", "starts from"], loc="lower left", ncols=2)
        save(figure, path)


def _edges(axes: Axes, rows: Sequence[Row], boxes: dict) -> None:
    teachers: list[tuple[int, str]] = []
    for i, row in enumerate(rows):
        spans = "" in row.models
        if row.data:
            x, y, wide, high = boxes[i, None]
            if spans:
                _arrow(axes, [(x + wide, y + high / 2), (boxes[i, ""][0], y + high / 2)], BLUE)
            for name in row.models if not spans else ():
                left, _, model_width, _ = boxes[i, name]
                at = left + 0.3 * model_width
                _arrow(axes, [(x + wide * 0.7, y), (x + wide * 0.7, y - 0.14), (at, y - 0.14), (at, y)], BLUE)
        if spans:
            for teacher in row.parents.values():
                teachers.append(teacher)
                left, top, model_width, high = boxes[teacher]
                at = left + 0.65 * model_width
                _arrow(axes, [(at, top + high), (at, boxes[i, ""][1])], BLUE)
            continue
        if row.labels_from is not None:
            left, top, _, high = boxes[row.labels_from, ""]
            x, y, wide, _ = boxes[i, None]
            turn = top + high + 0.18
            corners = [
                (left + 0.2, top + high),
                (left + 0.2, turn),
                (x + 0.3 * wide, turn),
                (x + 0.3 * wide, y),
            ]
            _arrow(axes, corners, BLUE)
        for name, parent in row.parents.items():
            _arrow(axes, _way(boxes, parent, (i, name)), VERMILLION, dashed=True)


def _way(boxes: dict, parent: tuple[int, str], child: tuple[int, str]) -> list[tuple[float, float]]:
    """Corners from a model to the one that starts from it: straight down, or round what lies between."""
    left, top, wide, high = boxes[parent]
    child_left, child_top, child_width, _ = boxes[child]
    start, end = left + 0.65 * wide, child_left + 0.65 * child_width
    between = [key for key in boxes if parent[0] < key[0] < child[0] and key[1] in ("", parent[1])]
    if not between and start == end:
        return [(start, top + high), (end, child_top)]
    gutter, turn = left + wide + GUTTER / 2, child_top - 0.26
    return [
        (left + wide, top + high / 2),
        (gutter, top + high / 2),
        (gutter, turn),
        (end, turn),
        (end, child_top),
    ]


def _arrow(axes: Axes, corners: list[tuple[float, float]], color: str, *, dashed: bool = False) -> None:
    *way, last, tip = corners
    if way:
        axes.plot(
            *zip(*way, last, strict=True), color=color, lw=1.4, ls=(0, (4, 2)) if dashed else "-", zorder=1
        )
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": color, "linewidth": 1.4, "zorder": 3}
    line = {"linestyle": (0, (4, 2))} if dashed else {}
    axes.add_patch(FancyArrowPatch(path=Outline([last, tip]), **style, **line))


def _box(axes: Axes, place: tuple[float, float, float, float], lines: list[str], fill: str) -> None:
    x, y, wide, high = place
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch((x, y), wide, high, boxstyle=shape, facecolor=fill, edgecolor="black", zorder=2)
    )
    first = y + (high - (len(lines) - 1) * LINE_HEIGHT) / 2
    for i, line in enumerate(lines):
        weight = "normal" if i else "bold"
        at = (x + wide / 2, first + i * LINE_HEIGHT)
        axes.text(*at, line, ha="center", va="center", weight=weight, size=10.5, zorder=4)


def _wrapped(lines: Sequence[str], inches: float) -> list[str]:
    """Lines cut to a box's width, two for each at most."""
    limit = int(inches / 0.095)
    return [part for line in lines for part in textwrap.wrap(shortened(line, 2 * limit - 4), limit)[:2]]
