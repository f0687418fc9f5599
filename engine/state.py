"""State by batch: what a partition keeps lies in files that never change, named by the manifest of the batch.

A task writes one file with all that its partitions keep and that changed, under a name that nobody uses again: so a
task that is tried again, or still runs somewhere, spoils nothing. What did not change is named again by the manifest
of the next batch. A worker remembers the frames that it has read or written last: a name says for good what is in it.
"""

import io
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow as pa

from schemas.errors import StateLost


class Kept(NamedTuple):
    """Where a kind of state lies.

    Attributes:
        file: its name.
        rows: how many it has there.
    """

    file: str
    rows: int


Manifest = Mapping[str, Mapping[str, Kept]]
"""Partition → kind → where it lies; a kind that is not there is empty."""
Change = tuple[str, str, Kept]
"""Partition, kind, and where it lies now."""
ENTRIES = pa.schema(
    [pa.field("partition", pa.string()), pa.field("kind", pa.string()), pa.field("frame", pa.large_binary())]
)
"""Columns of a state file: each frame as an Arrow file of its own."""
_known: dict[tuple[Path, str, str], tuple[str, pl.DataFrame]] = {}


def read(folder: Path, manifest: Manifest, partition: str, kinds: Mapping[str, pl.Schema]) -> dict[str, pl.DataFrame]:
    """The state of a partition, by kind; empty where the manifest has none of it.

    Args:
        folder: of the query's state.
        manifest: of the batch before.
        partition: whose.
        kinds: that are wanted, with their columns.

    Raises:
        StateLost: a file is gone, or cannot be read.
    """
    names = manifest.get(partition, {})
    found: dict[str, pl.DataFrame] = {}
    read: dict[str, dict[tuple[str, str], bytes]] = {}
    for kind, schema in kinds.items():
        if kind not in names:
            found[kind] = schema.to_frame()
            continue
        name = names[kind][0]
        known, frame = _known.get((folder, partition, kind), ("", None))
        if known != name or frame is None:
            try:
                entries = read[name] if name in read else read.setdefault(name, _entries(folder / name))
                frame = pl.read_ipc(entries[partition, kind])
            except (OSError, KeyError, pa.ArrowException, pl.exceptions.PolarsError) as error:
                msg = f"{folder.parent.name}: the state in {folder / name} cannot be read ({error}). "
                raise StateLost(msg + "Repair: from the beginning (docs/operations.md)") from error
            _known[folder, partition, kind] = name, frame
        found[kind] = frame
    return found


def _entries(file: Path) -> dict[tuple[str, str], bytes]:
    with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
        table = reader.read_all()
        places = zip(table.column("partition").to_pylist(), table.column("kind").to_pylist(), strict=True)
        return {
            place: frame.as_buffer().to_pybytes() for place, frame in zip(places, table.column("frame"), strict=True)
        }


def write(folder: Path, batch: int, kept: Iterable[tuple[str, str, pl.DataFrame]]) -> list[Change]:
    """Writes a file of a batch's state, where there is something to keep. Returns what lies in it.

    Args:
        folder: of the query's state.
        batch: its number.
        kept: partition, kind and rows.
    """
    entries = list(kept)
    if not entries:
        return []
    name = f"{batch:08d}-{uuid.uuid4().hex[:12]}.arrow"
    rows = []
    for partition, kind, frame in entries:
        _known[folder, partition, kind] = name, frame
        buffer = io.BytesIO()
        frame.write_ipc(buffer)
        rows.append((partition, kind, buffer.getbuffer()))
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=ENTRIES)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, ENTRIES) as writer:
        writer.write_table(table)
    part.rename(folder / name)
    return [(partition, kind, Kept(name, len(frame))) for partition, kind, frame in entries]


def merged(before: Manifest, changes: Iterable[Change]) -> dict[str, dict[str, Kept]]:
    """The manifest of a batch: that of the batch before, and what changed."""
    after = {partition: dict(kinds) for partition, kinds in before.items()}
    for partition, kind, kept in changes:
        after.setdefault(partition, {})[kind] = kept
    return after


def rows_of(manifest: Manifest) -> int:
    """All rows that are kept."""
    return sum(rows for kinds in manifest.values() for _, rows in kinds.values())


def forget(folder: Path, *manifests: Manifest) -> None:
    """Removes the state files that none of these manifests names."""
    named = {name for manifest in manifests for kinds in manifest.values() for name, _ in kinds.values()}
    for file in folder.glob("*.arrow*"):
        if file.name not in named:
            file.unlink(missing_ok=True)
