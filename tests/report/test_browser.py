"""The report in a real browser: nothing on the console, nothing asked of the network, nothing wider than a
phone, dark where the reader is in the dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from browser import browser, opened
from jobs import Case, Deployed, deploy_arguments, save_case, trtq_command

from trtq.recovery.speed import Point
from trtq.report.html import write_report

pytestmark = pytest.mark.slow

PHONE, DESK = 375, 1100

HOSTILE = "</script></style></code>\"'><img src=http://example.com/x onerror=alert(1)>" + "w" * 300


FRONT = [
    asdict(
        Point(name, microseconds, 1000, "modelled", "roofline of a card", share, noise, drop, passed, chosen)
    )
    for name, microseconds, share, noise, drop, passed, chosen in (
        ("every layer that can in INT8", 10.0, 1.0, None, None, None, False),
        ("calibrate", 11.0, 0.9, 9.0, 0.3, False, False),
        ("partial", 12.0, 0.7, 30.0, 0.002, True, True),
        ("FP32", 30.0, 0.0, None, None, None, False),
    )
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


def unlike(folder: Path) -> Case:
    """Two layers whose weights are powers of two far apart within a channel, so that INT8 fails."""
    random = np.random.default_rng(0)
    weight = (random.normal(size=(32, 32)) * 2.0 ** random.integers(-8, 8, (32, 1))).astype(np.float32)
    x, h, y = (
        gs.Variable("x", np.float32, ["N", 32]),
        gs.Variable("h"),
        gs.Variable("y", np.float32, ["N", 32]),
    )
    nodes = [
        gs.Node("MatMul", "first", {}, [x, gs.Constant("w", weight)], [h]),
        gs.Node("MatMul", "second", {}, [h, gs.Constant("v", np.ascontiguousarray(weight[::-1]))], [y]),
    ]
    values = random.normal(size=(48, 32)) / np.abs(weight).max(axis=1)
    return save_case(gs.Graph(nodes, [x], [y], opset=17), folder, {"x": values.astype(np.float32)})


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of a job that fails, of one that recovers by the second or third attempt, and of the same as if
    latencies had been known."""
    case = unlike(tmp_path_factory.mktemp("unlike"))
    root = tmp_path_factory.mktemp("tried")
    for name, options in {
        "fail": ("--recover", "none", "--min-sqnr", 60),
        "recovered": ("--recover", "fix,partial", "--min-sqnr", 30),
    }.items():
        common = (
            "--method",
            "max",
            "--backend",
            "none",
            "--rest",
            "fp32",
            "--cache",
            root / "cache",
            *options,
        )
        trtq_command(*deploy_arguments(case, root / name, *common))
    shutil.copytree(root / "recovered", root / "front")
    steps = json.loads((root / "front" / "workflow.json").read_text())
    (kept,) = (step for step in steps if step["kept"])
    kept["front"] = FRONT
    (root / "front" / "workflow.json").write_text(json.dumps(steps))
    return {name: root / name for name in ("fail", "recovered", "front")}


def with_nodes(demo: Deployed, folder: Path, names: Sequence[str]) -> Path:
    """The demo's results with another graph: a chain of weighted nodes with connections over four of them."""
    shutil.copytree(demo.folder, folder, dirs_exist_ok=True)
    plan = json.loads((folder / "plan.json").read_text())
    plan["nodes"] = [
        {"name": name, "op": "Conv", "int8": index % 3 > 0, "rule": "r", "reason": name, "macs": 9}
        for index, name in enumerate(names)
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    record = json.loads((folder / "report.json").read_text())
    record["nodes"] = [
        {"name": name, "op": "Conv", "inputs": [p for p in (i - 4, i - 1) if p >= 0]}
        for i, name in enumerate(names)
    ]
    for tensor, name in zip(record["tensors"], names, strict=False):
        tensor |= {"tensor": name, "readers": [name]}
    record |= {"model": names[-1], "command": names[-1]}
    (folder / "report.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def pages(
    demo: Deployed, tried: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    folders = tried | {
        "pass": demo.folder,
        "large": with_nodes(demo, root / "large", [f"encoder.{i}.layer" for i in range(1000)]),
        "hostile": with_nodes(demo, root / "hostile", [f"{i}{HOSTILE}" for i in range(30)]),
    }
    return {name: write_report(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["pass", "fail", "recovered", "front", "large", "hostile"])
@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "light"), (DESK, "dark")])
def test_it_is_quiet_and_fits(
    name: str, width: int, scheme: str, pages: dict[str, Path], chromium: Any
) -> None:
    with opened(chromium, pages[name], width, color_scheme=scheme) as seen:
        assert (seen.messages, seen.requests) == ([], [])
        assert seen.width() == width
        seen.page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert seen.width() == width
        assert pages[name].stat().st_size < 1_500_000


def test_what_the_pages_show(pages: dict[str, Path], chromium: Any) -> None:
    """Each picture is there, of the size and in the place that its figures say."""
    with opened(chromium, pages["fail"]) as seen:
        assert seen.page.locator(".way h2").inner_text() == "What stands in the way"
        assert "trtq" in seen.page.locator(".way pre").first.inner_text()
        widths = [seen.page.locator(".way .bar i").nth(i).bounding_box()["width"] for i in (0, 1)]
        assert widths[0] > widths[1] > 0
    with opened(chromium, pages["recovered"]) as seen:
        assert seen.page.locator(".plot .dot").count() >= 2
        assert seen.page.locator(".dot.chosen.pass").count() == 1
    with opened(chromium, pages["front"]) as seen:
        plot, limit = (seen.page.locator(s).bounding_box() for s in (".plot", ".plot i.limit"))
        failed, passed, fp32 = (
            {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
            for box in (dot.bounding_box() for dot in seen.page.locator(".plot .dot").all())
        )
        assert plot["x"] < failed["x"] < passed["x"] < fp32["x"] < plot["x"] + plot["width"]
        assert plot["y"] < fp32["y"] < passed["y"] < limit["y"] < failed["y"] < plot["y"] + plot["height"]
        share = (passed["x"] - failed["x"]) / (fp32["x"] - failed["x"])
        assert share == pytest.approx(1 / 19, abs=0.01)  # 11, 12 and 30 µs
    with opened(chromium, pages["pass"]) as seen:
        images = seen.page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert images
        assert min(images) > 0
        assert seen.page.locator(".values svg path").first.bounding_box()["height"] > 0
        light = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    with opened(chromium, pages["pass"], color_scheme="dark") as seen:
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    with opened(chromium, pages["large"]) as seen:
        assert seen.page.locator("details.block").count() <= 30
        assert seen.page.locator("details.block li").count() == 1000
        assert seen.page.locator("details.block li").first.is_hidden()
        seen.page.locator("details.block summary").first.click()
        assert seen.page.locator("details.block li").first.is_visible()


def test_on_paper_everything_is_there(pages: dict[str, Path], chromium: Any) -> None:
    """Nothing can be opened on paper."""
    with opened(chromium, pages["pass"], color_scheme="dark") as seen:
        seen.page.emulate_media(media="print", color_scheme="dark")
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert seen.page.locator("details td").last.bounding_box()["height"] > 0


def test_names_stay_names(pages: dict[str, Path], chromium: Any) -> None:
    with opened(chromium, pages["hostile"]) as seen:
        assert seen.page.locator("body script, body [onerror]").count() == 0
        assert seen.page.title().startswith("x onerror=alert(1)>www")  # the last part of the model's path
        assert f"0{HOSTILE}" in seen.page.locator("details.block code").first.text_content()
