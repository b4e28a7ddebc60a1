"""A sample of hostile models: exit code 2, one message, no traceback, nothing written, nothing to obey.

`tools/campaign.py` tries all of them with every command.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hostile.models import BASES, HARMLESS, Hostile, flipped, hostile_models, plain, write_data
from hostile.trial import tried
from hostile.whole import MODEL_COMMANDS

from trtq.errors import ExitCode
from trtq.graph.door import read_model

ONCE_CRASHED = (
    "a function with an input twice",
    "a function of more than it is given",
    "an If with more outputs than its branches",
    "an If on no value",
    "an If whose branches make nothing",
    "a sequence that is read behind its end",
    "an optional of nothing",
    "a Constant without a value",
    "a Loop without an end",
    "a Loop without an end or a count",
    "a GatherND of batch_dims below 0",
    "an integer divided by what gives no quotient",
)


def _in_sample(hostile: Hostile) -> bool:
    """A fifth of them, the same in every run, and what crashed once."""
    once = hostile.name in [f"{name}, plain" for name in ONCE_CRASHED]
    return once or zlib.crc32(hostile.name.encode()) % 5 == 0


SAMPLE = [hostile for hostile in hostile_models() if _in_sample(hostile)]


@pytest.mark.parametrize("hostile", SAMPLE, ids=lambda hostile: hostile.name)
def test_a_model_that_is_not_what_it_claims_is_refused(hostile: Hostile, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model, data = hostile.write(tmp_path / "model"), write_data(tmp_path)
    arguments = ("quantize", model, "--data", data, "--method", "max", "-o", "made.onnx")
    arguments += ("--rest", "fp32", "--recover", "none")
    run, found = tried(arguments, tmp_path, may_write=hostile.harmless)
    assert found == []
    assert hostile.harmless or (run.code, run.out) == (ExitCode.BAD_INPUT, "")


@pytest.mark.parametrize("seed", range(20))
def test_changed_bytes_crash_nothing(seed: int, tmp_path: Path) -> None:
    _, found = tried(("inspect", flipped(seed).write(tmp_path)), tmp_path)
    assert found == []


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_every_command_that_reads_a_model_reads_it_at_the_door(command: str, tmp_path: Path) -> None:
    model = plain()
    model.graph.node.add().CopyFrom(model.graph.node[0])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    write_data(tmp_path)
    arguments = [argument.format(model="model.onnx") for argument in MODEL_COMMANDS[command]]
    run, found = tried(arguments, tmp_path)
    assert found == []
    assert (run.code, run.out) == (ExitCode.BAD_INPUT, "")


@pytest.mark.parametrize("base", BASES)
def test_the_sound_models_that_they_come_from_pass_the_door(base: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(BASES[base]().SerializeToString())
    assert read_model(tmp_path / "model.onnx").graph.node


def test_what_is_harmless_is_in_the_table() -> None:
    assert {hostile.name.rpartition(", ")[0] for hostile in hostile_models()} >= HARMLESS
