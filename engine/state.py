"""State by batch, in objects that never change: each batch adds what changed, and its manifest names what there is.

A kind of state of a partition is a chain of objects: the first has all rows, each further one says which of the rows
before it are gone, and has new ones. So a batch costs what it changes. A long chain begins anew with one object. A task
writes one with all that its partitions keep, under a name that nobody uses again: one that is tried again, or still
runs somewhere, spoils nothing. Workers remember the rows of the chains that they have read or written last; where
others went on meanwhile they read what was added.
"""

import io
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from lake.store import store
from schemas.errors import StateLost

SMALL_ROWS = 2_000
"""So few rows are written as a whole: it costs no more than their changes."""
FEW_ROWS = 2
"""Times the records that came: no more rows are handed, and written, as a whole (docs/bench.md, sparse)."""
LONGEST_CHAIN = 16
MOST_ROWS = 3
"""Times the rows that are there, a chain's files may have before they are written anew: what a row costs to change,
against what it costs to read them."""
COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4")
"""A quarter of the bytes, in less time than it takes to write the rest."""
GONE, ROWS = "gone", "rows"
"""In a state file, a zip that compresses nothing, each chain has two members: the places of the rows before it that are
gone, as 32-bit numbers, which is not there where the chain begins; and the new rows, an Arrow file."""


class Kept(NamedTuple):
    """Where a kind of state lies.

    Attributes:
        files: names of the chain's files, in order.
        rows: how many there are.
    """

    files: tuple[str, ...]
    rows: int


@lru_cache(maxsize=1)
def _content(path: str) -> bytes:
    """An object's bytes: a task's partitions and kinds are read from one, one after the other."""
    return store().get(path)


UNREADABLE = (
    OSError, LookupError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, pl.exceptions.PolarsError
)  # fmt: skip
"""What comes of a state file with a damaged byte."""
Manifest = Mapping[str, Mapping[str, Kept]]
"""Partition → kind → where it lies; a kind that is not there is empty."""
Change = tuple[str, str, Kept]
"""Partition, kind, and where it lies now."""


@dataclass
class Keys:
    """Keys of a chain's rows, each as a number; worked out when somebody looks for one, and then carried on."""

    rows: pl.DataFrame
    by: Sequence[str]

    @cached_property
    def hashes(self) -> pl.Series:
        """Of each row."""
        return hashes_of(self.rows, self.by)

    def grown(self, rows: pl.DataFrame, new: pl.DataFrame) -> "Keys":
        """Of these rows, of which the last are new."""
        after = Keys(rows, self.by)
        if "hashes" in self.__dict__:
            after.hashes = pl.concat([self.hashes, hashes_of(new, self.by)], rechunk=False)
        return after


@dataclass(frozen=True)
class Stock:
    """Rows of one kind of state of a partition.

    Attributes:
        rows: of the whole chain, also those that are gone.
        keys: of them.
        is_there: which of them are.
        files: names of the chain's files.
    """

    rows: pl.DataFrame
    keys: Keys
    is_there: NDArray[np.bool_]
    files: tuple[str, ...] = ()

    @classmethod
    def anew(cls, rows: pl.DataFrame, by: Sequence[str]) -> "Stock":
        """A chain that begins with these rows, found by these columns."""
        return cls(rows, Keys(rows, by), np.ones(len(rows), np.bool_))

    def grown(self, gone: NDArray[np.uint32], new: pl.DataFrame) -> "Stock":
        """Without the rows at these places of the chain, and with new ones."""
        is_there = np.concatenate([self.is_there, np.ones(len(new), np.bool_)])
        is_there[gone] = False
        rows = self.rows.vstack(new)
        return Stock(rows, self.keys.grown(rows, new), is_there, self.files)

    @property
    def present(self) -> pl.DataFrame:
        """All rows that are there."""
        return self.rows if self.is_there.all() else self.rows.filter(pl.Series(self.is_there))

    def is_small(self, records: int) -> bool:
        """Whether to look for the rows of so many records costs more than to hand, and write, all of them."""
        return len(self.rows) <= max(SMALL_ROWS, FEW_ROWS * records)

    def found(self, hashes: pl.Series, due: pl.Expr | None) -> NDArray[np.bool_]:
        """Which rows are there and have one of these keys, or are due."""
        found = self.keys.hashes.is_in(hashes.implode())
        if due is not None:
            found |= self.rows.select(due.fill_null(False)).to_series()
        return found.to_numpy() & self.is_there


