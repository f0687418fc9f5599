"""Settings of the streaming jobs, and what the night takes of them."""

from pydantic import Field

from metering.energy.delta_engine import DEFAULT_FUSE_A
from settings import Settings


class JudgeSettings(Settings):
    """What a meter can say, for the stream and for the night.

    Attributes:
        max_ahead_s: how far a meter's clock may be ahead of the arrival before it is impossible.
        max_behind_s: how far behind; a meter that was offline sends readings of months ago.
        default_fuse_a: A of each of three phases of a connection whose fuse the registry does not know.
    """

    max_ahead_s: int = Field(36 * 3600, ge=0)
    max_behind_s: int = Field(400 * 24 * 3600, ge=0)
    default_fuse_a: int = Field(DEFAULT_FUSE_A, ge=1, le=1_000_000)


class StreamSettings(JudgeSettings):
    """Settings of the streaming jobs.

    Attributes:
        kafka_bootstrap: host:port of a Kafka broker.
        trigger_s: most seconds that a micro-batch waits after the one before, when little comes; under a backlog none.
        max_offsets_per_trigger: most records of a topic in a batch, catch-up included; bounds memory.
        allowed_lateness_s: how far behind the arrivals of its run a record may come, s on the arrival clock.
        compact_files: how many small files a table's day may have, before they become one.
        upkeep_s: seconds between two looks of the upkeep of tables.
        recent_records: offsets per Kafka partition within which a redelivered record is recognised; several times what
            the broker leaves unacknowledged.
        flush: on the way out take what Kafka has by then, then close what is open.
        accept_loss: go on where Kafka no longer has what was not read yet.
        metrics_port: where `GET /metrics` is answered; 0 is nowhere.
        listen: address for that.
    """

    kafka_bootstrap: str
    trigger_s: float = Field(5, ge=0, le=86_400)
    max_offsets_per_trigger: int = Field(400_000, ge=1)
    allowed_lateness_s: int = Field(1_800, ge=0)
    compact_files: int = Field(64, ge=2)
    upkeep_s: float = Field(10, ge=0.1, le=86_400)
    recent_records: int = Field(10_000, ge=0)
    flush: bool = False
    accept_loss: bool = False
    metrics_port: int = Field(0, ge=0, le=65535)
    listen: str = "127.0.0.1"
