"""Text of others (names in models and data, messages of backends) made safe where it is shown.

What it is shown in: a terminal, which obeys escape sequences; XML, which cannot hold every character; HTML,
where Jinja2 escapes markup and `printable` the rest.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but for tabs and ends of lines, those that turn text around, and lone surrogates."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def printable(text: str) -> str:
    """`text` with control characters written out: a terminal shows `\\x1b[31m` and does not turn red."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def xml_text(text: str) -> str:
    """`text` with `?` for what XML cannot hold; markup is left to the writer."""
    return _NOT_XML.sub("?", text)


MOST_ROWS = 50
"""Of a table in a notebook."""


def html_table(title: str, rows: Sequence[Sequence[object]], head: Sequence[object] = ()) -> str:
    """A small table for a notebook, as HTML in which nothing of `title` and `rows` is markup.

    Args:
        rows: of as many cells each; the first `MOST_ROWS` are shown. head: what stands above them.
    """

    def cell(value: object, tag: str) -> str:
        text = html.escape(printable(str(value))).replace("\n", "<br>")
        return f'<{tag} style="text-align:left;vertical-align:top">{text}</{tag}>'

    lines = ["".join(cell(value, "td") for value in row) for row in rows[:MOST_ROWS]]
    if head:
        lines.insert(0, "".join(cell(value, "th") for value in head))
    if len(rows) > MOST_ROWS:
        lines.append(cell(f"and {len(rows) - MOST_ROWS} more", "td"))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    caption = html.escape(printable(title)).replace("\n", "<br>")
    return f'<table><caption style="text-align:left"><b>{caption}</b></caption>{body}</table>'
