"""Programs and jars that a bench needs beyond the set-up: the Java that is there, the rest fetched the first time."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from schemas.errors import ConfigError, RetryLater
from tools import setup

ROOT = Path(__file__).resolve().parent.parent


def java_program() -> str:
    """The Java that set-up brought, else the machine's.

    Raises:
        ConfigError: there is none.
    """
    java = str(setup.OWN_JAVA) if setup.OWN_JAVA.exists() else setup.system_java()
    if java is None:
        msg = "no Java found: run make setup"
        raise ConfigError(msg)
    return java


@contextmanager
def setting_up() -> Iterator[None]:
    """For what is fetched or installed the first time: one at a time, its progress beside the results.

    Raises:
        RetryLater: it failed.
    """
    try:
        with setup.only_one_at_a_time(), redirect_stdout(sys.stderr):
            yield
            shutil.rmtree(setup.VENV / "tmp", ignore_errors=True)
    except setup.SetupFailed as failure:
        raise RetryLater(str(failure)) from failure


def producer_jars() -> Path:
    """Folder of ProducerPerformance's class path, fetched the first time.

    Raises:
        RetryLater: Ivy failed.
    """
    module = ROOT / "bench" / "ivy.xml"
    with setting_up():
        setup.step("Bench jars", setup.digest(module.read_bytes()),
                   lambda show: setup.fetch_jars(java_program(), module, ("bench",), show))  # fmt: skip
    return setup.JARS / "bench"