class Taken(NamedTuple):
    """What a rule is handed of a kind of state of a partition.

    Attributes:
        which: rows of the chain.
        rows: these, or some of them: the others are gone.
    """

    which: NDArray[np.bool_]
    rows: pl.DataFrame


class Changed(NamedTuple):
    """A kind of state after a batch.

    Attributes:
        partition: whose.
        kind: which.
        gone: places in the chain of what is gone; None where the chain begins anew.
        new: rows that came.
        stock: after it; its files are those before.
    """

    partition: str
    kind: str
    gone: NDArray[np.uint32] | None
    new: pl.DataFrame
    stock: Stock


_known: dict[tuple[str, str, str], Stock] = {}


def hashes_of(rows: pl.DataFrame, by: Iterable[str]) -> pl.Series:
    """A number for each row's key: the same for the same key, within one process."""
    return rows.select(hash=pl.struct(by).hash()).to_series()


def stock(folder: str, manifest: Manifest, partition: str, kind: str, schema: pl.Schema, by: Sequence[str]) -> Stock:
    """A kind of state of a partition, as a batch left it; empty where the manifest has none of it.

    Args:
        folder: of the query's state.
        manifest: of the batch.
        partition: whose.
        kind: which.
        schema: its columns.
        by: columns of its key; none where rows are not found by a key.

    Raises:
        StateLost: a file is gone, or cannot be read.
    """
    kept = manifest.get(partition, {}).get(kind)
    files = tuple(kept[0]) if kept else ()
    found = _known.get((folder, partition, kind))
    if found is None or found.files != files[: len(found.files)]:
        found = Stock.anew(schema.to_frame(), by)
    for name in files[len(found.files) :]:
        try:
            gone, new = _entry(f"{folder}/{name}", partition, kind)
            after = Stock.anew(new, by) if gone is None else found.grown(gone, new)
        except UNREADABLE as error:
            raise _lost(folder, name, str(error)) from error
        found = replace(after, files=(*found.files, name))
        if name == files[-1] and kept and (rows := int(found.is_there.sum())) != kept[1]:
            raise _lost(folder, name, f"{rows} rows instead of {kept[1]}")
    _known[folder, partition, kind] = found
    return found


def _lost(folder: str, name: str, why: str) -> StateLost:
    job = folder.split("/")[1].rpartition("-v")[0]
    msg = f"{job}: the state in {store().uri(f'{folder}/{name}')} cannot be read ({why}). "
    return StateLost(msg + f"Repair: stop the jobs, python -m stack begin-anew {job} (docs/operations.md), start again")


def stocks(
    folder: str, manifest: Manifest, partition: str, kinds: Mapping[str, pl.Schema], keys: Mapping[str, Sequence[str]]
) -> dict[str, Stock]:
    """All kinds of state of a partition; see `stock`."""
    return {
        kind: stock(folder, manifest, partition, kind, schema, keys.get(kind, ())) for kind, schema in kinds.items()
    }


def _entry(path: str, partition: str, kind: str) -> tuple[NDArray[np.uint32] | None, pl.DataFrame]:
    with zipfile.ZipFile(io.BytesIO(_content(path))) as members:
        gone, rows = (f"{partition}/{kind}/{member}" for member in (GONE, ROWS))
        places = np.frombuffer(members.read(gone), np.uint32) if gone in members.NameToInfo else None
        return places, pl.read_ipc(members.read(rows))


