"""How many processors a process may use, and that whoever starts threads keeps to it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trtq.simulation.processors import cgroup_limit, processors
from trtq.simulation.rows import Workers


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs the tests may have set a limit."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_is_honoured() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processors() == 1
        assert Workers().count == 1
        assert Workers(3).count == 3
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= processors() <= len(allowed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("1,4", 1), (" 1 ", 1), ("0", None), ("-1", None), ("all", None), ("", None)],
)
def test_openmp_is_asked_for_fewer(text: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    free = processors()
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert processors() == (expected or free)
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")  # it does not make processors
    assert processors() == free


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"app/cpu.max": "150000 100000"}, "0::/app", 1.5),
        ({"cpu.max": "400000 100000", "app/cpu.max": "max 100000"}, "0::/app", 4.0),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, "0::/a/b", 2.0),
        ({"app/cpu.max": "max 100000"}, "0::/app", None),
        ({"cpu.max": "50000 100000"}, "0::/not/seen/from/the/container", 0.5),
        ({"cpu/app/cpu.cfs_quota_us": "250000", "cpu/app/cpu.cfs_period_us": "100000"}, "3:cpu:/app", 2.5),
        (
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "50000"},
            "8:memory:/x\n3:cpu,cpuacct:/docker/0123",
            2.0,
        ),
        ({"cpu/app/cpu.cfs_quota_us": "-1", "cpu/app/cpu.cfs_period_us": "100000"}, "3:cpu:/app", None),
        ({}, "", None),
    ],
)
def test_the_limit_of_a_cgroup(files: dict[str, str], own: str, limit: float | None, tmp_path: Path) -> None:
    """Of version 2 and of version 1; the tightest one around the process counts."""
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert cgroup_limit(tmp_path / "mount", tmp_path / "own") == limit


def run_in_a_process(program: str, **environment: str) -> str:
    """What a program prints, with the imports that all of these need."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={name: text for name, text in os.environ.items() if not name.startswith("OMP_")} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


STARTED = """
import os, onnx.parser
from trtq.simulation.session import simulation_session
{before}
text = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) {{ y = Neg(x) }}'
model = onnx.parser.parse_model(text)
before = len(os.listdir("/proc/self/task"))
session = simulation_session(model.SerializeToString())
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list threads")
@pytest.mark.parametrize(
    ("before", "environment", "expected"),
    [
        ("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", {}, 0),
        ("", {"OMP_NUM_THREADS": "1"}, 0),
        ("", {"OMP_NUM_THREADS": "2"}, 1),
    ],
)
def test_a_session_starts_as_many_threads(before: str, environment: dict[str, str], expected: int) -> None:
    """The one that calls it works, too: none beside it for one processor."""
    expected = min(expected, processors() - 1)
    assert int(run_in_a_process(STARTED.format(before=before), **environment)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_of_openmp_sleep_while_they_wait(given: str | None) -> None:
    """As the library itself says, unless the user has said otherwise; the environment is as it was."""
    pytest.importorskip("torch", reason="PyTorch is not installed (extra qat)")
    program = """
    import os
    from trtq.simulation.processors import patient_openmp
    with patient_openmp():
        import torch
    print("then", os.environ.get("OMP_WAIT_POLICY"))
    """
    environment = {} if given is None else {"OMP_WAIT_POLICY": given}
    said = run_in_a_process(program, OMP_DISPLAY_ENV="TRUE", **environment)
    if "OPENMP DISPLAY ENVIRONMENT BEGIN" not in said:
        pytest.skip("PyTorch was built without OpenMP")
    assert f"OMP_WAIT_POLICY = '{given or 'PASSIVE'}'" in said
    assert f"then {given}" in said
