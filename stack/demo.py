"""The whole chain, once, for real, and the proof that nothing was lost: `make demo`.

logs → replay → MQTT → bridge → Kafka → Spark streaming jobs → lake → nightly batch → Parquet reports, in a stack and a
data folder of its own: native processes, or containers, on this machine's Spark or on a cluster.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from lake.queries import accounting_lines, compared_energy
from lake.reading import Lake
from lake.reports import glob_of
from lake.store import store
from metering.clocks import busiest_day
from replay.__main__ import new_run_id, played, simulated, speed_of
from replay.dirt.entries import read_dirt
from replay.importers import formats, import_log
from replay.run.ledger import Ledger, run_folder
from replay.run.order import Order
from replay.simulate import VERSION
from replay.tape import read_tape
from replay.verify import verify
from replay.verify.verdict import rendered
from schemas.errors import ConfigError, RetryLater, exits
from settings import OWN_STORE, home
from stack import proof
from stack.backlog import left_on_the_way
from stack.containers import ContainerStack
from stack.demo_communities import take_communities
from stack.isolated import Stack, drain, environment, own_settings
from stack.jobs import jobs, metrics_text
from stack.native import NativeStack
from stack.parts import S3
from stack.settings import ROOT, StackSettings, store_of

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
SEED = 1
DAY = date(2016, 6, 15)
GRID_TAPE = ROOT / "data" / "cache" / f"simbench-{DAY}-v{VERSION}"
BAD_INPUT = Path("config") / "demo-dirt.yml"
IN_IMAGE = Path("/opt/meterstream")
STALLED_S = 300.0  # a bridge that is killed on a slow machine carries again long before
LOOK_S = 0.5
NAMED = 10  # of what does not hold


def main(
    meters: Annotated[int, typer.Option(help="How many meters the simulated grid has.", min=1)] = 1_000,
    log: Annotated[
        Path | None, typer.Option(help="Play a log of your own instead.", exists=True, dir_okay=False)
    ] = None,
    format: Annotated[str | None, typer.Option(help="Its format: one of `replay formats`.")] = None,
    timezone: Annotated[str | None, typer.Option(help="Of the log's local stamps, if not the format's.")] = None,
    speed: Annotated[str, typer.Option(help="600: an hour in six seconds; max: flat out.")] = "720",
    folder: Annotated[Path, typer.Option(help="Emptied at the start, kept at the end.")] = ROOT / "data" / "demo",
    mode: Annotated[str, typer.Option(help="native: processes; docker: containers.")] = "native",
    cluster: Annotated[bool, typer.Option(help="Spark's jobs on a master and two workers.")] = False,
    store: Annotated[
        str, typer.Option(help="home, s3 (an S3 server of the stack's own) or an empty store's URL.")
    ] = "home",
) -> None:
    """Runs the whole chain on a day of a simulated low-voltage grid, or on a log of your own, and proves the result.

    Examples: make demo; make demo METERS=100; make demo LOG=meter.txt FORMAT=dsmr; make demo STORE=s3;
    make demo MODE=docker CLUSTER=1
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup: it goes on
        signal.signal(signal.SIGHUP, _interrupted)
    with exits():
        if log and not format:
            msg = f"a log needs its FORMAT: one of {', '.join(formats())}"
            raise ConfigError(msg)
        if mode not in ("native", "docker"):
            msg = f"MODE is native or docker, not {mode}"
            raise ConfigError(msg)
        if not _demo(meters, log, format, timezone, speed, folder.resolve(), mode == "docker", cluster, store):
            raise SystemExit(1)


