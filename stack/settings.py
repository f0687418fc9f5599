"""Where a stack lives and which ports it takes, and what its home remembers of its start."""

import json
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from lake.store import SCHEMES
from schemas.errors import ConfigError
from settings import OWN_STORE, Settings, started_file, started_with

ROOT = Path(__file__).resolve().parent.parent


class StackSettings(Settings):
    """Where the stack lives and which ports it takes.

    Attributes:
        listen: address that the processes listen on; loopback, but for a container's 0.0.0.0.
        kafka_inside: host:port at which containers find Kafka, if they do: a second listener.
        spark_master: spark://host:port of the cluster that jobs and workers use; the port below where it is our own.
        store: URL of what has lake, state and reports; empty: the home.
        s3_access_key: of the stack's own S3 server, and s3_secret_key; empty: the home's, made the first time.
        project: compose's; names containers and volumes, so that two stacks can live beside each other.
    """

    of_stack: ClassVar[frozenset[str]] = frozenset(
        {
            "mqtt_port", "nats_port", "nats_monitor_port", "kafka_port", "kafka_controller_port", "spark_master_port",
            "spark_master_ui_port", "metrics_port", "s3_port", "project", "store",
        }
    )  # fmt: skip

    home: Path = ROOT / "data"
    listen: str = "127.0.0.1"
    kafka_inside: str | None = None
    spark_master: str = ""
    store: str = ""
    project: str = "meterstream"
    mqtt_port: int = Field(1883, ge=1, le=65535)
    nats_port: int = Field(4222, ge=1, le=65535)
    nats_monitor_port: int = Field(8222, ge=1, le=65535)
    kafka_port: int = Field(9092, ge=1, le=65535)
    kafka_controller_port: int = Field(9093, ge=1, le=65535)
    spark_master_port: int = Field(7077, ge=1, le=65535)
    spark_master_ui_port: int = Field(8080, ge=1, le=65535)
    metrics_port: int = Field(9464, ge=1, le=65535)
    s3_port: int = Field(7070, ge=1, le=65535)
    s3_access_key: str = ""
    s3_secret_key: str = ""
    nats_server: Path | None = None

    @property
    def folder(self) -> Path:
        """The home as an absolute path without links."""
        return self.home.resolve()

    @property
    def has_own_store(self) -> bool:
        """Whether the stack runs an S3 server of its own for the store."""
        return self.store == OWN_STORE

    @property
    def kafka_bootstrap(self) -> str:
        """Address for Kafka clients."""
        return f"127.0.0.1:{self.kafka_port}"


def store_of(said: str, in_containers: bool = False) -> str:
    """URL of the store that somebody asks for; empty: the home.

    Args:
        said: s3, home or a URL.
        in_containers: of what runs in containers.

    Raises:
        ConfigError: it is none of these, or a folder that is another one in each container.
    """
    url = {"s3": OWN_STORE, "home": ""}.get(said, said.rstrip("/"))
    scheme, _, rest = url.partition("://")
    if url and (scheme not in SCHEMES or not rest):
        msg = f"STORE is s3, home or a URL ({', '.join(f'{each}://…' for each in SCHEMES)}), not {said}"
        raise ConfigError(msg)
    if in_containers and scheme == "file":
        msg = f"STORE={said} would be another folder in each container: home is their volume"
        raise ConfigError(msg)
    return url


def remember(settings: StackSettings, mode: str, cluster: bool, critical: bool) -> None:
    """Writes down what a stack is started with, for whoever asks for its home later.

    Args:
        settings: of the stack.
        mode: native or docker.
        cluster: whether the jobs run on a Spark cluster of our own.
        critical: whether critical events are published.

    Raises:
        ConfigError: the home cannot be written.
    """
    started = {
        **{name: getattr(settings, name) for name in sorted(StackSettings.of_stack)},
        "kafka_bootstrap": settings.kafka_bootstrap,
        "mode": mode,
        "cluster": cluster,
        "critical": critical,
    }
    folder = settings.folder
    if started_with(folder) == started:
        return
    file = started_file(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".fresh")
        fresh.write_text(json.dumps(started, indent=2) + "\n")
        fresh.rename(file)
    except OSError as error:
        msg = f"{folder} cannot be written ({error.strerror}): METERSTREAM_HOME names another folder"
        raise ConfigError(msg) from error
