"""Where tables and reports lie in a home."""

from pathlib import Path

from settings import home


def table_path(table: str) -> Path:
    """Folder of a lake table."""
    return home() / "lake" / table


def report_path(report: str) -> Path:
    """Folder of a report, `report` with its version: `daily_consumption_v1`."""
    return home() / "reports" / report


def glob_of(folder: Path) -> str:
    """The glob that gives a table's or report's committed rows to any reader."""
    return str(folder / "date=*" / "*.parquet")
