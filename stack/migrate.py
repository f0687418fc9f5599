"""Moving house: a home of a release before the store becomes Delta tables and intents, where it lies.

Before, a table was its Parquet files under a glob, and a job had a checkpoint of plans and commits. The files stay as
they are, and each table gets a log that names them; each job's newest commit becomes its newest intent. What a batch
left that was begun and never committed is removed: Kafka still has its records.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import Schema, convert_to_deltalake

from engine.driver import only_one
from engine.intents import Intent, Intents, flat
from engine.job import StreamingJob
from lake.store import store
from lake.tables import PROPERTIES, folder_of, partition_column
from schemas.errors import ConfigError, StateLost
from schemas.tables import CURRENT, TABLES
from settings import home
from streaming_jobs import discovered

Step = Callable[[str], None]
"""Called with what was done."""


def old_home() -> Path | None:
    """The folder of the old checkpoints; None where this home is not, or no longer, one of before."""
    folder = home() / "state" / "checkpoints"
    return folder if folder.exists() else None


def migrate(on_step: Step = lambda _: None) -> None:
    """Takes an old home into tables and intents; one that was interrupted goes on where it was.

    Raises:
        ConfigError: there is no old home, or the store is not the home.
        RetryLater: a job runs.
        StateLost: what a job left cannot be read.
    """
    checkpoints = old_home()
    if checkpoints is None:
        msg = f"{home()} is no home of an earlier release: there is nothing to migrate"
        raise ConfigError(msg)
    if store().url != f"file://{home()}":
        msg = f"METERSTREAM_STORE is {store().url}: migrate the home first, without it, then copy its lake and state"
        raise ConfigError(msg)
    jobs = discovered()
    with ExitStack() as held:
        held.enter_context(only_one(*[job.name for job in jobs]))
        for job in jobs:
            old = checkpoints / f"{job.name}-v{job.version}"
            if old.exists():
                on_step(f"{job.name}: {_job(job, old)}")
                shutil.rmtree(old)
            elif others := sorted(checkpoints.glob(f"{job.name}-v*")):
                store().put_new(f"state/{others[0].name}/id.json", b"{}")  # so that it does not begin beside its rows
                on_step(f"{job.name}: {others[0].name} cannot be read; run python -m stack begin-anew {job.name}")
        for old in checkpoints.glob("critical_events-v*"):  # Spark's own
            (home() / "state" / old.name).mkdir(exist_ok=True)
            old.rename(home() / "state" / old.name / "checkpoint")
        for table in TABLES:
            if files := _table(table):
                on_step(f"{table}: {files:,} files")
        for part in (home() / "reports").glob("*/date=*/part-*.parquet"):
            part.rename(part.with_name("0000-of-0001.parquet"))  # as a night names it: it is replaced then
        shutil.rmtree(home() / "staging", ignore_errors=True)
        shutil.rmtree(home() / "state" / "locks", ignore_errors=True)
        shutil.rmtree(checkpoints)


def _job(job: StreamingJob, old: Path) -> str:
    """Makes a job's newest commit its newest intent. Returns what was done."""
    try:
        query_id = str(json.loads((old / "metadata").read_text())["id"])
        done = max((int(file.name) for file in (old / "commits").glob("[0-9]*")), default=None)
        begun = max((int(file.name) for file in (old / "offsets").glob("[0-9]*")), default=-1)
        states = home() / "state" / job.name / query_id
        removed = [f"{batch:08d}" for batch in range((-1 if done is None else done) + 1, begun + 1)]
        flushed = states / f"{done}.flushed"
        if done is not None and (states / f"{done}.flush").exists() and not flushed.exists():
            removed.append(f"{done:08d}f")
        for batch in removed:
            for file in (home() / "lake").glob(f"*/date=*/{job.name}-{query_id}-{batch}-*.parquet"):
                file.unlink()
        if done is None:
            return "nothing was done yet"
        intent = _intent(old, done, flushed)
    except (OSError, ValueError, LookupError) as error:
        msg = f"{job.name}: {old} cannot be read ({error}): mend it by the release before, and migrate again"
        raise StateLost(msg) from error
    intents = Intents(job.name, job.version)
    store().put_new(f"{intents.folder}/id.json", json.dumps({"id": query_id}).encode())
    for file in states.glob("*.zip"):
        store().put(f"{intents.states}/{file.name}", file.read_bytes())
    if intents.newest() is None:
        intents.put(intent)
    shutil.rmtree(home() / "state" / job.name, ignore_errors=True)
    return f"stands after batch {done}"


def _intent(old: Path, done: int, flushed: Path) -> Intent:
    """The intent of the last batch that is done, without its files: they are in the tables."""
    facts, ends = map(json.loads, (old / "offsets" / str(done)).read_text().splitlines()[1:3])
    state: dict[str, Any] = json.loads((old / "commits" / str(done)).read_text().splitlines()[1])["state"]
    if flushed.exists():
        state = json.loads(flushed.read_text())
    at = datetime.fromtimestamp(facts["batchTimestampMs"] / 1000, UTC)
    places = flat(facts["startOffsets"]), flat(ends)
    return Intent(done, at, *places, facts.get("topicIds", {}), state, (), flushed.exists())


def _table(table: str) -> int:
    """Gives a table's files a log. Returns how many they are; those of a table of newest rows go, its job writes it."""
    folder = home() / "lake" / table
    if not folder.exists() or (folder / "_delta_log").exists():
        return 0
    if table in CURRENT:
        shutil.rmtree(folder)
        return 0
    files = [*folder.glob("date=*/*.parquet")]
    if files:
        column = partition_column(table)
        convert_to_deltalake(
            store().uri(folder_of(table)), partition_by=Schema.from_arrow(pa.schema([pa.field(column, pa.date32())])),
            partition_strategy="hive", configuration=PROPERTIES,
        )  # fmt: skip
    return len(files)
