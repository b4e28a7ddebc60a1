"""`report.html`: one self-contained page made from the files that `trtq deploy` leaves in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from trtq.backends.builders import describe_engine
from trtq.backends.compiled import Compiled
from trtq.backends.coverage import Coverage, coverage
from trtq.calibration.table import Table
from trtq.errors import InputError, about
from trtq.files import PathLike, read_json, write_text
from trtq.gate.in_the_way import InTheWay
from trtq.gate.verdict import Outcome, Verdict
from trtq.graph.plan import Plan, percent
from trtq.numerics import INT8_MAX

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.badge { color: #fff; padding: .1em .6em; border-radius: .3em; font-weight: 600 }
.pass { background: #18794e } .fail { background: #c62a2f } .inconclusive { background: #ad5700 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2em .6em .2em 0;
border-bottom: 1px solid var(--line); vertical-align: top } td.n, th.n { text-align: right }
.bar { background: #18794e; height: .7em; border-radius: .2em } .missed { color: #c62a2f; font-weight: 600 }
code { background: var(--soft); padding: 0 .25em } summary { cursor: pointer } svg text { fill: currentColor }
"""


def write_report(folder: PathLike) -> Path:
    """Write `report.html` into a folder of results and return its path.

    Raises:
        InputError: a file of the results is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "verdict.json").is_file():
        raise InputError(
            "the folder holds no results",
            file=folder,
            remedy="give one that 'trtq deploy -o' or 'demo' wrote",
        )
    with about(folder / "verdict.json"):
        verdict = Verdict.from_json(read_json(folder / "verdict.json", "verdict"))
    plan, table = Plan.load(folder / "plan.json"), Table.load(folder / "calibration.cache")
    engine = describe_engine(folder / "model.plan")
    if engine["build"] is None:
        raise InputError("the record of the engine is missing", file=folder / "model.plan.json")
    compiled: Compiled = engine["build"]["compiled"]
    covered = coverage(plan, compiled)
    title = f"{verdict.metric}: {verdict.outcome.value}"
    sections = [
        _headline(verdict),
        _in_the_way(verdict.in_the_way),
        *([_section("Warnings", _warnings(verdict))] if verdict.warnings else []),
        _section("Accuracy", _interval(verdict) + _paragraphs(_measured(verdict))),
        _section("Steps", _steps(folder)),
        _section("Calibration", _methods(table.metadata)),
        _section("Engine", _engine(engine, compiled, covered)),
        _section("Weighted nodes", _nodes(plan, covered)),
        *([_section("In float32", _float32(plan))] if plan.float32 else []),
        _section("Ranges", _ranges(table)),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<body>{''.join(sections)}</body></html>\n"
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _headline(verdict: Verdict) -> str:
    name = verdict.outcome.value
    summary = verdict.headline().removeprefix(name.upper()).strip()
    return f'<h1><span class="badge {name}">{name.upper()}</span> {escape(summary)}</h1>'


def _in_the_way(found: InTheWay | None) -> str:
    """The layers that stand in the way, and the way round them where one is known."""
    if found is None:
        return ""
    rows = [
        [
            str(rank),
            ", ".join(f"<code>{escape(node)}</code>" for node in obstacle.nodes),
            escape(obstacle.op),
            "" if obstacle.sqnr_db is None else f"{obstacle.sqnr_db:.1f} dB",
            "" if obstacle.noise_share is None else f"{obstacle.noise_share:.1%}",
            "" if obstacle.mac_share is None else f"{obstacle.mac_share:.1%}",
            escape(obstacle.reason),
        ]
        for rank, obstacle in enumerate(found.obstacles, 1)
    ]
    header = ["", "nodes", "op", "SQNR alone", "of the noise", "of the MACs", ""]
    table = _table(header, rows, numeric=(3, 4, 5)) if rows else ""
    way = f"{escape(found.advice)}: <code>{escape(found.options)}</code>" if found.options else None
    body = f"<p>{escape(found.what)}</p>{table}<p>{way or escape(found.advice)}</p>"
    return _section("In the way", body)


def _measured(verdict: Verdict) -> list[str]:
    return replace(verdict, in_the_way=None).details()


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}\n"


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<div>{escape(line.strip())}</div>" for line in lines)


def _warnings(verdict: Verdict) -> str:
    items = (f"<li>{escape(text).replace(chr(10), '<br>')}</li>" for text in verdict.warnings)
    return f"<ul>{''.join(items)}</ul>"


def _interval(verdict: Verdict) -> str:
    """The drop with its interval on a line, and the margin it must stay under."""
    if verdict.relative_interval is None or verdict.relative_drop is None:
        return ""
    low, high = verdict.relative_interval
    left, right = min(low, 0.0), max(high, verdict.max_drop, 0.0)
    span = (right - left) or 1.0

    def x(value: float) -> float:
        return 60 + 580 * (value - left) / span

    ticks = "".join(
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="14" y2="46" stroke="{colour}" stroke-width="2"/>'
        f'<text x="{x(v):.1f}" y="{y}" text-anchor="middle" font-size="12">{escape(label)}</text>'
        for v, colour, label, y in (
            (0.0, "#8888", "fp32", 60),
            (verdict.max_drop, "#c62a2f", f"allowed {verdict.max_drop:.2%}", 10),
        )
    )
    colour = "#18794e" if verdict.gate is Outcome.PASS else "#c62a2f"
    return (
        f'<svg viewBox="0 0 700 66" width="100%" role="img" aria-label="drop with its interval">{ticks}'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="30" y2="30" stroke="{colour}" stroke-width="6" '
        f'opacity=".45"/><circle cx="{x(verdict.relative_drop):.1f}" cy="30" r="6" fill="{colour}"/></svg>'
    )


def _steps(folder: Path) -> str:
    """Every step that the workflow took, where `deploy` left a record of them."""
    if not (folder / "workflow.json").is_file():
        return "<p>One: the table it was given.</p>"
    with about(folder / "workflow.json"):
        rows = [_step(step) for step in read_json(folder / "workflow.json", "record of the steps")]
    header = ["step (kept: bold)", "outcome", "drop", "SQNR dB", "INT8 MACs", ""]
    return _table(header, rows, numeric=(2, 3, 4))


def _step(step: Mapping[str, Any]) -> list[str]:
    """The row of a step: its figures, or why it gave nothing to measure."""
    name, note = escape(step["step"]), escape(step.get("note", ""))
    if step["outcome"] is None:
        return [name, "nothing to gate", "", "", "", note]
    drop = "not finite" if step["relative_drop"] is None else f"{step['relative_drop']:.2%}"
    noise = ", ".join(f"{value:.1f}" for value in step["sqnr_db"].values())
    outcome = escape(step["outcome"])
    missed = escape("; ".join(check["message"] for check in step["checks"] if not check["ok"]))
    badge = f'<span class="badge {outcome}">{outcome}</span>'
    badge += f' <span class="missed">{missed}</span>' if missed else ""
    name = f"<strong>{name}</strong>" if step["kept"] else name
    return [name, badge, drop, noise, percent(step["int8_share"]), note]


def _methods(metadata: Any) -> str:
    method, rows = metadata.get("method", "unknown"), metadata.get("rows", "?")
    text = f"<p>Method <code>{escape(str(method))}</code> on {rows} rows.</p>"
    tried: dict[str, float] = metadata.get("sqnr_db", {})
    if not tried:
        return text
    widest = max(*tried.values(), 1.0)
    rows_html = []
    for name, value in sorted(tried.items(), key=lambda item: -item[1]):
        width = 20 * max(value, 0) / widest
        rows_html.append(
            [escape(name), f"{value:.2f} dB", f'<div class="bar" style="width:{width:.1f}rem"></div>']
        )
    text += f"<p>Signal to quantization noise of the outputs on {metadata['held_back']} rows held back:</p>"
    text += _table(["method", "SQNR", ""], rows_html)
    if "fixes" in metadata:
        fixes = [
            [escape(label), f"{value:.2f} dB"]
            for label, value in sorted(metadata["fixes_sqnr_db"].items(), key=lambda item: -item[1])
        ]
        text += f"<p>Fixes: <code>{escape(metadata['fixes'])}</code>.</p>" + _table(["fixes", "SQNR"], fixes)
    if "learned" in metadata:
        before, after = metadata["learned"]["sqnr_db"]
        steps = metadata["learned"]["steps"]
        text += f"<p>Learned in {steps} steps: {before:.2f} dB before, {after:.2f} dB after.</p>"
    if left := metadata.get("left_out"):
        rows_html = [[f"<code>{escape(name)}</code>", escape(why)] for name, why in left.items()]
        listed = _table(["in floating point", "why"], rows_html)
        text += f"<details><summary>{len(left)} left in floating point</summary>{listed}</details>"
    own: dict[str, str] = metadata.get("exceptions", {})
    if own:
        gain = f"{metadata['sqnr_db_with_exceptions']:.2f} dB"
        listed = _table(
            ["tensor", "method"], [[f"<code>{escape(t)}</code>", escape(m)] for t, m in own.items()]
        )
        summary = f"{len(own)} tensors do better with their own: {gain}"
        text += f"<details><summary>{summary}</summary>{listed}</details>"
    return text


def _engine(engine: dict[str, Any], compiled: Compiled, covered: Coverage) -> str:
    targets = ", ".join(engine["targets"]) or "the builder's own"
    megabytes = compiled.bytes_moved() / 1e6
    lines = [
        f"{engine['backend']} {engine['version']}, {engine['bytes'] / 1e6:.1f} MB",
        f"built for compute capabilities {targets}",
        f"{compiled.kernels} kernels; about {megabytes:.1f} MB moved at batch {compiled.batch} (an estimate)",
        *covered.text().splitlines(),
    ]
    return _paragraphs(lines)


def _nodes(plan: Plan, covered: Coverage) -> str:
    running = {node.name for node in covered.int8}
    rows = []
    for node in plan.nodes:
        if node.name in running:
            state = "INT8"
        else:
            state = '<span class="missed">floating point</span>' if node.int8 else "floating point"
        reason = "" if node.name in running else node.reason if not node.int8 else "its Q/DQ bought nothing"
        millions = "" if node.macs is None else f"{node.macs / 1e6:.2f} M"
        rows.append([f"<code>{escape(node.name)}</code>", escape(node.op), millions, state, escape(reason)])
    return _table(["node", "op", "MACs", "engine", "why"], rows, numeric=(2,))


def _float32(plan: Plan) -> str:
    """What stays float32 where the rest is float16."""
    rows = [
        [f"<code>{escape(node.name)}</code>", escape(node.op), escape(node.reason)] for node in plan.float32
    ]
    body = _table(["node", "op", "why"], rows)
    return f"<details><summary>{len(rows)} nodes, the rest is float16</summary>{body}</details>"


def _ranges(table: Table) -> str:
    rows = [
        [f"<code>{escape(name)}</code>", f"{float(scale) * INT8_MAX:.5g}", f"{float(scale):.6g}"]
        for name, scale in table.scales.items()
    ]
    body = _table(["tensor", "amax", "scale"], rows, numeric=(1, 2))
    return f"<details><summary>{len(rows)} tensors</summary>{body}</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numeric else ''}>{value}</{tag}>" for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{body}</table>"
