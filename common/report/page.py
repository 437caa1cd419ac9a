"""The report's page: sections of sentences, pictures and tables, and how they become one HTML file."""

import base64
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import jinja2

from common.report.pictures import DOTS_PER_INCH

CSS_PIXELS_PER_INCH = 104
"""At which a picture is shown: a little above CSS's 96, so that its 11 pt text looks like the page's."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG on the page."""

    uri: str
    width: int
    """CSS pixels at which its text has the size of the page's."""
    alt: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers alone, which are then aligned to the right."""
        return all(re.fullmatch(r"[-+\d.,%]*", row[column]) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, sentences, then pictures and tables; `folded` ones wait behind their title on screen."""

    title: str
    text: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Sentences on what is not there and how to make it."""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple["Section", ...] = ()

    @property
    def anchor(self) -> str:
        """The part after # in a link to it."""
        return self.title.lower().replace(" ", "-")


def first_open(title: str, parts: list[Section], missing: list[str], text: tuple[str, ...] = ()) -> Section:
    """A section that shows its first part and folds the others."""
    if not parts:
        return Section(title=title, text=text, missing=tuple(missing))
    first, *others = parts
    return Section(
        title=title,
        text=(*text, *first.text),
        missing=tuple(missing),
        pictures=first.pictures,
        tables=first.tables,
        folded=tuple(others),
    )


def picture(path: Path, alt: str, caption: str) -> Picture:
    """A PNG as a data URI."""
    data = path.read_bytes()
    width, _ = struct.unpack(">II", data[16:24])  # of a PNG's first chunk
    return Picture(
        uri="data:image/png;base64," + base64.b64encode(data).decode("ascii"),
        width=round(width / DOTS_PER_INCH * CSS_PIXELS_PER_INCH),
        alt=alt,
        caption=caption,
    )


def render(template: Path, headlines: list[str], sections: list[Section], name: str) -> str:
    """The page's HTML; every text is escaped, names of models and sources too.

    Args:
        template: Jinja file.
        headlines: Sentences at the top.
        sections: In the order of the page.
        name: Of the run, for the title.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template.name).render(headlines=headlines, sections=sections, name=name)
    return text.encode("utf-8", "replace").decode("utf-8")  # a file's name may be no valid text
