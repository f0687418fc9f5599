"""Command line of the stack, in containers or as native processes: `python -m stack up|down|status|logs`."""

import contextlib
import getpass
import json
import os
import shutil
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

from kafka_io.topics import create_topics
from schemas.errors import ConfigError, RetryLater, exits
from settings import Settings, contradictions, damage, load, started_with
from stack import following, registry, tables
from stack.backlog import waiting_in_broker
from stack.containers import ContainerStack, engine
from stack.jobs import LEGEND, jobs, jobs_table, metrics_text, processes_table, upkeep_warning
from stack.native import NativeStack
from stack.parts import ALWAYS, NATS, PARTS, STREAMING, SUPERVISOR
from stack.settings import StackSettings, store_of
from stack.supervisor import supervise as restart_dead_parts

app = typer.Typer(
    help="The stack on this machine.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.add_typer(registry.app, name="registry")
app.command()(tables.files)
app.command()(tables.upkeep)
app.command()(tables.migrate)
app.command()(tables.begin_anew)
console, problems = Console(highlight=False), Console(highlight=False, stderr=True)

Names = Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(ALWAYS)}. All without.")]
Mode = Annotated[str, typer.Option(envvar="MODE", help="docker, native, or auto: Docker where an engine answers.")]
Cluster = Annotated[bool, typer.Option(envvar="CLUSTER", help="The jobs on a Spark master and two workers.")]
Store = Annotated[
    str | None,
    typer.Option(
        envvar="STORE",
        help="Where lake, state and reports lie: s3 (an S3 server of the stack's own), the URL of a store, or home. "
        "Without: where they were.",
    ),
]
Critical = Annotated[bool, typer.Option(envvar="CRITICAL", help="Critical events too, published within milliseconds.")]
FOLLOW_EVERY_S = 0.3


