"""Stores that tests run on: the home itself, a real S3 server beside it, a real HDFS."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lake.store import aws_variables
from settings import OWN_STORE
from stack.isolated import own_settings
from stack.native import NativeStack
from stack.parts import S3, S3_SERVER
from stack.settings import ROOT
from tests.hdfs_server import hdfs

KINDS = ("home", "s3", "hdfs")
"""Kinds of stores; the last two are there for whoever asks from another machine, the last for long tests."""


@dataclass
class Place:
    """Where stores can be made.

    Attributes:
        url: of them all; empty: each is in its own home.
        variables: of the environment, by which they are opened.
        stack: that has the server.
    """

    url: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    stack: NativeStack | None = None

    def store(self, home: Path) -> str:
        """URL of a store that nobody else has."""
        return f"{self.url}/{home.name}" if self.url else f"file://{home}"


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    """A place of a kind, while it holds; this process opens its stores, too.

    Args:
        kind: home, folder (beside the homes), s3 or hdfs.
        folder: of the server, where there is one.
    """
    if kind == "home":
        yield Place()
        return
    if kind == "folder":
        yield Place(f"file://{folder}")
        return
    if kind == "hdfs":
        with hdfs(folder) as nodes:
            yield Place(nodes.url)
        return
    if not S3_SERVER.exists():
        subprocess.run([sys.executable, ROOT / "tools" / "setup.py", "s3"], check=True)
    stack = NativeStack(own_settings(folder, OWN_STORE))
    with pytest.MonkeyPatch.context() as patch:
        try:
            stack.start([S3.name])
            patch.setenv("METERSTREAM_HOME", str(folder))
            variables = aws_variables(OWN_STORE)
            patch.undo()
            for name, value in variables.items():
                patch.setenv(name, value)
            yield Place(OWN_STORE, variables, stack)
        finally:
            stack.stop()
