"""Dirt files: which faults an operator asks for."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from schemas.closed_lists import FaultKind, Poison
from schemas.errors import ConfigError

ON_EVERY_WAY = (
    Poison.NOT_FRAMED,
    Poison.UNKNOWN_SCHEMA_ID,
    Poison.UNDECODABLE,
    Poison.TRAILING_BYTES,
    Poison.METER_ID_MISMATCH,
)
"""What is poison over MQTT and in Kafka alike; JSON and telegrams are for MQTT only."""
CENTURY = 36_525 * 86_400
MOST = 10**9
ONCE = (FaultKind.RESET, FaultKind.ROLLOVER, FaultKind.METER_EXCHANGE)
AMOUNTS = {FaultKind.SPIKE: (1, 10**12), FaultKind.UNIT_SLIP: (2, 10**6)}
BY_S = {
    FaultKind.LATE: 2_700, FaultKind.CLOCK_JUMP: 3_600, FaultKind.VOLTAGE_ALARM: 1_800, FaultKind.POWER_STORM: 1_200,
}  # fmt: skip
"""`by` where an entry does not say."""
PARTS = {
    "meters": set(FaultKind) - {FaultKind.POWER_STORM},
    "times": set(FaultKind) - {FaultKind.POWER_STORM},
    "length": {
        FaultKind.GAP, FaultKind.CLOCK_JUMP, FaultKind.CLOCK_1970, FaultKind.CLOCK_2099, FaultKind.SPIKE,
        FaultKind.FROZEN, FaultKind.UNIT_SLIP,
    },
    "by": set(BY_S),
    "amount": set(AMOUNTS),
    "bytes": {FaultKind.POISON},
    "transformers": {FaultKind.POWER_STORM},
}  # fmt: skip
"""Part of an entry → the kinds that heed it."""


def seconds(value: Any) -> float:
    """`90`, `40m`, `-1h` → seconds.

    Raises:
        ValueError: no such time.
    """
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*(s|m|h|d)", str(value).strip())
    if not match:
        msg = f"{value!r} is no time: say 90s, 40m, -1h or 2d"
        raise ValueError(msg)
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


Seconds = Annotated[float, BeforeValidator(seconds), Field(ge=-CENTURY, le=CENTURY)]
Count = Annotated[int, Field(ge=1, le=MOST)]


class Entry(BaseModel):
    """One entry of a dirt file.

    Attributes:
        kind: which fault.
        meters: how many meters: a number, a share below 1, or their ids.
        transformers: for a power_storm: how many transformers lose their supply.
        times: how often per meter, spread over the run.
        length: readings that are touched each time (gap, clock_*, spike, frozen, unit_slip).
        by: whole seconds that a late record is late, that a clock jumps (may be negative) or an outage or alarm lasts.
        amount: Wh of a spike, or factor of a unit_slip: whole numbers.
        bytes: kinds of poison, in turn.
        at: seconds after the run's begin, once; drawn by seed if absent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind
    meters: int | float | list[str] = 1
    transformers: Count = 1
    times: Count = 1
    length: Count = 1
    by: Seconds | None = None
    amount: float | None = None
    bytes: Annotated[list[Poison], Field(min_length=1)] = list(ON_EVERY_WAY)
    at: Annotated[Seconds, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "Entry":
        named = self.meters if isinstance(self.meters, list) else []
        number = 1.0 if isinstance(self.meters, list) else self.meters
        least, most = AMOUNTS.get(self.kind, (0, 0))
        unheeded = sorted(part for part in self.model_fields_set & set(PARTS) if self.kind not in PARTS[part])
        wrong = [
            sentence
            for is_wrong, sentence in (
                (not (0 < number < 1 or (1 <= number <= MOST and number % 1 == 0)) or self.meters == [],
                 f"meters is a number from 1 to {MOST}, a share below 1, or a list of ids"),
                (len(set(named)) < len(named), "meters names one twice"),
                (self.at is not None and self.times > 1, "at says when: leave times out"),
                (bool(unheeded), f"a {self.kind} has no {', no '.join(unheeded)}: leave it out"),
                (self.by is not None and (self.by == 0 or self.by % 1 != 0), "by is whole seconds, and not 0"),
                (self.by is not None and self.by < 0 and self.kind != FaultKind.CLOCK_JUMP,
                 "by is more than 0: only a clock jumps back"),
                (self.kind in ONCE and self.times > 1, f"a {self.kind} comes once per meter, not {self.times} times"),
                (self.kind in AMOUNTS and self.amount is not None
                 and (not least <= self.amount <= most or self.amount % 1 != 0),
                 f"amount is a whole number from {least} to {most}"),
            )
            if is_wrong
        ]  # fmt: skip
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def by_s(self) -> int:
        """`by`, or what it is where the entry does not say."""
        return round(BY_S.get(self.kind, 0) if self.by is None else self.by)


class DirtFile(BaseModel):
    """A dirt file: a list of entries under `faults`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    faults: list[Entry]


def read_dirt(path: Path) -> list[Entry]:
    """The entries of a dirt file.

    Raises:
        ConfigError: it is not there, no YAML, or an entry is none that we know; all that is wrong, together.
    """
    try:
        return DirtFile.model_validate(yaml.safe_load(path.read_text())).faults
    except (OSError, yaml.YAMLError) as error:
        msg = f"cannot read {path}: {error}"
        raise ConfigError(msg) from error
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, each['loc']))}: {_sentence(each['type'], each['msg'])}" for each in error.errors()
        ]
        msg = f"{path}: " + "; ".join(wrong)
        raise ConfigError(msg) from error


def _sentence(error: str, text: str) -> str:
    if error == "extra_forbidden":
        return f"no such part; an entry has {', '.join(Entry.model_fields)}"
    return text.removeprefix("Value error, ")