def _ended(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _guarded(work: Callable[[], None]) -> None:
    """Runs a command; our own errors become a text and an exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    with exits():
        work()


def _stack(
    mode: str = "auto",
    cluster: bool = False,
    critical: bool = False,
    is_asked: bool = False,
    store: str | None = None,
) -> NativeStack | ContainerStack:
    """The stack of the home, as it was started, where it runs.

    Args:
        mode: docker, native or auto.
        cluster: asked for.
        critical: asked for.
        is_asked: contradicting settings are an error; else they are said, and those of the running stack are taken.
        store: s3, home or a URL; None: as it was.

    Raises:
        ConfigError: no such mode; or the environment says otherwise than what runs.
    """
    if mode not in ("auto", "docker", "native"):
        msg = f"MODE is auto, docker or native, not {mode}"
        raise ConfigError(msg)
    settings = load(StackSettings, store=store_of(store) if store else None)
    started = started_with(folder := settings.folder)

    def show(line: str) -> None:
        console.print(f"  {line}", markup=False)

    native = NativeStack(settings, show)
    if lost := damage(folder):
        if is_asked:
            msg = f"{lost}. make down ends what runs; then remove that file and start again"
            raise ConfigError(msg)
        problems.print(f"[yellow]![/] {lost}; looked at are the usual ones", soft_wrap=True)
    runs = "native" if any(native.is_running(name) for name in (*PARTS, SUPERVISOR)) else None
    if runs is None and started.get("mode") == "docker" and (mode == "docker" or engine()):
        runs = "docker" if any(state.pid for state in ContainerStack(settings, show).states()) else None
    if runs:
        wrong = list(dict.fromkeys([*contradictions(StackSettings, folder), *contradictions(Settings, folder)]))
        if mode not in ("auto", runs):
            wrong.append(f"MODE is {mode}, and the stack in {folder} was started with MODE={runs}")
        if store and settings.store != started.get("store", ""):
            wrong.append(
                f"STORE is {store}, and the stack in {folder} was started with {started.get('store') or 'home'}"
            )
        if wrong and is_asked:
            msg = "; ".join(wrong) + ": unset it, or make down first, then make up takes it"
            raise ConfigError(msg)
        for line in wrong:
            problems.print(f"[yellow]![/] {line}, which is what is looked at", soft_wrap=True)
        kept = {name: value for name, value in started.items() if name in StackSettings.of_stack}
        settings, mode = settings.model_copy(update=kept), runs
        if not is_asked:
            cluster, critical = cluster or bool(started.get("cluster")), critical or bool(started.get("critical"))
    elif mode == "auto":  # the lake is where it was
        mode = str(started.get("mode") or ("docker" if engine() else "native"))
    if mode == "docker":
        return ContainerStack(settings, show, cluster, critical)
    return NativeStack(settings, show, cluster, critical)


@app.command()
def up(
    names: Names = None,
    mode: Mode = "auto",
    cluster: Cluster = False,
    critical: Critical = False,
    store: Store = None,
) -> None:
    """Start what does not run yet, and see to it that what dies comes back.

    Where a Docker engine answers it runs in containers, else as native processes; MODE decides.
    """

    def work() -> None:
        known = started_with(load(StackSettings).folder)
        before = known.get("store", "")
        stack = _stack(mode, cluster, critical, is_asked=True, store=store)
        store_of(stack.settings.store, isinstance(stack, ContainerStack))
        if known and before != stack.settings.store:
            where = before or stack.home
            problems.print(f"[yellow]![/] what the lake has so far stays in {where}: it is not read", soft_wrap=True)
        in_containers = isinstance(stack, ContainerStack)
        console.print(f"{_named(stack)} ({'MODE=native' if in_containers else 'MODE=docker'} is the other way)")
        with console.status("Starting the stack"):
            if isinstance(stack, ContainerStack):
                stack.build()
            started = stack.start(names or None)
            stack.start_supervisor(names or None)
        settings = stack.settings
        console.print("Started." if started else "Already running.")
        files = f"volume {stack.project}_lake" if isinstance(stack, ContainerStack) else f"files in {stack.home}"
        if settings.store:
            files = f"lake in {settings.store}"
        console.print(f"MQTT 127.0.0.1:{settings.mqtt_port}, Kafka {settings.kafka_bootstrap}, {files}")

    _guarded(work)


def _bootstrap() -> str:
    """Where Kafka is; says where the environment means another than the home's stack has."""
    settings = load(StackSettings)
    for line in contradictions(StackSettings, settings.folder):
        problems.print(f"[yellow]![/] {line}", soft_wrap=True)
    return os.environ.get("METERSTREAM_KAFKA_BOOTSTRAP") or settings.kafka_bootstrap


def _named(stack: NativeStack | ContainerStack) -> str:
    return "In containers" if isinstance(stack, ContainerStack) else "As native processes"


@app.command()
def down(
    mode: Mode = "auto",
    flush: Annotated[
        bool,
        typer.Option(envvar="FLUSH", help="First take what Kafka has and close open windows: for `replay verify`."),
    ] = False,
) -> None:
    """Stop everything; the data stay."""

    def work() -> None:
        stack = _stack(mode)
        if flush and not stack.is_running(STREAMING.name):
            console.print("The streaming jobs do not run: nothing can be flushed.")
        with console.status("Stopping the stack"):
            stopped = stack.stop(flush)
        console.print(f"{_named(stack)}: {'stopped.' if stopped else 'nothing was running.'}")

    _guarded(work)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    mode: Mode = "auto",
    cluster: Cluster = False,
    critical: Critical = False,
) -> None:
    """Show what runs, and how the jobs get on; exit 0 when everything runs, 1 otherwise."""

    def work() -> None:
        stack = _stack(mode, cluster, critical)
        states = stack.states()
        text = metrics_text(stack.settings.metrics_port) if stack.is_running(STREAMING.name) else None
        found = jobs(text) if text else []
        if as_json:
            both = {"processes": [asdict(state) for state in states], "jobs": [asdict(job) for job in found]}
            typer.echo(json.dumps(both))
        else:
            console.print(_named(stack))
            console.print(processes_table(states))
            if found:
                console.print(jobs_table(found))
                console.print(LEGEND, style="dim")
                if warning := upkeep_warning(text or ""):
                    console.print(f"[yellow]![/] {warning}")
            elif stack.is_running(STREAMING.name):
                console.print("The streaming jobs have exported no metrics yet.")
            if stack.is_running(NATS.name):
                with contextlib.suppress(RetryLater):
                    console.print(
                        f"The MQTT broker holds {waiting_in_broker(stack.settings.nats_monitor_port):,} messages."
                    )
        if any(state.state != "running" for state in states):
            raise typer.Exit(1)

    _guarded(work)