def _interrupted(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _demo(
    meters: int,
    log: Path | None,
    format: str | None,
    timezone: str | None,
    speed: str,
    folder: Path,
    in_containers: bool,
    cluster: bool,
    asked: str,
) -> bool:
    began = time.monotonic()
    settings = own_settings(folder, store_of(asked, in_containers))
    os.environ |= environment(settings)
    if settings.store and not settings.has_own_store and (taken := store().folders("state") + store().folders("lake")):
        msg = f"{settings.store} has {', '.join(taken[:3])} already: a demo takes an empty store, or STORE=s3"
        raise ConfigError(msg)

    def on_progress(line: str) -> None:
        console.print(f"  {line}")

    stack: Stack
    if in_containers:
        settings = settings.model_copy(update={"project": f"{settings.project}-demo"})
        stack = ContainerStack(settings, on_progress, cluster)
    else:
        stack = NativeStack(settings, on_progress, cluster)
    with _step("Tape"):  # first, so that a log that cannot be read leaves the last demo as it is
        tape_folder = ROOT / "data" / "cache" / "log"
        if log and format:
            tape, _ = import_log(log, format, tape_folder, timezone=timezone)
        else:
            tape_folder = GRID_TAPE
            tape = read_tape(tape_folder) if tape_folder.exists() else simulated(tape_folder, DAY, 300, SEED)
        console.print(f"  {tape.info.rows_out:,} readings of {len(tape.registry)} meters from {tape.info.source}")
    stack.stop()
    _empty(folder)
    if isinstance(stack, ContainerStack):
        stack.clean()
        with _step("Image"):
            stack.build()
    try:
        with _step("Stack: MQTT broker, Kafka, bridge, Spark"):
            stack.start()
            stack.start_supervisor()
        with _step("Replay → MQTT → bridge → Kafka → Spark"):
            ledger = _played(stack, tape_folder, None if log else meters, speed)
            if not ledger.is_whole:
                raise KeyboardInterrupt
            console.print(f"  {ledger.records:,} records sent, {ledger.records_per_s:,.0f}/s{_slipped(ledger)}")
            carry(settings, ledger.records)
            offsets = proof.end_offsets(settings.kafka_bootstrap)
        with _step("Spark takes what is left and closes its windows"):
            drain(stack, lambda: _lag_shown(stack))
        day = busiest_day(tape.readings.column("observed_at"), tape.info.time_zone)
        if isinstance(stack, NativeStack) and not log:
            with _step("Two energy communities come into the registry"):
                members = take_communities(stack.home / "communities", tape.info.time_zone)
                console.print(f"  {members} members, in {stack.home / 'communities'}/*.csv", markup=False)
        with _step(f"Nightly batch of {day}"):
            _nightly(stack, day)
        if settings.has_own_store:
            with _step("Stack stops but for its store"):
                stack.stop()
                stack.start([S3.name])
        return _summary(ledger, offsets, None if log else run_folder(ledger.run_id) / "truth.parquet", began)
    finally:
        with _step("Stack stops"):
            stack.stop()


def _played(stack: Stack, tape: Path, meters: int | None, speed: str) -> Ledger:
    """Plays the tape as a fleet with a few faults, or a log of the user's own as it is."""
    run_id = new_run_id()
    if isinstance(stack, NativeStack):
        if meters is None:
            return played(Order(tape, run_id, "mqtt", own_clock=True))
        dirt = tuple(read_dirt(ROOT / BAD_INPUT))
        return played(Order(tape, run_id, "mqtt", meters, SEED, speed_of(speed), dirt=dirt))
    how = ["--clock", "original", "--speed", "max"]
    if meters is not None:
        how = ["--meters", f"{meters}", "--seed", f"{SEED}", "--speed", speed, "--dirt", str(IN_IMAGE / BAD_INPUT)]
    command = ["run", "--tape", "/tape", "--to", "mqtt", "--run-id", run_id, "--json", *how]
    return Ledger(**json.loads(stack.run("replay", command, {str(tape): "/tape"}).splitlines()[-1]))


def _nightly(stack: Stack, day: date) -> None:
    """The night's reports, where the stack has its lake; then the lake is in the stack's home folder."""
    if isinstance(stack, ContainerStack):
        stack.run("nightly", ["--date", day.isoformat()])
        stack.collect()
        return
    command = [sys.executable, "-m", "batch_jobs", "--date", day.isoformat()]
    if subprocess.run(command, cwd=stack.home / "tmp", check=False).returncode:
        msg = "the nightly batch failed: see above"
        raise RetryLater(msg)


def _empty(folder: Path) -> None:
    """Empties the demo's folder, if it is one."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "run").is_dir():
        msg = f"{folder} is there and is no folder of a demo: name another with --folder"
        raise ConfigError(msg)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run").mkdir(parents=True)  # makes it a demo's, also where this one is cut off before it has data
    (folder / "tmp").mkdir()


@contextlib.contextmanager
def _step(title: str) -> Iterator[None]:
    began = time.monotonic()
    console.print(f"[bold]{title}[/]")
    yield
    console.print(f"  [dim]{time.monotonic() - began:.1f} s[/]")


def _slipped(ledger: Ledger) -> str:
    """What a steady run's clock has waited, where that was worth a word."""
    if not ledger.speed or ledger.slip_s < 1:
        return ""
    return f"; its clock waited {ledger.slip_s:.0f} s for the way: speed {ledger.speed_reached:.0f} of {ledger.speed:g}"


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how much of a long step is done and how long the rest will take; gives what takes (done, total)."""
    columns = (TextColumn(f"  {what}"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=max(total, 1))


def carry(settings: StackSettings, sent: int) -> None:
    """Waits until Kafka has all that was sent, and the MQTT broker nothing more.

    Raises:
        RetryLater: for minutes nothing was carried.
    """
    before, changed_at = (-1, -1), time.monotonic()
    with _bar("the bridge carries what the broker holds") as show:
        while (left := _left(settings, sent, before)) != (0, 0):
            if left != before:
                before, changed_at = left, time.monotonic()
            elif time.monotonic() - changed_at > STALLED_S:
                msg = f"the bridge has not moved for {STALLED_S:.0f} s, with {max(left):,} messages left: see "
                raise RetryLater(msg + str(home() / "logs"))
            show(sent - max(left), sent)
            time.sleep(0.25)


def _left(settings: StackSettings, sent: int, before: tuple[int, int]) -> tuple[int, int]:
    """What is left, or what was before, while one of the two that know is being started again."""
    try:
        return left_on_the_way(settings, sent)
    except RetryLater:
        return before


@contextlib.contextmanager
def _lag_shown(stack: Stack) -> Iterator[None]:
    """Shows how much Kafka still has for the jobs, where somebody looks."""
    if not console.is_terminal:
        yield
        return
    ended = threading.Event()

    def look() -> None:
        most = 0
        while not ended.wait(LOOK_S):
            lag = sum(job.lag_records or 0 for job in jobs(metrics_text(stack.settings.metrics_port) or ""))
            most = max(most, lag)
            show(most - lag, most)

    with _bar("Spark takes what Kafka has") as show:
        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()


def _summary(ledger: Ledger, offsets: dict[str, int], truth: Path | None, began: float) -> bool:
    lake = Lake().duckdb()
    lines = accounting_lines(lake)
    refused = lake.execute(
        """SELECT 'dead letter' AS place, reason, count(*) FROM dead_letters GROUP BY ALL
        UNION ALL SELECT 'quarantine of ' || count(DISTINCT stage) || ' jobs', reason,
            count(DISTINCT (topic, partition, "offset")) FROM (
                SELECT stage, reason, topic, partition, "offset" FROM quarantined_readings UNION ALL
                SELECT stage, reason, topic, partition, "offset" FROM quarantined_events) GROUP BY reason
        ORDER BY ALL"""
    ).fetchall()
    stored = next((line.stored for line in lines if line.stage == "readings_lake"), 0)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Meters", f"{ledger.meters:,}")
    facts.add_row(
        "Records sent", f"{ledger.records:,} in {ledger.seconds:.0f} s, {ledger.records_per_s:,.0f}/s over MQTT"
    )
    facts.add_row("In the lake", f"{stored:,} ({ledger.readings:,} readings and {ledger.events:,} events were sent)")
    if ledger.faults:
        facts.add_row("Bad on purpose", ", ".join(f"{kind} × {count}" for kind, count in ledger.faults.items()))
    for place, reason, count in refused:
        facts.add_row("  ended as", f"{place}: {reason} × {count}")
    if truth:
        tape_wh, delta_wh, _ = compared_energy(lake, str(truth))
        sign = "=" if tape_wh == delta_wh else "≠"
        facts.add_row("Energy", f"{tape_wh:,} Wh on the tape {sign} {delta_wh:,} Wh in the deltas")
    else:
        steps = lake.execute(
            "SELECT reason, count(*), sum(delta_wh) FROM consumption_deltas GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        for reason, count, wh in steps:
            energy = f", {wh:,} Wh" if wh is not None else ""
            facts.add_row("Steps", f"{reason}: {count:,}{energy}")
    for meter_id, phase, mv, pct, at in lake.execute(
        """SELECT meter_id, phase, mean_mv, deviation_pct, window_start FROM voltage_windows
        ORDER BY abs(deviation_pct) DESC, meter_id, phase, window_start LIMIT 3"""
    ).fetchall():
        facts.add_row("Worst voltage", f"{meter_id} {phase}: {mv / 1000:.1f} V ({pct:+.1f} %) at {at:%Y-%m-%d %H:%M}Z")
    alarms = lake.execute(
        """WITH newest AS (SELECT * FROM alarms QUALIFY row_number() OVER (
            PARTITION BY alarm_id ORDER BY cleared_at IS NULL, repeat_count DESC, updated_at DESC) = 1)
        SELECT alarm_type, severity, count(*), count(*) FILTER (state = 'active') FROM newest
        GROUP BY ALL ORDER BY 3 DESC, alarm_type"""
    ).fetchall()
    for kind, severity, count, active in alarms:
        facts.add_row("Alarms", f"{kind} ({severity}): {count:,}, still active {active:,}")
    console.print(Panel(facts, title=f"Run {ledger.run_id}", expand=False))
    console.print(f"Tables   {store().uri('lake')}")
    console.print(f"Reports  {store().uri('reports')}")
    columns, report = "meter_id, date, import_wh, export_wh, readings, quality", "daily_consumption_v1"
    if store().is_local:
        sql = f"SELECT {columns} FROM '{glob_of(report)}' LIMIT 5"
        line = f'.venv/bin/python -c "import duckdb; duckdb.sql(\\"{sql}\\").show()"'
    else:
        start = f"METERSTREAM_HOME={home()} .venv/bin/stack up s3; " if store().url == OWN_STORE else ""
        line = f'{start}METERSTREAM_HOME={home()} .venv/bin/stack sql "SELECT {columns} FROM {report} LIMIT 5"'
    console.print(f"Open one {line}", soft_wrap=True)
    found = proof.problems(lake, offsets, ledger.records, truth)
    with console.status("replay verify: every record, window, alarm and fault"):
        verdict = verify(ledger.run_id)
    console.print(f"[bold]replay verify --run {ledger.run_id}[/]")
    for part in rendered(verdict, NAMED):
        console.print(part)
    for problem in found:
        console.print(f"[red]✗[/] {problem}")
    console.print(f"[dim]{time.monotonic() - began:.0f} s in all[/]")
    return verdict.is_balanced and not found


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
