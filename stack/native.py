"""Starts, watches and stops the embedded stack's native processes; in a container, becomes one of them.

A process is known by a mark in its environment, which its own children inherit: whatever process of a stack is left,
and whoever started it, `stop` finds it, and a recycled pid is never taken for one of ours.
"""

import base64
import contextlib
import fcntl
import http.client
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn

import psutil
from confluent_kafka import KafkaException
from pydantic import Field

from kafka_io.clients import admin
from kafka_io.offsets import received
from kafka_io.topics import create_topics
from schemas.errors import ConfigError, MeterstreamError, RetryLater
from schemas.topics import INGESTED
from settings import Settings, started_file, started_with

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config"
ENVIRONMENT = Path(sys.prefix)
"""The virtual environment: its `bin` has the broker, its `jars/kafka` Kafka's class path."""

MARK = "METERSTREAM_STACK_PART"
NAMES = ("nats", "kafka", "ingest", "streaming")
"""In the order of starting: each needs the ones before it."""
WORKERS = ("spark-worker-1", "spark-worker-2")
CLUSTER = ("spark-master", *WORKERS)
"""A Spark standalone cluster, which runs the same jobs: started before them where it is asked for."""
CRITICAL = "critical_events"
"""Tells of critical events within milliseconds: started where it is asked for, as it takes memory for good."""
ALL = (*NAMES[:-1], *CLUSTER, NAMES[-1], CRITICAL)
SUPERVISOR = "supervisor"

START_TIMEOUT_S = {"nats": 20.0, "kafka": 90.0, "ingest": 60.0, **dict.fromkeys(CLUSTER, 60.0), "streaming": 180.0,
                   CRITICAL: 180.0}  # fmt: skip
"""Some ten times what each takes on two idle cores: a busy machine is slow, not broken."""
STOP_GRACE_S = {"nats": 15.0, "kafka": 30.0, "ingest": 30.0, **dict.fromkeys(CLUSTER, 15.0), "streaming": 60.0,
                CRITICAL: 30.0, SUPERVISOR: 15.0}  # fmt: skip
"""Time to finish on SIGTERM: a streaming batch and Kafka's clean flush take longest."""
FLUSH_GRACE_S = 900.0
"""Time to take all that Kafka has, and to close what is open."""
NOT_READY = "the streaming jobs are starting, and cannot flush yet: wait for make status to say running"
NOT_FLUSHED = "the streaming jobs did not take all that Kafka has: make up, and down with FLUSH=1 again; see make logs"
FLUSHING = "streaming takes what Kafka has and closes what is open"
STANDSTILL_S = 60.0
"""How long the bridge may carry nothing before a flush goes on without the rest."""
FAILED_START_GRACE_S = 5.0
"""What has not become ready has nothing worth a longer wait."""
CHILDREN_GRACE_S = 5.0
"""Spark's JVM and Python workers end by themselves soon after their driver."""
PORT_GRACE_S = 1.0
"""A killed process's threads hold its ports for some milliseconds after it counts as dead."""
POLL_S = 0.05
LOOK_S = 0.5  # at Kafka and the MQTT broker, which have other work
LONGEST_RESTART_DELAY_S = 30.0
STABLE_AFTER_S = 60.0
"""A process that ran this long has its restart delay forgotten."""
KAFKA_HEAP = "-Xmx512m"
"""Enough for 300,000 records a second from one producer; about 350 MB resident."""
LOG_TAIL_LINES = 15
EVERYWHERE = "0.0.0.0"  # in a container, whose engine publishes on loopback
WORKER_MEMORY = "2g"
SPARK_HOME = Path(str(importlib.util.find_spec("pyspark").origin)).parent  # type: ignore[union-attr]
"""The wheel has no start scripts for a cluster, but what they start."""


class StartFailed(MeterstreamError):
    """A process of the stack did not become ready; the text has the end of its log."""


