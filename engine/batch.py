"""A batch: what is the same for all its partitions, and how each is done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from engine.settings import StreamSettings
from lake.reading import RegistryFiles
from schemas.tables import TABLES, polars_schema
from schemas.topics import Topic

Frames = Mapping[str, pl.DataFrame]
CROSS_PARTITION = "cross_partition"
NO_DATE = "__HIVE_DEFAULT_PARTITION__"  # as Spark names it


@dataclass(frozen=True)
class BatchContext:
    """What is the same for all partitions of a batch.

    Attributes:
        settings: of the streaming jobs.
        watermarks: per run_id `previous_watermark`, up to which the batch before closed its windows, and `watermark`,
            up to which this one does (`engine.watermark.watermarks`).
        close_all: a flush: every window is over.
    """

    settings: StreamSettings
    watermarks: pl.DataFrame
    close_all: bool = False


Transform = Callable[[pl.DataFrame, pl.DataFrame, Frames, BatchContext], Frames]


@dataclass(frozen=True)
class BatchPlan:
    """How the partitions of one batch are done.

    Attributes:
        topics: by name.
        writes: lake table → the timestamp column that dates its rows.
        current: lake tables that are replaced, a file per partition.
        state: kinds of frames that the next batch reads.
        transform: (rows of a partition, registry, its state, context) → frames: tables, state, books.
        registry: files of the registry.
        context: what is the same for all.
        before: state of the batch before, None before the first.
        after: state of this one.
        staging: where rows wait.
    """

    topics: Mapping[str, Topic]
    writes: Mapping[str, str]
    current: tuple[str, ...]
    state: Mapping[str, pl.Schema]
    transform: Transform
    registry: RegistryFiles
    context: BatchContext
    before: Path | None
    after: Path
    staging: Path


def contract(frame: pl.DataFrame, table: str) -> pl.DataFrame:
    """A lake table's columns, as they are written."""
    return frame.select(TABLES[table].names).cast(polars_schema(TABLES[table]))