@app.command()
def alarms(
    all_: Annotated[bool, typer.Option("--all", help="Those that were cleared, too.")] = False,
    meter: Annotated[str | None, typer.Option(help="Of this meter_id only.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the newest.", min=1)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON each, for machines.")] = False,
) -> None:
    """Show the alarms that stand, the newest first: since when, whose, and who has seen them.

    For example: .venv/bin/stack alarms --meter m1 --all
    """

    def work() -> None:
        with Console(stderr=True).status("Reading the alarms"):
            found = following.alarms(_bootstrap())
        chosen = following.newest_first(found.values(), meter, all_)
        if as_json:
            for alarm in chosen[:limit]:
                typer.echo(json.dumps(alarm, default=str))
            return
        for alarm in chosen[:limit]:
            console.print(following.alarm_line(alarm), markup=False, soft_wrap=True)
        more = f", the newest {limit} of them above" if len(chosen) > limit else ""
        console.print(f"{len(chosen):,} {'' if all_ else 'that stand '}in {following.KEPT}{more}.", soft_wrap=True)

    _guarded(work)


@app.command()
def acknowledge(
    alarm_id: Annotated[str, typer.Argument(help="Of the alarm, or how that begins; `stack alarms` shows them.")],
    meter: Annotated[str | None, typer.Option(help="Its meter_id; without, the alarm is looked up.")] = None,
    by: Annotated[str, typer.Option(help="Who has seen it.")] = getpass.getuser(),
    note: Annotated[str | None, typer.Option(help="What is to be said of it.")] = None,
) -> None:
    """Say that somebody has seen an alarm: a command in Kafka, which the table alarm_acknowledgements keeps.

    For example: .venv/bin/stack acknowledge 0f3c --by "control room" --note "crew is on its way"
    """

    def work() -> None:
        bootstrap = _bootstrap()
        whole_id, whose = following.acknowledge(bootstrap, alarm_id, meter, by, note)
        console.print(f"Acknowledged: alarm {whole_id} of {whose}, by {by}.", markup=False)

    _guarded(work)


@app.command()
def logs(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join((*PARTS, SUPERVISOR))}.")] = None,
    lines: Annotated[int, typer.Option(help="Last lines of each.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    mode: Mode = "auto",
) -> None:
    """Show the end of the logs."""

    def work() -> None:
        stack = _stack(mode)
        if isinstance(stack, ContainerStack):
            stack.logs(names or (), lines, follow)
            return
        wanted = names or [name for name in (*PARTS, SUPERVISOR) if name in ALWAYS or stack.log_file(name).exists()]
        for name in wanted:
            if name not in (*PARTS, SUPERVISOR):
                message = f"no such process: {name}; there are {', '.join((*PARTS, SUPERVISOR))}"
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
        console.print(f"{name:<15} {text}", markup=False, soft_wrap=True)


@app.command()
def run(name: Annotated[str, typer.Argument(help=f"Which: {', '.join(PARTS)}.")]) -> None:
    """Become one process of the stack, in the foreground: what containers and service managers start.

    Example: METERSTREAM_SPARK_MASTER=spark://10.0.0.5:7077 stack run spark-worker-1
    """

    def work() -> None:
        if name not in PARTS:
            message = f"no such process: {name}; there are {', '.join(PARTS)}"
            raise ConfigError(message)
        NativeStack(load(StackSettings)).become(name)

    _guarded(work)


@app.command()
def topics() -> None:
    """Make Kafka's topics, where they are not there yet: METERSTREAM_KAFKA_BOOTSTRAP names a broker."""

    def work() -> None:
        bootstrap = os.environ.get("METERSTREAM_KAFKA_BOOTSTRAP") or load(StackSettings).kafka_bootstrap
        try:
            create_topics(bootstrap)
        except KafkaException as error:
            msg = f"could not make the topics at {bootstrap}: {error}"
            raise RetryLater(msg) from error

    _guarded(work)


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def once(
    service: Annotated[str, typer.Argument(help="nightly or replay.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Of the service.")] = None,
    mode: Mode = "auto",
) -> None:
    """Run the night's batch or the replay once, where the stack has its lake."""

    def work() -> None:
        stack = _stack(mode, is_asked=True)
        if isinstance(stack, ContainerStack):
            sys.exit(stack.attached(service, arguments or []))
        if service == "--help":
            typer.echo("Usage: stack once nightly|replay ARGUMENTS; each says which: stack once nightly --help")
            return
        module = {"nightly": "batch_jobs", "replay": "replay"}.get(service)
        if module is None:
            msg = f"no such service: {service}; there are nightly and replay"
            raise ConfigError(msg)
        os.execv(sys.executable, [sys.executable, "-m", module, *(arguments or [])])

    _guarded(work)


@app.command()
def clean(mode: Mode = "auto", yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Stop the stack and remove all its data, after asking."""

    def work() -> None:
        stack = _stack(mode)
        what = f"the volumes of {stack.project}" if isinstance(stack, ContainerStack) else f"all of {stack.home}"
        if stack.settings.store and not stack.settings.has_own_store:
            problems.print(f"[yellow]![/] lake, state and reports in {stack.settings.store} stay", soft_wrap=True)
        if not yes and not typer.confirm(f"Remove {what}?"):
            console.print("Kept.")
            return
        stack.stop()
        if isinstance(stack, ContainerStack):
            stack.clean()
        else:
            shutil.rmtree(stack.home, ignore_errors=True)
        console.print("Removed.")

    _guarded(work)


@app.command()
def critical(
    from_start: Annotated[bool, typer.Option("--from-start", help="First what Kafka still has.")] = False,
    count: Annotated[int | None, typer.Option(help="End after so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON each, for machines.")] = False,
) -> None:
    """Follow critical events as they are published, until Ctrl-C: time, meter, what, volts, and how long that took.

    They are published where the stack was started with CRITICAL=1: make up CRITICAL=1, and .venv/bin/stack critical
    """

    def work() -> None:
        bootstrap = _bootstrap()
        problems.print(f"Follows critical events on {bootstrap}; make up CRITICAL=1 publishes them", soft_wrap=True)
        for number, event in enumerate(following.critical_events(bootstrap, from_start), 1):
            if as_json:
                typer.echo(json.dumps(event, default=str))
            else:
                console.print(following.event_line(event), markup=False, soft_wrap=True)
            if number == count:
                return

    _guarded(work)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="Of DuckDB; each table of the lake is a view of its name.")],
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON each, for machines.")] = False,
) -> None:
    """Ask the lake of the home: its tables, and its reports as they are called.

    For example: .venv/bin/stack sql "SELECT meter_id, state, raised_at FROM alarms ORDER BY raised_at DESC LIMIT 10"

    .venv/bin/stack sql "SELECT * FROM daily_consumption_v1 LIMIT 5"
    """
    import duckdb

    from lake.reading import Lake, registry_files
    from lake.store import store as place

    def work() -> None:
        stack = _stack()
        if isinstance(stack, ContainerStack) and not stack.settings.store:
            msg = (
                "the lake is in Docker's volume: docs/docker.md says how to copy it out, METERSTREAM_HOME names a copy"
            )
            raise ConfigError(msg)
        os.environ |= {"METERSTREAM_HOME": str(stack.home), "METERSTREAM_STORE": stack.settings.store}
        with Lake().duckdb() as lake:
            try:
                rows = lake.sql(query)
                if rows is None:
                    return
                if as_json:
                    for row in rows.fetchall():
                        typer.echo(json.dumps(dict(zip(rows.columns, row, strict=True)), default=str))
                else:
                    rows.show(max_width=console.width)
                    if not rows.limit(1).fetchall():
                        hint = "" if registry_files() else ": METERSTREAM_HOME names another home"
                        problems.print(f"No rows in {place().url}{hint}", soft_wrap=True)
            except duckdb.Error as error:
                msg = f"{error}\nThe lake is in {place().url}"
                raise ConfigError(msg) from error

    _guarded(work)


@app.command(hidden=True)
def supervise(names: Names = None) -> None:
    """Bring back what dies; `up` leaves this behind, `down` ends it."""

    def report(line: str) -> None:
        console.print(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}", markup=False, soft_wrap=True)

    _guarded(lambda: restart_dead_parts(NativeStack(load(StackSettings)), names or ALWAYS, threading.Event(), report))


if __name__ == "__main__":
    app()
