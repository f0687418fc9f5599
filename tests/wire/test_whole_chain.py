"""The whole chain on native processes; killed ones are started again by the supervisor."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from settings import OWN_STORE
from stack.isolated import Stack
from stack.native import NativeStack
from tests.chain import Kill, WholeChain
from tests.hdfs_server import Nodes, hdfs


class TestNativeProcesses(WholeChain):
    kind = NativeStack

    @pytest.fixture(params=["ingest", "streaming"])
    def killed(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


class TestNativeProcessesAndS3(WholeChain):
    kind = NativeStack

    @pytest.fixture(scope="class")
    def store_of(self) -> Callable[[Path], str]:
        return lambda _: OWN_STORE

    @pytest.fixture(params=["s3", "spark-worker-1"])  # the second on a cluster that shares nothing but the store
    def killed(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


@pytest.mark.long  # `make test` fetches no jars of Hadoop
class TestNativeProcessesAndHdfs(WholeChain):
    kind = NativeStack

    @pytest.fixture(scope="class")
    def nodes(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
        with hdfs(tmp_path_factory.mktemp("server")) as nodes:
            yield nodes

    @pytest.fixture(scope="class")
    def store_of(self, nodes: Nodes) -> Callable[[Path], str]:
        return lambda home: f"{nodes.url}/{home.name}"

    @pytest.fixture(params=["hdfs"])
    def killed(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def kill(self, nodes: Nodes) -> Kill:
        def killed(_: Stack, __: str) -> None:
            nodes.kill()
            nodes.start()

        return killed
