"""A Polars function over each shard of meters, with its state: the one place where Spark hands rows to Python engines.

Rows and state are grouped by a hash of the meter and handed over by Arrow. A function returns several frames; they
travel in one union, `kind` and a struct column for each, since a Spark group gives one frame back. The state is some of
these kinds, kept as it is: batch N reads what batch N−1 returned.
"""

from collections.abc import Callable, Mapping, Sequence

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from lake.decoding import spark_schema

Frames = Mapping[str, pl.DataFrame]
SHARDS = 4
"""Groups a batch is cut into: a few more than a small machine has cores; the state of a query does not depend on it."""


def union_schema(outputs: Mapping[str, pa.Schema]) -> pa.Schema:
    """Schema of the union of several frames."""
    structs = [pa.field(name, pa.struct(list(schema))) for name, schema in outputs.items()]
    return pa.schema([pa.field("kind", pa.string()), pa.field("shard", pa.int64()), *structs])


def _shard(meter_id: str) -> F.Column:  # type: ignore[name-defined]
    return F.crc32(F.col(meter_id).cast("binary")) % SHARDS


def by_shard(
    rows: DataFrame,
    state: DataFrame,
    engine: Callable[[pl.DataFrame, Frames], Frames],
    outputs: Mapping[str, pa.Schema],
    kept: Sequence[str],
) -> DataFrame:
    """Runs the engine over every shard that has rows or state.

    Args:
        rows: has a column meter_id, and only what the engine needs: all of it is shuffled and copied.
        state: `state_of` an earlier result; may be empty.
        engine: (rows of the shard, its state frames by kind) → frames by kind.
        outputs: columns of every kind; narrow ones, since a row of one kind carries the nulls of the others.
        kept: the kinds that are state.

    Returns:
        The union; `of_kind` takes one frame out of it.
    """
    schema = union_schema(outputs)
    names = list(outputs)

    def run(key: tuple[pa.Scalar, ...], left: pa.Table, right: pa.Table) -> pa.Table:
        frames = {name: _of_kind(right, name, outputs[name]) for name in kept}
        results = engine(_frame(left.drop_columns(["shard"])), frames)
        pieces = []
        for name, frame in results.items():
            table = frame.select(outputs[name].names).to_arrow().cast(outputs[name])
            columns = {
                "kind": pa.repeat(pa.scalar(name), len(table)),
                "shard": pa.repeat(key[0].cast(pa.int64()), len(table)),
                **{other: pa.nulls(len(table), schema.field(other).type) for other in names if other != name},
                name: table.to_struct_array().combine_chunks(),
            }
            pieces.append(pa.table([columns[column] for column in schema.names], schema=schema))
        return pa.concat_tables(pieces) if pieces else schema.empty_table()

    grouped = rows.withColumn("shard", _shard("meter_id")).groupBy("shard")
    return grouped.cogroup(state.groupBy("shard")).applyInArrow(run, spark_schema(schema))


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _of_kind(union: pa.Table, kind: str, schema: pa.Schema) -> pl.DataFrame:
    if len(union) == 0:
        return _frame(schema.empty_table())
    rows = union.filter(pa.compute.equal(union.column("kind"), kind)).column(kind).combine_chunks()
    return _frame(pa.Table.from_arrays(rows.flatten(), schema=schema) if len(rows) else schema.empty_table())


def state_schema(outputs: Mapping[str, pa.Schema], kept: Sequence[str]) -> StructType:
    """Columns of `state_of`."""
    return spark_schema(union_schema({name: outputs[name] for name in kept}))


def state_of(union: DataFrame, kept: Sequence[str]) -> DataFrame:
    """The rows that the next batch reads."""
    return union.where(F.col("kind").isin(*kept)).select("kind", "shard", *kept)


def of_kind(union: DataFrame, kind: str, schema: pa.Schema) -> DataFrame:
    """One frame out of the union, its columns in the order of the schema: a table's contract."""
    return union.where(F.col("kind") == kind).select(*[F.col(f"{kind}.{name}").alias(name) for name in schema.names])
