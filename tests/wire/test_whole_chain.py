"""The whole chain on native processes; killed ones are started again by the supervisor."""

import pytest

from settings import OWN_STORE
from stack.native import NativeStack
from tests.chain import WholeChain


class TestNativeProcesses(WholeChain):
    kind = NativeStack

    @pytest.fixture(params=["ingest", "streaming", "spark-worker-1"])
    def killed(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


class TestNativeProcessesAndS3(WholeChain):
    kind = NativeStack
    store = OWN_STORE

    @pytest.fixture(params=["s3", "spark-worker-1"])  # the second on a cluster that shares nothing but the store
    def killed(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)
