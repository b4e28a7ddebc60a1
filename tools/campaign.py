"""The whole campaign against what is done to a job: kills, signals, other writers, hostile inputs.

    python tools/campaign.py DIR [--minutes M] [--kills 70] [--parallel-kills 30] [--terms 50]
                             [--writers 8] [--seconds 60] [--scale 2] [--seed 0]

- kills: calibrate, deploy with recovery, sensitivity and study are killed (SIGKILL) at random moments; with
  `--parallel loky`, the main process or one of its workers. Each job is run again and must leave the files of
  an undisturbed run without workers, byte by byte but for times (`comparable`), and nothing else: no staging
  or temporary folder, no process.
- terms: the same with SIGTERM, which must end the job as exit 143 with its line, and leave nothing even
  before it is run again.
- writers: so many processes store and fetch the same entries of one cache, while others list, verify and
  prune it: nobody may find a damaged entry, or another's content.
- hostile: every case of `tests/hostile/whole.py`, which must end with exit code 2 and one message: no
  traceback, no hang, no file written or replaced, nothing else made of what the cache holds. `--scale` has so
  many times as many of those that are random; 0: none at all.

What was tried is kept in DIR, and a run with the same options goes on from there: `--minutes` ends one
early. The last lines count all that was tried and what failed; the exit code is 1 if anything did.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

JOBS = {
    "calibrate": "calibrate {model} --data {data} --method auto -o {out}/calibration.cache",
    "deploy": "deploy {model} --data {data} --eval {data} --metric cosine --max-drop 1e-9%"
    " --recover fix,partial -o {out}",
    "sensitivity": "sensitivity {model} --data {data} --eval {data} --metric cosine -o {out}/effects.json",
    "study": "study {model} --data {data} --eval {data} --metric top1 -o {out}",
}
"""Name -> command line; `deploy` asks for more than int8 can do, so it recovers until it has nothing left."""

TURNS = [*["calibrate", "deploy", "sensitivity"] * 3, "study"]
"""The jobs in turn; `study` takes as long as all others together."""

PARALLEL = "--parallel loky:2"

_TIMES = re.compile(r"seconds|time|created|date|^made$|command|path|file")
"""Keys of JSON values that say when, how long and where."""


class Try(NamedTuple):
    """Something to try: its kind, a name that no other of this kind has, and what finds out what is wrong."""

    kind: str
    name: str
    problems: Callable[[], list[str]]


class Journal:
    """What was tried, in a file with a line for each, and what went wrong."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[tuple[str, str], list[str]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            kind, name, problems = json.loads(line)
            self._found[kind, name] = problems

    def knows(self, attempt: Try) -> bool:
        """Whether it was tried."""
        return (attempt.kind, attempt.name) in self._found

    def add(self, attempt: Try) -> None:
        """Try something."""
        problems = attempt.problems()
        self._found[attempt.kind, attempt.name] = problems
        with self._file.open("a") as file:
            print(json.dumps([attempt.kind, attempt.name, problems]), file=file)
        for problem in problems:
            print(f"{attempt.kind}, {attempt.name}: {problem}", file=sys.stderr, flush=True)

    @property
    def failed(self) -> Counter[str]:
        """Kind -> how many of it failed."""
        return Counter(kind for (kind, _), problems in self._found.items() if problems)

    def text(self) -> str:
        """A table of the kinds."""
        tried, failed = Counter(kind for kind, _ in self._found), self.failed
        lines = [f"{kind:40} {tried[kind]:6} {failed[kind]:6}" for kind in sorted(tried)]
        total = f"{'all':40} {tried.total():6} {failed.total():6}"
        return "\n".join([f"{'kind':40} {'tried':>6} {'failed':>6}", *lines, total])


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
    if path.name == "recipe.toml":
        lines = path.read_text().replace(str(root), "").splitlines()
        return [line for line in lines if not line.startswith("parallel =")]
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


