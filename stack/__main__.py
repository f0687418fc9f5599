"""Command line of the embedded stack: `python -m stack up|down|status|logs`."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from confluent_kafka import KafkaException
from rich.console import Console
from rich.table import Table

from schemas.errors import ConfigError, RetryLater, exits
from schemas.settings import load
from stack.native import CLUSTER, NAMES, SUPERVISOR, NativeStack, PartState, StackSettings, create_topics

app = typer.Typer(help="The embedded stack on this machine.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False)

Names = Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(NAMES)}. All without.")]
FOLLOW_EVERY_S = 0.3
COLOURS = {"running": "green", "starting": "yellow", "died": "red", "stopped": "dim"}


def _ended(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _guarded(work: Callable[[], None]) -> None:
    """Runs a command; our own errors become a text and an exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    with exits():
        work()


def _stack() -> NativeStack:
    return NativeStack(load(StackSettings), lambda line: console.print(f"  {line}", markup=False))


@app.command()
def up(names: Names = None) -> None:
    """Start what does not run yet, and leave a supervisor that brings back what dies."""

    def work() -> None:
        stack = _stack()
        with console.status("Starting the stack"):
            started = stack.start(names or NAMES)
            stack.start_supervisor(names or NAMES)
        settings = stack.settings
        console.print("Started." if started else "Already running.")
        console.print(f"MQTT 127.0.0.1:{settings.mqtt_port}, Kafka {settings.kafka_bootstrap}, files in {stack.home}")

    _guarded(work)


@app.command()
def down() -> None:
    """Stop everything, supervisor first."""

    def work() -> None:
        stack = _stack()
        with console.status("Stopping the stack"):
            stopped = stack.stop()
        console.print("Stopped." if stopped else "Nothing was running.")

    _guarded(work)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Show what runs; exit 0 when everything does, 1 otherwise."""

    def work() -> None:
        states = _stack().states()
        if as_json:
            typer.echo(json.dumps([asdict(state) for state in states]))
        else:
            console.print(_table(states))
        if any(state.state != "running" for state in states):
            raise typer.Exit(1)

    _guarded(work)


def _table(states: list[PartState]) -> Table:
    table = Table("process", "pid", "up since", "port", "memory", "state")
    for state in states:
        since = (
            datetime.fromtimestamp(state.since, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if state.since else "-"
        )
        memory = f"{state.memory_bytes / 1e6:.0f} MB" if state.memory_bytes is not None else "-"
        shown = f"[{COLOURS[state.state]}]{state.state}[/]"
        table.add_row(state.name, str(state.pid or "-"), since, str(state.port or "-"), memory, shown)
    return table


@app.command()
def logs(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join((*NAMES, SUPERVISOR))}.")] = None,
    lines: Annotated[int, typer.Option(help="Last lines of each.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
) -> None:
    """Show the end of the logs."""

    def work() -> None:
        stack = _stack()
        wanted = names or [*NAMES, SUPERVISOR]
        for name in wanted:
            if name not in (*NAMES, SUPERVISOR):
                message = f"no such process: {name}; there are {', '.join((*NAMES, SUPERVISOR))}"
                raise ConfigError(message)
        seen = {}
        for name in wanted:
            file = stack.log_file(name)
            seen[name] = file.stat().st_size if file.exists() else 0
            _show(name, _read(file, 0, seen[name]).splitlines()[-lines:])
        while follow:
            time.sleep(FOLLOW_EVERY_S)
            for name in wanted:
                file = stack.log_file(name)
                size = file.stat().st_size if file.exists() else 0
                start = seen[name] if size >= seen[name] else 0
                whole_lines = _read(file, start, size).rpartition("\n")
                seen[name] = start + len((whole_lines[0] + whole_lines[1]).encode())
                _show(name, whole_lines[0].splitlines())

    _guarded(work)


def _read(file: Path, start: int, end: int) -> str:
    if end <= start:
        return ""
    with file.open("rb") as log:
        log.seek(start)
        return log.read(end - start).decode(errors="surrogateescape")


def _show(name: str, lines: list[str]) -> None:
    for line in lines:
        text = line.encode(errors="surrogateescape").decode(errors="replace")
        console.print(f"{name:<10} {text}", markup=False, soft_wrap=True)


@app.command()
def run(name: Annotated[str, typer.Argument(help=f"Which: {', '.join((*NAMES, *CLUSTER))}.")]) -> None:
    """Become one process of the stack, in the foreground: what containers and service managers start.

    Example: METERSTREAM_SPARK_MASTER=spark://10.0.0.5:7077 stack run spark-worker
    """

    def work() -> None:
        if name not in (*NAMES, *CLUSTER):
            message = f"no such process: {name}; there are {', '.join((*NAMES, *CLUSTER))}"
            raise ConfigError(message)
        _stack().become(name)

    _guarded(work)


@app.command()
def topics() -> None:
    """Make Kafka's topics, where they are not there yet: METERSTREAM_KAFKA_BOOTSTRAP names a broker."""

    def work() -> None:
        bootstrap = os.environ.get("METERSTREAM_KAFKA_BOOTSTRAP") or _stack().settings.kafka_bootstrap
        try:
            create_topics(bootstrap)
        except KafkaException as error:
            msg = f"could not make the topics at {bootstrap}: {error}"
            raise RetryLater(msg) from error

    _guarded(work)


@app.command(hidden=True)
def supervise(names: Names = None) -> None:
    """Bring back what dies; `up` leaves this behind, `down` ends it."""

    def report(line: str) -> None:
        console.print(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}", markup=False, soft_wrap=True)

    _guarded(lambda: NativeStack(load(StackSettings)).supervise(names or NAMES, threading.Event(), report))


if __name__ == "__main__":
    app()
