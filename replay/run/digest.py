"""The digest of what a run sent: the same for the same records, in whatever order meters interleave."""

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

UNSTAMPED = ("sent_at", "received_at", "run_id")
"""What of a record the digest leaves out."""


def digest_of(payloads: list[bytes]) -> npt.NDArray[np.uint64]:
    """Sum of the payloads' hashes modulo 2⁶⁴, in two lanes: it depends on all of them, and not on their order.

    A record carries its meter and its seq, so the order within a meter's stream is in it all the same.
    """
    joined = b"".join([xxh3_128_digest(payload) for payload in payloads])
    lanes: npt.NDArray[np.uint64] = np.frombuffer(joined, "<u8").reshape(-1, 2).sum(axis=0, dtype=np.uint64)
    return lanes


def raw_bytes(meter_id: str, encoding: str, payload: bytes) -> bytes:
    """What the digest takes of bytes that are sent as they are: they need not name their meter themselves."""
    return f"{meter_id}/{encoding}/".encode() + payload


def digest_text(lanes: npt.NDArray[np.uint64]) -> str:
    """A digest as the ledger has it."""
    return "".join(f"{int(lane):016x}" for lane in lanes)
