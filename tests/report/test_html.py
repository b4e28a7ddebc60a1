"""`report.html`: it says what the files beside it say, and needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jobs import Deployed

from trtq.errors import InputError
from trtq.report.html import write_report


class Page(HTMLParser):
    """Texts, attributes and whether every tag is closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.attributes: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        linked = [str(value) for name, value in attrs if name in ("src", "href")]
        self.links += [link for link in linked if not link.startswith("data:image/png;base64,")]
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta", "img", "br"):  # those that HTML leaves open
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [name for name, _ in attrs]  # shapes within SVG

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def copied(demo: Deployed, folder: Path) -> Path:
    shutil.copytree(demo.folder, folder, dirs_exist_ok=True)
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_report_is_a_page_of_its_own(demo: Deployed) -> None:
    page = Page((demo.folder / "report.html").read_text())
    assert page.open == []
    assert page.links == []


def test_the_report_says_verdict_method_and_every_node(demo: Deployed) -> None:
    text = Page((demo.folder / "report.html").read_text()).text
    verdict = json.loads((demo.folder / "verdict.json").read_text())
    plan = json.loads((demo.folder / "plan.json").read_text())
    assert "PASS" in text
    assert f"{verdict['reference']:.4f}" in text
    for node in plan["nodes"]:
        assert node["name"] in text
    method = json.loads((demo.folder / "calibration.cache.json").read_text())["method"]
    assert method in text


def test_the_report_is_the_same_again(demo: Deployed, tmp_path: Path) -> None:
    again = write_report(copied(demo, tmp_path))
    assert again.read_bytes() == (demo.folder / "report.html").read_bytes()


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_the_badge_is_the_outcome(outcome: str, demo: Deployed, tmp_path: Path) -> None:
    change(copied(demo, tmp_path) / "verdict.json", outcome=outcome, gate=outcome)
    content = write_report(tmp_path).read_text()
    assert f'<span class="badge {outcome}">{outcome.upper()}</span>' in content
    assert "badge pass" not in content.partition("</h1>")[0]


def test_a_verdict_with_two_answers_is_refused(demo: Deployed, tmp_path: Path) -> None:
    change(copied(demo, tmp_path) / "verdict.json", gate="fail")
    with pytest.raises(InputError, match="contradicts itself"):
        write_report(tmp_path)


def test_results_of_the_time_of_the_gate_alone(demo: Deployed, tmp_path: Path) -> None:
    """Their verdict has no gate, checks and diagnosis; their steps have no note and no gate; there is no
    record of the report."""
    folder = copied(demo, tmp_path)
    (folder / "report.json").unlink()
    now = write_report(folder).read_bytes()
    assert b"Noise" not in now
    for name, new in (
        ("verdict.json", ("gate", "checks", "in_the_way")),
        ("workflow.json", ("gate", "note")),
    ):
        value = json.loads((folder / name).read_text())
        for item in value if isinstance(value, list) else [value]:
            for key in new:
                del item[key]
        (folder / name).write_text(json.dumps(value))
    assert write_report(folder).read_bytes() == now


def test_what_is_in_the_way_stands_under_the_head(demo: Deployed, tmp_path: Path) -> None:
    found = {
        "what": "2 layers",
        "obstacles": [
            {"rank": 1, "nodes": ["<b>", "c"], "op": "Conv", "sqnr_db": 3.25, "noise_share": 0.9,
             "mac_share": None, "reason": ""}
        ],
        "options": "--exclude '<b>'",
        "advice": "would pass",
    }  # fmt: skip
    change(copied(demo, tmp_path) / "verdict.json", outcome="fail", gate="fail", in_the_way=found)
    page = Page(write_report(tmp_path).read_text())
    assert page.open == []
    assert page.text.index("What stands in the way") < page.text.index("Accuracy")
    for words in ("<b>", "3.2 dB", "trtq deploy --recipe recipe.toml -o again --exclude '<b>'"):
        assert words in page.words
    assert "90.0%" in page.text


