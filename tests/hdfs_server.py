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


@contextlib.contextmanager
def hdfs(folder: Path) -> Iterator[str]:
    """The URL of an HDFS that has nothing yet, while it runs."""
    if not any(JARS.glob("hadoop-hdfs-*.jar")):
        subprocess.run([sys.executable, ROOT / "tools" / "setup.py", "hdfs"], check=True)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    for name in PAGES:
        (folder / "webapps" / name).mkdir(parents=True)
    java = [own_java(), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
    java += ["-cp", f"{folder}:{CONFIG / 'hdfs'}:{JARS}/*"]
    said = [word for name, value in options(folder, port).items() for word in ("-D", f"{name}={value}")]
    commands = [[*java, NAME_NODE, *said]]
    commands += [[*java, DATA_NODE, *said, "-D", f"dfs.datanode.data.dir=file://{folder}/data{node}"] for node in NODES]
    with (folder / "log").open("ab") as log, contextlib.ExitStack() as running:
        subprocess.run([*java, NAME_NODE, *said, "-format", "-nonInteractive"], check=True, stdout=log, stderr=log)
        for command in commands:
            process = running.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            running.callback(process.kill)
        store = Store(f"hdfs://127.0.0.1:{port}")

        def is_ready() -> bool:
            try:
                store.put("ready", b"")
                store.put("ready", b"a block")
            except RetryLater:
                return False
            return store.get("ready") == b"a block"

        eventually(is_ready, READY_S)
        yield store.url
