"""Hours of readings at half of what the jobs can take: does memory or batch time grow, does the lag? `make bench-soak`.

Kafka and the streaming driver as `make up` starts them, in a folder of their own. First readings are sent flat out, and
the time until no job lags any more gives the sustained rate; then half of that for hours. What the driver tells of
itself, and the memory of its processes, are looked at every so often; slopes are of a straight line through them, the
first tenth left out. The looks come at random moments: in step with the jobs' trigger they would all see the same part
of a batch, and what they slip by would look like a slope. Then the driver is started again and looked at a while
longer: what stays as it was at the end has not grown in the process; where the replay, which does the same each second,
needs more of a core as well, the machine has become slower. Timing decides no exit code.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import polars as pl
import psutil
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.loads import FAILED, ROOT, SETTLED_S, STEP_S, lag, metrics, played, playing, tape, wait_for_no_lag
from schemas.errors import RetryLater, exits
from stack.demo import SEED
from stack.isolated import environment, own_settings
from stack.jobs import JobMetrics
from stack.native import NativeStack

OPEN = ("--pace", "open")
FLAT_OUT_STEPS = 72  # readings of each meter by which the rate is found
RESTARTED = 1 / 12  # of the time, after a restart at its end; the first third of it is not looked at
KEPT = re.compile(r"Pause .*->(\d+)M\(")  # the JVM's words on a garbage collection
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
progress = Console(stderr=True, highlight=False)


def sustained(stack: NativeStack, meters: int) -> float:
    """Readings a second that all jobs together take, by a load that is sent at once.

    Raises:
        RetryLater: the replay failed, or the jobs do not come to the end.
    """
    played(meters, "kafka", "--meter-prefix", "w", *OPEN, "--duration", "10m", "--speed", "max")  # to wake the jobs
    wait_for_no_lag(stack)
    length = f"{FLAT_OUT_STEPS * STEP_S}s"
    played(meters, "kafka", "--meter-prefix", "f", *OPEN, "--duration", length, "--speed", "max")
    before, began = {job.job: job.records for job in metrics(stack)}, time.monotonic()
    wait_for_no_lag(stack)
    took = [job.records - before.get(job.job, 0) for job in metrics(stack) if job.job != "alarms"]
    return min(took) / (time.monotonic() - began)


def _tree(pid: int | None) -> list[psutil.Process]:
    """A process and those that it started, where they are alive."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [] if pid is None else [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def memory_mb(pid: int | None) -> dict[str, float]:
    """Memory of a process's tree, by what a process is; of what several share each has its part (PSS)."""
    sums = {"java": 0.0, "python": 0.0}
    for each in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            sums["java" if each.name() == "java" else "python"] += each.memory_full_info().pss / 1e6
    return sums


def kept_mb(log: Path) -> float | None:
    """What the JVM kept at its last garbage collection; None before the first."""
    found = KEPT.findall(log.read_text()) if log.exists() else []
    return float(found[-1]) * 1.048576 if found else None


def busy_s(pid: int | None) -> float:
    """CPU seconds that a process's tree has used."""
    total = 0.0
    for each in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:2])
    return total


def slope_an_hour(at_s: pl.Series, values: pl.Series) -> tuple[float, float]:
    """Rise an hour of the line through the samples, the first tenth left out, and its standard error.

    The error is that of samples that do not depend on each other; both are not a number where there are too few.
    """
    known = pl.DataFrame({"at_s": at_s, "value": values}).drop_nulls().cast(pl.Float64)
    known = known.tail(len(known) - len(known) // 10)
    if len(known) < 3:
        return float("nan"), float("nan")
    (rise, _), covariance = np.polyfit(known["at_s"].to_numpy() / 3600, known["value"].to_numpy(), 1, cov=True)
    return float(rise), float(covariance[0, 0] ** 0.5)


def sample(stack: NativeStack, found: list[JobMetrics], at_s: float) -> list[dict[str, float | str | None]]:
    """What there is to see now, with what the jobs have told: rows of (at_s, part, what, value)."""
    seen: dict[tuple[str, str], float | None] = {}
    for job in found:
        seen[job.job, "lag, records"] = job.lag_records
        seen[job.job, "batch, s"] = job.batch_seconds
        seen[job.job, "state, rows"] = job.state_rows
        seen[job.job, "records"] = job.records
    for kind, megabytes in memory_mb(stack.pid("streaming")).items():
        seen["driver", f"{kind}, MB"] = megabytes
    seen["driver", "heap kept, MB"] = kept_mb(stack.log_file("gc"))
    seen["machine", "load"] = os.getloadavg()[0]  # what else it has to do shows in every other figure
    lake = list((stack.home / "lake").rglob("*.parquet"))
    seen["lake", "files"] = len(lake)
    return [{"at_s": at_s, "part": part, "what": what, "value": value} for (part, what), value in seen.items()]


def looks(stack: NativeStack, replay: subprocess.Popen[bytes], seconds: float, every_s: float) -> list[dict[str, Any]]:
    """Samples of so many seconds, and the cores that each process used between them.

    Raises:
        RetryLater: the replay failed.
    """
    rows: list[dict[str, Any]] = []
    moments = random.Random(SEED)
    trees = {"driver": stack.pid("streaming"), "kafka": stack.pid("kafka"), "replay": replay.pid}
    began = before = time.monotonic()
    busy = {part: busy_s(pid) for part, pid in trees.items()}
    while (left := began + seconds - time.monotonic()) > 0:
        time.sleep(min(moments.uniform(0.5, 1.5) * every_s, left))
        now, found = time.monotonic(), metrics(stack)
        rows += sample(stack, found, now - began)
        used = {part: busy_s(pid) for part, pid in trees.items()}
        rows += [
            {"at_s": now - began, "part": part, "what": "cores", "value": (used[part] - busy[part]) / (now - before)}
            for part in trees
        ]
        before, busy = now, used
        behind = lag(found)
        progress.print(f"{(now - began) / 60:5.1f} min, lag {'?' if behind is None else f'{behind:,}'}")
        if replay.poll():
            raise RetryLater(FAILED)
    return rows


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"at_s": pl.Float64, "part": pl.String, "what": pl.String, "value": pl.Float64})


