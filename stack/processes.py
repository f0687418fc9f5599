"""Processes of a home: starting one in a session of its own, finding it again, ending it with all that it started.

A process is known by a mark in its environment, which its own children inherit: whatever process of a stack is left,
and whoever started it, `stop` finds it, and a recycled pid is never taken for one of ours.
"""

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil

from schemas.errors import MeterstreamError

MARK = "METERSTREAM_STACK_PART"
CHILDREN_GRACE_S = 5.0
"""Spark's JVM and Python workers end by themselves soon after their driver."""
POLL_S = 0.05
LOG_TAIL_LINES = 15


class StartFailed(MeterstreamError):
    """A process of the stack did not become ready; the text has the end of its log."""


class Processes:
    """The processes of one home, each by the name of its part.

    Args:
        home: absolute path of the stack's home.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def make_folders(self) -> None:
        """Makes the folders that each process needs."""
        for folder in ("run", "logs", "tmp"):
            (self._home / folder).mkdir(parents=True, exist_ok=True)

    def launch(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a process in a session of its own, its output appended to its log.

        Args:
            name: of its part.
            command: program and arguments.
            environment: all of it, but for the mark.
        """
        self.make_folders()
        self.ready_file(name).unlink(missing_ok=True)
        with self.log_file(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                # Not the home itself: its folders are called as our packages are, and Python looks there first.
                cwd=self._home / "tmp",
                env={**environment, MARK: self._mark(name)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[name] = process
        self.pid_file(name).write_text(json.dumps({"pid": process.pid, "started": time.time()}))
        return process

    def end(self, name: str, grace_s: float) -> bool:
        """Ends a process and all that it started.

        Args:
            name: of its part.
            grace_s: how long it may take to end by itself after SIGTERM.

        Returns:
            Whether there was anything to end.
        """
        leader = self.leader(name)
        found = leader is not None
        if leader:
            # The leader alone: it ends its children in its own order.
            with contextlib.suppress(psutil.NoSuchProcess):
                leader.send_signal(signal.SIGTERM)
            wait_until(lambda: self.leader(name) is None, grace_s)
            wait_until(lambda: not self.members(name), CHILDREN_GRACE_S if self.leader(name) is None else 0.0)
        left = self.members(name)
        while left:
            found = True
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            wait_until(lambda: not self.members(name), 1.0)
            left = self.members(name)
        child = self._children.pop(name, None)
        if child:
            child.wait()
        self.pid_file(name).unlink(missing_ok=True)
        self.ready_file(name).unlink(missing_ok=True)
        return found

    def leader(self, name: str) -> psutil.Process | None:
        """The process that the pid file names, where it is alive and ours."""
        try:
            process = psutil.Process(json.loads(self.pid_file(name).read_text())["pid"])
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None
        return process if self._is_living_part(process, name) else None

    def members(self, name: str) -> list[psutil.Process]:
        """The living processes of a part: the leader and whatever it started."""
        return [process for process in psutil.process_iter() if self._is_living_part(process, name)]

    def says_ready(self, name: str) -> bool:
        """Whether the leader has written its process id into its ready file."""
        leader = self.leader(name)
        try:
            return leader is not None and int(self.ready_file(name).read_text()) == leader.pid
        except (OSError, ValueError):
            return False

    def explained(self, name: str, what: str) -> str:
        """A sentence about a process, with the end of its log."""
        log = self.log_file(name)
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
        return "\n".join([f"{name} {what}; the end of {log}:", *(f"    {line}" for line in lines)])

    def log_file(self, name: str) -> Path:
        """Where the process's output goes."""
        return self._home / "logs" / f"{name}.log"

    def pid_file(self, name: str) -> Path:
        """Has the leader's process id, from its start until it is ended."""
        return self._home / "run" / f"{name}.pid"

    def ready_file(self, name: str) -> Path:
        """Has the process id of a part that writes by itself that it is ready."""
        return self._home / "run" / f"{name}.ready"

    def _is_living_part(self, process: psutil.Process, name: str) -> bool:
        child = self._children.get(name)
        if child and child.pid == process.pid:
            return child.poll() is None  # not by its mark: for a moment after its start a process shows no environment
        try:
            return bool(process.environ().get(MARK) == self._mark(name) and process.status() != psutil.STATUS_ZOMBIE)
        except (OSError, psutil.Error):
            return False

    def _mark(self, name: str) -> str:
        return f"{name}@{self._home}"


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Waits until something holds, at most so long."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S)


@contextlib.contextmanager
def uninterrupted() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Holds back what ends a command while processes are being stopped: half a stop would leave some behind.

    Gives a context in which Ctrl-C works again, for what may be cut short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ends}

    @contextlib.contextmanager
    def interruptible() -> Iterator[None]:
        for number, handler in before.items():
            signal.signal(number, handler)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                yield
        finally:
            for number in ends:
                signal.signal(number, signal.SIG_IGN)

    try:
        yield interruptible
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
