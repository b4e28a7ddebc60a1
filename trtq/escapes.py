"""Text of others (names in models and data, messages of backends) made safe where it is shown.

What it is shown in: a terminal, which obeys escape sequences; XML, which cannot hold every character; HTML,
where Jinja2 escapes markup and `printable` the rest.
"""

from __future__ import annotations

import re

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
