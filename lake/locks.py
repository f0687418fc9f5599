"""Locks of a home: who may write, move or read files, until the process ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from settings import home


@contextmanager
def files_kept(*tables: str) -> Iterator[None]:
    """While it holds, no file of these tables is merged with others: for whoever lists files and reads them later.

    Writers hold it too; who merges holds the opposite, `files_replaced`.
    """
    with ExitStack() as locks:
        for table in sorted(tables):
            fcntl.flock(locks.enter_context(_lock(table)), fcntl.LOCK_SH)
        yield


def files_replaced(table: str) -> AbstractContextManager[bool]:
    """Whether this process alone may move a table's files, as long as it holds; nobody is waited for."""
    return _alone(table)


def job_run(job: str) -> AbstractContextManager[bool]:
    """Whether this process alone runs a streaming job on this home, as long as it holds; nobody is waited for."""
    return _alone(f"{job}.job")


def report_run(report: str, date: str) -> AbstractContextManager[bool]:
    """Whether this process alone writes a report's date, as long as it holds; nobody is waited for."""
    return _alone(f"{report}-{date}.report")


@contextmanager
def _alone(name: str) -> Iterator[bool]:
    with _lock(name) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except BlockingIOError:
            is_alone = False
        yield is_alone


@contextmanager
def _lock(name: str) -> Iterator[int]:
    """A file that locks are laid on; a process that dies lets go."""
    folder = home() / "state" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / name, os.O_CREAT | os.O_RDONLY, 0o644)  # for whoever may read the lake
    try:
        yield descriptor
    finally:
        os.close(descriptor)
