"""Commands on the lake's tables: their files, upkeep, a job that begins anew."""

import json
import threading
import time
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console

from engine.driver import asked_to_end, only_one
from engine.settings import StreamSettings
from lake.reading import Lake
from lake.store import store
from lake.tables import Writer
from lake.upkeep import Upkeep
from schemas.errors import ConfigError, exits
from settings import load
from stack.migrate import migrate as migrated
from streaming_jobs import discovered

console = Console(highlight=False)


def files(
    table: Annotated[str, typer.Argument(help="A table's name, such as readings.")],
    version: Annotated[str | None, typer.Option(help="Number of a version, or a time: as it was then.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """The files that have a table's rows, and no others: for tools that read Parquet and know no table formats.

    For example: .venv/bin/python -m stack files alarms

    .venv/bin/python -m stack files readings --version 2026-11-30T06:00:00+01:00
    """
    with exits():
        lake = Lake({table: _version(version)} if version else None)
        found = lake.files(table)
        if as_json:
            typer.echo(json.dumps({"table": table, "version": lake.version(table), "files": found}))
            return
        for file in found:
            typer.echo(file)


def _version(text: str) -> int | datetime:
    try:
        return int(text) if text.isdecimal() else datetime.fromisoformat(text)
    except ValueError as error:
        msg = f"--version is a number or a time such as 2026-11-30T06:00:00+01:00, not {text}"
        raise ConfigError(msg) from error


def upkeep(
    every_s: Annotated[float | None, typer.Option(help="Go on until Ctrl-C, after so many seconds each.")] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Once: put the rows of closed days in the order of their meters.")
    ] = False,
) -> None:
    """Write checkpoints of the tables' logs, compact small files, remove what nobody reads any more.

    The driver of the streaming jobs does it, too, but for --cluster. Several at once do no harm.

    For example: .venv/bin/python -m stack upkeep --every-s 60

    .venv/bin/python -m stack upkeep --cluster
    """
    with exits():
        if cluster:
            done = Upkeep(load(StreamSettings, kafka_bootstrap="none:0").compact_files).cluster()
            console.print(f"{store().url}: {done} days of tables are in the order of their meters now")
            return
        keeping = Upkeep(load(StreamSettings, kafka_bootstrap="none:0").compact_files)
        stop = asked_to_end() if every_s else threading.Event()
        while True:
            began = time.monotonic()
            keeping.once(stop.is_set)
            console.print(f"{store().url}: {time.monotonic() - began:.1f} s")
            if every_s is None or stop.wait(every_s):
                return


def migrate() -> None:
    """Take a home of a release before Delta tables into this one's form, where it lies. Copy the home first.

    For example: make down, with the release before; then .venv/bin/python -m stack migrate, make up
    """
    with exits():
        migrated(lambda line: console.print(line, markup=False, soft_wrap=True))
        console.print(f"{store().url} is in this release's form")


def begin_anew(
    job: Annotated[str, typer.Argument(help="Name of a streaming job.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a job's state and the rows that it has added to tables: it reads all that Kafka still has, once more.

    What its tables have of before is gone then: keep a copy of the store first. Stop the jobs before.

    For example: .venv/bin/python -m stack begin-anew consumption_deltas
    """
    with exits():
        known = {each.name: each for each in discovered()}
        if job not in known:
            msg = f"there is no streaming job {job}; there are {', '.join(sorted(known))}"
            raise ConfigError(msg)
        with only_one(job):
            if not yes:
                typer.confirm(f"Remove the state of {job} and its rows in {store().url}?", abort=True)
            folders = [f"state/{name}" for name in store().folders("state") if name.rpartition("-v")[0] == job]
            places = [path for folder in folders for path in store().paths(folder)]
            ids = [path for path in places if path.endswith("/id.json")]
            store().delete(path for path in places if path not in ids)  # a start tells of a cut from here on
            for table in [*known[job].tables, *known[job].current, "accounting"]:
                Writer().delete(table, known[job].rows_of(table))
                console.print(f"{table}: its rows are removed")
            store().delete(ids)
            console.print(f"{job} begins with the oldest record in Kafka when it starts again")