def disturb(
    process: subprocess.Popen[str], number: int, after: float, source: random.Random, *, worker: bool
) -> bool:
    """Signal a job, or one of its workers, some seconds after its start, and wait for its end; but not for
    that of its workers. Whether it was not done before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=after)
        return False
    workers = children(process.pid) if worker else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(source.choice(workers) if workers else process.pid, number)
    process.wait()
    return True


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
    command: str,
    case: Path,
    folder: Path,
    known: Undisturbed,
    number: int,
    source: random.Random,
    *,
    worker: bool = False,
) -> list[str]:
    """Problems of a job that a signal ends at a random moment, and that is run again then."""
    shutil.rmtree(folder, ignore_errors=True)
    place = Place(folder)
    process = place.start(command, case)
    disturbed = disturb(process, number, source.uniform(0.1, known.seconds), source, worker=worker)
    problems = left_running(process.pid)
    assert process.stderr is not None
    said = process.stderr.read()
    if disturbed and "Traceback" in said:
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


def kills(folder: Path, *, plain: int, parallel: int, terms: int, seed: int) -> Iterator[Try]:
    """The jobs, killed and signalled in turn, so many times in all."""
    plan = [("SIGKILL", signal.SIGKILL, "", plain), ("SIGKILL, loky", signal.SIGKILL, PARALLEL, parallel)]
    for kind, number, more, times in [*plan, ("SIGTERM", signal.SIGTERM, "", terms)]:
        for turn in range(times):
            name = TURNS[turn % len(TURNS)]
            worker = bool(more) and turn % 2 == 1
            where = folder / f"{kind.replace(', ', '-')}-{turn}"

            def problems(
                name: str = name,
                more: str = more,
                number: int = number,
                where: Path = where,
                worker: bool = worker,
            ) -> list[str]:
                case, known = _undisturbed(folder, name)
                source = random.Random(f"{seed} {where.name}")
                return killed(f"{JOBS[name]} {more}", case, where, known, number, source, worker=worker)

            yield Try(f"{kind}: {name}{', a worker' if worker else ''}", str(turn), problems)


def _undisturbed(folder: Path, name: str) -> tuple[Path, Undisturbed]:
    """The data that all jobs run on, and what one of them leaves that nothing disturbs, run once."""
    case, known = folder / "case", folder / f"{name}.pickle"
    if not case.exists():
        case_in(case)
    if not known.exists():
        known.write_bytes(pickle.dumps(Undisturbed.of(JOBS[name], case, folder / name)))
    return case, pickle.loads(known.read_bytes())


WRITER = """
import random, sys, time
from pathlib import Path
from trtq.cache import Cache, Key, remove
from trtq.cli.main import main
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
    elif role == "prune":
        cache.prune(lambda entry: not entry.problem and random.random() < 0.9)
    else:
        main(["cache", role, "--cache", sys.argv[1]])
print(rounds)
"""


def writers(folder: Path, *, number: int, seconds: float) -> list[str]:
    """Problems of processes that write, list, verify and prune one cache for some seconds.

    Each prints what it found that is wrong, and at its end how many rounds it made.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        (
            role,
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), role, str(seconds)],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
        for role in [*["write"] * number, "verify", "list", "prune"]
    ]
    problems = []
    for role, process in processes:
        out, said = process.communicate()
        *lines, rounds = out.splitlines() or [""]
        wrong = [line for line in lines if "damaged" in line.replace(" 0 damaged", "") or "another" in line]
        if process.returncode or said or int(rounds) < 2:
            wrong.append(f"exit {process.returncode}, {rounds} rounds: {said}")
        problems += [f"{role}: {line}" for line in wrong]
    return problems + [f"left {path.name}" for path in folder.rglob("*.part")]


def hostile(folder: Path, seed: int, scale: int) -> Iterator[Try]:
    """Every case of tests/hostile, each tried in a process beside this one."""
    from hostile.own_files import write_own
    from hostile.whole import Trying, all_tries

    if not (own := folder / "own").exists():
        write_own(own)
    cases = functools.partial(all_tries, seed, scale, own)
    with contextlib.closing(Trying(cases)) as trying:
        for number, (kind, name, _) in enumerate(cases()):
            yield Try(f"hostile {kind}", f"seed {seed}: {name}", lambda number=number: trying(number))


def all_of(given: argparse.Namespace) -> Iterator[Try]:
    """The whole campaign."""
    folder: Path = given.folder
    if given.writers:
        name = f"{given.writers} writers, {given.seconds:g} s, seed {given.seed}"
        yield Try(
            "cache", name, lambda: writers(folder / "cache", number=given.writers, seconds=given.seconds)
        )
    if given.scale:
        yield from hostile(folder, given.seed, given.scale)
    yield from kills(
        folder / "kills",
        plain=given.kills,
        parallel=given.parallel_kills,
        terms=given.terms,
        seed=given.seed,
    )


def main() -> int:
    """Run the campaign, or as much of it as there is time for, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M")
    parser.add_argument("--kills", type=int, default=70, metavar="N")
    parser.add_argument("--parallel-kills", type=int, default=30, metavar="N")
    parser.add_argument("--terms", type=int, default=50, metavar="N")
    parser.add_argument("--writers", type=int, default=8, metavar="N")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="for the writers")
    parser.add_argument("--scale", type=int, default=2, metavar="N", help="for the hostile cases")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    given = parser.parse_args()
    given.folder = given.folder.absolute()
    given.folder.mkdir(parents=True, exist_ok=True)
    journal, end, left = Journal(given.folder / "tried.jsonl"), time.monotonic() + 60 * given.minutes, 0
    for attempt in all_of(given):
        if not journal.knows(attempt):
            if time.monotonic() < end:
                journal.add(attempt)
            else:
                left += 1
    print(journal.text())
    if left:
        print(f"{left} are left: run the same again")
    return 1 if journal.failed else 0


if __name__ == "__main__":
    sys.exit(main())
