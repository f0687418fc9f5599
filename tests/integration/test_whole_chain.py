"""The whole chain in the containers of docker-compose.yml; each is killed once, and started again."""

import pytest

from stack.containers import ContainerStack
from tests.chain import WholeChain


class TestContainers(WholeChain):
    kind = ContainerStack

    @pytest.fixture(params=["nats", "kafka", "ingest", "streaming", "spark-master", "spark-worker-1", "spark-worker-2"])
    def killed(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)
