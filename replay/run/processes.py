"""A run in several processes, each with its own meters, and its end by a signal."""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier, Event
from typing import Any

import numpy as np

from replay.pace import RunClock
from replay.run.blocks import Game
from replay.run.ledger import Sent
from replay.run.order import Order
from replay.run.sending import Progress, SharedCounts, Standing, play_meters
from replay.sinks import Sink
from schemas.errors import MeterstreamError, RetryLater

LAST_WORDS_S = 1.0  # what a process said before it died is heard by then
ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether somebody asked for the end. A plain flag: a signal may come while a lock is held."""

    is_asked: bool = False


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM let the block at hand go out; a second one ends at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def end(number: int, _: Any) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.is_asked = True

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share(
    order: Order, meters: int, open_sink: Callable[[], Sink], stop: Stop, on_progress: Progress
) -> tuple[list[Sent], MeterstreamError | None]:
    """Plays in several processes, each its own meters.

    Returns:
        What each has sent, by the number of its first meter, and what ended the run before its time.
    """
    context = multiprocessing.get_context("spawn")
    edges = np.linspace(0, meters, order.processes + 1).astype(int).tolist()
    reports: Any = context.Queue()
    barrier, is_stopped = context.Barrier(order.processes), context.Event()
    counts = context.Array("q", order.processes, lock=False)
    workers = [
        context.Process(target=_work, args=(order, number, low, high, open_sink, is_stopped, barrier, counts, reports))
        for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]
    # they inherit this for life: Ctrl-C goes to all of a terminal's processes, and the parent says when to stop
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    for worker in workers:
        worker.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    parts: dict[int, Sent] = {}
    failure: MeterstreamError | None = None
    done = dict.fromkeys(range(order.processes), Standing(0, 0.0, 0.0, 0.0))
    died: dict[int, float] = {}
    try:
        while len(parts) < order.processes:
            if stop.is_asked:
                is_stopped.set()
            for number, worker in enumerate(workers):
                if number in parts or worker.is_alive():
                    continue
                if time.monotonic() - died.setdefault(number, time.monotonic()) > LAST_WORDS_S:
                    parts[number] = Sent.nothing(edges[number], edges[number + 1])  # what it had sent is not known
                    failure = failure or RetryLater(f"process {number + 1} of {order.processes} of the run died")
                    is_stopped.set()
                    barrier.abort()
            try:
                number, report = reports.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(report, Sent):
                parts[number] = report
            elif isinstance(report, MeterstreamError):
                failure = failure or report
                is_stopped.set()
                barrier.abort()
            else:
                done[number] = report
                on_progress(_together(list(done.values())))
        for worker in workers:
            worker.join()
    finally:  # on a second Ctrl-C they end at once
        for worker in workers:
            worker.kill()
    return [parts[number] for number in sorted(parts)], failure


def _together(standings: list[Standing]) -> Standing:
    """Where a run stands by its processes: the one that is furthest back says how far it has come."""
    return Standing(
        sum(each.records for each in standings),
        min(each.share for each in standings),
        max(each.late_s for each in standings),
        max(each.slip_s for each in standings),
    )


def _end_with_parent() -> None:
    """Kills this process when its parent dies: nobody would write the ledger."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _work(
    order: Order,
    number: int,
    low: int,
    high: int,
    open_sink: Callable[[], Sink],
    is_stopped: Event,
    barrier: Barrier,
    counts: SharedCounts,
    reports: Any,
) -> None:
    """One of several processes of a run; it ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    shown = 0.0

    def on_progress(standing: Standing) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            reports.put((number, standing))

    def meet() -> None:
        if order.speed is None or order.is_steady:
            barrier.wait()

    try:
        crew = order.fleet()
        game = Game(order, crew, order.faults(crew), RunClock(order.speed, order.is_steady), is_stopped.is_set)
        open_way = order.open_way if number == 0 else lambda: None
        sent, failure = play_meters(
            game, low, high, open_sink, on_progress, meet, counts, number, barrier.wait, open_way
        )  # fmt: skip
    except MeterstreamError as error:
        sent, failure = Sent.nothing(low, high), error
    except threading.BrokenBarrierError:  # another one ended before the run began, and says why
        sent, failure = Sent.nothing(low, high), None
    sent.cpu_s = time.process_time()
    if failure:
        reports.put((number, failure))
    elif is_stopped.is_set():
        barrier.abort()
    reports.put((number, sent))
