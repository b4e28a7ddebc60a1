"""Whatever the gate and the checks say: exit code, last line, files, report and JUnit give one answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from jobs import Case, deploy_arguments, trtq_command

from trtq.errors import ExitCode

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

GATES = {
    "pass": ("--max-drop", "50%"),
    "fail": ("--max-drop", "0.000001%"),
    "inconclusive": ("--metric", "top1", "--confidence", "0.99999", "--max-drop", "1%"),
}
CHECKS = {
    "--min-int8": (("--min-int8", "10%"), ("--min-int8", "100%")),
    "--min-sqnr": (("--min-sqnr", "1"), ("--min-sqnr", "150")),
}
CODES = {"pass": ExitCode.PASS, "fail": ExitCode.FAIL, "inconclusive": ExitCode.INCONCLUSIVE}


def answers(case: Case, folder: Path, *options: str) -> tuple[str, dict[str, str], str]:
    """The verdict's gate, what each place says of the outcome, and the last line."""
    run = trtq_command(*deploy_arguments(case, folder, "--method", "max", "--exclude", "classes", *options))
    last = run.out.splitlines()[-1]
    verdict = json.loads((folder / "verdict.json").read_text())
    (kept,) = [step for step in json.loads((folder / "workflow.json").read_text()) if step["kept"]]
    head = (folder / "report.html").read_text().partition("</h1>")[0]
    (badge,) = re.findall(r'<span class="badge (\w+)">', head)
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    failures, skipped = int(suite.get("failures", "0")), int(suite.get("skipped", "0"))
    assert len(suite.findall("testcase")) == 1 + len(verdict["checks"])
    said = {
        "exit code": next(name for name, code in CODES.items() if code == run.code),
        "last line": last.split("  ")[0].lower(),
        "verdict.json": verdict["outcome"],
        "workflow.json": kept["outcome"],
        "report": badge,
        "junit": "fail" if failures else "inconclusive" if skipped else "pass",
    }
    assert kept["gate"] == verdict["gate"]
    return verdict["gate"], said, last


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("missed", [(), ("--min-int8",), ("--min-sqnr",), ("--min-int8", "--min-sqnr")])
@pytest.mark.parametrize("engine", [(), ("--require-engine",)])
def test_every_place_says_the_same(
    gate: str, missed: tuple[str, ...], engine: tuple[str, ...], small: Case, tmp_path: Path
) -> None:
    checks = [option for name, options in CHECKS.items() for option in options[name in missed]]
    found, said, last = answers(small, tmp_path / "out", "--recover", "none", *GATES[gate], *checks, *engine)
    if engine:  # only what is read from the engine counts, and a simulated fail is none
        outcome = "fail" if "--min-int8" in missed else "inconclusive"
        assert found == ("inconclusive" if gate == "fail" else gate)
    else:
        outcome = "fail" if missed or gate == "fail" else gate
        assert found == gate
    assert said == dict.fromkeys(said, outcome)
    for name in (*missed, *engine):
        assert name in last
