"""Command line of the replay."""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as AnyProgress
from rich.table import Table

from replay.dirt.entries import read_dirt, seconds
from replay.fleet import PREFIX
from replay.importers import formats, import_log
from replay.pace import Pace, answers
from replay.run import play
from replay.run.ledger import Ledger
from replay.run.order import Order
from replay.run.sending import Standing
from replay.simulate import DEFAULT_GRID
from replay.simulate import simulate as build_simulation
from replay.sinks import KafkaSink, MqttSink, NullSink, Sink
from replay.statistics import NARROWEST, TARGETS, Statistics, comparisons, statistics
from replay.tape import Tape, has_tape, read_tape
from schemas.errors import ConfigError, RetryLater, exits
from settings import PREFIX as VARIABLE
from settings import Settings, contradictions, home, load

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode="markdown")
SAY_EVERY_S = 30  # where no terminal shows a bar
UNWRAPPED = 10_000  # columns: where no terminal sets a width, tables and lines have the width that they need
console, problems = (
    Console(stderr=is_stderr, width=None if stream.isatty() else UNWRAPPED, soft_wrap=not stream.isatty())
    for is_stderr, stream in ((False, sys.stdout), (True, sys.stderr))
)
Progress = partial(AnyProgress, disable=not sys.stderr.isatty())


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, where somebody looks; gives a function that shows the next step."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with problems.status(what) as status:
        yield status.update


@app.command("formats")
def list_formats() -> None:
    """Lists the log formats that `replay import` reads."""
    table = Table("format", "time zone", "what it is", box=None)
    for name, module in formats().items():
        table.add_row(name, module.ZONE, (module.__doc__ or "").strip().splitlines()[0])
    console.print(table)
    console.print("time zone: of the homes and of stamps without an offset; import --timezone names another")


@app.command("import")
def import_command(
    logs: Annotated[list[Path], typer.Argument(help="Logs, plain or .gz, or folders of them.", exists=True)],
    format: Annotated[str, typer.Option(help="One of `replay formats`.")],
    to: Annotated[Path, typer.Option(help="Folder of the tape; a tape that is there is replaced.")],
    meter_id: Annotated[str | None, typer.Option(help="Of a log that names no meter, if not the file's name.")] = None,
    timezone: Annotated[str | None, typer.Option(help="Of local stamps, if not the format's usual one.")] = None,
    first_at: Annotated[datetime | None, typer.Option(help="Begin, UTC, of a log whose records have no clock.")] = None,
    ignore_crc: Annotated[bool, typer.Option(help="Take telegrams whose CRC is wrong or absent.")] = False,
    keep_going: Annotated[bool, typer.Option(help="Count damaged records, name the first, and go on.")] = False,
    fuse: Annotated[str | None, typer.Option(help="A of each phase, if the log does not say; or: unlimited.")] = None,
) -> None:
    """Turns logs into a tape.

    For example one log, or a folder of them with what is damaged left out:

    replay import meter.txt --format dsmr --fuse 35 --to data/tapes/meter

    replay import telegrams/ --format dsmr --first-at 2024-01-01T00:00:00 --keep-going --to data/tapes/telegrams
    """
    with exits():
        begin = first_at and first_at.replace(tzinfo=UTC)
        is_there = has_tape(to)
        with working("reading"):
            tape, refused = import_log(
                logs, format, to, meter_id=meter_id, timezone=timezone, keep_going=keep_going, first_at=begin,
                ignore_crc=ignore_crc, fuse=fuse,
            )  # fmt: skip
        _summarise(tape, to, is_there)
        for line in refused:
            problems.print(f"  left out {line}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def simulate(
    to: Annotated[Path, typer.Option(help="Folder of the tape; a tape that is there is replaced.")],
    grid: Annotated[str, typer.Option(help="A low-voltage grid of SimBench; a wrong one lists them.")] = DEFAULT_GRID,
    profiles: Annotated[str, typer.Option(help="simbench: a grid; demandlib: homes without a grid.")] = "simbench",
    meters: Annotated[
        int | None, typer.Option(help="How many homes, for demandlib (50 if absent); a grid has its own number.", min=1)
    ] = None,
    day: Annotated[
        datetime, typer.Option(formats=["%Y-%m-%d"], help="The first one: 2016-01-01 to 2016-12-30.")
    ] = datetime(2016, 6, 15),  # noqa: DTZ001
    days: Annotated[int, typer.Option(help="How many.", min=1)] = 1,
    step_s: Annotated[int, typer.Option(help="Seconds between two readings: 1, 10, 60, 900, any part of 3600.")] = 300,
    tap: Annotated[
        list[str] | None,
        typer.Option(
            help="HH:MM=STEPS: from then on, each day, the transformer stands so many steps above the grid's own "
            "position (up is a higher voltage); YYYY-MM-DDTHH:MM=STEPS for one day. Repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.", min=0)] = 1,
) -> None:
    """Builds the tape of days of a real kind of low-voltage grid, with the truth beside it: see docs/simulation.md.

    For example the default grid, a week of another at one reading a minute, a change of the tap, homes without a grid:

    replay simulate --to data/tapes/grid

    replay simulate --to data/tapes/urban --grid 1-LV-urban6--2-sw --day 2016-01-11 --days 7 --step-s 60

    replay simulate --to data/tapes/cvr --step-s 60 --tap 10:00=-1 --tap 14:00=0

    replay simulate --to data/tapes/homes --profiles demandlib --meters 50 --step-s 10
    """
    with exits():
        if profiles not in ("simbench", "demandlib"):
            msg = f"--profiles is simbench or demandlib, not {profiles}"
            raise ConfigError(msg)
        if profiles == "simbench" and meters is not None:
            msg = (
                "--meters is for --profiles demandlib: a grid has its own number of homes, and run --meters plays more"
            )
            raise ConfigError(msg)
        homes = meters or 50 if profiles == "demandlib" else None
        is_there = has_tape(to)
        tape = simulated(to, day.date(), step_s, seed, days=days, grid=grid, homes=homes, taps=_taps(tap or []))
        _summarise(tape, to, is_there)


