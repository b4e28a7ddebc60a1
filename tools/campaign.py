"""The whole campaign against what a machine does to a job: kills, signals, other writers, hostile inputs.

    python tools/campaign.py [--kills 70] [--parallel-kills 30] [--terms 50] [--writers 8] [--seconds 60]

- kills: calibrate, deploy with recovery, sensitivity and study are killed (SIGKILL) at random moments; with
  `--parallel loky`, the main process or one of its workers. Each job is run again and must leave the files of
  an undisturbed run without workers, byte by byte but for times (`comparable`), and nothing else: no staging
  or temporary folder, no process.
- terms: the same with SIGTERM, which must end the job as exit 143 with its line, and leave nothing even
  before it is run again.
- writers: so many processes store and fetch the same entries of one cache, while others verify and prune it:
  nobody may find a damaged entry, or another's content.
- hostile: the tests of `tests/hostile`, each of which must end as an error of one message.

The last lines count what was tried and what failed; the exit code is 1 if anything did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

JOBS = {
    "calibrate": "calibrate {model} --data {data} --method auto -o {out}/calibration.cache",
    "deploy": "deploy {model} --data {data} --eval {data} --metric cosine --max-drop 1e-9%"
    " --recover fix,partial -o {out}",
    "sensitivity": "sensitivity {model} --data {data} --eval {data} --metric cosine -o {out}/effects.json",
    "study": "study {model} --data {data} --eval {data} --metric top1 -o {out}",
}
"""Name -> command line; `deploy` asks for more than int8 can do, so it recovers until it has nothing left."""

PARALLEL = "--parallel loky:2"

_TIMES = re.compile(r"seconds|time|created|date|command|path|file")
"""Keys of JSON values that say when, how long and where."""


@dataclass
class Count:
    """What was tried of each kind, and what went wrong."""

    tried: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: str, problems: list[str]) -> None:
        """One more try of a kind."""
        self.tried[kind] += 1
        self.failures += [(kind, problem) for problem in problems]
        for problem in problems:
            print(f"{kind}: {problem}", file=sys.stderr)

    def text(self) -> str:
        """A table of the kinds."""
        failed = Counter(kind for kind, _ in self.failures)
        lines = [f"{kind:40} {self.tried[kind]:6} {failed[kind]:6}" for kind in sorted(self.tried)]
        return "\n".join([f"{'kind':40} {'tried':>6} {'failed':>6}", *lines])


@dataclass(frozen=True)
class Place:
    """Where one job runs: output, cache and temporary files are its own."""

    root: Path

    def start(self, command: str, case: Path) -> subprocess.Popen[str]:
        """The job, as the leader of a session of its own."""
        for name in ("out", "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        command = command.format(model=case / "model.onnx", data=case / "data.npz", out="out")
        return subprocess.Popen(
            [sys.executable, "-m", "trtq", *command.split(), "-q"],
            cwd=self.root,
            env={
                **os.environ,
                "TMPDIR": str(self.root / "tmp"),
                "TRTQ_CACHE": str(self.root / "cache"),
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def results(self) -> dict[str, object]:
        """Name -> content of every file of the output, as `comparable`."""
        made = [path for path in sorted((self.root / "out").iterdir()) if path.is_file()]
        return {path.name: comparable(path, self.root) for path in made}

    def litter(self) -> list[str]:
        """What should not be there: files of a dead process. `.ses` is ONNX Runtime's, of any run."""
        staged = [str(path.relative_to(self.root)) for path in self.root.rglob("*.part")]
        temporary = [f"tmp/{path.name}" for path in (self.root / "tmp").iterdir() if path.name != ".ses"]
        return sorted({*staged, *temporary})


def comparable(path: Path, root: Path) -> object:
    """A file's content without times and its folder's path: JSON without such keys, HTML and manifests by
    their being there.
    """
    if path.suffix == ".json" and path.name != "manifest.json":
        return _timeless(json.loads(path.read_text()))
    if path.name in ("manifest.json", "report.html", "junit.xml", "study.svg"):
        return path.stat().st_size > 0
    return path.read_bytes().replace(str(root).encode(), b"")


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if not _TIMES.search(name)}
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    return value


def case_in(folder: Path) -> Path:
    """A small convolutional network with data, in a folder."""
    from jobs import conv_case

    folder.mkdir(parents=True)
    conv_case(folder, "N", rows=200)
    return folder


def children(leader: int) -> list[int]:
    """Processes of a session, but for its leader."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "-s", str(leader)], capture_output=True, text=True)
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines()]
    return [int(pid) for pid, *args in lines if int(pid) != leader and "tracker" not in "".join(args)]


def disturb(process: subprocess.Popen[str], number: int, after: float, *, worker: bool) -> str | None:
    """Signal a job, or one of its workers, some seconds after its start, and wait for its end.

    Returns: what it said; None: it was done before.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=after)
        return None
    workers = children(process.pid) if worker else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(random.choice(workers) if workers else process.pid, number)
    return process.communicate()[1]


def left_running(leader: int, patience: float = 20) -> list[str]:
    """Problem with a job's processes: some still run after so many seconds. They are ended."""
    end = time.monotonic() + patience
    while (running := children(leader)) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{len(running)} processes still ran {patience:.0f} s after it"] if running else []


@dataclass(frozen=True)
class Undisturbed:
    """A job as it is: what it leaves, its exit code and its seconds."""

    results: dict[str, object]
    code: int
    seconds: float

    @classmethod
    def of(cls, command: str, case: Path, folder: Path) -> Undisturbed:
        """Run it once."""
        start = time.monotonic()
        process = Place(folder).start(command, case)
        said = process.communicate()[1]
        if process.returncode not in (0, 1, 3):
            raise SystemExit(f"{command}: exit {process.returncode}: {said}")
        return cls(Place(folder).results(), process.returncode, time.monotonic() - start)


