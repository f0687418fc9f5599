"""What to play, and how."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from replay.dirt import Dirt
from replay.dirt.entries import Entry
from replay.fleet import PREFIX, Fleet, fleet
from replay.pace import ON_THE_WAY, Pace, Way
from replay.tape import read_tape


@dataclass(frozen=True)
class Order:
    """What to play, and how: all that a process has to know.

    Attributes:
        tape: folder.
        run_id: the run's name.
        to: mqtt, kafka or null.
        meters: how many; the tape's own number if None.
        seed: of fleet and faults.
        speed: run clock per wall clock; None is flat out.
        start: run clock's begin; the tape's own if None.
        own_clock: the log as it is.
        duration: how much of the log each meter plays.
        loop: begin the log again at its end.
        burst: all meters report at the same moment.
        processes: how many share the meters.
        dirt: faults to inject.
        prefix: of the meters' ids.
        again: add to what this data folder has of the same meters already.
        pace: whether the run's clock waits for the way.
        way: host:port of the Kafka behind the MQTT broker, where a steady run can see what has come through.
        on_the_way: records between the two at which it waits.
    """

    tape: Path
    run_id: str
    to: str
    meters: int | None = None
    seed: int = 1
    speed: float | None = None
    start: datetime | None = None
    own_clock: bool = False
    duration: timedelta | None = None
    loop: bool = False
    burst: bool = False
    processes: int = 1
    dirt: tuple[Entry, ...] = ()
    prefix: str = PREFIX
    again: bool = False
    pace: Pace = Pace.STEADY
    way: str | None = None
    on_the_way: int = ON_THE_WAY

    def open_way(self) -> Way | None:
        """What a steady run waits for behind the MQTT broker, where it can see that.

        Raises:
            RetryLater: Kafka does not answer.
        """
        return Way(self.way, self.on_the_way) if self.is_steady and self.way else None

    @property
    def is_steady(self) -> bool:
        """Whether the run's clock waits for the way."""
        return self.pace == Pace.STEADY

    def fleet(self) -> Fleet:
        """The fleet; the same in every process."""
        return fleet(
            read_tape(self.tape), self.meters, self.seed, start=self.start, own_clock=self.own_clock,
            duration=self.duration, loop=self.loop, burst=self.burst, prefix=self.prefix,
        )  # fmt: skip

    def faults(self, crew: Fleet) -> Dirt | None:
        """The faults; the same in every process."""
        return Dirt(crew, list(self.dirt), self.seed) if self.dirt else None
