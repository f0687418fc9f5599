"""Poison: bytes that cannot be taken."""

from dataclasses import dataclass
from typing import Any

from schemas.closed_lists import Poison
from schemas.codec import FRAME, encode


@dataclass(frozen=True)
class Raw:
    """Bytes that are sent as they are.

    Attributes:
        due: microseconds after the run's begin.
        meter: number of the meter in whose name they are sent.
    """

    due: int
    meter: int
    encoding: str
    payload: bytes


def poisoned(poison: Poison, reading: dict[str, Any]) -> bytes:
    """A record that cannot be taken, made of a good reading."""
    good = encode("reading", reading)
    match poison:
        case Poison.NOT_FRAMED:
            return b"\xff" + good[1:]
        case Poison.UNKNOWN_SCHEMA_ID:
            return FRAME.pack(0, 9_999) + good[FRAME.size :]
        case Poison.UNDECODABLE:
            return good[:-1]
        case Poison.TRAILING_BYTES:
            return good + b"\x00"
        case Poison.METER_ID_MISMATCH:
            return encode("reading", {**reading, "meter_id": f"{reading['meter_id']}-other"})
        case Poison.INVALID_JSON:
            return f'{{"meter_id": "{reading["meter_id"]}", "seq": {reading["seq"]}, "observed_at": '.encode()
        case Poison.INVALID_TELEGRAM:
            name = f"{reading['meter_id']}/{reading['seq']}".encode().hex()  # an octet string
            return f"/ISK5\\2M550T-1012\r\n\r\n0-0:96.1.1({name})\r\n1-0:1.8.1(0034#2.827*kWh)\r\n!0000\r\n".encode()


def encoding_of(poison: Poison) -> str:
    """As what it is sent: the last level of its MQTT topic."""
    return {Poison.INVALID_JSON: "json", Poison.INVALID_TELEGRAM: "dsmr"}.get(poison, "avro")
