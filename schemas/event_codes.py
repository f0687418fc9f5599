"""The event code tables of the meters' dialects (events/codes.csv), and their reader."""

import io
from functools import cache
from importlib.resources import files

import polars as pl


@cache
def code_table() -> pl.DataFrame:
    """Event codes: (dialect, dialect_version, source_table, code) → type, edge, severity, tier, action; all text.

    `once_within_s`: an event that a meter tells twice, by its log and its network card, counts once in so many seconds.
    """
    text = files("schemas").joinpath("events", "codes.csv").read_bytes()
    return pl.read_csv(io.BytesIO(text), infer_schema=False)
