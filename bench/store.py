"""What commits cost: CPU and wall of 25 commits, by how many files a table has and how old its log is.

    python -m bench.store [--json]

Each cell has a store of its own, local or what METERSTREAM_STORE names, under a folder that is removed. What is
committed names files that nobody reads, so only the log counts. A commit that read the whole log would grow with it.
"""

import json
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lake.store import store, used
from lake.tables import Commit, Part, Writer
from lake.upkeep import CHECKPOINT_COMMITS, Upkeep
from schemas.errors import exits
from settings import store_url

TABLE, DAY = "readings", "2026-01-05"
COMMITS = 25
NO_COMPACTION = 10**9
"""More files than there are: nobody has written those that are named."""
console = Console(highlight=False)


@dataclass(frozen=True)
class Cell:
    """What one measurement found.

    Attributes:
        files: that the table has.
        versions: of the log before.
        cpu_ms: of a commit, all threads.
        wall_ms: of a commit.
    """

    files: int
    versions: int
    cpu_ms: float
    wall_ms: float


def part() -> Part:
    """A file by name."""
    return Part(TABLE, f"date={DAY}/{uuid.uuid4()}.parquet", 10_000, 100, DAY)


def commits(files: int, versions: int = 0) -> Cell:
    """Cost of a commit to a table of so many files, with so many versions, a checkpoint now and then."""
    writer, keeping = Writer(), Upkeep(NO_COMPACTION)
    writer.add([part() for _ in range(files)], Commit("files", 0))
    for number in range(versions):
        writer.add([part()], Commit("before", number))
        if number % CHECKPOINT_COMMITS == 0:
            keeping.once()
    writer.add([part()], Commit("warm", 0))
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for number in range(COMMITS):
        writer.add([part()], Commit("bench", number))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return Cell(files, versions, cpu_s * 1e3 / COMMITS, wall_s * 1e3 / COMMITS)


@contextmanager
def base_url() -> Iterator[str]:
    """URL below which stores are made: of what METERSTREAM_STORE names, else of a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        url = store_url()
        yield f"file://{Path(folder).resolve()}" if url.startswith("file://") else url


@contextmanager
def own_store(url: str) -> Iterator[None]:
    """While it holds, the store is a folder of this one that is empty before and after."""
    with used(f"{url}/bench-{uuid.uuid4()}"):
        yield
        store().delete([*store().paths("lake"), *store().paths("reports")])


def in_a_store(url: str, files: int, versions: int = 0) -> Cell:
    """`commits`, in a store of its own."""
    with own_store(url):
        return commits(files, versions)


def main(as_json: Annotated[bool, typer.Option("--json", help="A line of JSON each.")] = False) -> None:
    """CPU and wall of a commit at 10 and 10,000 files, and after 1,000 versions with upkeep."""
    with exits(), base_url() as url:
        found = [in_a_store(url, *cell) for cell in ((10, 0), (10_000, 0), (10, 1_000), (10, 0))]
        if as_json:
            for cell in found:
                typer.echo(json.dumps(asdict(cell)))
            return
        table = Table("files", "versions before", "CPU ms", "wall ms", box=box.SIMPLE, title=url.partition("://")[0])
        for cell in found:
            table.add_row(f"{cell.files:,}", f"{cell.versions:,}", f"{cell.cpu_ms:.1f}", f"{cell.wall_ms:.1f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