def _taps(wishes: list[str]) -> dict[str, int]:
    taps = {}
    for wish in wishes:
        moment, _, steps = wish.partition("=")
        try:
            taps[moment] = int(steps)
        except ValueError as error:
            msg = f"--tap is HH:MM=STEPS, for example 10:00=-1, not {wish}"
            raise ConfigError(msg) from error
    return taps


def simulated(
    folder: Path,
    day: date,
    step_s: int,
    seed: int,
    *,
    days: int = 1,
    grid: str = DEFAULT_GRID,
    homes: int | None = None,
    taps: Mapping[str, int] | None = None,
) -> Tape:
    """The simulated days, with progress."""
    with Progress(TextColumn("power flow"), BarColumn(), TimeElapsedColumn(), console=problems) as bar:
        task = bar.add_task("", total=None)
        return build_simulation(
            folder, day=day, days=days, grid=grid, homes=homes, step_s=step_s, seed=seed, taps=taps,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip


@app.command()
def inspect(
    tapes: Annotated[list[Path], typer.Argument(help="Folders of tapes.", metavar="TAPE...")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, by tape.")] = False,
) -> None:
    """Shows what tapes are like, side by side, and where they are unlike real homes.

    Example: replay inspect data/tapes/grid data/tapes/home
    """
    with exits():
        found: dict[str, Statistics] = {}
        with working("") as step:
            for tape in tapes:
                step(f"reads {tape}")
                name = tape.resolve().name
                found[name if name not in found else str(tape)] = statistics(read_tape(tape))
        if as_json:
            figures = {name: asdict(one) for name, one in found.items()}
            sys.stdout.write(json.dumps(figures | {"targets": TARGETS}) + "\n")
            return
        for table in comparisons(found, console.width):  # one too wide for the terminal goes on in its next line
            console.print(table, width=max(console.width, NARROWEST), crop=False)
        console.print("Median over the meters (10th … 90th percentile). ✗: outside the range of docs/simulation.md.")


def _summarise(tape: Tape, folder: Path, was_there: bool) -> None:
    info = tape.info
    if was_there:
        console.print(f"replaced the tape that was in {folder}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{info.rows_out:,} readings, {len(tape.registry):,} meter{'' if len(tape.registry) == 1 else 's'}, "
        f"{info.first_at} to {info.last_at}, from {info.rows_in:,} rows of {info.source}",
        highlight=False,
        soft_wrap=True,
    )
    for name, count in info.defects.items():
        console.print(f"  {name}: {count:,}", highlight=False)


@app.command()
def run(
    tape: Annotated[Path, typer.Option(help="Folder of the tape.")],
    to: Annotated[str, typer.Option(help="mqtt, kafka or null (everything but the sending).")] = "mqtt",
    meters: Annotated[int | None, typer.Option(help="How many; the tape's own number if absent.", min=1)] = None,
    speed: Annotated[str, typer.Option(help="600: an hour in six seconds; max: flat out.")] = "1",
    seed: Annotated[int, typer.Option(help="The same seed gives the same fleet and the same faults.", min=0)] = 1,
    start: Annotated[datetime | None, typer.Option(help="Begin of the run's clock, UTC, if not the tape's.")] = None,
    duration: Annotated[
        str | None, typer.Option(help="How much of the log each meter plays: 90s, 40m, 6h, 7d.")
    ] = None,
    loop: Annotated[
        bool, typer.Option(help="Begin the log again after its whole weeks, or days, until --duration is over.")
    ] = False,
    burst: Annotated[bool, typer.Option(help="All meters report at the same moment.")] = False,
    processes: Annotated[int, typer.Option(help="How many share the meters.", min=1)] = 1,
    connections: Annotated[int, typer.Option(help="MQTT connections of each process.", min=1)] = 1,
    dirt: Annotated[Path | None, typer.Option(help="Faults to inject: a YAML file, see docs/replay.md.")] = None,
    pace: Annotated[
        Pace,
        typer.Option(
            help="steady: the run's clock waits for a way that is slower; open: it does not, and the ledger says how "
            "late each record was (load tests)."
        ),
    ] = Pace.STEADY,
    clock: Annotated[str, typer.Option(help="run: a fleet on one clock; original: the log as it is.")] = "run",
    run_id: Annotated[str | None, typer.Option(help="A name for the run; made up if absent.")] = None,
    meter_prefix: Annotated[str, typer.Option(help="Of the meters' ids: m gives m0000001, m0000002 …")] = PREFIX,
    again: Annotated[
        bool, typer.Option(help="Add to what this data folder has of the same meters already; verify tells less then.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Plays a tape as the stream of N meters.

    Ctrl-C ends it early with a ledger that is right; `replay verify --run RUN_ID` then compares it with the lake.

    For example in real time × 600, or a million meters flat out, or with one of every kind of fault:

    replay run --tape data/tapes/grid --meters 1000 --speed 600 --to mqtt

    replay run --tape data/tapes/grid --meters 1000000 --duration 10m --speed max --to kafka --processes 2 --json

    replay run --tape data/tapes/grid --meters 1000 --speed max --to kafka --dirt config/dirt.yml --run-id dirty
    """
    with exits():
        order = Order(
            tape=tape, run_id=run_id or new_run_id(), to=to, meters=meters, seed=seed, speed=speed_of(speed),
            start=start and start.replace(tzinfo=UTC), own_clock=_is_original(clock), duration=_duration(duration),
            loop=loop, burst=burst, processes=processes, dirt=tuple(read_dirt(dirt)) if dirt else (),
            prefix=meter_prefix, again=again, pace=pace,
        )  # fmt: skip
        ledger = played(order, connections)
        if as_json:
            sys.stdout.write(json.dumps(asdict(ledger)) + "\n")
        else:
            for line in _lines(ledger, processes):
                console.print(line, highlight=False, soft_wrap=True)
        if not ledger.is_whole:
            raise SystemExit(130)


def _lines(ledger: Ledger, processes: int) -> Iterator[str]:
    """What a run came to, for people."""
    yield (
        f"run {ledger.run_id}: {ledger.records:,} records of {ledger.meters:,} meters in {ledger.seconds:.1f} s, "
        f"{ledger.records_per_s:,.0f}/s, {ledger.cpu_s:.1f} s of CPU"
    )
    if ledger.speed:
        yield (
            f"  late by {ledger.late_mean_s} s on average, 99 % within {ledger.late_p99_s} s, {ledger.late_max_s} s "
            "at most"
        )
    if ledger.speed and ledger.slip_s:
        waited = [f"{what} {waited_s} s" for what, waited_s in ledger.waited_s.items() if waited_s >= 0.1]
        yield (
            f"  its clock waited {ledger.slip_s} s for the way ({', '.join(waited) or 'for the replay itself'}): speed "
            f"{ledger.speed_reached:,.0f} instead of {ledger.speed:,.0f}"
        )
    if ledger.faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ledger.faults.items())
        yield f"  {sum(ledger.faults.values()):,} faults: {kinds}"
    yield f"  digest {ledger.digest}"
    if ledger.processes < processes:
        yield "  by one process: the tape is too sparse to share"
    if not ledger.is_whole:
        yield "  stopped before its end"


@app.command("verify")
def verify_command(
    run: Annotated[str, typer.Option("--run", help="The run's id: a folder under runs/.")],
    first: Annotated[int, typer.Option(help="How many of what does not hold are named.", min=1)] = 10,
    wait: Annotated[float, typer.Option(help="Seconds to wait, at most, until bridge and jobs have all.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compares what a run sent with what lake and dead letters hold, record by record, and explains every fault.

    It ends with precision and recall per reason and alarm type. Run it when the jobs have taken everything and closed
    their windows: after `make down FLUSH=1`. Exit 0: nothing is left to explain; 1: the accounting does not balance, a
    fault is unexplained, or a precision or recall is below 0.99; 2: no such run, or no lake. Per meter: verify.parquet
    beside the run's ledger.

    Example: replay verify --run dirty
    """
    from replay.verify import unfinished, verify  # DuckDB, which the processes of a run do without
    from replay.verify.verdict import rendered

    with exits():
        end = time.monotonic() + wait
        with working("") as step:
            while (left := end - time.monotonic()) > 0 and (behind := unfinished(run)):
                step(f"waits: {behind[0]}")
                time.sleep(min(2, left))
            verdict = verify(run, lambda what: step(f"verify: {what}"))
        if as_json:
            sys.stdout.write(json.dumps(verdict.as_json(first)) + "\n")
        else:
            for part in rendered(verdict, first):
                console.print(part, highlight=False, soft_wrap=isinstance(part, str))
        if not verdict.is_balanced:
            raise SystemExit(1)


@app.command("record")
def record_command(
    to: Annotated[Path, typer.Option(help="Folder of the tape; one that is there is replaced.")],
    run: Annotated[str | None, typer.Option("--run", help="Only the records of this run.")] = None,
    begin: Annotated[datetime | None, typer.Option("--from", help="Only what Kafka took from then on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only what Kafka took before, UTC.")] = None,
    bootstrap: Annotated[
        str | None, typer.Option(help="host:port of a Kafka broker, if not METERSTREAM_KAFKA_BOOTSTRAP or the stack's.")
    ] = None,
) -> None:
    """Writes a tape of the readings and events that Kafka has at this moment, as they came.

    Late, reordered and redelivered records stay, so that an incident can be played again as it was.

    Example: replay record --to data/tapes/incident --from 2026-03-01T06:00:00 --until 2026-03-01T09:00:00

    then: replay run --tape data/tapes/incident --clock original --speed max --again
    """
    from replay.record import record, sent_by

    with exits():
        is_there = has_tape(to)
        with Progress(TextColumn("record"), BarColumn(), TimeElapsedColumn(), console=problems) as bar:
            task = bar.add_task("", total=None)
            tape, newest = record(
                to,
                bootstrap or _way().kafka_bootstrap,
                run_id=run,
                begin=begin and begin.replace(tzinfo=UTC),
                until=until and until.replace(tzinfo=UTC),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        _summarise(tape, to, is_there)
        found = len(tape.readings) + len(tape.events)
        sent = None if run is None or begin or until else sent_by(run)
        whole = "" if sent is None else f" of the {sent:,} that run {run} sent"
        console.print(
            f"{found:,} records{whole}, which Kafka took up to {newest:%Y-%m-%d %H:%M:%S} UTC",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        if sent is not None and found < sent:
            msg = (
                f"{sent - found:,} records of run {run} are not in Kafka yet: record again when the bridge has sent all"
            )
            raise RetryLater(msg)


def new_run_id() -> str:
    """A name for a run, by the time of day."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def _is_original(clock: str) -> bool:
    if clock not in ("run", "original"):
        msg = f"--clock is run or original, not {clock}"
        raise ConfigError(msg)
    return clock == "original"


def speed_of(text: str) -> float | None:
    """Run clock per wall clock; None is flat out.

    Raises:
        ConfigError: no number, and not `max`.
    """
    try:
        speed = None if text == "max" else float(text)
    except ValueError as error:
        msg = f"--speed is a number or max, not {text}"
        raise ConfigError(msg) from error
    if speed is not None and not 0 < speed < math.inf:
        msg = f"--speed is more than 0, not {text}"
        raise ConfigError(msg)
    return speed


def _duration(text: str | None) -> timedelta | None:
    try:
        return None if text is None else timedelta(seconds=seconds(text))
    except ValueError as error:
        msg = f"--duration: {error}"
        raise ConfigError(msg) from error


def played(order: Order, connections: int = 1) -> Ledger:
    """Plays a tape, with progress.

    Raises:
        ConfigError: an argument is none that we know.
        RetryLater: the other side does not answer, or did not take all.
    """
    way = _way()
    if order.to == "mqtt" and order.is_steady and answers(way.kafka_bootstrap):
        order = replace(order, way=way.kafka_bootstrap)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[standing]}"), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
    with Progress(TextColumn("replay"), *columns, *left, console=problems) as bar:
        task = bar.add_task("replay", total=1.0, standing="")
        began = time.monotonic()
        said = [began]

        def show(standing: Standing) -> None:
            rate = standing.records / max(time.monotonic() - began, 1e-3)
            late = f", late by {standing.late_s:.1f} s" if standing.late_s > 1 else ""
            slip = f", has waited {standing.slip_s:.0f} s" if standing.slip_s > 1 else ""
            line = f"{standing.records:,} records, {rate:,.0f}/s{late}{slip}"
            bar.update(task, completed=standing.share, standing=line)
            if not problems.is_terminal and time.monotonic() - said[-1] > SAY_EVERY_S:
                said.append(time.monotonic())
                problems.print(f"  {standing.share:.0%}: {line}", soft_wrap=True)

        return play(order, _sink(order.to, way, connections), show)


class WaySettings(Settings):
    """Where a replay's records go; by default to the stack of the home.

    Attributes:
        mqtt_host: MQTT broker.
        mqtt_port: its port.
        kafka_bootstrap: host:port of a Kafka broker.
    """

    mqtt_host: str = "127.0.0.1"
    mqtt_port: int = 1883
    kafka_bootstrap: str = "127.0.0.1:9092"


def _way() -> WaySettings:
    """Where to; says where the environment means another stack than that of the home."""
    for line in contradictions(WaySettings, home()):
        problems.print(f"[yellow]![/] {line}", soft_wrap=True)
    given = {name for name in WaySettings.model_fields if f"{VARIABLE}{name.upper()}" in os.environ}
    if "mqtt_host" not in given:
        return load(WaySettings)
    elsewhere = {"mqtt_port": 1883, "kafka_bootstrap": ""}  # not the home's, behind a broker that is not the home's
    return load(WaySettings, **{name: value for name, value in elsewhere.items() if name not in given})


def _sink(to: str, way: WaySettings, connections: int) -> Callable[[], Sink]:
    match to:
        case "mqtt":
            return partial(MqttSink, way.mqtt_host, way.mqtt_port, connections)
        case "kafka":
            return partial(KafkaSink, way.kafka_bootstrap or "127.0.0.1:9092")
        case "null":
            return NullSink
        case _:
            msg = f"--to is mqtt, kafka or null, not {to}"
            raise ConfigError(msg)


if __name__ == "__main__":
    app()
