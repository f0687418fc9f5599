"""Command line of the bridge."""

import signal
from typing import Annotated

import typer

from ingest.bridge import Bridge
from ingest.settings import BridgeSettings
from schemas.errors import exits
from settings import load

app = typer.Typer(no_args_is_help=True, add_completion=False, help="MQTT → Kafka, without losing a message.")


@app.callback()
def ingest() -> None:
    """MQTT → Kafka, without losing a message."""


@app.command()
def run(
    kafka_bootstrap: Annotated[str | None, typer.Option(help="host:port of a Kafka broker.")] = None,
    mqtt_host: Annotated[str | None, typer.Option(help="MQTT broker.")] = None,
    mqtt_port: Annotated[int | None, typer.Option(help="Its port.")] = None,
    shards: Annotated[str | None, typer.Option(help="Hex digits of the shards to own, such as 01234567.")] = None,
) -> None:
    """Carries messages until SIGTERM or Ctrl-C; each flag is also an environment variable METERSTREAM_….

    Example: ingest run --kafka-bootstrap 127.0.0.1:9092 --mqtt-port 1883
    """
    with exits():
        bridge = Bridge(
            load(
                BridgeSettings,
                kafka_bootstrap=kafka_bootstrap,
                mqtt_host=mqtt_host,
                mqtt_port=mqtt_port,
                shards=shards,
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, bridge.stop)
        bridge.run()


if __name__ == "__main__":
    app()