def _mean(values: pl.Series) -> float | None:
    known = values.drop_nulls().to_list()
    return fmean(known) if known else None


def show(samples: pl.DataFrame, restarted: pl.DataFrame, rate: float, sent: float) -> None:
    """One line per figure: where it began, where it ended, after the restart, the most, and how it rose."""
    hours = samples.select(pl.max("at_s")).item() / 3600
    title = f"{hours:.2f} h at {sent:,.0f} readings/s, sustained {rate:,.0f}/s"
    table = Table(box=box.SIMPLE, title=title)
    for column in ("part", "figure", "first tenth", "last tenth", "restarted", "most", "rise an hour"):
        table.add_column(column, justify="left" if column in ("part", "figure") else "right")
    for (part, what), rows in samples.group_by("part", "what", maintain_order=True):
        values, tenth = rows["value"].drop_nulls(), max(1, len(rows) // 10)
        if values.is_empty():
            continue
        again = restarted.filter(pl.col("part") == part, pl.col("what") == what)["value"]
        figures = [
            _mean(values.head(tenth)),
            _mean(values.tail(tenth)),
            _mean(again.tail(len(again) * 2 // 3)),
            max(values.to_list()),
        ]
        rise, error = slope_an_hour(rows["at_s"], rows["value"])
        cells = ["" if figure is None else f"{figure:,.2f}" for figure in figures]
        table.add_row(str(part), str(what), *cells, f"{rise:+,.2f} ± {error:,.2f}")
    console.print(table)


def main(
    hours: Annotated[float, typer.Option(help="How long.", min=0.01)] = 2.0,
    meters: Annotated[int, typer.Option(help="How many.", min=10)] = 20_000,
    share: Annotated[float, typer.Option(help="Of the sustained rate.", min=0.01, max=1)] = 0.5,
    every_s: Annotated[float, typer.Option(help="Seconds between looks, in the mean.", min=1)] = 30.0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave data and samples, under data/tmp.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Soak test of the streaming jobs: make bench-soak; make bench-soak ARGS="--hours 0.2 --meters 1000"."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what it started ends with it
    with exits():
        tape()
        (ROOT / "data" / "tmp").mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="soak-", dir=ROOT / "data" / "tmp"))
        stack = NativeStack(own_settings(folder), on_progress=lambda line: progress.print(f"  {line}"))
        os.environ |= {**environment(stack.settings), "SPARK_SUBMIT_OPTS": f"-Xlog:gc:file={stack.log_file('gc')}"}
        rows: list[dict[str, Any]] = []
        try:
            stack.start(["kafka", "streaming"])
            rate = sustained(stack, meters)
            sent = rate * share
            speed, seconds = sent * STEP_S / meters, hours * 3600
            progress.print(f"sustained {rate:,.0f} readings/s; {hours:g} h at {sent:,.0f}/s, speed {speed:,.1f}")
            length = f"{(seconds * (1 + RESTARTED) + SETTLED_S) * speed:.0f}s"
            how = ("--meter-prefix", "s", *OPEN, "--speed", f"{speed:.3f}", "--duration", length, "--loop")
            with playing(meters, "kafka", *how) as replay:
                rows = looks(stack, replay, seconds, every_s)
                stack.restart("streaming")
                restarted = looks(stack, replay, seconds * RESTARTED, every_s)
        finally:
            stack.stop()
            if keep and rows:
                _frame(rows).write_csv(folder / "samples.csv")
                progress.print(f"kept in {folder}")
            elif not keep:
                shutil.rmtree(folder, ignore_errors=True)
        show(_frame(rows), _frame(restarted), rate, sent)
        if as_json:
            result = {"sustained_per_s": rate, "sent_per_s": sent, "samples": rows, "restarted": restarted}
            sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