class StackSettings(Settings):
    """Where the stack lives and which ports it takes.

    Attributes:
        listen: address that the processes listen on; loopback, but for a container's 0.0.0.0.
        kafka_inside: host:port at which containers find Kafka, if they do: a second listener.
        spark_master: spark://host:port of the cluster that jobs and workers use; the port below where it is our own.
        project: compose's; names containers and volumes, so that two stacks can live beside each other.
    """

    of_stack: ClassVar[frozenset[str]] = frozenset(
        {
            "mqtt_port", "nats_port", "nats_monitor_port", "kafka_port", "kafka_controller_port", "spark_master_port",
            "spark_master_ui_port", "metrics_port", "project",
        }
    )  # fmt: skip

    home: Path = ROOT / "data"
    listen: str = "127.0.0.1"
    kafka_inside: str | None = None
    spark_master: str = ""
    project: str = "meterstream"
    mqtt_port: int = Field(1883, ge=1, le=65535)
    nats_port: int = Field(4222, ge=1, le=65535)
    nats_monitor_port: int = Field(8222, ge=1, le=65535)
    kafka_port: int = Field(9092, ge=1, le=65535)
    kafka_controller_port: int = Field(9093, ge=1, le=65535)
    spark_master_port: int = Field(7077, ge=1, le=65535)
    spark_master_ui_port: int = Field(8080, ge=1, le=65535)
    metrics_port: int = Field(9464, ge=1, le=65535)
    nats_server: Path | None = None

    @property
    def kafka_bootstrap(self) -> str:
        """Address for Kafka clients."""
        return f"127.0.0.1:{self.kafka_port}"

    def ports(self, name: str) -> dict[str, int]:
        """Ports that a process listens on, by the variable that moves each; the one for clients first."""
        fields = {
            "nats": ("mqtt_port", "nats_port", "nats_monitor_port"),
            "kafka": ("kafka_port", "kafka_controller_port"),
            "streaming": ("metrics_port",),
            "spark-master": ("spark_master_port", "spark_master_ui_port"),
        }
        return {f"METERSTREAM_{field.upper()}": getattr(self, field) for field in fields.get(name, ())}


def remember(settings: StackSettings, mode: str, cluster: bool, critical: bool) -> None:
    """Writes down what a stack is started with, for whoever asks for its home later.

    Raises:
        ConfigError: the home cannot be written.
    """
    told = {
        **{name: getattr(settings, name) for name in sorted(StackSettings.of_stack)},
        "kafka_bootstrap": settings.kafka_bootstrap,
        "mode": mode,
        "cluster": cluster,
        "critical": critical,
    }
    folder = settings.home.resolve()
    if started_with(folder) == told:
        return
    file = started_file(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".fresh")
        fresh.write_text(json.dumps(told, indent=2) + "\n")
        fresh.rename(file)
    except OSError as error:
        msg = f"{folder} cannot be written ({error.strerror}): METERSTREAM_HOME names another folder"
        raise ConfigError(msg) from error


@dataclass(frozen=True)
class PartState:
    """What is known of one process: state is `running`, `starting`, `died` or `stopped`."""

    name: str
    state: str
    pid: int | None = None
    since: float | None = None
    port: int | None = None
    memory_bytes: int | None = None


