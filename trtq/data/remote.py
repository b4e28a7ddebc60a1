"""Data at URLs, through `fsspec`: `s3://`, `gs://`, `https://`, `file://`, ...

The rows are read many times, so a source is copied once, into a folder that is removed when the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any

from trtq.errors import InputError, MissingBackendError
from trtq.scratch import scratch_folder


def is_url(source: object) -> bool:
    """Whether `source` names its protocol, and so is no path here; what is in memory does, too."""
    return "://" in str(source)


def download(url: str) -> Path:
    """A copy of the file or folder at `url`; what is on this machine already is not copied.

    Beside a folder `<folder>.csv` is copied too, and beside a CSV the folder of its images.

    Raises:
        InputError: an unknown protocol, nothing there, or it cannot be read.
        MissingBackendError: `fsspec`, or the package that it needs for the protocol, is not installed.
    """
    try:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        system, root = fsspec.core.url_to_fs(url)
        if isinstance(system, LocalFileSystem):
            return Path(root)
        return _copied(system, root.rstrip("/"))
    except ImportError as error:
        raise MissingBackendError(
            "data at a URL need fsspec and its package for the protocol",
            file=url,
            cause=error,
            remedy="pip install 'trtq[remote]', or fsspec's extra for the protocol: 'fsspec[s3]'",
        ) from error
    except FileNotFoundError as error:
        raise InputError("the data does not exist", file=url, cause=error, remedy="check the URL") from error
    except Exception as error:  # every protocol raises its own
        raise InputError(
            "the data cannot be read from the URL", file=url, cause=f"{type(error).__name__}: {error}"
        ) from error


def _copied(system: Any, root: str) -> Path:
    home = Path(tempfile.mkdtemp(dir=_downloads()))
    parent, _, name = root.rpartition("/")
    copy = home / name.partition("?")[0]
    if copy.suffix == ".npz":
        system.get_file(root, str(copy))
    elif copy.suffix == ".csv":
        system.get_file(root, str(copy))
        if system.isdir(beside := root.removesuffix(".csv")):
            _copy_folder(system, beside, copy.with_suffix(""))
        else:
            _copy_folder(system, parent, home)
    else:
        _copy_folder(system, root, copy)
        if system.isfile(f"{root}.csv"):
            system.get_file(f"{root}.csv", f"{copy}.csv")
    return copy


def _copy_folder(system: Any, root: str, copy: Path) -> None:
    files = [f for f in system.find(root) if f.startswith(f"{root}/") and ".." not in f.split("/")]
    if not files:
        raise FileNotFoundError(f"there are no files in {root}")
    copies = [copy / file.removeprefix(f"{root}/") for file in files]
    for path in copies:
        path.parent.mkdir(parents=True, exist_ok=True)
    system.get(files, [str(path) for path in copies])


@functools.cache
def _downloads() -> Path:
    until_the_end = contextlib.ExitStack()
    atexit.register(until_the_end.close)
    return until_the_end.enter_context(scratch_folder())
