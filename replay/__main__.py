"""Command line of the replay."""

import json
import os
import secrets
import sys
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from replay.fleet import fleet
from replay.importers import formats, import_log
from replay.run import Ledger, play
from replay.sinks import KafkaSink, MqttSink, NullSink, Sink
from replay.tape import Tape, read_tape
from schemas.errors import ConfigError, exits

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode="markdown")
console = Console()
problems = Console(stderr=True)


@app.command("formats")
def list_formats() -> None:
    """Lists the log formats that `replay import` reads."""
    table = Table("format", "what it is", box=None)
    for name, module in formats().items():
        table.add_row(name, (module.__doc__ or "").strip().splitlines()[0])
    console.print(table)


@app.command("import")
def import_command(
    log: Annotated[Path, typer.Argument(help="The log, plain or .gz.", exists=True, dir_okay=False)],
    format: Annotated[str, typer.Option(help="One of `replay formats`.")],
    to: Annotated[Path, typer.Option(help="Folder of the tape.")],
    meter_id: Annotated[str | None, typer.Option(help="For a log that names no meter.")] = None,
    timezone: Annotated[str | None, typer.Option(help="Of local stamps, if not the format's usual one.")] = None,
    keep_going: Annotated[bool, typer.Option(help="Count damaged lines and go on.")] = False,
) -> None:
    """Turns a log into a tape.

    Example: replay import meter.txt --format dsmr --to data/tapes/meter
    """
    with exits():
        _told(import_log(log, format, to, meter_id=meter_id, timezone=timezone, keep_going=keep_going))


@app.command()
def simulate(
    to: Annotated[Path, typer.Option(help="Folder of the tape.")],
    day: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="A day of 2016.")] = datetime(2016, 6, 15),  # noqa: DTZ001
    step_s: Annotated[int, typer.Option(help="Seconds between two readings.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 1,
) -> None:
    """Builds the tape of a day of a real low-voltage grid, with power flow.

    Example: replay simulate --to data/tapes/grid
    """
    with exits():
        _told(simulated(to, day.date(), step_s, seed))


def simulated(folder: Path, day: date, step_s: int, seed: int) -> Tape:
    """The simulated day, with progress."""
    from replay.simulate import simulate as build

    with Progress(TextColumn("power flow"), BarColumn(), TimeElapsedColumn(), console=problems) as bar:
        task = bar.add_task("")
        return build(
            folder,
            day=day,
            step_s=step_s,
            seed=seed,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )


def _told(tape: Tape) -> None:
    info = tape.info
    console.print(
        f"{info.rows_out} readings of {len(tape.registry)} meters, {info.first_at} to {info.last_at}, "
        f"from {info.rows_in} rows of {info.source}",
        highlight=False,
    )
    for name, count in info.defects.items():
        console.print(f"  defect {name}: {count}", highlight=False)


@app.command()
def run(
    tape: Annotated[Path, typer.Option(help="Folder of the tape.")],
    to: Annotated[str, typer.Option(help="mqtt, kafka or null (everything but the sending).")] = "mqtt",
    meters: Annotated[int | None, typer.Option(help="How many; the tape's own number if absent.")] = None,
    speed: Annotated[str, typer.Option(help="600: an hour in six seconds; max: flat out.")] = "1",
    seed: Annotated[int, typer.Option(help="The same seed gives the same fleet.")] = 1,
    start: Annotated[datetime | None, typer.Option(help="Begin of the run's clock, UTC, if not the tape's.")] = None,
    clock: Annotated[str, typer.Option(help="run: a fleet on one clock; original: the log as it is.")] = "run",
    run_id: Annotated[str | None, typer.Option(help="A name for the run; made up if absent.")] = None,
    with_bad_input: Annotated[bool, typer.Option(help="Send one of each kind of bad record too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Plays a tape as the stream of N meters.

    Example: replay run --tape data/tapes/grid --meters 1000 --speed 600 --to mqtt --seed 1
    """
    with exits():
        ledger = played(tape, to, meters, speed, seed, start, clock, run_id, with_bad_input)
        if as_json:
            sys.stdout.write(json.dumps(asdict(ledger)) + "\n")
        else:
            late = f"late by {ledger.late_mean_s} s on average, {ledger.late_max_s} s at most"
            console.print(
                f"run {ledger.run_id}: {ledger.records:,} records of {ledger.meters:,} meters in {ledger.seconds:.1f} s"
                f", {ledger.records_per_s:,.0f}/s; the sender was {late}"
                f"{'' if ledger.is_whole else '; stopped before its end'}",
                highlight=False,
            )


def played(
    tape: Path,
    to: str,
    meters: int | None,
    speed: str,
    seed: int,
    start: datetime | None,
    clock: str,
    run_id: str | None,
    with_bad_input: bool,
) -> Ledger:
    """Plays a tape, with progress.

    Raises:
        ConfigError: an argument is none that we know.
        RetryLater: the other side does not answer.
    """
    if clock not in ("run", "original"):
        msg = f"--clock is run or original, not {clock}"
        raise ConfigError(msg)
    try:
        factor = None if speed == "max" else float(speed)
    except ValueError as error:
        msg = f"--speed is a number or max, not {speed}"
        raise ConfigError(msg) from error
    if factor is not None and factor <= 0:
        msg = f"--speed is more than 0, not {speed}"
        raise ConfigError(msg)
    crew = fleet(read_tape(tape), meters, seed, start and start.replace(tzinfo=UTC), clock == "original")
    now = datetime.now(UTC)
    ledger = Ledger(
        run_id=run_id or f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}",
        tape=tape.name,
        meters=len(crew.plan),
        speed=factor,
        seed=seed,
        to=to,
        clock=clock,
        first_at=crew.first_at.isoformat(),
        last_at=crew.last_at.isoformat(),
        started_at=now.isoformat(),
    )
    total = crew.records
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=problems) as bar:
        task = bar.add_task("replay", total=total)

        def show(ledger: Ledger, late_s: float) -> None:
            done = ledger.readings + ledger.events
            rate = done / max(ledger.seconds, 1e-3)
            told = f"replay {done:,} of {total:,}, {rate:,.0f}/s" + (f", late {late_s:.1f} s" if late_s > 1 else "")
            bar.update(task, completed=done, description=told)

        return play(crew, _sink(to), ledger, show, with_bad_input)


def _sink(to: str) -> Sink:
    match to:
        case "mqtt":
            host = os.environ.get("METERSTREAM_MQTT_HOST", "127.0.0.1")
            return MqttSink(host, int(os.environ.get("METERSTREAM_MQTT_PORT", "1883")))
        case "kafka":
            return KafkaSink(os.environ.get("METERSTREAM_KAFKA_BOOTSTRAP", "127.0.0.1:9092"))
        case "null":
            return NullSink()
        case _:
            msg = f"--to is mqtt, kafka or null, not {to}"
            raise ConfigError(msg)


if __name__ == "__main__":
    app()