def test_the_interval_is_drawn_to_scale(demo: Deployed, tmp_path: Path) -> None:
    path = copied(demo, tmp_path) / "verdict.json"
    change(path, relative_interval=[-0.01, 0.03], relative_drop=0.01, max_drop=0.02)
    content = write_report(tmp_path).read_text()

    def at(mark: str) -> float:
        return float(re.search(rf'<i class="{mark}" style="left:([\d.]+)%', content).group(1))  # type: ignore[union-attr]

    zero, margin, low, drop = at("zero"), at("margin"), at("span pass"), at("drop pass")
    unit = float(re.search(r";width:([\d.]+)%", content).group(1)) / 4  # type: ignore[union-attr] # 1 % of drop
    assert [low + unit, low + 2 * unit, low + 3 * unit] == pytest.approx([zero, drop, margin], abs=0.02)


def test_names_of_the_model_are_text_and_not_markup(demo: Deployed, tmp_path: Path) -> None:
    path = copied(demo, tmp_path) / "plan.json"
    plan = json.loads(path.read_text())
    plan["nodes"][0]["name"] = "<script>alert(1)</script>"
    path.write_text(json.dumps(plan))
    page = Page(write_report(tmp_path).read_text())
    assert "<script>alert(1)</script>" in page.words
    assert page.open == []


def test_hostile_text_is_text_wherever_it_comes_from(demo: Deployed, tmp_path: Path) -> None:
    """Every kind of text of the files that the page shows, with what could open a tag or end an attribute."""
    hostile = iter(f"</code>\"'><img src=x{n} onerror=alert({n})>" for n in range(100))
    told = []

    def text() -> str:
        told.append(next(hostile))
        return told[-1]

    folder = copied(demo, tmp_path)
    obstacle = {"rank": 1, "nodes": [text()], "op": text(), "sqnr_db": None, "noise_share": None,
                "mac_share": None, "reason": text()}  # fmt: skip
    in_the_way = {"what": text(), "obstacles": [obstacle], "options": text(), "advice": text()}
    change(
        folder / "verdict.json", outcome="fail", gate="fail",
        metric=text(), notes=[text()], warnings=[text()], in_the_way=in_the_way,
    )  # fmt: skip
    (step, *_) = json.loads((folder / "workflow.json").read_text())
    check = {"name": "SQNR", "outcome": "fail", "message": text(), "ok": False}
    gated = {"step": text(), "note": text(), "checks": [check]}
    fruitless = {"step": text(), "note": text(), "outcome": None, "kept": False}
    (folder / "workflow.json").write_text(json.dumps([step | gated, step | fruitless]))
    change(
        folder / "calibration.cache.json",
        **{"method": text(), "rows": 8, "held_back": 2, "sqnr_db": {text(): 1.0}, "fixes": text()},
        **{"fixes_sqnr_db": {text(): 1.0}, "left_out": {text(): text()}, "exceptions": {text(): text()}},
        confirmed={"rows": 2, "before_db": 1.0, "after_db": 2.0},
    )
    plan = json.loads((folder / "plan.json").read_text())
    plan["nodes"].append({"name": text(), "op": text(), "int8": False, "rule": "r", "reason": text()})
    plan["float32"] = [{"name": text(), "op": text(), "rule": "r", "reason": text()}]
    (folder / "plan.json").write_text(json.dumps(plan))
    record = json.loads((folder / "report.json").read_text())
    (tensor, *_) = record["tensors"]
    record["tensors"] = [tensor | {"tensor": text(), "readers": [text()]}]
    layer = {"nodes": [text()], "op": text(), "sqnr_db": 1.0, "share": 1.0, "mac_share": None}
    record["noise"] = {"step": text(), "rows": 1, "layers": [layer], "count": 2}
    record["samples"] = [{"number": 1, "images": [{"input": "x", "png": '"onerror=alert(1)'}]}]
    record["costs"] = [{"engine": text(), "kernels": 1, "bytes": 1}] * 2
    record["nodes"] = [{"name": text(), "op": text(), "inputs": []}]
    record |= {"command": text(), "model": text(), "versions": {text(): text()}, "made": text()}
    record |= {name: {"source": text(), "rows": 1} for name in ("data", "eval")}
    (folder / "report.json").write_text(json.dumps(record))
    page = Page(write_report(folder).read_text())
    assert page.open == []
    assert page.links == []
    assert [name for name in page.attributes if name.startswith("on")] == []
    shown = "".join(page.words)
    assert [words for words in told if words not in shown] == []


def test_a_verdict_without_an_interval(demo: Deployed, tmp_path: Path) -> None:
    path = copied(demo, tmp_path) / "verdict.json"
    gone = dict.fromkeys(("relative_interval", "absolute_interval", "relative_drop", "candidate"))
    change(path, outcome="fail", gate="fail", **gone)
    content = write_report(tmp_path).read_text()
    assert 'class="interval"' not in content
    assert "candidate not measurable" in content


