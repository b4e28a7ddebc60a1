"""A verdict as JUnit XML, which CI systems show test by test; also of a job that ended without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from trtq import __version__
from trtq.errors import InputError, TrtqError
from trtq.escapes import xml_text
from trtq.files import is_stream, locked, parse_json, read_bytes, write_json, write_text
from trtq.gate.verdict import Check, Outcome, Verdict

_SUITE = "trtq"
_NOT_FINISHED = "the job has not finished: it was killed, or it is still running"


def write_verdict(folder: Path, verdict: Verdict, model: str = "", seconds: float | None = None) -> None:
    """Write `verdict.json` and `junit.xml` into a folder of results; the others are as for `junit_xml`."""
    write_json(folder / "verdict.json", verdict.to_json())
    write_text(folder / "junit.xml", junit_xml(verdict, model, seconds))


def junit_xml(verdict: Verdict, model: str = "", seconds: float | None = None) -> str:
    """One test suite: the gate's test case, then one per check.

    A fail is a `failure`, what is inconclusive is `skipped`: the suite has failures, or else skipped cases,
    exactly where the verdict's outcome is not a pass. The gate's case carries the verdict's text, and every
    failure says what stands in the way. Characters that XML cannot hold become `?`.

    Args:
        model: name of the model's file, the class of every case.
        seconds: how long the job took.
    """
    properties = {
        "trtq": __version__,
        "model": model,
        "outcome": verdict.outcome.value,
        "metric": verdict.metric,
        "reference": verdict.reference,
        "candidate": verdict.candidate,
        "relative_drop": verdict.relative_drop,
        "max_drop": verdict.max_drop,
        "samples": verdict.samples,
        "executor": verdict.executor,
    }
    suite = _suite({name: value for name, value in properties.items() if value not in ("", None)})
    gate = Check(f"accuracy gate {verdict.metric}", verdict.gate, verdict.gate_line())
    in_the_way = "\n".join(verdict.in_the_way.lines()) if verdict.in_the_way else ""
    for check, text in (
        (gate, verdict.text()),
        *((check, f"{check.message}\n{in_the_way}".strip()) for check in verdict.checks),
    ):
        case = _case(suite, model, check.name)
        if check.ok:
            ElementTree.SubElement(case, "system-out").text = xml_text(text)
        else:
            kind = "failure" if check.outcome is Outcome.FAIL else "skipped"
            ElementTree.SubElement(case, kind, message=xml_text(check.message)).text = xml_text(text)
    if seconds is not None:  # all that led to the verdict is the gate's
        suite.set("time", f"{seconds:.3f}")
        next(suite.iter("testcase")).set("time", f"{seconds:.3f}")
    return _text(suite)


def error_xml(message: str, text: str, model: str = "", kind: str = "error") -> str:
    """The test suite of a job that ended without a verdict: the gate's case has an `error`.

    Args:
        kind: of the error, such as its class.
    """
    suite = _suite({"trtq": __version__, **({"model": model} if model else {})})
    case = _case(suite, model, "accuracy gate")
    error = ElementTree.SubElement(case, "error", type=kind, message=xml_text(message))
    error.text = xml_text(text)
    return _text(suite)


def _suite(properties: Mapping[str, object]) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=_SUITE)
    parent = ElementTree.SubElement(suite, "properties")
    for name, value in properties.items():
        ElementTree.SubElement(parent, "property", name=name, value=xml_text(str(value)))
    return suite


def _case(suite: ElementTree.Element, model: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=xml_text(model) or _SUITE, name=xml_text(name))


def _text(suite: ElementTree.Element) -> str:
    tags = {"tests": "testcase", "failures": "failure", "skipped": "skipped", "errors": "error"}
    for attribute, tag in tags.items():
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


@dataclass(frozen=True)
class Said:
    """The files that say how a job ended, which must not be an earlier job's once the next one has begun.

    Attributes:
        groups: files that belong together: where one of them is of trtq, all are.
        junit: the JUnit file among them, if one is asked for.
        model: as for `junit_xml`.
    """

    groups: tuple[tuple[Path, ...], ...]
    junit: Path | None
    model: str = ""

    @classmethod
    def in_folder(cls, folder: str | Path | None, model: object) -> Said:
        """Those of a folder of results; none where there is no such folder."""
        if folder is None:
            return cls((), None)
        names = ("verdict.json", "junit.xml", "workflow.json", "migration.json", "report.html")
        files = tuple(Path(folder) / name for name in names)
        return cls((files,), files[1], model_name(model))

    @contextlib.contextmanager
    def by_this_job(self) -> Iterator[None]:
        """`retire`, and `leave` where the context ends with an error and there is a folder for the file."""
        self.retire()
        try:
            yield
        except Exception as error:
            if self.junit is not None and self.junit.parent.is_dir():
                self.leave(error)
            raise

    def leave(self, error: Exception) -> None:
        """Write the JUnit file of a job that ended with an error, also where there was none."""
        if self.junit is not None:
            problem = error.problem if isinstance(error, TrtqError) else str(error)
            with contextlib.suppress(InputError, OSError):  # the error is what is to be known
                write_text(self.junit, error_xml(problem, str(error), self.model, type(error).__name__))

    def retire(self) -> None:
        """Let no file say how an earlier job ended: a JUnit file now says that this one has not finished,
        which holds also where it is killed, and the others are gone. Files that are not trtq's stay."""
        for group in self.groups:
            files = [file for file in group if file.is_file() and not is_stream(file)]
            if not any(_is_ours(file) for file in files):
                continue
            with contextlib.suppress(OSError), locked(files[0].parent):
                for file in files:
                    if file == self.junit:
                        write_text(file, error_xml(_NOT_FINISHED, _NOT_FINISHED, self.model))
                    else:
                        file.unlink(missing_ok=True)


def model_name(model: object) -> str:
    """What JUnit calls a model: the name of its file."""
    return Path(str(model or "")).name


def _is_ours(file: Path) -> bool:
    """Whether trtq wrote a verdict: JSON that has what a verdict has, or its test suite."""
    try:
        content = read_bytes(file)
        if file.suffix == ".html":
            return False  # it goes with what it was made from
        if b'<testsuite name="trtq"' in content[:200]:
            return True
        value = parse_json(content)
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and {"outcome", "metric", "executor"} <= value.keys()
