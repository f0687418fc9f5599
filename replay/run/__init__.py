"""Playing a tape: pacing, sending, and the ledger of what was sent.

A record is due when the run's clock says so (`replay.pace`); how late it is handed over is measured for every record
against its own due time. sent_at is the run's clock when it is sent; flat out, its due time.

The run's time is cut into slices, the fleet into blocks of meters; processes share the fleet, each its own meters. None
of that changes what a meter sends.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from lake.reading import all_registered, registered, registry_files
from lake.tables import Commit, Writer, put_part
from replay.dirt import FAULTS, Dirt
from replay.fleet import Fleet
from replay.pace import RunClock
from replay.run.blocks import BLOCK_RECORDS, FARTHEST_US, Game
from replay.run.ledger import Ledger, ledger_rows, run_folder, settle, write_ledger
from replay.run.order import Order
from replay.run.processes import share, stopped_by_signals
from replay.run.sending import Progress, play_meters
from replay.sinks import Sink
from schemas.errors import ConfigError, MeterstreamError
from schemas.tables import BY_IMPORT, REGISTRY, polars_schema
from settings import home

BLOCK_METERS = 100_000  # rows of registry and truth that are in memory at once
SHARED_RECORDS = BLOCK_RECORDS  # fewer in a slice of that length cost less than meeting after it
FACTS = [name for name in REGISTRY.names if name not in ("meter_id", "valid_from", "valid_to")]
"""What the registry says of a meter at all times."""
KEY = ["meter_id", "valid_from", "usage_point_id"]
"""What makes a row of the registry."""


def play(order: Order, open_sink: Callable[[], Sink], on_progress: Progress = lambda *_: None) -> Ledger:
    """Sends everything, then writes the ledger; SIGINT or SIGTERM ends it with a ledger that is right.

    Args:
        order: what to play.
        open_sink: makes a sink; in another process where there are several, so it has to be picklable then.
        on_progress: called a few times a second.

    Raises:
        ConfigError: the tape or the faults cannot be played so, or the run's name is taken.
        RetryLater: the other side did not take all; the ledger says what it has.
    """
    crew = order.fleet()
    if not 1 <= order.processes <= len(crew):
        msg = f"--processes is 1 to the number of meters ({len(crew)}), not {order.processes}"
        raise ConfigError(msg)
    dirt = order.faults(crew)
    counted = dirt.faults.unique("fault_id").group_by("kind").len().sort("kind").iter_rows() if dirt else ()
    ledger = Ledger(
        run_id=order.run_id, tape=order.tape.name, meters=len(crew), speed=order.speed, seed=order.seed, to=order.to,
        clock="original" if order.own_clock else "run", processes=order.processes,
        first_at=crew.first_at.isoformat(), last_at=crew.last_at.isoformat(), started_at=datetime.now(UTC).isoformat(),
        faults=dict(counted), pace=order.pace.value,
    )  # fmt: skip
    processes = order.processes if _is_dense(order, crew) else 1
    ledger.processes = processes
    failure: MeterstreamError | None = None
    with stopped_by_signals() as stop:
        _prepare(crew, dirt, ledger, order.again)
        ids = crew.meter_ids(np.arange(len(crew)))
        began = time.monotonic()
        if processes == 1:
            game = Game(order, crew, dirt, RunClock(order.speed, order.is_steady), lambda: stop.is_asked)
            sent, failure = play_meters(game, 0, len(crew), open_sink, on_progress, open_way=order.open_way)
            parts = [sent]
        else:
            del crew, dirt
            parts, failure = share(order, ledger.meters, open_sink, stop, on_progress)
    ledger.seconds = round(time.monotonic() - began, 3)
    settle(ledger, parts)
    ledger.is_whole = failure is None and not stop.is_asked
    if failure and not ledger.readings + ledger.events + ledger.poison:
        _unregister(ledger)  # it sent nothing: the same run again is no second one
    _write(ledger_rows(ids, parts, ledger), run_folder(ledger.run_id) / "ledger.parquet")
    write_ledger(ledger)
    if failure:
        raise failure
    return ledger


def _is_dense(order: Order, crew: Fleet) -> bool:
    """Whether a run has enough to share: flat out, processes meet after every slice of `FARTHEST_US`."""
    if order.speed or order.processes == 1:
        return True
    return crew.records * FARTHEST_US >= SHARED_RECORDS * ((crew.last_at - crew.first_at) // timedelta(microseconds=1))


def _prepare(crew: Fleet, dirt: Dirt | None, ledger: Ledger, again: bool) -> None:
    """Registry and truth are there before the first record; the lake's registry only where records follow."""
    folder = run_folder(ledger.run_id)
    if (folder / "run.json").exists():
        msg = f"run {ledger.run_id} is there already ({folder}): a run's name is used once"
        raise ConfigError(msg)
    if ledger.to != "null":
        _check_is_new(crew, again)
        _register(crew, ledger, again)
    _write((crew.truth(low, high).to_arrow() for low, high in _blocks(len(crew))), folder / "truth.parquet")
    faults = (dirt.faults if dirt else pl.DataFrame(schema=polars_schema(FAULTS))).to_arrow().cast(FAULTS)
    _write(iter([faults]), folder / "faults.parquet")
    write_ledger(ledger)