@pytest.mark.parametrize(
    "name", ["verdict.json", "plan.json", "calibration.cache", "model.plan", "model.plan.json"]
)
def test_a_missing_file_is_named(name: str, demo: Deployed, tmp_path: Path) -> None:
    (copied(demo, tmp_path) / name).unlink()
    with pytest.raises(InputError) as raised:
        write_report(tmp_path)
    assert str(tmp_path) in (raised.value.file or "")


@pytest.mark.parametrize(
    "name", ["verdict.json", "plan.json", "calibration.cache", "model.plan", "model.plan.json"]
)
def test_a_damaged_file_is_named(name: str, demo: Deployed, tmp_path: Path) -> None:
    (copied(demo, tmp_path) / name).write_text("5")
    with pytest.raises(InputError) as raised:
        write_report(tmp_path)
    assert Path(raised.value.file or "").name == name


def put(value: Any, path: Sequence[str | int], new: object) -> None:
    """Set what is at a path in JSON values."""
    *inside, last = path
    for key in inside:
        value = value[key]
    value[last] = new


@pytest.mark.parametrize(
    ("name", "path", "new", "word"),
    [
        ("workflow.json", [0], "text", "[0]"),
        ("workflow.json", [0, "kept"], "yes", "kept"),
        ("workflow.json", [0, "colour"], "red", "colour"),
        ("workflow.json", [0, "outcome"], "maybe", "outcome"),
        ("workflow.json", [0, "relative_drop"], "1%", "relative_drop"),
        ("workflow.json", [0, "int8_share"], [1], "int8_share"),
        ("workflow.json", [0, "checks"], None, "checks"),
        ("workflow.json", [0, "checks"], [{"ok": True}], "name"),
        ("workflow.json", [0, "sqnr_db", "logits"], None, "sqnr_db"),
        ("calibration.cache.json", ["sqnr_db"], "text", "sqnr_db"),
        ("calibration.cache.json", ["sqnr_db"], {"max": "30"}, "sqnr_db"),
        ("calibration.cache.json", ["held_back"], None, "held_back"),
        ("calibration.cache.json", ["exceptions"], ["conv"], "exceptions"),
        ("calibration.cache.json", ["confirmed"], None, "confirmed"),
        ("calibration.cache.json", ["learned"], {"sqnr_db": [1.0], "steps": 3}, "learned.sqnr_db"),
        ("workflow.json", [0, "latency"], 3, "latency"),
        ("workflow.json", [0, "front"], [{"name": "FP32"}], "microseconds"),
        ("report.json", ["format"], "trtq-report-0", "trtq-report-0"),
        ("report.json", ["made"], 5, "made"),
        ("report.json", ["nodes", 1, "inputs"], [1], "nodes[1].inputs"),
        ("report.json", ["nodes", 1, "inputs"], [-1], "nodes[1].inputs"),
        ("report.json", ["tensors", 0, "counts"], "many", "counts"),
        ("report.json", ["tensors", 0, "amax"], 0.0, "amax"),
        ("verdict.json", ["outcome"], None, "outcome"),
        ("verdict.json", ["checks"], "all", "checks"),
        ("verdict.json", ["checks"], [1], "checks[0]"),
        ("verdict.json", ["in_the_way"], 3, "in_the_way"),
        ("verdict.json", ["in_the_way"], {"obstacles": 3}, "in_the_way"),
        ("verdict.json", ["reference"], float("nan"), "NaN"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    name: str, path: Sequence[str | int], new: object, word: str, demo: Deployed, tmp_path: Path
) -> None:
    """Methods are compared, and a tensor takes one of its own, as with --method auto."""
    change(
        copied(demo, tmp_path) / "calibration.cache.json",
        sqnr_db={"max": 30.0}, held_back=64, exceptions={"conv": "max"},
        confirmed={"rows": 64, "before_db": 30.0, "after_db": 30.5},
    )  # fmt: skip
    write_report(tmp_path)
    value = json.loads((tmp_path / name).read_text())
    put(value, path, new)
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(InputError) as raised:
        write_report(tmp_path)
    assert raised.value.file == str(tmp_path / name)
    assert word in str(raised.value.cause)
