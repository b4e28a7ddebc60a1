"""The record beside an engine: what made it and what it runs, so that nobody has to deserialize a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from trtq.backends.compiled import Compiled
from trtq.backends.interface import Build, BuildOptions, Profile
from trtq.errors import InputError
from trtq.files import PathLike, decode, read_json, sha256_file, write_json
from trtq.graph.codes import Code


class _Always(TypedDict):
    """What every record has."""

    engine_sha256: str
    builder: str
    version: str
    model: str
    model_sha256: str
    targets: list[str]
    profile: dict[str, list[list[int]]]
    compiled: Compiled


class Record(_Always, total=False):
    """What of a record is read: see `write_record`."""

    profile_values: dict[str, list[list[int]]]
    options: dict[str, str]


def sidecar(engine: PathLike) -> Path:
    """Where the record of an engine lies: `model.plan` -> `model.plan.json`."""
    return Path(f"{Path(engine)}.json")


def write_record(
    build: Build,
    *,
    builder: str,
    version: str,
    model: Path,
    profiles: Sequence[Profile],
    held: Profile,
    options: BuildOptions,
) -> None:
    """Write `<engine>.json`: builder, versions, hashes, targets, profiles, options, warnings, kernels, and
    what the numbers of 8-bit inputs and outputs stand for.

    Args:
        profiles: the engine's optimization profiles, at least one.
        held: ranges of the values of those inputs that decide shapes; the same in all profiles.
    """
    from trtq.graph.door import read_model
    from trtq.graph.ends import codes_of

    first, *further = [{n: [list(shape) for shape in sizes] for n, sizes in p.items()} for p in profiles]
    write_json(
        sidecar(build.engine),
        {
            "engine_sha256": sha256_file(build.engine),
            "builder": builder,
            "version": version,
            "model": model.name,
            "model_sha256": sha256_file(model),
            "targets": list(build.targets),
            "profile": first,
            "further_profiles": further,
            "profile_values": {name: [list(numbers) for numbers in three] for name, three in held.items()},
            "options": {name: str(getattr(options, name)) for name in options.given()},
            "warnings": list(build.warnings),
            "codes": {name: code.to_json() for name, code in codes_of(read_model(model).graph).items()},
            "compiled": build.compiled.to_json(),
        },
    )


def read_record(engine: PathLike) -> dict[str, Any] | None:
    """The record of an engine, with `compiled` as a `Compiled`.

    None when there is no record or it belongs to another engine; the engine is read only if there is one.

    Raises:
        InputError: the record is damaged, or the engine cannot be read.
    """
    path = sidecar(engine)
    if not path.exists():
        return None
    record = read_json(path, "record of the engine")
    claimed = record.get("engine_sha256") if isinstance(record, dict) else None
    if claimed is not None and claimed != sha256_file(engine):
        return None
    try:
        compiled = decode(record, Record, closed=False)["compiled"]
    except ValueError as error:
        raise InputError(
            "the record of the engine is damaged",
            file=path,
            cause=error,
            remedy="delete it, or build the engine again",
        ) from error
    return {**record, "compiled": compiled}


def codes_in(record: Mapping[str, Any] | None) -> dict[str, Code]:
    """Input or output of an engine -> what its 8-bit numbers stand for, by its record."""
    return {name: Code.from_json(value) for name, value in (record or {}).get("codes", {}).items()}