def _register(crew: Fleet, ledger: Ledger, again: bool) -> None:
    """Adds the fleet to the lake's registry, in one commit; a row that it has stays: somebody may have put it right.

    Args:
        crew: the fleet.
        ledger: of the run.
        again: whether the registry may have some of the meters already.
    """
    by, date = pl.lit(ledger.run_id).alias("registered_by"), ledger.first_at[:10]
    parts = []
    for low, high in _blocks(len(crew)):
        new = crew.registry(low, high)
        if again:
            new = new.join(all_registered(new.get_column("meter_id")), on=KEY, how="anti", nulls_equal=True)
        if len(new):
            parts.append(put_part("registry", new.with_columns(by), ledger.run_id, date))
    Writer().add(parts, Commit(f"replay-{ledger.run_id}-{uuid.uuid4()}", 0))


def _unregister(ledger: Ledger) -> None:
    """Removes the fleet from the lake's registry."""
    run_id = ledger.run_id.replace("'", "''")
    Writer().delete("registry", f"registered_by = '{run_id}'")


def _check_is_new(crew: Fleet, again: bool) -> None:
    """Raises ConfigError where the lake's registry has a meter of the fleet: nobody could tell the two apart."""
    for low, high in _blocks(len(crew)) if registry_files() else ():
        mine = crew.registry(low, high)
        newest = registered(mine.get_column("meter_id"))
        other = "METERSTREAM_HOME names another data folder"
        if not crew.own_clock:
            other = f"--meter-prefix gives the fleet other names, {other}"
        both = newest.join(mine, on="meter_id", suffix="_mine").sort("meter_id", "registered_by")
        is_another = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name}_mine")) for name in FACTS)
        is_put_right = pl.col("registered_by").str.starts_with(f"{BY_IMPORT} ").fill_null(False)
        for row in (both.filter(is_another & ~is_put_right) if again else both).head(1).iter_rows(named=True):
            whose = f"{row['meter_id']} is known by {row['registered_by']}"
            differing = [name for name in FACTS if row[name] != row[f"{name}_mine"]]
            if differing and not str(row["registered_by"]).startswith(f"{BY_IMPORT} "):
                name = differing[0]
                msg = f"{whose} as another meter ({name} {row[name]}, not {row[f'{name}_mine']}): {other}"
                raise ConfigError(msg)
            msg = f"{whose} already: {other}, --again adds to what is there of the same meters"
            raise ConfigError(msg)


def _write(pieces: Iterator[pa.Table], path: Path) -> None:
    """Writes beside the tables, then renames: no reader sees half a file."""
    staged = home() / "staging" / f"{path.parent.name}-{path.name}"
    staged.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(pieces)
    with pq.ParquetWriter(staged, first.schema, compression="zstd", use_dictionary=False) as file:
        file.write_table(first)
        for piece in pieces:
            file.write_table(piece)
    staged.rename(path)


def _blocks(meters: int) -> Iterator[tuple[int, int]]:
    for low in range(0, meters, BLOCK_METERS):
        yield low, min(low + BLOCK_METERS, meters)