def killed(
    command: str, case: Path, folder: Path, known: Undisturbed, number: int, *, worker: bool = False
) -> list[str]:
    """Problems of a job that a signal ends at a random moment, and that is run again then."""
    place = Place(folder)
    process = place.start(command, case)
    said = disturb(process, number, random.uniform(0.1, known.seconds), worker=worker)
    problems = left_running(process.pid)
    if said is not None and "Traceback" in said:
        problems.append(f"a traceback: {said[-300:]}")
    if number == signal.SIGTERM:
        starting = process.returncode == -signal.SIGTERM and not said  # Python itself had just started
        if process.returncode not in (143, known.code) and not starting:
            problems.append(f"exit {process.returncode}: {said}")
        problems += [f"left {name}" for name in place.litter()]
        if (found := place.results()) not in ({}, known.results):
            problems.append(f"half a result: {', '.join(found)}")
    again = place.start(command, case)
    said = again.communicate()[1]
    if again.returncode != known.code:
        problems.append(f"run again: exit {again.returncode}: {said}")
    elif (found := place.results()) != known.results:
        names = {name for name in found.keys() | known.results if found.get(name) != known.results.get(name)}
        problems.append(f"run again, it leaves another {', '.join(sorted(names))}")
    problems += [f"left for good {name}" for name in place.litter()]
    if not problems:
        shutil.rmtree(folder)
    return [f"{problem} ({folder})" for problem in problems]


def kills(count: Count, folder: Path, *, plain: int, parallel: int, terms: int) -> None:
    """Kill and signal the jobs in turn, so many times in all."""
    case, known = case_in(folder / "case"), {}
    plan = [("SIGKILL", signal.SIGKILL, "", plain), ("SIGKILL, loky", signal.SIGKILL, PARALLEL, parallel)]
    for kind, number, more, times in [*plan, ("SIGTERM", signal.SIGTERM, "", terms)]:
        for turn in range(times):
            name = list(JOBS)[turn % len(JOBS)]
            command = f"{JOBS[name]} {more}"
            if name not in known:
                known[name] = Undisturbed.of(JOBS[name], case, folder / name)
            where = folder / f"{kind.replace(', ', '-')}-{turn}"
            worker = bool(more) and turn // len(JOBS) % 2 == 1
            problems = killed(command, case, where, known[name], number, worker=worker)
            count.add(f"{kind}: {name}{', a worker' if worker else ''}", problems)


WRITER = """
import random, sys, time
from pathlib import Path
from trtq.cache import Cache, Key, remove
root, role, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
cache = Cache(root, lambda line: print(line, flush=True))
keys = [Key.of("shard", model=f"{n % 2}" * 64, data=f"{n % 3}" * 64, number=n) for n in range(24)]
rounds, end = 0, time.monotonic() + seconds
while time.monotonic() < end:
    rounds += 1
    if role == "write":
        n = random.randrange(len(keys))
        content = bytes([n]) * (1 + 20000 * (n % 5))
        if cache.fetch(keys[n]) not in (None, content):
            print("another's content", flush=True)
        cache.store(keys[n], content, {"number": n})
        if random.random() < 0.1:
            remove(cache.path(keys[n]))
    elif role == "verify":
        for entry in cache.entries():
            if entry.problem:
                print(f"{entry.path.name}: {entry.problem}", flush=True)
    else:
        cache.prune(lambda entry: not entry.problem and random.random() < 0.9)
print(rounds, file=sys.stderr)
"""


def writers(count: Count, folder: Path, *, number: int, seconds: float) -> None:
    """Processes that write, verify and prune one cache for some seconds."""
    roles = [*["write"] * number, "verify", "verify", "prune"] if number else []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), role, str(seconds)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for role in roles
    ]
    for role, process in zip(roles, processes, strict=True):
        out, said = process.communicate()
        problems = [f"exit {process.returncode}: {said}"] if process.returncode else []
        count.add(f"cache: {role}", problems + out.splitlines())
        count.tried[f"cache: {role}, rounds"] += 0 if process.returncode else int(said)
    litter = [path.name for path in folder.rglob("*.part")]
    count.add("cache: litter", litter)


def hostile(count: Count, folder: Path) -> None:
    """The tests of tests/hostile, the slow ones, too: each gives trtq inputs that it must refuse."""
    report, tests = folder / "report.xml", ROOT / "tests" / "hostile"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-m", "", f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    for test in ElementTree.parse(report).iter("testcase"):
        failed = [found.get("message", "") for kind in ("failure", "error") for found in test.iter(kind)]
        problems = [f"{test.get('name')}: {message}" for message in failed]
        count.add(f"hostile: {test.get('classname', '').rpartition('.')[2]}", problems)


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=70, metavar="N")
    parser.add_argument("--parallel-kills", type=int, default=30, metavar="N")
    parser.add_argument("--terms", type=int, default=50, metavar="N")
    parser.add_argument("--writers", type=int, default=8, metavar="N")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="for the writers")
    parser.add_argument("--no-hostile", action="store_true")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    given = parser.parse_args()
    random.seed(given.seed)
    np.random.seed(given.seed)
    count, folder = Count(), Path(tempfile.mkdtemp(prefix="campaign-"))
    writers(count, folder / "cache", number=given.writers, seconds=given.seconds)
    if not given.no_hostile and (ROOT / "tests" / "hostile").is_dir():
        hostile(count, folder)
    kills(
        count,
        folder / "kills",
        plain=given.kills,
        parallel=given.parallel_kills,
        terms=given.terms,
    )
    print(count.text())
    if count.failures:
        print(f"what failed is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
