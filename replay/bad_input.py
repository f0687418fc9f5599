"""One of each kind of bad record, to show that none stops anything and none is lost.

Three end as dead letters with their reason, one (a clock in 2099) in quarantine.
"""

from datetime import UTC, datetime
from typing import Any

from schemas.codec import FRAME, encode

YEAR_2099 = datetime(2099, 1, 1, tzinfo=UTC)


def bad_records(reading: dict[str, Any]) -> list[tuple[str, str, bytes]]:
    """(name, encoding, payload) of each kind, made of a good reading."""
    meter_id = reading["meter_id"]
    good = encode("reading", reading)
    telegram = "/ISK5\\2M550T-1012\r\n\r\n0-0:1.0.0(190324150519W)\r\n1-0:1.8.1(0034#2.827*kWh)\r\n!0000\r\n"
    return [
        ("garbled telegram", "dsmr", telegram.encode()),
        ("unknown schema id", "avro", FRAME.pack(0, 9_999) + good[FRAME.size :]),
        ("wrong meter_id in the body", "avro", encode("reading", {**reading, "meter_id": f"{meter_id}-other"})),
        ("a date in 2099", "avro", encode("reading", {**reading, "observed_at": YEAR_2099})),
    ]
