"""The report's page: sections of sentences, pictures and tables, and how they become one HTML file."""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from common.report.pictures import FIGURE_WIDTH

CSS_PIXELS_PER_INCH = 104
"""At which a picture is shown: a little above CSS's 96, so that its 11 pt text looks like the page's."""


@dataclass
class Section:
    """A heading, sentences, then pictures and tables; `folded` ones wait behind their title on screen."""

    title: str
    text: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Sentences on what is not there and how to make it."""
    pictures: list[dict[str, object]] = field(default_factory=list)
    tables: list[dict[str, object]] = field(default_factory=list)
    folded: list["Section"] = field(default_factory=list)

    def draw(self, path: Path, painter: Callable, data: object, alt: str, caption: str) -> None:
        """Adds a picture: `painter(path, data)` makes the PNG, the page holds it as a data URI."""
        painter(path, data)
        uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
        width = round(FIGURE_WIDTH * CSS_PIXELS_PER_INCH)
        self.pictures.append({"uri": uri, "width": width, "alt": alt, "caption": caption})

    def tabulate(self, caption: str, columns: Mapping[str, str], rows: Sequence[Sequence[object]]) -> None:
        """Adds a table, unless there are no rows.

        Args:
            caption: Above it.
            columns: Heading -> format of its values ("{:.4f}"); numbers alone are aligned to the right.
            rows: Values; the first one names the row, None stays empty.
        """
        forms = columns.values()
        texts = [["" if v is None else f.format(v) for f, v in zip(forms, row, strict=True)] for row in rows]
        is_numeric = [all(re.fullmatch(r"[-+\d.,%]*", row[i]) for row in texts) for i in range(len(forms))]
        found = {"caption": caption, "columns": list(columns), "rows": texts, "is_numeric": is_numeric}
        self.tables += [found] if rows else []


def render(template: Path, headlines: list[str], sections: list[Section], name: str) -> str:
    """The page's HTML from a Jinja file; every text is escaped, names of models and sources too."""
    rules = {
        "autoescape": True,
        "trim_blocks": True,
        "lstrip_blocks": True,
        "undefined": jinja2.StrictUndefined,
    }
    made = jinja2.Template(template.read_text(encoding="utf-8"), **rules)
    text = made.render(headlines=headlines, sections=sections, name=name)
    return text.encode("utf-8", "replace").decode("utf-8")  # a file's name may be no valid text
