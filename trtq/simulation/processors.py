"""How many processors this process may use: in a container, fewer than the machine has.

Whoever starts threads asks here: the runner of rows, ONNX Runtime's sessions, PyTorch, processes of joblib.
What a user gives as `--threads` goes before it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def processors() -> int:
    """Processors that the affinity, the CPU limit of the cgroup and OMP_NUM_THREADS leave to this process; at
    least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [limit for limit in (cgroup_limit(), _wanted_of_openmp()) if limit is not None]
    return max(min([available, *map(math.ceil, limits)]), 1)


@contextlib.contextmanager
def patient_openmp() -> Iterator[None]:
    """The OpenMP libraries that are loaded within let a thread that waits sleep, unless the environment says
    otherwise.

    By default it tries again and again; where other processes want the processors, too, each of the many
    parallel regions of a network then waits for threads that do not run, and two threads take several times
    as long as one. A library reads the setting once, when it is loaded: one that already is stays as it is.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]


def _wanted_of_openmp() -> int | None:
    """What OMP_NUM_THREADS says of the outermost level, as in 4 or 4,2; None: nothing, or no such number."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None


def cgroup_limit(mount: Path = _CGROUPS, own_groups: Path = _OWN_GROUPS) -> float | None:
    """The least CPU limit of this process's cgroup and those around it, in processors; None: no limit.

    Args:
        mount: where the hierarchies of cgroup version 1, or that of version 2, are mounted.
        own_groups: the file that says which groups this process is in.
    """
    limits = [limit for folder in _folders(mount, own_groups) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(mount: Path, own_groups: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and of those around it, in the hierarchies that limit CPU time.

    In a container the file may name a group as the host sees it, which is not there; the mount is then the
    container's own.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, group_of = line.partition(":")
        controllers, colon, path = group_of.partition(":")
        if not colon:
            continue
        if controllers == "":
            top = mount
        elif "cpu" in controllers.split(","):
            top = next((f for f in (mount / controllers, mount / "cpu") if f.is_dir()), mount)
        else:
            continue
        group = top / path.strip("/")
        yield group
        if group != top:
            yield from (parent for parent in group.parents if parent.is_relative_to(top))


def _limit(folder: Path) -> float | None:
    """CPU time per time that a cgroup may use, by version 2's file or version 1's; None: any."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:  # "max", or -1
        return None
    return int(quota) / int(period)
