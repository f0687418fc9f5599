"""Stores that tests run on: the home itself, and a real S3 server beside it."""

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

STORES = ("home", "s3")


@dataclass
class Place:
    """Where stores can be made.

    Attributes:
        url: of them all; empty: each is in its own home.
        folder: where the server keeps its objects, each a file under its name.
        variables: of the environment, by which they are opened.
        stack: that has the server.
    """

    url: str = ""
    folder: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)
    stack: NativeStack | None = None

    def store(self, home: Path) -> tuple[str, Path]:
        """URL of a store that nobody else has, and the folder in which its objects are files."""
        if self.folder is None:
            return f"file://{home}", home
        return f"{self.url}/{home.name}", self.folder / home.name


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    """A place of a kind, while it holds; this process opens its stores, too.

    Args:
        kind: one of `STORES`.
        folder: of the server, where there is one.
    """
    if kind == "home":
        yield Place()
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
