"""What a job reads and writes, checked before any work: no output replaces an input or another output."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from trtq.data.remote import is_url
from trtq.errors import InputError
from trtq.files import PathLike, check_name, is_stdout, is_stream
from trtq.recipe import Recipe, flag, options


class Output(enum.Enum):
    """What is made of a path: a file, text that may go into a stream, or a folder."""

    FILE = "a file"
    TEXT = "a file or a stream"
    FOLDER = "a folder"
    CACHE = "a folder of files whose names are hashes"


_FOLDERS = (Output.FOLDER, Output.CACHE)

_SAMPLES = (".npz", ".npy", ".csv", ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_NO_FILES = ("/dev/", "/proc/", "/sys/")


_QUANTIZED = (
    *("model.int8.onnx", "model.int8.onnx.data", "model.plan", "model.plan.json", "plan.json"),
    *("calibration.cache", "calibration.cache.json", "verdict.json", "junit.xml", "report.html"),
)

RECIPE = "recipe.toml"
"""May be given again among the results, and is written as it was read."""

DEPLOYED = (*_QUANTIZED, "workflow.json", "report.json", "manifest.json", RECIPE)
"""What `deploy` makes in its folder; what an earlier job left of it goes even where there is no new one."""

MIGRATED = (*_QUANTIZED, "migration.json")
"""The same of `migrate`."""

BUILT = (".json", ".cache", ".cache.json")
"""What `build` adds to its engine's name for files beside it."""

THREE = (
    *("model.fp32.onnx", "model.fp16.onnx", "model.fp32.plan", "model.fp16.plan", "model.int8.plan"),
    *("model.fp32.plan.json", "model.fp16.plan.json", "model.int8.plan.json"),
)
"""What `bench --three` makes in its folder, beside the model with Q/DQ where none is given."""


class Read(NamedTuple):
    """An input: how the user spells it, and its path."""

    spelled: str
    path: Path


class Written(NamedTuple):
    """An output: how the user spells it, its path, and what is made there.

    Attributes:
        makes: of a folder the names that are written in it; of a file what is added to its name for files
            that come to lie beside it.
    """

    spelled: str
    path: Path
    kind: Output
    makes: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """All that is written."""
        if self.kind is Output.FOLDER:
            return [self.path / name for name in self.makes]
        return [self.path, *(Path(f"{self.path}{suffix}") for suffix in self.makes)]


def paths_of_recipe(recipe: Recipe, output: Output, makes: tuple[str, ...]) -> Iterator[Read | Written]:
    """The paths among the options of a recipe.

    Args:
        output, makes: what is made of the recipe's output (see `Written`).
    """
    kinds = {"output": output, "timing_cache": Output.FILE, "cache": Output.CACHE}
    for option in options():
        if not option.metadata["path"]:
            continue
        value, spelled = getattr(recipe, option.name), flag(option.name)
        for text in value if isinstance(value, tuple) else [value]:
            if text is None or is_url(text) or (option.name == "metric" and ".py:" not in text):
                continue
            if option.name in kinds:
                own = makes if option.name == "output" else ()
                yield Written(spelled, Path(text), kinds[option.name], own)
            else:
                path = text.rpartition(":")[0] if ".py:" in text else text
                yield Read("MODEL" if option.name == "model" else spelled, Path(path))


def check_recipe(recipe: Recipe, output: Output, makes: tuple[str, ...], **more: PathLike | None) -> None:
    """`check_paths` of a job's recipe, for callers from Python; the command line checks its own options, too.

    Args:
        output, makes: as for `paths_of_recipe`.
        more: option -> another file that the job reads, if it is given.

    Raises:
        InputError: as `check_paths`.
    """
    reads = [Read(flag(name), Path(path)) for name, path in more.items() if path is not None]
    check_paths([*paths_of_recipe(recipe, output, makes), *reads])


def check_paths(paths: Iterable[Read | Written]) -> None:
    """Refuse what cannot be read or written as it has to be, and outputs that would replace an input or each
    other.

    Raises:
        InputError: for the first of these.
    """
    paths = list(paths)
    reads = [path for path in paths if isinstance(path, Read)]
    writes = [path for path in paths if isinstance(path, Written)]
    for path in paths:
        check_name(path.path)
    for read in reads:
        if read.path.exists() and not (read.path.is_file() or read.path.is_dir()):
            raise InputError(f"{read.spelled} is not a regular file", file=read.path, remedy="give a file")
    for written in writes:
        _check_place(written)
    writes = [w for w in writes if w.kind is not Output.CACHE and not is_stream(w.path)]
    for one, other in combinations(writes, 2):
        if {_identity(path) for path in one.files()} & {_identity(path) for path in other.files()}:
            raise InputError(
                f"{one.spelled} and {other.spelled} are written to the same file",
                file=other.path,
                remedy="give each a path of its own",
            )
    for written in writes:
        for read in reads:
            if file := _replaced(written, read):
                raise InputError(
                    f"{written.spelled} would replace an input, {read.spelled}",
                    file=file,
                    remedy="give another output path",
                )


def writes_to_stdout(paths: Iterable[Read | Written]) -> bool:
    """Whether an output is the standard output: what else is printed then goes elsewhere."""
    return any(isinstance(path, Written) and is_stdout(path.path) for path in paths)


def _check_place(written: Written) -> None:
    """Refuse a path that cannot become what is to be made there."""
    spelled, path, kind, _ = written
    if is_stream(path):
        if kind is not Output.TEXT:
            raise InputError(
                f"{spelled} is a stream; {kind.value} is written", file=path, remedy="give a path"
            )
        return
    if path.exists() and not (path.is_dir() if kind in _FOLDERS else path.is_file()):
        cause = "it is a folder" if path.is_dir() else "it is a file"
        if not (path.is_dir() or path.is_file()):
            cause = "it is not a regular file"
        problem = "the cache is not a folder" if kind is Output.CACHE else f"cannot write {spelled}"
        raise InputError(problem, file=path, cause=cause, remedy="give another path")
    real = os.path.realpath(path)
    if real.startswith(_NO_FILES) and not real.startswith("/dev/shm/"):
        raise InputError(f"cannot write {spelled}", file=path, cause="no files are kept there")
    outside = [path] if path.is_dir() else list(Path(real).parents)
    folder = next(folder for folder in outside if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        cause = "Permission denied" if folder.is_dir() else "it is not a folder"
        raise InputError(
            f"cannot write {spelled} in {folder}", file=path, cause=cause, remedy="give another path"
        )


def _replaced(written: Written, read: Read) -> Path | None:
    """The file of an input that an output would replace."""
    taken = {_identity(path) for path in written.files()}
    return next((file for file in _files(read, written) if _identity(file) in taken), None)


def _files(read: Read, written: Written) -> list[Path]:
    """The files of an input: of a folder the samples, of a model also its external data, and of a table or an
    engine what lies beside it.

    Those are looked up only where the output is there already, and may be one of them.
    """
    if not read.path.exists() or not any(path.exists() for path in written.files()):
        return [read.path]
    if read.path.is_dir():
        return [read.path, *(f for f in read.path.iterdir() if f.suffix.lower() in _SAMPLES)]
    if (beside := Path(f"{read.path}.json")).exists() and read.path.suffix != ".onnx":
        return [read.path, beside]
    if read.path.suffix == ".onnx":
        from trtq.graph.model import model_files

        try:
            return model_files(read.path)
        except InputError:  # which the command reports
            return [read.path]
    return [read.path]


def _identity(path: Path) -> object:
    """Equal for two paths of one file, also for links to it."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino
