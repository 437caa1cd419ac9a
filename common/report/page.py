"""The report's page: one HTML file from a Jinja template, and what its tables are made with."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2


def render(template: Path, **found: object) -> str:
    """The page's HTML; every text is escaped, names of models and sources too."""
    rules = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    rules.filters |= {"filled": filled, "are_numbers": are_numbers, "listed": listed}
    text = rules.from_string(template.read_text(encoding="utf-8")).render(found)
    return text.encode("utf-8", "replace").decode("utf-8")  # a file's name may be no valid text


def data_uri(picture: Path) -> str:
    """A PNG as an address that holds it, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def filled(row: Mapping[str, object], form: str) -> str:
    """`filled({"loss": 0.5}, "{loss:.3f}")` -> "0.500"; "" where a value is None or not there."""
    try:
        return form.format_map({name: value for name, value in row.items() if value is not None})
    except KeyError:
        return ""


def are_numbers(rows: Sequence[Mapping[str, object]], form: str) -> bool:
    """Whether a table's column holds nothing but numbers, which stand on the right."""
    return all(re.fullmatch(r"[-+\d.,%]*", filled(row, form)) for row in rows)


def listed(values: Mapping[str, object], form: str) -> str:
    """`listed({"arena": 1200}, "{} {:,}")` -> "arena 1,200"."""
    return ", ".join(form.format(*item) for item in values.items())
