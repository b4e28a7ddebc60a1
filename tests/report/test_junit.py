from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from trtq.gate.decision import decide
from trtq.gate.metrics import load_metric
from trtq.gate.verdict import Check, Outcome, Verdict
from trtq.report.junit import junit_xml


def verdict(lost: int, **options) -> Verdict:
    reference = np.tile([1.0, 0.0], (100, 1))
    candidate = reference.copy()
    candidate[:lost] = [0.0, 1.0]
    targets = {"labels": np.zeros(100, int)}
    metric = load_metric("top1")
    return decide({"y": reference}, {"y": candidate}, targets, metric, executor="simulation", **options)


def test_pass():
    suite = ElementTree.fromstring(junit_xml(verdict(0)).encode())
    assert suite.attrib == {"name": "trtq", "tests": "1", "failures": "0", "skipped": "0", "errors": "0"}
    assert suite.find("testcase").get("name") == "accuracy gate top1"
    assert suite.findtext("testcase/system-out").startswith("PASS")


@pytest.mark.parametrize(("lost", "confidence", "tag"), [(9, None, "failure"), (1, 0.95, "skipped")])
def test_fail_and_inconclusive(lost, confidence, tag):
    suite = ElementTree.fromstring(junit_xml(verdict(lost, confidence=confidence)).encode())
    found = suite.find(f"testcase/{tag}")
    assert "top1 on 100 samples" in found.get("message")
    assert suite.get("failures") == str(int(tag == "failure"))
    assert suite.get("skipped") == str(int(tag == "skipped"))


def test_checks_are_escaped():
    checks = (
        Check('int8 <kernels> & "more"', Outcome.FAIL, "a < b\x00\x1b & 'c'"),
        Check("size", Outcome.PASS),
        Check("an engine ran", Outcome.INCONCLUSIVE, "it did not"),
    )
    suite = ElementTree.fromstring(junit_xml(verdict(0).with_checks(*checks)).encode())
    _, first, second, third = suite.findall("testcase")
    assert first.get("name") == 'int8 <kernels> & "more"'
    assert first.find("failure").get("message") == "a < b?? & 'c'"
    assert second.find("failure") is None
    assert third.find("skipped").get("message") == "it did not"
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