def changes(
    partition: str,
    before: Mapping[str, Stock],
    handed: Mapping[str, Taken],
    after: Mapping[str, pl.DataFrame],
    keys: Mapping[str, Sequence[str]],
) -> list[Changed]:
    """The kinds of state of a partition that are not what they were.

    Args:
        partition: whose.
        before: what was there, by kind.
        handed: what of it.
        after: what came for that; where it is the same frame nothing did, and what is not there stays.
        keys: columns of the keys.
    """
    found = []
    for kind, given in after.items():
        stock, (which, rows), by = before[kind], handed[kind], keys.get(kind, ())
        taken = int(which.sum())
        is_same = len(rows) == taken if given is rows else not taken and given.is_empty()
        if not is_same:
            gone, new = _replaced(stock, which, given, by)
            grown = Stock.anew(new, by) if gone is None else stock.grown(gone, new)
            found.append(Changed(partition, kind, gone, new, grown))
    return found


def _replaced(
    before: Stock, taken: NDArray[np.bool_], given: pl.DataFrame, by: Sequence[str]
) -> tuple[NDArray[np.uint32] | None, pl.DataFrame]:
    """What a file says of a chain in which rows were replaced: what is gone, and the new rows."""
    rest = before.is_there & ~taken
    if not rest.any():
        return None, given.rechunk()
    present = int(rest.sum()) + len(given)
    is_long = len(before.files) >= LONGEST_CHAIN or len(before.rows) + len(given) > MOST_ROWS * present
    if by and before.files and not is_long and present > SMALL_ROWS:
        return np.flatnonzero(taken).astype(np.uint32), given.rechunk()
    return None, pl.concat([before.rows.filter(pl.Series(rest)), given], rechunk=True)


def write(folder: str, batch: int, changed: Sequence[Changed]) -> list[Change]:
    """Writes a file of a batch's state, where something changed. Returns what lies where now.

    Args:
        folder: of the query's state.
        batch: its number.
        changed: of the partitions of a task.
    """
    if not changed:
        return []
    name = f"{batch:08d}-{uuid.uuid4().hex[:12]}.zip"
    written = []
    with store().writing(f"{folder}/{name}") as file, zipfile.ZipFile(file, "w") as members:
        for change in changed:
            after = replace(change.stock, files=(*change.stock.files, name))
            _known[folder, change.partition, change.kind] = after
            place = f"{change.partition}/{change.kind}"
            if change.gone is not None:
                members.writestr(f"{place}/{GONE}", change.gone.tobytes())
            with members.open(f"{place}/{ROWS}", "w", force_zip64=True) as member:
                out = io.BufferedWriter(member)
                rows = change.new.to_arrow(compat_level=pl.CompatLevel.newest())
                how = COMPRESSED if len(rows) > SMALL_ROWS else None
                with pa.ipc.new_file(out, rows.schema, options=how) as arrow:  # a third of what Polars takes
                    arrow.write_table(rows)
                out.flush()
            written.append((change.partition, change.kind, Kept(after.files, int(after.is_there.sum()))))
    return written


def merged(before: Manifest, changes: Iterable[Change]) -> dict[str, dict[str, Kept]]:
    """The manifest of a batch: that of the batch before, and what changed."""
    after = {partition: dict(kinds) for partition, kinds in before.items()}
    for partition, kind, kept in changes:
        after.setdefault(partition, {})[kind] = kept
    return after


def rows_of(manifest: Manifest, partition: str | None = None) -> int:
    """All rows that are there, or those of a partition."""
    those = manifest.values() if partition is None else [manifest.get(partition, {})]
    return sum(rows for kinds in those for _, rows in kinds.values())


def names(*manifests: Manifest) -> set[str]:
    """Names of all objects that manifests name."""
    return {
        name for manifest in manifests for kinds in manifest.values() for files, _ in kinds.values() for name in files
    }
