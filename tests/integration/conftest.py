"""An engine must answer and the image be built; without, nothing here can be said to hold."""

import os

import pytest

# Its helper container would be an image from elsewhere; ours are removed by the fixtures.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
os.environ.setdefault("TESTCONTAINERS_CONNECTION_MODE", "docker_host")  # ports are published on loopback
os.environ["METERSTREAM_PROJECT"] = "meterstream-test"


@pytest.fixture(scope="session", autouse=True)
def image() -> str:
    """Builds the image that every container here runs, and gives its name."""
    from settings import load
    from stack.containers import ContainerStack, engine
    from stack.settings import StackSettings

    if engine() is None:
        what = "no Docker engine answers, or it has no compose; start one (on Debian: tools/engine.sh start)"
        pytest.exit(f"The integration tests run in containers, but {what}.", returncode=1)
    ContainerStack(load(StackSettings)).build()
    return f"meterstream:{os.environ.get('METERSTREAM_VERSION', 'latest')}"
