"""What a bridge process is set to."""

from settings import Settings


class BridgeSettings(Settings):
    """Settings of a bridge process.

    Attributes:
        kafka_bootstrap: host:port of a Kafka broker.
        mqtt_host: MQTT broker.
        mqtt_port: its port.
        shards: hex digits of the shards that this process owns; all of them if empty.
        accept_run_ids: False where no replay may send.
        ack_wait_s: the broker's ack_wait (config/nats/nats.conf): after it a message that was not acknowledged comes
            again.
        poison_share: the brake: stop when more than this share of the last thousand messages is poison.
    """

    kafka_bootstrap: str
    mqtt_host: str = "127.0.0.1"
    mqtt_port: int = 1883
    mqtt_username: str | None = None
    mqtt_password: str | None = None
    shards: str = ""
    accept_run_ids: bool = True
    ack_wait_s: float = 10.0
    poison_share: float = 0.5
