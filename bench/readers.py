"""Readers beside a writer, compaction, vacuum and reports that are replaced: does one ever see a wrong sum?

    python -m bench.readers [--minutes 75] [--json]

A writer adds files to a table, each commit worth ten; upkeep compacts them, and vacuums each minute what nobody may
read any more, which begins an hour after the first compaction. Meanwhile Polars and DuckDB open the table again and
again and find what was committed before, and no more than was meant to be; and one reader reads for 50 minutes what it
has opened once. A report is replaced all the time: under a plain glob each meter's rows are of one run.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated

import duckdb
import polars as pl
import pyarrow as pa
import typer
from rich.console import Console

from bench.store import base_url, own_store
from lake import reports, upkeep
from lake.reading import Lake
from lake.store import store, used
from lake.tables import Commit, Writer, put_part
from lake.upkeep import Upkeep
from schemas.errors import ContractBroken, exits
from schemas.tables import ACCOUNTING, polars_schema

TABLE, DAYS = "accounting", ("2026-01-05", "2026-01-06")
WORTH = (1, 2, 7)
"""Of the files of a commit: who sees some of them, or one twice, finds another sum than a multiple of all."""
COMMIT_S, UPKEEP_S, READ_S, VACUUM_S = 1.0, 5.0, 0.5, 60.0
COMPACTED_FILES = 16
HELD_S = 50 * 60.0
REPORT, SHARDS, METERS = "readers_v1", 4, 200
console = Console(highlight=False)


@dataclass
class Found:
    """What was seen.

    Attributes:
        commits: that were done.
        meant: that were begun.
        runs: of the report that were begun.
        compacted: small files that became large ones.
        left: how often upkeep could not look after the table.
        vacuumed: files that vacuum has removed.
        reads: how often each reader has read.
        wrong: what it should not have found, a sentence each.
    """

    commits: int = 0
    meant: int = 0
    runs: int = 0
    compacted: int = 0
    left: int = 0
    vacuumed: int = 0
    reads: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def write(found: Found) -> None:
    """A commit of files that are worth ten together, in one day or both."""
    found.meant += 1
    parts = []
    for number, received in enumerate(WORTH):
        rows = pl.DataFrame([{"stage": "a", "batch": "b", "received": received}], schema=polars_schema(ACCOUNTING))
        parts.append(put_part(TABLE, rows, "x", DAYS[(found.meant + number) % len(DAYS)]))
    Writer().add(parts, Commit("bench", found.meant))
    found.commits += 1


def replace_report(found: Found) -> None:
    """Another run of a report, a file after the other, as `lake.reports` does it."""
    found.runs += 1
    for shard in range(SHARDS):
        meters = [f"m{meter:03}" for meter in range(shard, METERS, SHARDS) for _ in range(2)]
        rows = pa.table({"meter_id": meters, "run": [found.runs] * len(meters)})
        reports.put_shard(rows, REPORT, DAYS[0], shard, SHARDS)


def keep_up(keeping: Upkeep, found: Found) -> None:
    """Compacts and vacuums."""
    before = {path for path in store().paths(f"lake/{TABLE}") if path.endswith(".parquet")}
    done = keeping.once()
    found.vacuumed += len(before - set(store().paths(f"lake/{TABLE}")))
    found.compacted += done.compacted
    found.left += done.left


def by_polars(lake: Lake) -> int:
    """The sum of what a lake has received."""
    return int(lake.polars(TABLE).select(pl.col("received").sum()).collect().item() or 0)


def by_duckdb(lake: Lake) -> int:
    """The sum of what a lake has received."""
    with lake.duckdb() as tables:
        return int((tables.execute(f"SELECT coalesce(sum(received), 0) FROM {TABLE}").fetchone() or (0,))[0])


def opened_anew(ask: Callable[[Lake], int]) -> Callable[[Found], str | None]:
    """A reader that opens the table each time."""

    def read(found: Found) -> str | None:
        least = found.commits * sum(WORTH)
        seen = ask(Lake())
        most = found.meant * sum(WORTH)
        is_right = least <= seen <= most and seen % sum(WORTH) == 0
        return None if is_right else f"{ask.__name__} found {seen}, not between {least} and {most}"

    return read


class Holder:
    """A reader that goes on with what it has opened once."""

    def __init__(self) -> None:
        self.lake, self.seen, self.until = Lake(), -1, 0.0

    def __call__(self, found: Found) -> str | None:
        """The same sum as when it was opened."""
        if time.monotonic() > self.until:
            self.lake = Lake()
            self.seen, self.until = by_polars(self.lake), time.monotonic() + HELD_S
        seen = by_polars(self.lake), by_duckdb(self.lake)
        return None if seen == (self.seen, self.seen) else f"who opened it before found {seen}, before {self.seen}"


def globbed(found: Found) -> str | None:
    """Each meter's rows under a report's plain glob are two, of one run."""
    if not store().is_local:  # DuckDB needs an extension there
        return None
    query = f"""SELECT meter_id, count(*), count(DISTINCT run) FROM read_parquet('{reports.glob_of(REPORT)}')
        GROUP BY ALL HAVING count(*) <> 2 OR count(DISTINCT run) > 1"""
    with duckdb.connect() as database:
        wrong = database.execute(query).fetchall()
        meters = database.execute(
            f"SELECT count(DISTINCT meter_id) FROM read_parquet('{reports.glob_of(REPORT)}')"
        ).fetchall()
    return None if not wrong and meters == [(METERS,)] else f"the report has {meters} meters, {wrong[:3]}"


def watched(minutes: float) -> Found:
    """Lets all of them run for so long."""
    found, is_over, url = Found(), threading.Event(), store().url
    upkeep.VACUUM_S = VACUUM_S
    write(found)
    replace_report(found)
    keeping = Upkeep(COMPACTED_FILES)
    readers: dict[str, Callable[[Found], str | None]] = {
        "Polars": opened_anew(by_polars),
        "DuckDB": opened_anew(by_duckdb),
        "opened once": Holder(),
        "report's glob": globbed,
    }

    def again(work: Callable[[], object], every_s: float) -> threading.Thread:
        def run() -> None:
            with used(url):
                while not is_over.wait(every_s):
                    try:
                        work()
                    except Exception as error:  # whatever a reader fails of is what is looked for
                        found.wrong.append(f"{type(error).__name__}: {error}"[:500])

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def look(name: str, read: Callable[[Found], str | None]) -> None:
        wrong = read(found)
        found.reads[name] = found.reads.get(name, 0) + 1
        if wrong:
            found.wrong.append(wrong)

    threads = [
        again(lambda: write(found), COMMIT_S),
        again(lambda: replace_report(found), COMMIT_S),
        again(lambda: keep_up(keeping, found), UPKEEP_S),
        *[again(lambda name=name, read=read: look(name, read), READ_S) for name, read in readers.items()],  # type: ignore[misc]
    ]
    until = time.monotonic() + minutes * 60
    with console.status("readers read"):
        while time.monotonic() < until and not found.wrong:
            time.sleep(1)
    is_over.set()
    for thread in threads:
        thread.join()
    return found


def main(
    minutes: Annotated[float, typer.Option(help="How long; vacuum removes the first files after an hour.")] = 75.0,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Readers of a table that is written, compacted and vacuumed, and of a report that is replaced."""
    with exits(), base_url() as url:
        with own_store(url):
            found = watched(minutes)
        if as_json:
            typer.echo(json.dumps(asdict(found)))
        else:
            reads = ", ".join(f"{name} {number:,}" for name, number in found.reads.items())
            console.print(f"{found.commits:,} commits, {found.runs:,} runs of the report; reads: {reads}")
            console.print(f"{found.compacted:,} files compacted, {found.vacuumed:,} removed by vacuum")
        if found.wrong:
            msg = f"{len(found.wrong)} wrong: {found.wrong[0]}"
            raise ContractBroken(msg)
        if not found.compacted or found.left:
            msg = f"{found.compacted} files were compacted, and {found.left} times upkeep failed: nothing is shown"
            raise ContractBroken(msg)
        if not found.vacuumed:
            console.print("Vacuum has removed nothing yet: let it run for more than an hour.")
        console.print("None saw a wrong sum.")


if __name__ == "__main__":
    typer.run(main)
