"""The same stack in containers: what `NativeStack` does with processes, done with docker-compose.yml."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from schemas.errors import ConfigError, RetryLater
from settings import started_file
from stack.backlog import FLUSH_GRACE_S, FLUSHING, NOT_FLUSHED, NOT_READY, let_through
from stack.parts import (
    ALWAYS,
    CRITICAL_EVENTS,
    INGEST,
    NATS,
    PARTS,
    S3,
    STREAMING,
    SUPERVISOR,
    PartState,
    asked_for,
    store_variables,
)
from stack.processes import LOG_TAIL_LINES, StartFailed
from stack.settings import ROOT, StackSettings, remember

START_TIMEOUT_S = 240.0
ANSWER_S = 20.0
POLL_S = 0.5
IMAGE_FAILED = "the image could not be built"
EVERY_PROFILE = ["--profile", "cluster", "--profile", "critical", "--profile", "s3"]
S3_KEYS = {"ACCESS_KEY": "ACCESS_KEY_ID", "SECRET_KEY": "SECRET_ACCESS_KEY"}
S3_INSIDE = 7070
"""The port of the stack's own S3 server for the other containers."""
COMPOSE_STATES = {"running": "running", "restarting": "died", "exited": "stopped", "created": "stopped"}


def engine() -> list[str] | None:
    """Compose's command where a Docker engine answers, else None."""
    docker = shutil.which("docker")
    if not docker or not _works([docker, "info"]):
        return None
    if _works([docker, "compose", "version"]):
        return [docker, "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=ANSWER_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class ContainerStack:
    """One stack as a compose project.

    Args:
        settings: home, published ports and compose's project; the data lie in the project's volumes.
        on_progress: gets a line for people when a container becomes ready or is stopped.
        cluster: run the jobs on a Spark master and two workers.
        critical: publish critical events too.

    Raises:
        ConfigError: no engine answers, or there is no compose.
    """

    def __init__(
        self,
        settings: StackSettings,
        on_progress: Callable[[str], None] = lambda _: None,
        cluster: bool = False,
        critical: bool = False,
    ) -> None:
        compose = engine()
        if compose is None:
            msg = (
                "no Docker engine answers, or it has no compose: start one (tools/engine.sh start, on Debian), "
                "or use MODE=native"
            )
            raise ConfigError(msg)
        self.settings = settings
        self.home = settings.folder
        self.project = settings.project
        self.names = asked_for(cluster, critical, settings.has_own_store)
        self._cluster = cluster
        asked = {"cluster": cluster, "critical": critical, "s3": settings.has_own_store}
        self._profiles = [part for profile, is_asked in asked.items() if is_asked for part in ("--profile", profile)]
        self._docker = str(shutil.which("docker"))
        self._compose = [*compose, "--project-directory", str(ROOT), "-f", str(ROOT / "docker-compose.yml")]
        self._on_progress = on_progress

    def build(self) -> None:
        """Builds the image; where nothing changed that takes a second.

        Raises:
            StartFailed: it cannot be built.
        """
        before = time.monotonic()
        self._do(["build", NATS.name, *([S3.name] if self.settings.has_own_store else [])], IMAGE_FAILED)
        self._on_progress(f"image ready in {time.monotonic() - before:.1f} s")

    def start(self, names: Iterable[str] | None = None) -> list[str]:
        """Starts what does not run yet and waits until all of it is ready.

        Raises:
            ConfigError: there is no such container.
            StartFailed: a container died or did not become ready; its last lines are in the text.
        """
        wanted = [name for name in self.names if names is None or name in set(names)]
        if unknown := sorted(set(names or ()) - set(wanted)):
            msg = f"no such process: {', '.join(unknown)}; there are {', '.join(self.names)}"
            raise ConfigError(msg)
        running = {name for name in wanted if self.is_running(name)}
        before = time.monotonic()
        remember(self.settings, "docker", self._cluster, CRITICAL_EVENTS.name in self.names)
        self._do(["up", "-d", *wanted], "the containers could not be started")
        for name in wanted:
            while (state := self._state(name).state) != "running":
                if state in ("died", "stopped") or time.monotonic() - before > START_TIMEOUT_S:
                    raise StartFailed(self._explain(name, "is not ready" if state == "starting" else state))
                time.sleep(POLL_S)
            if name not in running:
                self._on_progress(f"{name} ready after {time.monotonic() - before:.1f} s")
        return [name for name in wanted if name not in running]

    def start_supervisor(self, _: Iterable[str] | None = None) -> None:
        """Nothing to do: the engine brings back what dies."""

    def stop(self, flush: bool = False) -> list[str]:
        """Stops and removes the containers; the volumes stay.

        Args:
            flush: the jobs first take what Kafka has and close what is open.

        Raises:
            RetryLater: a flush was asked for and the jobs are not ready, then nothing is stopped; or it did not come to
                its end, then everything is.
        """
        running = [name for name in PARTS if self.is_running(name)]
        is_flushed = True
        if flush and STREAMING.name in running:
            if self._state(STREAMING.name).state != "running":
                raise RetryLater(NOT_READY)
            if {NATS.name, INGEST.name} <= set(running):
                let_through(self.settings, self._on_progress)
            self._do(["kill", "-s", "SIGUSR1", STREAMING.name], "the jobs could not be asked to flush")
            self._on_progress(FLUSHING)
            self.stop_part(STREAMING.name, FLUSH_GRACE_S)
            is_flushed = self._inspect(STREAMING.name).get("State", {}).get("ExitCode") == 0
        self._do([*EVERY_PROFILE, "down", "--remove-orphans"], "the containers could not be stopped")
        if not is_flushed:
            raise RetryLater(NOT_FLUSHED)
        return running

    def clean(self) -> None:
        """Removes the containers and all data."""
        self._do([*EVERY_PROFILE, "down", "--volumes", "--remove-orphans"], "the data could not be removed")
        started_file(self.home).unlink(missing_ok=True)

    def stop_part(self, name: str, grace_s: float | None = None) -> None:
        """Stops one container; the engine leaves it stopped."""
        if name != SUPERVISOR:
            self._do(["stop", *(["-t", f"{grace_s:.0f}"] if grace_s else []), name], f"{name} could not be stopped")

    def kill(self, name: str) -> None:
        """Kills a container's process at once; the engine leaves it dead until `start`."""
        self._do(["kill", "-s", "SIGKILL", name], f"{name} could not be killed")

    def is_running(self, name: str) -> bool:
        """Whether the container is alive, ready or not."""
        return self._state(name).state in ("running", "starting")

    def states(self) -> list[PartState]:
        """What runs, for people and monitors."""
        return [self._state(name) for name in PARTS if name in self.names or self._container(name)]

    def run(self, service: str, arguments: Sequence[str], mounts: dict[str, str] | None = None) -> str:
        """Runs a service once, in the foreground. Returns what it printed.

        Raises:
            StartFailed: it ended with an error.
        """
        volumes = [part for ours, theirs in (mounts or {}).items() for part in ("-v", f"{ours}:{theirs}:ro")]
        command = ["run", "--rm", "-T", *volumes, service, *arguments]
        return self._do(command, f"{service} failed", show_errors=True)

    def attached(self, service: str, arguments: Sequence[str]) -> int:
        """Runs a service once, on this terminal, with the code as it is. Returns its exit code."""
        self._do(["build", NATS.name], IMAGE_FAILED)
        command = [*self._compose, "run", "--rm", *([] if sys.stdout.isatty() else ["-T"]), service, *arguments]
        return subprocess.run(command, check=False, env=self._environment(), cwd=ROOT).returncode

    def collect(self) -> None:
        """Copies the lake's volume into the home folder, for whoever looks at it from outside."""
        for folder in ("lake", "runs", "state"):  # what is gone in the volume must not stay here
            shutil.rmtree(self.home / folder, ignore_errors=True)
        self.home.mkdir(parents=True, exist_ok=True)
        container = self._container(INGEST.name)
        subprocess.run([self._docker, "cp", f"{container}:/data/.", str(self.home)], check=True, capture_output=True)

    def logs(self, names: Sequence[str], lines: int, follow: bool) -> None:
        """Shows the end of the containers' output."""
        command = [*self._compose, *EVERY_PROFILE, "logs", "--tail", str(lines), *(["-f"] if follow else []), *names]
        subprocess.run(command, check=False, env=self._environment(), cwd=ROOT)

    def _environment(self) -> dict[str, str]:
        settings = self.settings
        ports = {
            variable: str(port) for name in (*ALWAYS, S3.name) for variable, port in PARTS[name].ports(settings).items()
        }
        master = {"METERSTREAM_SPARK_MASTER": "spark://spark-master:7077"} if self._cluster else {}
        store = store_variables(settings, f"http://{S3.name}:{S3_INSIDE}")
        if settings.has_own_store:
            store |= {f"METERSTREAM_S3_{name}": store[f"AWS_{full}"] for name, full in S3_KEYS.items()}
        # the older compose would take the newer builder from its own docker only
        own = {**ports, **master, **store, "COMPOSE_PROJECT_NAME": self.project, "COMPOSE_DOCKER_CLI_BUILD": "0"}
        return {**os.environ, **own}

    def _do(self, arguments: list[str], what: str, show_errors: bool = False) -> str:
        profiles = [] if arguments[0] == "--profile" else self._profiles
        done = subprocess.run(
            [*self._compose, *profiles, *arguments],
            check=False, env=self._environment(), cwd=ROOT, stdin=subprocess.DEVNULL, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=None if show_errors else subprocess.PIPE,
        )  # fmt: skip
        if done.returncode:
            last_lines = (done.stdout + (done.stderr or "")).splitlines()[-LOG_TAIL_LINES:]
            raise StartFailed("\n".join([f"{what}:", *(f"    {line}" for line in last_lines)]))
        return done.stdout

    def _container(self, name: str) -> str:
        """Id of a service's container, running or not; empty where there is none."""
        labels = [f"label=com.docker.compose.project={self.project}", f"label=com.docker.compose.service={name}"]
        command = [self._docker, "ps", "-aq", "--no-trunc"]
        command += [
            part for label in (*labels, "label=com.docker.compose.oneoff=False") for part in ("--filter", label)
        ]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        if done.returncode:
            msg = f"the engine does not answer any more: {done.stderr.strip()}"
            raise StartFailed(msg)
        return done.stdout.strip()

    def _inspect(self, name: str) -> dict[str, Any]:
        container = self._container(name)
        if not container:
            return {}
        done = subprocess.run([self._docker, "inspect", container], capture_output=True, check=False, text=True)
        return dict(json.loads(done.stdout)[0]) if done.returncode == 0 else {}

    def _state(self, name: str) -> PartState:
        port = PARTS[name].client_port(self.settings)
        found = self._inspect(name).get("State")
        if not found:
            return PartState(name, "stopped", port=port)
        state = COMPOSE_STATES.get(found["Status"], "died")
        if state == "running" and found.get("Health", {}).get("Status", "healthy") != "healthy":
            state = "starting"
        elif state == "stopped" and found["ExitCode"]:
            state = "died"
        since = datetime.fromisoformat(found["StartedAt"][:19] + "+00:00").timestamp() if state != "stopped" else None
        return PartState(name, state, found["Pid"] or None, since, port)

    def _explain(self, name: str, what: str) -> str:
        command = [*self._compose, *EVERY_PROFILE, "logs", "--no-color", "--tail", str(LOG_TAIL_LINES), name]
        done = subprocess.run(command, check=False, env=self._environment(), cwd=ROOT, capture_output=True, text=True)
        return "\n".join([f"{name} {what}; the end of its log:", *(f"    {line}" for line in done.stdout.splitlines())])
