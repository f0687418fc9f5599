"""The MQTT broker and Kafka of the built image, each in a container of its own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from confluent_kafka import KafkaException
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

from kafka_io.topics import create_topics
from stack.isolated import own_settings
from stack.settings import StackSettings
from tests.brokers import Brokers
from tests.eventually import eventually


@dataclass
class Containers:
    """A container of each broker, by its name."""

    settings: StackSettings
    containers: dict[str, DockerContainer]


def answers(settings: StackSettings) -> bool:
    try:
        create_topics(settings.kafka_bootstrap)
    except KafkaException:
        return False
    return True


@pytest.fixture(scope="module")
def stack(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    settings = own_settings(tmp_path_factory.mktemp("brokers"))
    kafka = {"METERSTREAM_KAFKA_PORT": str(settings.kafka_port), "METERSTREAM_KAFKA_INSIDE": "kafka:29092"}
    with Network() as network, ExitStack() as held:
        containers: dict[str, DockerContainer] = {}
        nothing: dict[str, str] = {}
        for name, environment, ports in (
            ("nats", nothing, {1883: settings.mqtt_port}),
            ("kafka", kafka, {settings.kafka_port: settings.kafka_port}),
        ):
            made = DockerContainer(image, command=f"stack run {name}", env=environment, network=network)
            places = {inside: ("127.0.0.1", port) for inside, port in ports.items()}
            made.with_network_aliases(name).ports = places  # type: ignore[assignment]  # Docker takes an address too
            containers[name] = held.enter_context(made)
        eventually(lambda: answers(settings), 90)
        yield Containers(settings, containers)


class TestBrokersOfTheImage(Brokers):
    @pytest.fixture
    def killed_and_started(self, stack: Containers) -> Callable[[str], None]:
        def kill(name: str) -> None:
            container = stack.containers[name].get_wrapped_container()
            container.kill("SIGKILL")
            assert container.wait()["StatusCode"] == 137
            container.start()
            eventually(lambda: answers(stack.settings), 90)

        return kill
