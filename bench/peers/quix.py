"""Both works in Quix Streams, one process: state in RocksDB with a changelog in Kafka, records by fastavro.

    python quix.py BOOTSTRAP TOPIC deltas|windows RECORDS OUT SCHEMA_FILE

Runs in an environment of its own. A window is written at each update, so its last row counts.
"""

import io
import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import fastavro
from quixstreams import Application, State

LATENESS = timedelta(minutes=30)
WINDOW = timedelta(minutes=10)
HEADER_BYTES = 5
STEPS = 50  # how often it says how far it is


def main() -> None:
    """Command line."""
    bootstrap, name, work, given, out, schema_file = sys.argv[1:]
    records, taken = int(given), 0
    schema = fastavro.parse_schema(json.loads(Path(schema_file).read_text()))
    app = Application(
        broker_address=bootstrap,
        consumer_group=f"bench-{time.time_ns()}",
        auto_offset_reset="earliest",
        state_dir=str(Path(out) / "state"),
        loglevel="WARNING",
    )

    def decoded(value: bytes) -> dict[str, Any]:
        nonlocal taken
        taken += 1
        if taken % max(1, records // STEPS) == 0 or taken == records:
            sys.stdout.write(f"records {taken}\n")
            sys.stdout.flush()
        stream = io.BytesIO(value)
        stream.seek(HEADER_BYTES)
        reading = fastavro.schemaless_reader(stream, schema)
        assert isinstance(reading, dict)
        reading["observed_us"] = round(reading["observed_at"].timestamp() * 1e6)
        return reading

    def observed_ms(value: dict[str, Any], *_: Any) -> int:
        return int(value["observed_us"] // 1000)

    readings = app.dataframe(app.topic(name, key_deserializer="str", value_deserializer="bytes")).apply(decoded)
    folder = Path(out) / "rows"
    folder.mkdir()
    with (folder / "rows.csv").open("w") as rows:
        if work == "deltas":

            def write(row: str) -> None:
                rows.write(row)

            readings.apply(delta, stateful=True).update(write)
        else:

            def write_window(window: dict[str, Any]) -> None:
                held = window["value"]
                for phase, (count, least, largest, total) in enumerate(held["phases"], start=1):
                    start_us = window["start"] * 1000
                    rows.write(f"{held['meter_id']},L{phase},{start_us},{count},{least},{largest},{total / count}\n")

            timed = readings.set_timestamp(observed_ms)
            windows = timed.tumbling_window(WINDOW, grace_ms=LATENESS).reduce(merged, begun)
            windows.current().update(write_window)
        app.run(count=records, collect=False)


def delta(reading: dict[str, Any], state: State) -> str:
    """A row of the deltas."""
    last = state.get("last")
    at, wh = reading["observed_us"], reading["import_t1_wh"]
    row = f"{reading['meter_id']},{{}},{at},{{}},{wh},{{}},{{}}\n"
    if last and at <= last[0]:
        return row.format("", "", "", "duplicate" if at == last[0] else "out_of_order")
    state.set("last", [at, wh])
    return row.format(last[0], last[1], wh - last[1], "ok") if last else row.format("", "", 0, "first")


def begun(reading: dict[str, Any]) -> dict[str, Any]:
    """A window's first reading."""
    volts = [reading[f"voltage_l{phase}_mv"] for phase in (1, 2, 3)]
    return {
        "meter_id": reading["meter_id"],
        "times_us": [reading["observed_us"]],
        "phases": [[1, mv, mv, mv] for mv in volts],
    }


def merged(held: dict[str, Any], reading: dict[str, Any]) -> dict[str, Any]:
    """A window with one more reading, if it is new."""
    if reading["observed_us"] not in held["times_us"]:
        held["times_us"].append(reading["observed_us"])
        for phase, (count, least, largest, total) in enumerate(held["phases"]):
            mv = reading[f"voltage_l{phase + 1}_mv"]
            held["phases"][phase] = [count + 1, min(least, mv), max(largest, mv), total + mv]
    return held


if __name__ == "__main__":
    main()
