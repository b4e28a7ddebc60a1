"""What to do with the files of a job that passed: which of them goes where."""

from __future__ import annotations

from pathlib import Path

from trtq.backends import tensorrt_rtx
from trtq.backends.record import read_record
from trtq.gate.verdict import Verdict


def next_steps(verdict: Verdict, model: Path, engine: Path | None = None) -> list[str]:
    """Lines for a person; none where the job did not pass.

    Args:
        model: the one with Q/DQ.
        engine: the plan file made of it; None: there is none.

    Raises:
        InputError: the engine's record is missing or damaged.
    """
    if not verdict.passed:
        return []
    steps = [] if engine is None else _of_engine(engine)
    steps.append(f"{model.name}: TensorRT (trtexec --onnx={model}), ONNX Runtime, Triton, Jetson")
    if engine is not None and verdict.executor != "engine":
        steps.append(f"on its GPU, 'trtq gate MODEL {engine}' judges the engine itself")
    return [f"{'next' if number == 0 else '    '}  {step}" for number, step in enumerate(steps)]


def _of_engine(engine: Path) -> list[str]:
    record = read_record(engine)
    if record is None:
        return []
    version = record["version"]
    if record["builder"] == tensorrt_rtx.NAME:
        return [f"{engine.name}: TensorRT for RTX {version} (Python's tensorrt_rtx), and no TensorRT"]
    return [f"{engine.name}: TensorRT {version} (Python's tensorrt, trtexec --loadEngine={engine})"]
