"""Draws the pictures of the documentation's concepts: `python tools/site_pictures.py docs/images`.

Calibration's is made by trtq's own methods. All are drawn 400 wide, so that their text can be read on a
phone, and take light or dark colours as the reader's system has them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from trtq.calibration.methods import amax_of, parse_method
from trtq.calibration.statistics import Histogram

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2933 }
.small { font-size: 12px } .middle { text-anchor: middle } .end { text-anchor: end }
.line { stroke: #52606d; stroke-width: 1.5; fill: none } .bar { fill: #9fb3c8 }
.box { fill: #f0f4f8; stroke: #52606d } .int8 { fill: #b2dfdb; stroke: #00796b }
.good { stroke: #00796b; fill: #00796b } .bad { stroke: #c62828; fill: #c62828 }
.open { stroke: #b26a00; fill: #b26a00 }
.mark { stroke: #c62828; stroke-width: 1.5; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e4e7eb } .line { stroke: #9aa5b1 } .bar { fill: #486581 }
.box { fill: #323f4b; stroke: #9aa5b1 } .int8 { fill: #004d40; stroke: #4db6ac } .mark { stroke: #ef9a9a }
.good { stroke: #4db6ac; fill: #4db6ac } .bad { stroke: #ef9a9a; fill: #ef9a9a }
.open { stroke: #ffb74d; fill: #ffb74d }
}
"""
ARROW = (
    '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" fill="#7b8794"/></marker>'
)


def drawn(height: int, title: str, *parts: str) -> str:
    """An SVG of these parts."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 {height}" role="img">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<defs>{ARROW}</defs>\n{body}\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def line(x0: float, y0: float, x1: float, y1: float, kind: str = "line", *, arrow: bool = False) -> str:
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" class="{kind}"{end}/>'


def box(x: float, y: float, width: float, words: str, kind: str = "box", height: float = 30) -> str:
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>'
    return frame + text(x + width / 2, y + height / 2 + 5, words, "middle")


def calibration() -> str:
    """A histogram of magnitudes with an outlier, and each method's amax on it."""
    random = np.random.default_rng(0)
    bulk, outliers = np.abs(random.normal(0, 1, 200_000)), random.uniform(4, 9, 12)
    values = np.concatenate([bulk, outliers]).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    counts, _ = np.histogram(values, bins=45, range=(0, 9))
    heights = np.log10(counts + 1) / np.log10(counts.max() + 1) * 150
    scale = 360 / 9
    parts = [
        f'<rect x="{20 + 8 * i:g}" y="{210 - h:.1f}" width="7" height="{h:.1f}" class="bar"/>'
        for i, h in enumerate(heights)
    ]
    parts += [line(20, 210, 385, 210), text(385, 244, "magnitude of the activation", "small end")]
    parts += [text(20 + scale * tick, 226, f"{tick}", "small middle") for tick in range(0, 10, 3)]
    parts.append(text(20, 258, "bars: how often, logarithmic", "small"))
    for row, name in enumerate(("percentile:99.99", "entropy", "mse", "max")):
        at = 20 + scale * amax_of(parse_method(name), histogram)
        right = name == "entropy"
        parts += [
            line(at, 20 + 16 * row, at, 210, "mark"),
            text(at + (4 if right else -4), 24 + 16 * row, name, "small" if right else "small end"),
        ]
    return drawn(266, "A histogram of magnitudes, and where four methods clip it", *parts)


def placement() -> str:
    """A residual block."""
    rows = [("x", None), ("Q / DQ", "int8"), ("Conv + ReLU", "int8"), ("Q / DQ", "int8"), ("Conv", "int8")]
    parts = []
    for row, (words, kind) in enumerate(rows):
        y = 20 + 52 * row
        parts.append(box(110, y, 120, words, kind or "box"))
        parts.append(line(170, y + 30, 170, y + 52, arrow=True))
        if words.startswith("Conv"):
            parts += [box(262, y, 128, "weights Q / DQ", "int8"), line(262, y + 15, 231, y + 15, arrow=True)]
    parts += [
        box(110, 280, 120, "Add", "int8"),
        line(170, 310, 170, 330, arrow=True),
        text(182, 332, "next Q or output", "small"),
        '<path d="M110 35L50 35L50 160" class="line" marker-end="url(#arrow)"/>',
        box(10, 160, 80, "Q / DQ", "int8"),
        '<path d="M50 190L50 295L109 295" class="line" marker-end="url(#arrow)"/>',
        text(56, 273, "so that both fuse", "small"),
    ]
    return drawn(342, "Where Q/DQ stands in a residual block", *parts)


def gate() -> str:
    """Three intervals of the drop."""
    zero, percent = 90, 100
    margin = zero + percent
    parts = [
        line(margin, 20, margin, 180, "mark"),
        text(margin, 14, "allowed: 1 %", "small middle"),
        line(20, 180, 385, 180),
        text(385, 214, "relative drop of the metric", "small end"),
    ]
    parts += [text(zero + percent * tick, 197, f"{tick} %", "small middle") for tick in range(3)]
    for row, (low, at, high, kind, words) in enumerate(
        [
            (-0.5, 0.1, 0.7, "good", "PASS"),
            (0.2, 0.8, 1.5, "open", "INCONCLUSIVE"),
            (1.3, 1.7, 2.2, "bad", "FAIL"),
        ]
    ):
        y = 48 + 48 * row
        left, middle, right = (zero + percent * value for value in (low, at, high))
        parts += [
            f'<path d="M{left:g} {y}L{right:g} {y}" class="{kind}" stroke-width="3"/>',
            f'<circle cx="{middle:g}" cy="{y}" r="5" class="{kind}"/>',
            text(middle, y - 12, words, "middle") if words == "PASS" else text(right + 10, y + 5, words),
        ]
    return drawn(222, "Intervals of the drop and the outcome with --confidence", *parts)


def recovery() -> str:
    """The steps in their order."""
    steps = ["calibrate", "fix", "partial", "learn"]
    said = [
        "ranges, free fixes",
        "scales as operators",
        "cheapest layers to float",
        "ranges and weights learned",
    ]
    parts = []
    for row, (step, words) in enumerate(zip(steps, said, strict=True)):
        y = 12 + 70 * row
        parts += [
            box(14, y, 100, step, "int8"),
            text(14, y + 48, words, "small"),
            line(114, y + 15, 208, y + 15, arrow=True),
            box(210, y, 60, "gate"),
            line(270, y + 15, 328, y + 15, arrow=True),
            text(299, y + 9, "pass", "small middle"),
        ]
        if row + 1 < len(steps):
            way = f"M240 {y + 30}L240 {y + 58}L90 {y + 58}L90 {y + 69}"
            parts += [
                f'<path d="{way}" class="line" marker-end="url(#arrow)"/>',
                text(246, y + 48, "fail", "small"),
            ]
    parts += [box(330, 12, 60, "best", "int8", 240), text(246, 270, "fail: the layers in the way", "small")]
    return drawn(284, "The workflow: steps and gates in their order", *parts)


PICTURES: Mapping[str, Callable[[], str]] = {
    "calibration": calibration,
    "placement": placement,
    "gate": gate,
    "recovery": recovery,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(sys.argv[1]) / f"{name}.svg").write_text(draw())
