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

AS_FILES = ("home", "s3")
"""Kinds of stores whose objects are files under their names, for whoever looks at them from outside."""


@dataclass
class Place:
    """Where stores can be made.

    Attributes:
        url: of them all; empty: each is in its own home.
        folder: where the S3 server keeps its objects, each a file under its name.
        variables: of the environment, by which they are opened.
        stack: that has the server.
    """

    url: str = ""
    folder: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)
    stack: NativeStack | None = None

    def store(self, home: Path) -> str:
        """URL of a store that nobody else has."""
        return f"{self.url}/{home.name}" if self.url else f"file://{home}"

    def files(self, home: Path) -> Path:
        """The folder in which the objects of that store are files."""
        return self.folder / home.name if self.folder else home


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    """A place of a kind, while it holds; this process opens its stores, too.

    Args:
        kind: home, s3 or hdfs.
        folder: of the server, where there is one.
    """
    if kind == "home":
        yield Place()
        return
    if kind == "hdfs":
        with hdfs(folder) as url:
            yield Place(url)
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
            yield Place(OWN_STORE, folder / "s3" / "buckets" / OWN_STORE.removeprefix("s3://"), variables, stack)
        finally:
            stack.stop()
