"""Renders a checkpoint's chat template, foreign code, in a process of its own with limits.

The process has no file, no network and no clock: what a template writes follows from its text, the messages
and a date that is given. Jinja is set up as by `transformers.apply_chat_template`, without what is random.
"""

import json
import os
import resource
import subprocess
import sys
import textwrap  # noqa: F401 - like jinja2.debug imported late by jinja2, when no file can be opened
from datetime import datetime
from functools import lru_cache

import jinja2.debug
import jinja2.ext
import jinja2.sandbox

MAX_SECONDS = 2
"""Of computing, for all conversations together."""
MAX_WAIT_SECONDS = 120
"""Until an answer, on a machine that is busy otherwise."""
MAX_MEMORY = 512 * 2**20
"""Bytes of address space, Python's own included."""
MAX_CHARACTERS = 100_000
"""Of one rendering."""

DATE = "2024-07-26"
"""Today, for templates that write it: what Llama 3.1's writes where there is no clock."""

Conversation = list[dict[str, str]]


def render(
    template: str, conversations: list[Conversation], *, variables: dict[str, str], date: str
) -> list[tuple[str, str]]:
    """Renders conversations, each with the cue for the model's answer.

    Args:
        template: Jinja.
        conversations: Messages, each with `role` and `content`.
        variables: What the template may use besides, such as `bos_token`.
        date: Today, for the template: YYYY-MM-DD.

    Returns:
        For each conversation its text and "", or "" and why it has none.

    Raises:
        ValueError: The template computes or allocates without end.
    """
    return _render(json.dumps([template, conversations, variables, date]))


@lru_cache
def _render(asked: str) -> list[tuple[str, str]]:
    code = "import runpy, sys; file, *sys.path = sys.argv[1:]; runpy.run_path(file, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-B", "-c", code, __file__, *sys.path]
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    options = {"env": environment, "capture_output": True, "timeout": MAX_WAIT_SECONDS, "check": True}
    try:
        answer = subprocess.run(command, input=asked.encode(), **options)
        return [tuple(pair) for pair in json.loads(answer.stdout)]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").split("\n")
        reason = "".join(lines[-2:]) or f"more than {MAX_SECONDS} s of computing"
        raise ValueError(f"it was cut off: {reason} (memory: {MAX_MEMORY >> 20} MB at most)") from error


def _answer() -> None:
    """The other process: reads what is asked, gives up its rights, renders."""
    template, conversations, variables, date = json.load(sys.stdin)
    _text("{{ 'a' }}", [], {}, DATE)  # what Python loads at the first use is loaded now
    limits = {"CPU": MAX_SECONDS, "AS": MAX_MEMORY, "NOFILE": 0, "NPROC": 0, "FSIZE": 0, "CORE": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))
    found = []
    for messages in conversations:
        try:
            found.append((_text(template, messages, variables, date), ""))
        except Exception as error:  # foreign code raises anything
            found.append(("", f"{type(error).__name__}: {str(error)[:500]}"))
    sys.stdout.write(json.dumps(found))


def _text(template: str, messages: Conversation, variables: dict[str, str], date: str) -> str:
    today = datetime.fromisoformat(date)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=(Generation, jinja2.ext.loopcontrols)
    )
    environment.filters["tojson"] = _tojson
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise, "strftime_now": today.strftime}
    text = environment.from_string(template).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=True,
        **(variables | {"date_string": today.strftime("%d %b %Y")}),
    )
    text.encode()  # a lone surrogate is no text
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it writes {len(text):,} characters for short messages, {MAX_CHARACTERS:,} at most")
    return text


class Generation(jinja2.ext.Extension):
    """A mark for training: what stands in it is written as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


if __name__ == "__main__":
    _answer()
