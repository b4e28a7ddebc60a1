"""`trtq gate`: a candidate against its reference."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trtq.cli.command import DECIDED, Command, argument, console_of, recipe_of
from trtq.cli.options import GATE as OPTIONS
from trtq.console import show
from trtq.files import write_json, write_text
from trtq.recipe import Recipe

if TYPE_CHECKING:
    from trtq.report.junit import Said


def _gate(given: argparse.Namespace) -> int:
    from trtq.gate.tensors import compare_three, refuse_engines, some_rows
    from trtq.pipeline import gate
    from trtq.report.junit import junit_xml

    began = time.perf_counter()
    recipe, reference, candidate = recipe_of(given), Path(given.reference), Path(given.candidate)
    if given.tensors:
        refuse_engines([reference, candidate])
    verdict, samples = gate(recipe, reference, candidate, console_of(given))
    if given.tensors:
        compared = compare_three(
            reference, candidate, some_rows(samples), threads=recipe.threads, plugins=recipe.plugin_lib
        )
        write_json(given.tensors, compared.to_json())
        show(compared.text())
    if given.json:
        write_json(given.json, verdict.to_json())
    if given.junit:
        write_text(given.junit, junit_xml(verdict, candidate.name, time.perf_counter() - began))
    show("\n".join([*verdict.details(), verdict.headline()]))
    return verdict.exit_code


def _said(given: argparse.Namespace, recipe: Recipe) -> Said:
    from trtq.report.junit import Said, model_name

    files = [Path(file) for file in (given.json, given.junit) if file]
    junit = Path(given.junit) if given.junit else None
    return Said(tuple((file,) for file in files), junit, model_name(given.candidate))


GATE = Command(
    "gate",
    _gate,
    (*OPTIONS, "state", "op_reference", "plugin_lib", "batch", "threads", "parallel", "cache"),
    (
        argument("reference", path="read", metavar="REFERENCE", help="the fp32 ONNX model, or an engine"),
        argument(
            "candidate", path="read", metavar="CANDIDATE", help="the quantized ONNX model, or an engine"
        ),
        argument("--json", path="written", metavar="F", help="write the verdict as JSON"),
        argument("--junit", path="written", metavar="F", help="write the verdict as JUnit XML"),
        argument(
            "--tensors",
            path="written",
            metavar="F",
            help="compare ONNX models tensor by tensor as well: fp32, simulation, engine (GPU)",
        ),
    ),
    required=("reference", "candidate", "eval", "metric"),
    examples=(
        "trtq gate model.onnx out/model.int8.onnx --eval eval.npz --metric top1 --junit junit.xml",
        "trtq gate model.onnx model.plan --eval eval.npz --metric top1 --confidence 0.95",
    ),
    codes=DECIDED,
    said=_said,
)
