"""Upkeep of tables, apart from the stream: checkpoints of logs, small files made large, what nobody reads removed.

Each batch adds a file to each table and day that it has rows of. Compaction adds one large file in place of many in one
commit, so a reader finds the same rows before and after; the small ones stay until vacuum, an hour later, for whoever
opened the table before. Anybody may run it, several at once too: of two that do the same, one has to try again.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from lake.store import store
from lake.tables import DATE, NO_HOOKS, REOPENED_S, columns_of, folder_of, partition_column
from schemas.errors import RetryLater
from schemas.tables import TABLES

CHECKPOINT_COMMITS = 20
"""Without a checkpoint each commit since the last one costs whoever opens the table 0.15 ms."""
SMALL_BYTES, LARGE_BYTES = 2_000_000, 32_000_000
"""Small files become one of up to the first size, such ones one of the second: with one size only, the one that is half
full would be written again each time. A file of the second size holds a million readings or so."""
MIDDLE_FILES = 16
"""So many files between the two sizes, of a day, become large ones."""
RETENTION_HOURS = 1
VACUUM_S = 3600.0
ORPHANS_HOURS = 7 * 24
"""Files that no commit names are removed when they are so old: a batch that is on its way names its own by then."""
ORPHANS_S = 24 * 3600.0
QUIET_S = 6 * 3600.0
CLUSTERED_BY = "meter_id"
log = structlog.get_logger()


@dataclass
class Round:
    """What a look at all tables has come to.

    Attributes:
        compacted: small files that became large ones.
        left: tables that could not be looked after.
    """

    compacted: int = 0
    left: int = 0


class Upkeep:
    """Keeps tables small to open and fast to read.

    Attributes:
        files: how many small ones of a day are too many.
    """

    def __init__(self, files: int) -> None:
        self.files = files
        self._known: dict[str, tuple[float, int, DeltaTable]] = {}
        self._vacuumed: dict[str, float] = {}
        self._swept: dict[str, float] = {}

    def once(self, is_over: Callable[[], bool] = lambda: False) -> Round:
        """Does what is due; what cannot be done is logged and tried again the next time.

        Args:
            is_over: asked between two tables: whether to end early.
        """
        done = Round()
        try:
            there = set(store().folders("lake"))
        except RetryLater as error:
            log.warning("upkeep is left for the next time", error=str(error)[:500])
            return Round(left=len(TABLES))
        for table in TABLES:
            if is_over():
                break
            if table not in there:
                continue
            try:
                done.compacted += self._look(table)
            except TableNotFoundError:
                continue
            except (DeltaError, OSError, RetryLater) as error:
                self._known.pop(table, None)
                done.left += 1
                log.warning("upkeep of a table is left for the next time", table=table, error=str(error)[:500])
        return done

    def cluster(self, quiet_s: float = QUIET_S) -> int:
        """Puts the rows of closed days in the order of their meters: who asks for one meter reads little of a day.

        It takes a day's rows at once, so it is not the driver's work. Returns how many days of tables were done.

        Args:
            quiet_s: a day is closed when nothing came to it for so long.

        Raises:
            RetryLater: the store does not answer.
        """
        done = 0
        there = set(store().folders("lake"))
        for table in TABLES:
            if table in there and CLUSTERED_BY in columns_of(table).names and partition_column(table) == DATE:
                try:
                    done += self._cluster(table, quiet_s)
                except (DeltaError, OSError) as error:
                    log.warning("a table's days are left as they are", table=table, error=str(error)[:500])
        return done

    def _cluster(self, table: str, quiet_s: float) -> int:
        handle, place, done = DeltaTable(store().uri(folder_of(table))), f"upkeep/clustered/{table}.json", 0
        clustered = json.loads(store().get(place)) if store().has(place) else {}
        for day, newest in sorted(_newest(handle).items()):
            if clustered.get(day) == newest or time.time() - newest / 1000 < quiet_s:
                continue
            began = time.monotonic()
            handle.optimize.z_order(
                [CLUSTERED_BY], [(DATE, "=", day)], target_size=LARGE_BYTES, max_concurrent_tasks=1,
                post_commithook_properties=NO_HOOKS,
            )  # fmt: skip
            clustered[day] = _newest(handle)[day]
            store().put(place, json.dumps(clustered).encode())
            log.info("clustered", table=table, day=day, seconds=round(time.monotonic() - began, 2))
            done += 1
        return done

    def _look(self, table: str) -> int:
        """Opens a table anew now and then, reads on where it was opened before, and does nothing where nothing came."""
        now = time.monotonic()
        opened_at, seen, handle = self._known.get(table, (-REOPENED_S, -1, None))
        if handle is None or now - opened_at >= REOPENED_S:
            opened_at, handle = now, DeltaTable(store().uri(folder_of(table)))
        else:
            handle.update_incremental()
        compacted = self._keep(table, handle) if handle.version() != seen else 0
        self._known[table] = opened_at, handle.version(), handle
        return compacted

    def _keep(self, table: str, handle: DeltaTable) -> int:
        if handle.version() - _checkpointed(table) >= CHECKPOINT_COMMITS:
            handle.create_checkpoint()
            handle.cleanup_metadata()
        compacted = self._compact(table, handle)
        now = time.monotonic()
        if now - self._vacuumed.get(table, -VACUUM_S) >= VACUUM_S:
            handle.vacuum(RETENTION_HOURS, dry_run=False, enforce_retention_duration=False)
            self._vacuumed[table] = now
        if now - self._swept.get(table, -ORPHANS_S) >= ORPHANS_S:
            handle.vacuum(ORPHANS_HOURS, dry_run=False, enforce_retention_duration=False, full=True)
            self._swept[table] = now
        return compacted

    def _compact(self, table: str, handle: DeltaTable) -> int:
        """Makes small files of a day into larger ones, where there are too many. Returns how many."""
        compacted, small, middle = 0, Counter[str](), Counter[str]()
        column = partition_column(table)
        actions = handle.get_add_actions(flatten=True)
        for size, value in zip(
            actions["size_bytes"].to_pylist(), actions[f"partition.{column}"].to_pylist(), strict=True
        ):
            if value is not None:
                small[str(value)] += size < SMALL_BYTES
                middle[str(value)] += SMALL_BYTES // 2 <= size < LARGE_BYTES
        due = [(value, SMALL_BYTES) for value, number in small.items() if number >= self.files]
        due += [(value, LARGE_BYTES) for value, number in middle.items() if number >= MIDDLE_FILES]
        for value, target in due:
            began = time.monotonic()
            done = handle.optimize.compact(
                [(column, "=", value)], target_size=target, max_concurrent_tasks=1, post_commithook_properties=NO_HOOKS
            )
            if not done["numFilesRemoved"]:
                continue  # none of them fit together
            compacted += done["numFilesRemoved"]
            log.info(
                "compacted", table=table, day=value, files=done["numFilesRemoved"], left=done["numFilesAdded"],
                seconds=round(time.monotonic() - began, 2),
            )  # fmt: skip
        return compacted


def _newest(handle: DeltaTable) -> dict[str, int]:
    """Day of a table → when the newest of its files was added, ms since 1970."""
    actions, newest = handle.get_add_actions(flatten=True), dict[str, int]()
    for day, at in zip(actions[f"partition.{DATE}"].to_pylist(), actions["modification_time"].to_pylist(), strict=True):
        if day is not None:
            newest[str(day)] = max(newest.get(str(day), 0), at)
    return newest


def _checkpointed(table: str) -> int:
    """Version of a table's last checkpoint; −1 where there is none."""
    try:
        return int(json.loads(store().get(f"{folder_of(table)}/_delta_log/_last_checkpoint"))["version"])
    except (FileNotFoundError, ValueError, LookupError):
        return -1
