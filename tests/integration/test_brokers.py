"""The MQTT broker and Kafka of the built image, each in a container of its own."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaException

from kafka_io.topics import create_topics
from stack.isolated import own_settings
from tests.brokers import Brokers
from tests.eventually import eventually


def answers(settings):
    try:
        create_topics(settings.kafka_bootstrap)
    except KafkaException:
        return False
    return True


@pytest.fixture(scope="module")
def stack(image, tmp_path_factory):
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.network import Network

    settings = own_settings(tmp_path_factory.mktemp("brokers"))
    kafka = {"METERSTREAM_KAFKA_PORT": str(settings.kafka_port), "METERSTREAM_KAFKA_INSIDE": "kafka:29092"}
    with Network() as network, ExitStack() as held:
        containers = {}
        for name, environment, ports in (
            ("nats", {}, {1883: settings.mqtt_port}),
            ("kafka", kafka, {settings.kafka_port: settings.kafka_port}),
        ):
            made = DockerContainer(image, command=f"stack run {name}", env=environment, network=network)
            made.with_network_aliases(name).ports = {inside: ("127.0.0.1", port) for inside, port in ports.items()}
            containers[name] = held.enter_context(made)
        eventually(lambda: answers(settings), 90)
        yield SimpleNamespace(settings=settings, containers=containers)


class TestBrokersOfTheImage(Brokers):
    @pytest.fixture
    def killed_and_started(self, stack):
        def kill(name):
            container = stack.containers[name].get_wrapped_container()
            container.kill("SIGKILL")
            assert container.wait()["StatusCode"] == 137
            container.start()
            eventually(lambda: answers(stack.settings), 90)

        return kill
