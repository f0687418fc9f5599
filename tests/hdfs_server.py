"""An HDFS of this machine, as processes: a name node and two data nodes, on free ports of the loopback."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lake.store import Store
from schemas.errors import RetryLater
from stack.parts import CONFIG, ENVIRONMENT, own_java
from stack.settings import ROOT
from tests.eventually import eventually

JARS = ENVIRONMENT / "jars" / "hdfs"
SERVER = "org.apache.hadoop.hdfs.server"
NAME_NODE, DATA_NODE = f"{SERVER}.namenode.NameNode", f"{SERVER}.datanode.DataNode"
PAGES = ("hdfs", "datanode")
"""Folders of pages that the servers look for on their class path; none is in them."""
NODES = ("1", "2")
READY_S = 120.0


def options(folder: Path, port: int) -> dict[str, str]:
    """Settings of all nodes.

    Two copies: the client asks once whether a data node has said that it has the file, and again after half a second.
    With one data node that is each time; with two, one of them has mostly said so.
    """
    on = {f"dfs.datanode.{name}": "127.0.0.1:0" for name in ("address", "http.address", "ipc.address")}
    return on | {
        "fs.defaultFS": f"hdfs://127.0.0.1:{port}",
        "dfs.namenode.http-address": "127.0.0.1:0",
        "dfs.namenode.name.dir": f"file://{folder}/name",
        "dfs.replication": str(len(NODES)),
        "dfs.permissions.enabled": "false",  # whoever runs the tests
        "hadoop.tmp.dir": str(folder / "tmp"),
    }


class Nodes:
    """A name node and its data nodes.

    Attributes:
        url: of their HDFS.
    """

    def __init__(self, folder: Path) -> None:
        """Makes an HDFS that has nothing; nobody serves it yet.

        Args:
            folder: of all that it has.
        """
        if not any(JARS.glob("hadoop-hdfs-*.jar")):
            subprocess.run([sys.executable, ROOT / "tools" / "setup.py", "hdfs"], check=True)
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
        for name in PAGES:
            (folder / "webapps" / name).mkdir(parents=True)
        self.url, self._log, self._running = f"hdfs://127.0.0.1:{port}", folder / "log", list[subprocess.Popen[bytes]]()
        java = [own_java(), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
        java += ["-cp", f"{folder}:{CONFIG / 'hdfs'}:{JARS}/*"]
        said = [word for name, value in options(folder, port).items() for word in ("-D", f"{name}={value}")]
        places = [["-D", f"dfs.datanode.data.dir=file://{folder}/data{node}"] for node in NODES]
        self._commands = [[*java, NAME_NODE, *said], *([*java, DATA_NODE, *said, *place] for place in places)]
        with self._log.open("ab") as log:
            command = [*self._commands[0], "-format", "-nonInteractive"]
            subprocess.run(command, check=True, stdout=log, stderr=log)

    def start(self) -> None:
        """Serves what is there, at the same address, from when it returns."""
        with self._log.open("ab") as log:
            for command in self._commands:
                self._running.append(subprocess.Popen(command, stdout=log, stderr=log))
        eventually(self._is_ready, READY_S)

    def kill(self) -> None:
        """SIGKILL to all of them: what they have said that they have, they have."""
        for process in self._running:
            process.kill()
            process.wait()
        self._running.clear()

    def _is_ready(self) -> bool:
        store = Store(self.url)
        try:
            store.put("ready", b"")
            store.put("ready", b"a block")
        except RetryLater:
            return False
        return store.get("ready") == b"a block"


@contextlib.contextmanager
def hdfs(folder: Path) -> Iterator[Nodes]:
    """An HDFS that has nothing yet, while it runs."""
    nodes = Nodes(folder)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.kill()
