"""A sample of hostile models: exit code 2, one message, no traceback, nothing written, nothing to obey.

`tools/campaign.py` tries all of them with every command.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from jobs import Run, trtq_command
from models import BASES, HARMLESS, Hostile, flipped, hostile_models, plain, write_data

from trtq.errors import ExitCode
from trtq.graph.door import read_model

SAMPLE = [hostile for hostile in hostile_models() if zlib.crc32(hostile.name.encode()) % 4 == 0]
"""A quarter of them, the same in every run."""


def assert_no_crash(run: Run) -> None:
    """The command ended as it should: at most one message, and nothing that a terminal obeys."""
    assert run.code in set(ExitCode)
    assert "Traceback" not in run.err
    assert "internal error" not in run.err
    assert run.err.count("trtq: ") == (run.code in (ExitCode.BAD_INPUT, ExitCode.MISSING_BACKEND))
    assert all(character.isprintable() or character == "\n" for character in run.out + run.err)


@pytest.mark.parametrize("hostile", SAMPLE, ids=lambda hostile: hostile.name)
def test_a_model_that_is_not_what_it_claims_is_refused(hostile: Hostile, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model, data = hostile.write(tmp_path / "model"), write_data(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run = trtq_command("quantize", model, "--data", data, "--method", "max", "-o", tmp_path / "made.onnx")
    assert_no_crash(run)
    if hostile.harmless:
        return
    assert (run.code, run.out) == (ExitCode.BAD_INPUT, "")
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before


@pytest.mark.parametrize("seed", range(20))
def test_changed_bytes_crash_nothing(seed: int, tmp_path: Path) -> None:
    model = flipped(seed).write(tmp_path)
    assert_no_crash(trtq_command("inspect", model))


@pytest.mark.parametrize("command", ["inspect", "build", "gate", "calibrate", "bench", "migrate"])
def test_every_command_that_reads_a_model_reads_it_at_the_door(command: str, tmp_path: Path) -> None:
    model = plain()
    model.graph.node.add().CopyFrom(model.graph.node[0])
    path, data = tmp_path / "model.onnx", write_data(tmp_path)
    path.write_bytes(model.SerializeToString())
    arguments = {
        "gate": (path, "--eval", data, "--metric", "cosine"),
        "calibrate": ("--data", data, "-o", tmp_path / "made.cache"),
        "build": ("-o", tmp_path / "made.plan"),
        "migrate": ("-o", tmp_path / "made"),
    }
    run = trtq_command(command, path, *arguments.get(command, ()))
    assert_no_crash(run)
    assert (run.code, run.out) == (ExitCode.BAD_INPUT, "")


@pytest.mark.parametrize("base", BASES)
def test_the_sound_models_that_they_come_from_pass_the_door(base: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(BASES[base]().SerializeToString())
    assert read_model(tmp_path / "model.onnx").graph.node


def test_what_is_harmless_is_in_the_table() -> None:
    assert {hostile.name.rpartition(", ")[0] for hostile in hostile_models()} >= HARMLESS