class NativeStack:
    """One stack in one home folder; any process may look at it, start it or stop it.

    Args:
        settings: home and ports.
        on_progress: gets a line for people when a process becomes ready or is stopped.
        cluster: run the jobs on a Spark master and two workers of our own.
        critical: tell of critical events too.
    """

    def __init__(
        self,
        settings: StackSettings,
        on_progress: Callable[[str], None] = lambda _: None,
        cluster: bool = False,
        critical: bool = False,
    ) -> None:
        self.settings = settings
        self.home = settings.home.resolve()
        self.names = asked_for(cluster, critical)
        self._cluster = cluster
        self._on_progress = on_progress
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, names: Iterable[str] | None = None) -> list[str]:
        """Starts what does not run yet, in order, each once the one before is ready.

        Returns:
            The names that were started.

        Raises:
            ConfigError: a port is somebody else's, or a program is missing; nothing was started.
            StartFailed: a process died or did not become ready; what this call started is stopped again.
        """
        wanted = _in_order(names or self.names)
        with self._locked():
            missing = [name for name in wanted if not self.is_running(name)]
            for name in missing:
                self._stop_part(name, 0.0)  # Spark's JVM outlives a killed driver, and must not meet the next one
            self._check(missing)
            if missing:
                runs = set(self.names) | {name for name in ALL if self._pid_file(name).exists()}
                remember(self.settings, "native", bool(runs & set(CLUSTER)), CRITICAL in runs)
            started: list[str] = []
            try:
                for name in wanted:
                    before = time.monotonic()
                    if name in missing:
                        started.append(name)
                        self._spawn(name)
                    self._wait_ready(name)
                    if name in missing:
                        self._on_progress(f"{name} ready in {time.monotonic() - before:.1f} s")
            except BaseException:
                with _uninterrupted():
                    for name in reversed(started):
                        self._stop_part(name, FAILED_START_GRACE_S)
                raise
        return started

    def stop(self, flush: bool = False) -> list[str]:
        """Stops everything of this home, the supervisor first, then in reverse order.

        Args:
            flush: the jobs first take what Kafka has and close what is open.

        Returns:
            The names of what was running, wholly or in part.

        Raises:
            RetryLater: a flush was asked for and the jobs are not ready, then nothing is stopped; or it did not come to
                its end, then everything is.
        """
        asked = flush and self.is_running("streaming")
        if asked and not self._is_ready("streaming"):
            raise RetryLater(NOT_READY)
        stopped = [SUPERVISOR] if self._stop_part(SUPERVISOR, STOP_GRACE_S[SUPERVISOR]) else []
        with self._locked():
            if asked:
                if self.is_running("nats") and self.is_running("ingest"):
                    with contextlib.suppress(KeyboardInterrupt):
                        let_through(self.settings, self._on_progress)
                self._flush()
            with _uninterrupted():
                for name in reversed(ALL):
                    if self._stop_part(name, STOP_GRACE_S[name]):
                        stopped.append(name)
                        with contextlib.suppress(OSError):  # the terminal may be gone
                            self._on_progress(f"{name} stopped")
        if asked and not (self.home / "run" / "streaming.flushed").exists():
            raise RetryLater(NOT_FLUSHED)
        return stopped

    def _flush(self) -> None:
        """Lets the jobs come to their end, as long as it takes; Ctrl-C ends the waiting."""
        driver = self._leader("streaming")
        if driver is None:
            return
        self._on_progress(FLUSHING)
        with contextlib.suppress(psutil.NoSuchProcess):
            driver.send_signal(signal.SIGUSR1)
            driver.send_signal(signal.SIGTERM)
        with contextlib.suppress(KeyboardInterrupt):
            self._wait_until(lambda: self._leader("streaming") is None, FLUSH_GRACE_S)

    def stop_part(self, name: str, grace_s: float | None = None) -> None:
        """Stops one process; by default with its usual grace.

        Args:
            name: of the process, or of the supervisor, which would start the others again.
            grace_s: how long it may take to end by itself.
        """
        if name == SUPERVISOR:
            self._stop_part(name, STOP_GRACE_S[name])
            return
        with self._locked():
            self._stop_part(name, STOP_GRACE_S[name] if grace_s is None else grace_s)

    def restart(self, name: str) -> None:
        """Stops one process, if it runs, and starts it again."""
        self.stop_part(name)
        self.start([name])

    def is_running(self, name: str) -> bool:
        """Whether the process is alive, ready or not."""
        return self._leader(name) is not None

    def dead(self, names: Iterable[str] | None = None) -> list[str]:
        """Which of these do not run."""
        return [name for name in _in_order(names or self.names) if not self.is_running(name)]

    def pid(self, name: str) -> int | None:
        """Process id, where it is alive."""
        leader = self._leader(name)
        return leader.pid if leader else None

    def log_file(self, name: str) -> Path:
        """Where the process's output goes."""
        return self.home / "logs" / f"{name}.log"

    def states(self) -> list[PartState]:
        """What runs, for people and monitors."""
        used = [name for name in ALL if name in self.names or self._pid_file(name).exists()]
        return [self._state(name) for name in (*used, SUPERVISOR)]

    def start_supervisor(self, names: Iterable[str] | None = None) -> None:
        """Leaves a process behind that starts dead ones again: these, and those that one before it looked after."""
        with self._locked():
            wanted, before = set(_in_order(names or self.names)), set[str]()
            if supervisor := self._leader(SUPERVISOR):
                before = set(supervisor.cmdline()) & set(ALL)
                if wanted <= before:
                    return
                self._stop_part(SUPERVISOR, STOP_GRACE_S[SUPERVISOR])
            whole = _in_order(wanted | before)
            master = self._master(bool(set(CLUSTER) & set(whole)))
            self._launch(SUPERVISOR, [sys.executable, "-m", "stack", "supervise", *whole], master)

    def supervise(self, names: Iterable[str], until: threading.Event, report: Callable[[str], None]) -> None:
        """Starts dead processes again, each after a delay that grows while it keeps dying, until told to end."""
        wanted = _in_order(names)
        delays_s = dict.fromkeys(wanted, 1.0)
        due = dict.fromkeys(wanted, 0.0)
        alive_since = dict.fromkeys(wanted, time.monotonic())
        while not until.wait(1.0):
            for name in wanted:
                now = time.monotonic()
                if self.is_running(name):
                    due[name] = 0.0
                    if now - alive_since[name] > STABLE_AFTER_S:
                        delays_s[name] = 1.0
                elif not due[name]:
                    due[name] = now + delays_s[name]
                    report(f"{name} is dead; starting it again in {delays_s[name]:.0f} s")
                elif now >= due[name]:
                    delays_s[name] = min(2 * delays_s[name], LONGEST_RESTART_DELAY_S)
                    try:
                        self.start([name])
                        report(f"{name} runs again")
                    except (MeterstreamError, OSError) as error:  # a full disk, no more processes: it may pass
                        report(str(error))
                    due[name] = 0.0
                    alive_since[name] = time.monotonic()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time starts or stops in this home."""
        run = self.home / "run"
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = (run / "lock").open("w")
        except OSError as error:
            msg = f"{self.home} cannot be written ({error.strerror}): METERSTREAM_HOME names another folder"
            raise ConfigError(msg) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _check(self, names: Sequence[str]) -> None:
        """Raises ConfigError for everything that keeps these from starting, at once."""
        wrong = []
        taken: dict[int, str] = {}
        for variable, port in (item for name in self.names for item in self.settings.ports(name).items()):
            if port in taken:
                wrong.append(f"port {port} is wanted twice: by {taken[port]} and by {variable}")
            taken[port] = variable
        needed = [item for name in names for item in self.settings.ports(name).items()]
        self._wait_until(lambda: all(_is_free(port) for _, port in needed), PORT_GRACE_S)
        for variable, port in needed:
            if not _is_free(port):
                wrong.append(f"port {port} is in use{_user_of(port)}; set {variable} to a free one")
        if "nats" in names and shutil.which(self._nats_server()) is None:
            wrong.append(f"no NATS server at {self._nats_server()}; METERSTREAM_NATS_SERVER names another")
        if "kafka" in names:
            if not any(_kafka_jars().glob("kafka_*.jar")):
                wrong.append(f"no Kafka jars in {_kafka_jars()}: run make setup")
            logs = self.home / "kafka"
            if not _is_formatted(logs) and logs.exists() and any(logs.iterdir()):
                wrong.append(f"{logs} has no meta.properties, so Kafka cannot read it: move it away")
            if shutil.which(_java()) is None:
                wrong.append("no Java found: run make setup")
        if wrong:
            raise ConfigError("; ".join(wrong))

    def _nats_server(self) -> str:
        return str(self.settings.nats_server or ENVIRONMENT / "bin" / "nats-server")

    def become(self, name: str) -> NoReturn:
        """Turns this process into one of the stack, in the foreground: a container's whole life."""
        for folder in ("run", "logs", "tmp"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        self._ready_file(name).unlink(missing_ok=True)
        command, environment = self._command(name)
        os.chdir(self.home / "tmp")
        os.execvpe(command[0], command, {**os.environ, "TMPDIR": str(self.home / "tmp"), **environment})

    def _spawn(self, name: str) -> None:
        command, environment = self._command(name)
        self._launch(name, command, environment)

    def _command(self, name: str) -> tuple[list[str], dict[str, str]]:
        """What a process is started with, and what is special in its environment."""
        settings = self.settings
        if name == "nats":
            store = self.home / "nats"
            store.mkdir(parents=True, exist_ok=True)
            listeners = {
                "METERSTREAM_NATS_LISTEN": f"{settings.listen}:{settings.nats_port}",
                "METERSTREAM_NATS_MONITOR_LISTEN": f"{settings.listen}:{settings.nats_monitor_port}",
                "METERSTREAM_MQTT_LISTEN": f"{settings.listen}:{settings.mqtt_port}",
                "METERSTREAM_NATS_STORE": json.dumps(str(store)),
            }
            return [self._nats_server(), "-c", str(CONFIG / "nats" / "nats.conf")], listeners
        if name == "kafka":
            return self._kafka(), {}
        if name == "ingest":
            return [sys.executable, "-m", "ingest", "run"], {}
        if name == "streaming":
            metrics = {"METERSTREAM_METRICS_PORT": str(settings.metrics_port)}
            return [sys.executable, "-m", "streaming_jobs"], {**self._master(self._cluster), **metrics}
        if name == CRITICAL:
            return [sys.executable, "-m", "streaming_jobs.critical_events"], {"METERSTREAM_SPARK_MASTER": ""}  # here
        # not on all addresses: what they bind to is what they tell each other
        host = settings.listen if settings.listen != EVERYWHERE else socket.gethostname()
        environment = {"SPARK_HOME": str(SPARK_HOME), "SPARK_LOCAL_IP": host}
        command = [str(SPARK_HOME / "bin" / "spark-class")]
        if name == "spark-master":
            ports = ["--port", f"{settings.spark_master_port}", "--webui-port", f"{settings.spark_master_ui_port}"]
            # Else a master that comes back knows no driver, and has the executors ended that still work for one.
            kept = f"-Dspark.deploy.recoveryMode=FILESYSTEM -Dspark.deploy.recoveryDirectory={self.home / 'tmp' / name}"
            environment["SPARK_DAEMON_JAVA_OPTS"] = f"{os.environ.get('SPARK_DAEMON_JAVA_OPTS', '')} {kept}".strip()
            return [*command, "org.apache.spark.deploy.master.Master", "--host", host, *ports], environment
        command += ["org.apache.spark.deploy.worker.Worker", "--host", host, "--webui-port", "0"]
        command += ["--cores", f"{max(1, (os.cpu_count() or 2) // len(WORKERS))}", "--memory", WORKER_MEMORY]
        command += ["--work-dir", str(self.home / "tmp" / name)]
        master = settings.spark_master or self._master(self._cluster).get("METERSTREAM_SPARK_MASTER")
        if not master:
            msg = f"{name} needs a master: METERSTREAM_SPARK_MASTER=spark://host:port, or CLUSTER=1 for one of our own"
            raise ConfigError(msg)
        return [*command, master], environment

    def _master(self, is_cluster: bool) -> dict[str, str]:
        """What makes the jobs use a cluster of our own."""
        here = f"spark://{self.settings.listen}:{self.settings.spark_master_port}"
        return {"METERSTREAM_SPARK_MASTER": here} if is_cluster else {}

    def _kafka(self) -> list[str]:
        """Kafka's command; formats its folder the first time."""
        logs = self.home / "kafka"
        java = [_java(), KAFKA_HEAP, f"-Djava.io.tmpdir={self.home / 'tmp'}", "-XX:-UsePerfData"]
        java += ["-XX:+ExitOnOutOfMemoryError", f"-Dlog4j2.configurationFile={CONFIG / 'kafka' / 'log4j2.properties'}"]
        java += ["-cp", str(_kafka_jars() / "*")]
        if not _is_formatted(logs):
            # Aside and renamed: a folder whose formatting was interrupted could never be used again.
            fresh = self.home / "kafka.formatting"
            shutil.rmtree(fresh, ignore_errors=True)
            cluster = base64.urlsafe_b64encode(b"\0" + secrets.token_bytes(15)).decode()
            tool = ["kafka.tools.StorageTool", "format", "--standalone", "-t", cluster.rstrip("=")]
            if self._launch("kafka", [*java, *tool, "-c", str(self._kafka_properties(fresh))], {}).wait():
                raise StartFailed(self._explain("kafka", "could not format its folder"))
            if logs.exists():
                logs.rmdir()
            fresh.rename(logs)
        return [*java, "kafka.Kafka", str(self._kafka_properties(logs))]

    def _kafka_properties(self, logs: Path) -> Path:
        """Writes the configuration with our ports and folders appended."""
        settings = self.settings
        controller = f"127.0.0.1:{settings.kafka_controller_port}"
        listeners = {
            "PLAINTEXT": (f"{settings.listen}:{settings.kafka_port}", settings.kafka_bootstrap),
            "CONTROLLER": (controller, controller),
        }
        if settings.kafka_inside:
            port = settings.kafka_inside.rpartition(":")[2]
            listeners["INSIDE"] = (f"{settings.listen}:{port}", settings.kafka_inside)
        overrides = {
            "listeners": ",".join(f"{name}://{bound}" for name, (bound, _) in listeners.items()),
            "advertised.listeners": ",".join(f"{name}://{told}" for name, (_, told) in listeners.items()),
            "controller.quorum.bootstrap.servers": controller,
            "log.dirs": str(logs),
        }
        text = (CONFIG / "kafka" / "server.properties").read_text()
        properties = self.home / "run" / "kafka.properties"
        properties.write_text(text + "\n" + "".join(f"{key}={value}\n" for key, value in overrides.items()))
        return properties

    def _launch(self, name: str, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts a process in a session of its own, its output appended to its log."""
        for folder in ("run", "logs", "tmp"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        self._ready_file(name).unlink(missing_ok=True)
        everything = {
            **os.environ,
            "METERSTREAM_HOME": str(self.home),
            "METERSTREAM_KAFKA_BOOTSTRAP": self.settings.kafka_bootstrap,
            "METERSTREAM_MQTT_HOST": "127.0.0.1",
            **{variable: str(port) for part in ALL for variable, port in self.settings.ports(part).items()},
            "METERSTREAM_NATS_SERVER": self._nats_server(),
            "TMPDIR": str(self.home / "tmp"),
            "PYTHONUNBUFFERED": "1",
            **environment,
            MARK: self._mark(name),
        }
        with self.log_file(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                # Not the home itself: its folders are called as our packages are, and Python looks there first.
                cwd=self.home / "tmp",
                env=everything,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[name] = process
        self._pid_file(name).write_text(json.dumps({"pid": process.pid, "started": time.time()}))
        return process

    def _wait_ready(self, name: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S[name]
        while not self._is_ready(name):
            if not self.is_running(name):
                raise StartFailed(self._explain(name, "died while starting"))
            if time.monotonic() > deadline:
                raise StartFailed(self._explain(name, f"was not ready after {START_TIMEOUT_S[name]:.0f} s"))
            time.sleep(POLL_S)
        if name == "kafka":
            try:
                create_topics(self.settings.kafka_bootstrap)
            except KafkaException as error:
                raise StartFailed(self._explain("kafka", f"could not create its topics: {error}")) from error

    def _is_ready(self, name: str) -> bool:
        if name == "nats":
            return _accepts(self.settings.mqtt_port) and _is_healthy(self.settings.nats_monitor_port)
        if name == "kafka":
            return _accepts(self.settings.kafka_port) and self._answers_metadata()
        if name in CLUSTER:
            workers = _alive_workers(self.settings.spark_master_ui_port)
            return workers is not None and workers > CLUSTER.index(name) - 1
        try:
            return int(self._ready_file(name).read_text()) == self.pid(name)
        except (OSError, ValueError):
            return False

    def _answers_metadata(self) -> bool:
        try:
            return bool(admin(self.settings.kafka_bootstrap).list_topics(timeout=2.0).brokers)
        except KafkaException:
            return False

    def _explain(self, name: str, what: str) -> str:
        log = self.log_file(name)
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
        return "\n".join([f"{name} {what}; the end of {log}:", *(f"    {line}" for line in lines)])

    def _stop_part(self, name: str, grace_s: float) -> bool:
        """Ends a process and all that it started. Returns whether there was anything to end."""
        leader = self._leader(name)
        found = leader is not None
        if leader:
            # The leader alone: it ends its children in its own order.
            with contextlib.suppress(psutil.NoSuchProcess):
                leader.send_signal(signal.SIGTERM)
            self._wait_until(lambda: self._leader(name) is None, grace_s)
            self._wait_until(lambda: not self._members(name), CHILDREN_GRACE_S if self._leader(name) is None else 0.0)
        left = self._members(name)
        while left:
            found = True
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._wait_until(lambda: not self._members(name), 1.0)
            left = self._members(name)
        child = self._children.pop(name, None)
        if child:
            child.wait()
        self._pid_file(name).unlink(missing_ok=True)
        self._ready_file(name).unlink(missing_ok=True)
        return found

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _state(self, name: str) -> PartState:
        port = next(iter(self.settings.ports(name).values()), None)
        leader = self._leader(name)
        if leader is None:
            return PartState(name, "died" if self._pid_file(name).exists() else "stopped", port=port)
        memory = 0
        for process in self._members(name):
            with contextlib.suppress(psutil.Error):
                memory += process.memory_info().rss
        state = "running" if name == SUPERVISOR or self._is_ready(name) else "starting"
        return PartState(name, state, leader.pid, leader.create_time(), port, memory)

    def _leader(self, name: str) -> psutil.Process | None:
        """The process that the pid file names, where it is alive and ours."""
        try:
            process = psutil.Process(json.loads(self._pid_file(name).read_text())["pid"])
        except (OSError, ValueError, KeyError, psutil.Error):
            return None
        return process if self._is_living_part(process, name) else None

    def _members(self, name: str) -> list[psutil.Process]:
        """The living processes of this part: the leader and whatever it started."""
        return [process for process in psutil.process_iter() if self._is_living_part(process, name)]

    def _is_living_part(self, process: psutil.Process, name: str) -> bool:
        child = self._children.get(name)
        if child and child.pid == process.pid:
            return child.poll() is None  # not by its mark: for a moment after its start a process shows no environment
        try:
            return bool(process.environ().get(MARK) == self._mark(name) and process.status() != psutil.STATUS_ZOMBIE)
        except (OSError, psutil.Error):
            return False

    def _mark(self, name: str) -> str:
        return f"{name}@{self.home}"

    def _pid_file(self, name: str) -> Path:
        return self.home / "run" / f"{name}.pid"

    def _ready_file(self, name: str) -> Path:
        return self.home / "run" / f"{name}.ready"


def asked_for(cluster: bool, critical: bool) -> tuple[str, ...]:
    """The processes of a stack, in the order of starting."""
    wanted = {*NAMES, *(CLUSTER if cluster else ()), *((CRITICAL,) if critical else ())}
    return tuple(name for name in ALL if name in wanted)


def _in_order(names: Iterable[str]) -> list[str]:
    wanted = set(names)
    unknown = wanted - set(ALL)
    if unknown:
        message = f"no such process: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}"
        raise ConfigError(message)
    return [name for name in ALL if name in wanted]


def _java() -> str:
    """The Java that set-up brought, where it brought one, else the machine's, as Spark chooses it."""
    own = ENVIRONMENT / "java" / "bin" / "java"
    if own.exists():
        return str(own)
    home = os.environ.get("JAVA_HOME")
    return str(Path(home) / "bin" / "java") if home else "java"


def _kafka_jars() -> Path:
    return ENVIRONMENT / "jars" / "kafka"


def _is_formatted(logs: Path) -> bool:
    return (logs / "meta.properties").exists()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a connection of an earlier run that still winds down is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _user_of(port: int) -> str:
    """Who listens there, where the system lets us see it."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                part, _, other = process.environ().get(MARK, "").partition("@")
                stack = f", {part} of the stack in {other}" if other else ""
                return f" by {process.name()} (pid {connection.pid}{stack})"
    return ""


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def got(port: int, path: str, timeout_s: float = 1.0) -> bytes | None:
    """What a process of ours answers over HTTP, if it does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def waiting_in_broker(monitor_port: int) -> int:
    """Messages that the MQTT broker holds: not delivered yet, or delivered and not acknowledged.

    Raises:
        RetryLater: the broker does not say.
    """
    told = got(monitor_port, "/jsz?streams=true", timeout_s=5.0)
    if told is None:
        msg = f"the MQTT broker's monitor does not answer at port {monitor_port}"
        raise RetryLater(msg)
    return sum(
        stream["state"]["messages"]
        for account in json.loads(told).get("account_details", [])
        for stream in account.get("stream_detail", [])
        if stream["name"] == "$MQTT_msgs"
    )


def left_on_the_way(settings: StackSettings, wanted: int) -> tuple[int, int]:
    """Records that Kafka lacks of so many, and messages that the MQTT broker holds.

    Raises:
        RetryLater: one of the two does not say.
    """
    in_kafka = received(settings.kafka_bootstrap, INGESTED)
    return max(0, wanted - in_kafka), waiting_in_broker(settings.nats_monitor_port)


def let_through(settings: StackSettings, on_progress: Callable[[str], None]) -> None:
    """Waits until Kafka has what the MQTT broker holds now; what comes meanwhile is not waited for.

    Where nothing moves for a minute, or the broker does not say, that is said, and the waiting ends.
    """
    try:
        held = waiting_in_broker(settings.nats_monitor_port)
        wanted = received(settings.kafka_bootstrap, INGESTED) + held
        if held:
            on_progress(f"the bridge carries {held:,} messages that the MQTT broker holds")
        moved, before = time.monotonic(), -1
        while (left := min(left_on_the_way(settings, wanted))) > 0:
            if left != before:
                moved, before = time.monotonic(), left
            elif time.monotonic() - moved > STANDSTILL_S:
                on_progress(f"{left:,} messages stay in the MQTT broker: they come at the next start, late")
                return
            time.sleep(LOOK_S)
    except RetryLater as error:
        on_progress(f"what the MQTT broker holds stays there: {error}")


def _is_healthy(monitor_port: int) -> bool:
    return got(monitor_port, "/healthz") is not None


def _alive_workers(master_ui_port: int) -> int | None:
    told = got(master_ui_port, "/json/")
    return None if told is None else int(json.loads(told)["aliveworkers"])


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds back what ends a command while processes are being stopped: half a stop would leave some behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
