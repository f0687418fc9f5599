"""Logs → tapes: one module a format, discovered; a module's name, with `-` for `_`, is the format's.

A module has `read(path, asked) -> Imported`, `FILES`: which files of a folder are logs of its format, and `ZONE`: the
usage points' time zone where the operator names none; where logs go on in each other, `read_together(paths, asked)`
too.
"""

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import ModuleType

import polars as pl
import pyarrow as pa

from replay.log import Asked, Defect, Imported, look_at_times, most_common
from replay.tape import Tape, log_schema, registry_of, write_tape
from schemas.errors import BadLog, ConfigError
from schemas.tables import REGISTRY

UNLIMITED = "unlimited"
MOST_FUSE_A = 10_000


def formats() -> dict[str, ModuleType]:
    """Format name → its module, whose docstring's first line is the description."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{__name__}.{name}") for name in names}


def import_log(
    paths: Path | Sequence[Path],
    format: str,
    folder: Path,
    *,
    meter_id: str | None = None,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
    ignore_crc: bool = False,
    fuse: str | None = None,
) -> tuple[Tape, list[str]]:
    """Make a tape of one or several logs.

    Args:
        paths: logs, `.gz` or plain, or folders of them.
        format: a name of `formats`.
        folder: where the tape goes.
        meter_id: whose log it is, where there is one that names no meter; default is the file's stem.
        timezone: see `Asked`, and so on for the rest.
        keep_going: of all logs.
        first_at: of each log.
        ignore_crc: of all logs.
        fuse: A of each phase of the connections of which the log names none; or `unlimited`.

    Returns:
        The tape, and the first refused records of each log.

    Raises:
        ConfigError: no such file, format, time zone or fuse, or a meter id that is not allowed.
        BadLog: a line that the format does not allow.
    """
    known, connection = formats(), _connection(fuse)
    if format not in known:
        msg = f"no format {format}: there are {', '.join(known)}"
        raise ConfigError(msg)
    logs = _logs([paths] if isinstance(paths, Path) else list(paths), format, known[format].FILES)
    if meter_id and len(logs) > 1:
        msg = f"--meter-id names one meter, there are {len(logs)} logs"
        raise ConfigError(msg)
    done: list[Imported] = []
    refused: list[str] = []
    defects: Counter[str] = Counter()
    rows_in = 0
    for path, imported in _read(known[format], logs, Asked(meter_id or "", timezone, keep_going, first_at, ignore_crc)):
        lines = imported.refused
        if len(imported.readings):
            done.append(imported)
        else:
            why = ", ".join(f"{count} {defect}".replace("_", " ") for defect, count in (+imported.defects).items())
            lines = lines or [f"{path}: no reading in it: {imported.rows_in} records, {why or 'none of energy'}"]
            if not keep_going:
                raise BadLog(lines[0])
        refused += lines
        defects += imported.defects
        rows_in += imported.rows_in
    if not done:
        raise BadLog(refused[0])
    registries = pl.concat(_registry(imported) for imported in done)
    registry = registries.unique("meter_id", keep="first", maintain_order=True).with_columns(**connection)
    again = registries.filter(pl.col("meter_id").is_duplicated()).get_column("meter_id").unique()
    defects[Defect.SAME_METER_AGAIN] += len(registries) - len(registry)
    defects.update(_between_logs(done, again))
    tape = write_tape(
        folder, readings=pa.concat_tables(imported.readings for imported in done),
        events=_events(done), registry=registry.to_arrow().cast(REGISTRY),
        format=format, source=logs[0].name if len(logs) == 1 else f"{len(logs)} logs",
        time_zone=done[0].time_zone, rows_in=rows_in, defects=+defects,
        interval_s=most_common(step for imported in done for step in imported.intervals_s.values()),
    )  # fmt: skip
    return tape, refused


def _read(module: ModuleType, logs: list[Path], asked: Asked) -> Iterator[tuple[Path, Imported]]:
    """What each log has; of a format whose logs go on in each other, what all have, under the first one's name."""
    of_each = [asked if asked.meter_id else replace(asked, meter_id=stem(path)) for path in logs]
    if hasattr(module, "read_together"):
        yield from ((logs[0], imported) for imported in module.read_together(logs, of_each))
    else:
        yield from ((path, module.read(path, one)) for path, one in zip(logs, of_each, strict=True))


def _events(done: list[Imported]) -> pa.Table:
    """All logs' events in the order of time, as a tape has them."""
    found = [imported.events for imported in done if imported.events is not None]
    return pa.concat_tables([log_schema("event").empty_table(), *found]).sort_by("observed_at")


def _between_logs(done: list[Imported], meters: pl.Series) -> Counter[str]:
    """What is odd in the times of meters that come in several logs, beyond what is odd within each log."""
    parts = [pl.DataFrame(pl.from_arrow(imported.readings)) for imported in done if len(meters)]
    parts = [part.filter(pl.col("meter_id").is_in(meters.implode())) for part in parts]
    odd: Counter[str] = Counter()
    if parts:
        look_at_times(pl.concat(parts), odd)
    for part in parts:
        own: Counter[str] = Counter()
        look_at_times(part, own)
        odd.subtract(own)
    return odd


def _logs(paths: list[Path], format: str, patterns: Sequence[str]) -> list[Path]:
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted({log for pattern in patterns for log in path.glob(pattern) if log.is_file()})
        if not inside:
            msg = f"{path}: no log of format {format} in it ({', '.join(patterns)})"
            raise ConfigError(msg)
        found += inside
    return list(dict.fromkeys(found))


def stem(path: Path) -> str:
    """A file's name without its endings, as a meter id."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", re.sub(r"(\.(csv|txt|json|gz|log))+$", "", path.name))[:64]


def _connection(fuse: str | None) -> dict[str, pl.Expr]:
    """Columns of the registry that say what a connection bears, as `--fuse` has it.

    Raises:
        ConfigError: it is neither A nor `unlimited`.
    """
    if fuse is None:
        return {}
    if fuse == UNLIMITED:
        return {"is_unlimited": pl.col("fuse_a").is_null()}
    if not (fuse.isascii() and fuse.isdecimal()) or not 1 <= int(fuse) <= MOST_FUSE_A:
        msg = f"--fuse is A of each phase, 1 to {MOST_FUSE_A}, or {UNLIMITED}, not {fuse}"
        raise ConfigError(msg)
    return {"fuse_a": pl.coalesce("fuse_a", pl.lit(int(fuse), pl.Int64))}


def _registry(imported: Imported) -> pl.DataFrame:
    """Registry rows of one log's meters."""
    own = pl.DataFrame(registry_of(imported.readings, time_zone=imported.time_zone, interval_s=None))
    steps = pl.DataFrame(list(imported.intervals_s.items()), schema=["meter_id", "interval_s"], orient="row")
    own = own.update(steps.cast({"meter_id": pl.String, "interval_s": pl.Int64}), on="meter_id")
    return own if imported.registry is None else own.update(imported.registry, on="meter_id")
