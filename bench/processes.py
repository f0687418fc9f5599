"""Processes of a replay's bench: a broker of its own, and commands that are measured from their start to their end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.plan import Plan
from schemas.errors import RetryLater

if TYPE_CHECKING:
    from stack.settings import StackSettings

ROOT = Path(__file__).resolve().parent.parent
TIMED = Path(__file__).parent / "timed.py"

progress = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Took:
    """What a command took."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: str


@contextmanager
def own_stack(plan: Plan, part: str) -> Iterator[tuple["StackSettings", dict[str, str], Callable[[], float]]]:
    """One process of a stack of our own; gives its settings, its clients' environment and the CPU time it has used.

    Raises:
        RetryLater: it does not start, or has died.
    """
    import psutil

    from stack.isolated import environment, own_settings
    from stack.native import NativeStack

    folder = plan.folder / part
    settings = own_settings(folder)
    stack = NativeStack(settings, on_progress=lambda line: progress.print(f"  {line}"))

    def cpu_s() -> float:
        pid = stack.pid(part)
        if pid is None:
            msg = f"{part} has died: see {stack.log_file(part)}"
            raise RetryLater(msg)
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)

    try:
        stack.start([part])
        yield settings, {**os.environ, **environment(settings)}, cpu_s
    finally:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


def replayed(
    plan: Plan, environment: dict[str, str], run_id: str, meters: int, to: str, *more: str
) -> tuple[Took, dict[str, Any]]:
    """A run of the replay in a process of its own, and its ledger."""
    command = [
        sys.executable, "-m", "replay", "run", "--tape", str(plan.tape.resolve()), "--meters", str(meters),
        "--duration", f"{plan.duration.total_seconds():.0f}s", "--speed", "max", "--to", to, "--run-id", run_id,
        "--pace", "open", "--json", *more,
    ]  # fmt: skip
    home = plan.folder / run_id  # of its own: the meters of all runs have the same names
    took = timed(plan, command, {**environment, "METERSTREAM_HOME": str(home)})
    shutil.rmtree(home)
    return took, json.loads(took.output.strip().splitlines()[-1])


def timed(plan: Plan, command: list[str], environment: dict[str, str], stdin: Path | None = None) -> Took:
    """Runs a command to its end, measured from outside; whatever happens, nothing of it is left.

    Raises:
        RetryLater: it failed; with the end of what it said.
    """
    result, out, problems = (plan.folder / name for name in ("took.json", "out.txt", "problems.txt"))
    with open(stdin or os.devnull) as given, out.open("w") as said, problems.open("w") as complained:
        process = subprocess.Popen(
            [sys.executable, "-I", str(TIMED), str(result), *command],
            cwd=ROOT, env=environment, stdin=given, stdout=said, stderr=complained, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        end = "\n".join((out.read_text() + problems.read_text()).splitlines()[-15:])
        msg = f"{' '.join(command[:8])} … ended with {code}:\n{end}"
        raise RetryLater(msg)
    return Took(**json.loads(result.read_text()), output=out.read_text())
