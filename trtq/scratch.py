"""Folders that last as long as the work that needs them, even where the process is killed.

Their names end in `trtq-XXXXXXXX.part`, and the process that made one holds a lock on it, which the system
drops with the process, whatever ends that. So a folder of this form that nobody locks is litter, and goes
when trtq next writes beside it. No process id is compared, which containers that share a disk would not know.
Where the file system has no locks (Windows, some network disks), nothing is removed that way.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trtq import stops

if sys.platform != "win32":
    import fcntl

_LITTER = "*trtq-????????.part"
_LONGEST_NAME = 40
"""Characters of a file's name in its folder's: a name may have 255 bytes."""

_held: set[Path] = set()
"""The folders of this process."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files while the context lasts."""
    with folder_in(tempfile.gettempdir()) as folder:
        yield folder


@contextlib.contextmanager
def folder_in(home: str | os.PathLike[str], name: str | None = None) -> Iterator[Path]:
    """A folder in `home` while the context lasts; what it holds then goes with it.

    Args:
        name: of what is made in it: part of the folder's name, which is hidden then.

    Raises:
        OSError: it cannot be made.
    """
    home = Path(home)
    _sweep_once(home.absolute())
    prefix = "trtq-" if name is None else f".{name[:_LONGEST_NAME]}.trtq-"
    folder, lock = _locked_folder(home, prefix)
    _held.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _held.discard(folder)
        if lock is not None:
            os.close(lock)


def sweep(home: Path) -> None:
    """Remove the folders that dead processes of this user left in `home`."""
    if sys.platform == "win32":
        return
    for folder in home.glob(_LITTER):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


_sweep_once = functools.cache(sweep)


def _locked_folder(home: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder and the open file that holds its lock; None: no locks here.

    Between its making and its lock, another process may take it for litter; then there is another one.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=home))
        if sys.platform == "win32":
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _remove_held() -> None:
    """Remove the folders of this process, which ends."""
    for folder in list(_held):
        shutil.rmtree(folder, ignore_errors=True)


stops.clean_at_last(_remove_held)
