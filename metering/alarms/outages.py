"""Power failures of meters → outages per transformer. Pure functions on Polars frames.

Several meters of one transformer that lose power at about the same time are one outage, with its members; one meter
alone is a blown fuse. Where a transformer serves two, both are an outage. An interruption is momentary up to five
minutes, sustained after, customer by customer (docs/domain.md, Outages).
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import polars as pl

from metering.energy.delta_engine import STAMP
from schemas.closed_lists import AlarmState, OutageKind
from schemas.tables import OUTAGES, polars_schema

POWER_FAILURE = "power_failure"
FEWEST_METERS = 3
WITHIN = timedelta(minutes=2)  # meters' clocks are not one clock, and a fault takes its time to spread
MOMENTARY = timedelta(minutes=5)
UNCHANGED = timedelta(days=7)  # who has not come back by then will not say so: a meter taken away, an event lost
NEVER = datetime(1, 1, 1, tzinfo=UTC)
ROWS = polars_schema(OUTAGES)
MEMBER = pl.Schema(
    {
        "transformer_id": pl.String(),
        "feeder_id": pl.String(),
        "run_id": pl.String(),
        "begin_at": STAMP,
        "outage_id": pl.String(),
        "alarm_id": pl.String(),
        "meter_id": pl.String(),
        "down_at": STAMP,
        "up_at": STAMP,
        "updated_at": STAMP,
    }
)
"""State: meters that lost power, group by group; without `outage_id` while they are too few."""
Key = tuple[str | None, str, datetime]
"""A group: run, transformer and time of its first failure."""


class Outages(NamedTuple):
    """What `group_outages` returns.

    Attributes:
        rows: one row per outage that began or changed, columns `ROWS`; the highest revision of an outage_id is
            its state.
        members: the new state, columns `MEMBER`.
    """

    rows: pl.DataFrame
    members: pl.DataFrame


def group_outages(
    failures: pl.DataFrame, members: pl.DataFrame, watermarks: pl.DataFrame, served: Mapping[str, int]
) -> Outages:
    """Puts power failures into groups and tells the outages among them.

    A failure belongs to a group of its transformer when it lies within two minutes of the group's first, or when the
    group is an outage that was not over at its time. Groups do not merge. An outage in which nothing changed for a week
    takes no further failure and is forgotten; it stays active in the table.

    Args:
        failures: changes of alarms of one type: columns of the table alarms, transformer_id, feeder_id.
        members: the state so far, columns `MEMBER`.
        watermarks: per run_id `watermark`: what was over before it gets no further member.
        served: transformer → its meters.
    """
    groups: dict[Key, list[dict[str, Any]]] = {}
    under: dict[tuple[str | None, str], list[Key]] = {}

    def put(key: Key, row: dict[str, Any]) -> None:
        if key not in groups:
            under.setdefault(key[:2], []).append(key)
        groups.setdefault(key, []).append(row)

    for row in members.iter_rows(named=True):
        put((row["run_id"], row["transformer_id"], row["begin_at"]), row)
    changed: set[Key] = set()
    order = [pl.coalesce("cleared_at", "raised_at"), "state", "meter_id", "repeat_count"]
    for change in failures.drop_nulls("transformer_id").sort(order).iter_rows(named=True):
        mine = under.get((change["run_id"], change["transformer_id"]), [])
        key = next((key for key in mine if any(row["alarm_id"] == change["alarm_id"] for row in groups[key])), None)
        if key is None and change["state"] == AlarmState.CLEARED.value:
            continue  # its group was too small and is forgotten
        if key is None:
            key = next((key for key in sorted(mine) if _takes(groups[key], change["raised_at"])), None)
            if key is None:
                key = (change["run_id"], change["transformer_id"], change["raised_at"])
            put(key, _member(change, key))
            if len({row["meter_id"] for row in groups[key]}) >= _fewest(served.get(key[1])):
                name = groups[key][0]["outage_id"] or outage_id(*key)
                groups[key] = [{**row, "outage_id": name} for row in groups[key]]
        elif change["state"] == AlarmState.ACTIVE.value:
            continue  # said again
        else:
            row = next(row for row in groups[key] if row["alarm_id"] == change["alarm_id"])
            row |= {"up_at": change["cleared_at"], "updated_at": change["updated_at"]}
        changed.add(key)
    rows = [_row(groups[key]) for key in sorted(changed, key=str) if groups[key][0]["outage_id"]]
    over = dict(watermarks.select("run_id", "watermark").iter_rows())
    kept = [row for key, rows in groups.items() if not _is_past(rows, over.get(key[0])) for row in rows]
    return Outages(pl.DataFrame(rows, schema=ROWS, orient="row"), pl.DataFrame(kept, schema=MEMBER, orient="row"))


def _fewest(served: int | None) -> int:
    """Meters without power that make an outage: never one alone, all where there are two."""
    return max(2, min(served or FEWEST_METERS, FEWEST_METERS))


def outage_id(run_id: str | None, transformer_id: str, begin_at: datetime) -> str:
    """Name of an outage by transformer, begin and run, so that reprocessing gives the same."""
    text = f"{transformer_id}|{begin_at.isoformat()}|{run_id or ''}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _takes(rows: list[dict[str, Any]], down_at: datetime) -> bool:
    """Whether a failure at this time belongs to the group."""
    begin_at = rows[0]["begin_at"]
    is_outage = rows[0]["outage_id"] is not None
    was_open = is_outage and any(row["up_at"] is None or row["up_at"] >= down_at for row in rows)
    changed_at = max(row["up_at"] or row["down_at"] for row in rows)
    return bool(abs(down_at - begin_at) <= WITHIN or (was_open and begin_at <= down_at <= changed_at + UNCHANGED))


def _member(change: dict[str, Any], key: Key) -> dict[str, Any]:
    return {
        **{name: change[name] for name in ("transformer_id", "feeder_id", "run_id", "alarm_id", "meter_id")},
        "begin_at": key[2],
        "outage_id": None,
        "down_at": change["raised_at"],
        "up_at": change["cleared_at"],
        "updated_at": change["updated_at"],
    }


def _is_past(rows: list[dict[str, Any]], watermark: datetime | None) -> bool:
    """Whether a group can have no further member: too small for an outage, or over, or long without a change."""
    is_open = rows[0]["outage_id"] is not None and any(row["up_at"] is None for row in rows)
    newest_at = max(row["updated_at"] for row in rows)
    return bool(newest_at + (UNCHANGED if is_open else WITHIN) < (watermark or NEVER))


def _row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The outage as it is now."""
    began_at = min(row["down_at"] for row in rows)
    ends = [row["up_at"] for row in rows if row["up_at"] is not None]
    is_over = len(ends) == len(rows)
    restored_at = max(ends) if is_over else None
    sustained = [row for row in rows if row["up_at"] is not None and row["up_at"] - row["down_at"] > MOMENTARY]
    lasted = [row["up_at"] - row["down_at"] for row in sustained]
    kind = (OutageKind.SUSTAINED if sustained else OutageKind.MOMENTARY).value if is_over else None
    meters = sorted({row["meter_id"] for row in rows})
    still_down = {row["meter_id"] for row in rows if row["up_at"] is None}
    return {
        **{name: rows[0][name] for name in ("outage_id", "transformer_id", "feeder_id", "run_id")},
        "state": (AlarmState.CLEARED if is_over else AlarmState.ACTIVE).value,
        "began_at": began_at,
        "restored_at": restored_at,
        "kind": kind,
        "meter_count": len(meters),
        "restored_count": len(meters) - len(still_down),
        "sustained_count": len({row["meter_id"] for row in sustained}),
        "meter_minutes": sum(lasted, timedelta()) / timedelta(minutes=1),
        "meters": meters,
        "revision": len(rows) + len(ends),
        "updated_at": max(row["updated_at"] for row in rows),
    }
