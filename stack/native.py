"""The stack as native processes of this machine; in a container, one of its processes becomes this one."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from schemas.errors import ConfigError, RetryLater
from stack.backlog import FLUSH_GRACE_S, FLUSHING, NOT_FLUSHED, NOT_READY, let_through
from stack.parts import (
    CLUSTER,
    CRITICAL_EVENTS,
    INGEST,
    NATS,
    PARTS,
    STREAMING,
    SUPERVISOR,
    SUPERVISOR_GRACE_S,
    Part,
    PartState,
    asked_for,
    in_order,
    master_address,
    nats_server,
    store_variables,
)
from stack.ports import is_free, user_of
from stack.processes import POLL_S, Processes, StartFailed, uninterrupted, wait_until
from stack.settings import StackSettings, remember

FAILED_START_GRACE_S = 5.0
"""What has not become ready has nothing worth a longer wait."""
PORT_GRACE_S = 1.0
"""A killed process's threads hold its ports for some milliseconds after it counts as dead."""


class NativeStack:
    """One stack in one home folder; any process may look at it, start it or stop it.

    Args:
        settings: home and ports.
        on_progress: gets a line for people when a process becomes ready or is stopped.
        cluster: run the jobs on a Spark master and two workers of our own.
        critical: publish critical events too.
    """

    def __init__(
        self,
        settings: StackSettings,
        on_progress: Callable[[str], None] = lambda _: None,
        cluster: bool = False,
        critical: bool = False,
    ) -> None:
        self.settings = settings
        self.home = settings.folder
        self.names = asked_for(cluster, critical, settings.has_own_store)
        self._own_master = master_address(settings) if cluster else ""
        self._on_progress = on_progress
        self._processes = Processes(self.home)

    def start(self, names: Iterable[str] | None = None) -> list[str]:
        """Starts what does not run yet, in order, each once the one before is ready.

        Args:
            names: of the parts; all of this stack's if None.

        Returns:
            The names that were started.

        Raises:
            ConfigError: a port is somebody else's, or a program is missing; nothing was started.
            StartFailed: a process died or did not become ready; what this call started is stopped again.
        """
        wanted = in_order(names or self.names)
        with self._locked():
            missing = [name for name in wanted if not self.is_running(name)]
            for name in missing:
                self._processes.end(name, 0.0)  # Spark's JVM outlives a killed driver, and must not meet the next one
            self._check(missing)
            if missing:
                runs = set(self.names) | {name for name in PARTS if self._processes.pid_file(name).exists()}
                remember(self.settings, "native", bool(runs & set(CLUSTER)), CRITICAL_EVENTS.name in runs)
            started: list[str] = []
            try:
                for name in wanted:
                    before = time.monotonic()
                    if name in missing:
                        started.append(name)
                        self._spawn(PARTS[name])
                    self._wait_ready(PARTS[name])
                    if name in missing:
                        self._on_progress(f"{name} ready in {time.monotonic() - before:.1f} s")
            except BaseException:
                with uninterrupted():
                    for name in reversed(started):
                        self._processes.end(name, FAILED_START_GRACE_S)
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
        asked = flush and self.is_running(STREAMING.name)
        if asked and not self._is_ready(STREAMING):
            raise RetryLater(NOT_READY)
        with uninterrupted() as interruptible:  # from the supervisor's end on: nobody would look after what is left
            stopped = [SUPERVISOR] if self._processes.end(SUPERVISOR, SUPERVISOR_GRACE_S) else []
            with self._locked():
                if asked:
                    if self.is_running(NATS.name) and self.is_running(INGEST.name):
                        with interruptible():
                            let_through(self.settings, self._on_progress)
                    with interruptible():
                        self._flush()
                for name in reversed(PARTS):
                    if self._processes.end(name, PARTS[name].stop_grace_s):
                        stopped.append(name)
                        with contextlib.suppress(OSError):  # the terminal may be gone
                            self._on_progress(f"{name} stopped")
        if asked and not (self.home / "run" / "streaming.flushed").exists():
            raise RetryLater(NOT_FLUSHED)
        return stopped

    def _flush(self) -> None:
        """Lets the jobs come to their end, as long as it takes; Ctrl-C ends the waiting."""
        driver = self._processes.leader(STREAMING.name)
        if driver is None:
            return
        self._on_progress(FLUSHING)
        with contextlib.suppress(psutil.NoSuchProcess):
            driver.send_signal(signal.SIGUSR1)
            driver.send_signal(signal.SIGTERM)
        wait_until(lambda: not self.is_running(STREAMING.name), FLUSH_GRACE_S)

    def stop_part(self, name: str, grace_s: float | None = None) -> None:
        """Stops one process; by default with its usual grace.

        Args:
            name: of the process, or of the supervisor, which would start the others again.
            grace_s: how long it may take to end by itself.
        """
        if name == SUPERVISOR:
            self._processes.end(name, SUPERVISOR_GRACE_S)
            return
        with self._locked():
            self._processes.end(name, PARTS[name].stop_grace_s if grace_s is None else grace_s)

    def restart(self, name: str) -> None:
        """Stops one process, if it runs, and starts it again."""
        self.stop_part(name)
        self.start([name])

    def is_running(self, name: str) -> bool:
        """Whether the process is alive, ready or not."""
        return self._processes.leader(name) is not None

    def dead(self, names: Iterable[str] | None = None) -> list[str]:
        """Which of these do not run."""
        return [name for name in in_order(names or self.names) if not self.is_running(name)]

    def pid(self, name: str) -> int | None:
        """Process id, where it is alive."""
        leader = self._processes.leader(name)
        return leader.pid if leader else None

    def log_file(self, name: str) -> Path:
        """Where the process's output goes."""
        return self._processes.log_file(name)

    def states(self) -> list[PartState]:
        """What runs, for people and monitors."""
        used = [name for name in PARTS if name in self.names or self._processes.pid_file(name).exists()]
        return [self._state(name) for name in (*used, SUPERVISOR)]

    def start_supervisor(self, names: Iterable[str] | None = None) -> None:
        """Leaves a process behind that starts dead ones again: these, and those that one before it looked after."""
        with self._locked():
            wanted, before = set(in_order(names or self.names)), set[str]()
            if supervisor := self._processes.leader(SUPERVISOR):
                before = set(supervisor.cmdline()) & set(PARTS)
                if wanted <= before:
                    return
                self._processes.end(SUPERVISOR, SUPERVISOR_GRACE_S)
            whole = in_order(wanted | before)
            is_cluster = bool(set(CLUSTER) & set(whole))
            master = {"METERSTREAM_SPARK_MASTER": master_address(self.settings)} if is_cluster else {}
            self._launch(SUPERVISOR, [sys.executable, "-m", "stack", "supervise", *whole], master)

    def become(self, name: str) -> NoReturn:
        """Turns this process into one of the stack, in the foreground: a container's whole life."""
        part = PARTS[name]
        self._processes.make_folders()
        self._processes.ready_file(name).unlink(missing_ok=True)
        command, environment = self._prepared(part)
        os.chdir(self.home / "tmp")
        os.execvpe(command[0], command, {**os.environ, "TMPDIR": str(self.home / "tmp"), **environment})

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
        for variable, port in (item for name in self.names for item in PARTS[name].ports(self.settings).items()):
            if port in taken:
                wrong.append(f"port {port} is wanted twice: by {taken[port]} and by {variable}")
            taken[port] = variable
        needed = [item for name in names for item in PARTS[name].ports(self.settings).items()]
        wait_until(lambda: all(is_free(port) for _, port in needed), PORT_GRACE_S)
        for variable, port in needed:
            if not is_free(port):
                wrong.append(f"port {port} is in use{user_of(port)}; set {variable} to a free one")
        wrong += [sentence for name in names for sentence in PARTS[name].missing(self.settings)]
        if wrong:
            raise ConfigError("; ".join(wrong))

    def _spawn(self, part: Part) -> None:
        command, environment = self._prepared(part)
        self._launch(part.name, command, environment)

    def _prepared(self, part: Part) -> tuple[list[str], dict[str, str]]:
        """What a part is started with, and what is special in its environment, once its home has what it needs."""

        def run(command: list[str], what_failed: str) -> None:
            if self._launch(part.name, command, {}).wait():
                raise StartFailed(self._processes.explained(part.name, what_failed))

        part.prepare(self.settings, run)
        return part.command(self.settings, self._own_master), part.environment(self.settings, self._own_master)

    def _launch(self, name: str, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        ports = {variable: port for part in PARTS.values() for variable, port in part.ports(self.settings).items()}
        everything = {
            **os.environ,
            "METERSTREAM_HOME": str(self.home),
            "METERSTREAM_KAFKA_BOOTSTRAP": self.settings.kafka_bootstrap,
            "METERSTREAM_MQTT_HOST": "127.0.0.1",
            **{variable: str(port) for variable, port in ports.items()},
            "METERSTREAM_NATS_SERVER": nats_server(self.settings),
            **store_variables(self.settings),
            "TMPDIR": str(self.home / "tmp"),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        return self._processes.launch(name, command, everything)

    def _wait_ready(self, part: Part) -> None:
        deadline = time.monotonic() + part.start_timeout_s
        while not self._is_ready(part):
            if not self.is_running(part.name):
                raise StartFailed(self._processes.explained(part.name, "died while starting"))
            if time.monotonic() > deadline:
                what = f"was not ready after {part.start_timeout_s:.0f} s"
                raise StartFailed(self._processes.explained(part.name, what))
            time.sleep(POLL_S)
        try:
            part.once_ready(self.settings)
        except StartFailed as error:
            raise StartFailed(self._processes.explained(part.name, str(error))) from error

    def _is_ready(self, part: Part) -> bool:
        return self._processes.says_ready(part.name) if part.is_ready is None else part.is_ready(self.settings)

    def _state(self, name: str) -> PartState:
        part = PARTS.get(name)  # None: the supervisor
        port = part.client_port(self.settings) if part else None
        leader = self._processes.leader(name)
        if leader is None:
            return PartState(name, "died" if self._processes.pid_file(name).exists() else "stopped", port=port)
        memory = 0
        for process in self._processes.members(name):
            with contextlib.suppress(psutil.Error):
                memory += process.memory_info().rss
        state = "running" if part is None or self._is_ready(part) else "starting"
        return PartState(name, state, leader.pid, leader.create_time(), port, memory)
