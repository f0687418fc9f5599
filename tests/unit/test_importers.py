"""Logs → readings and tapes: what holds of every format; each format's own rules are in test_formats.py."""

import gzip
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.alarms.life_cycle import with_meaning
from replay.fields import number
from replay.importers import formats, import_log
from replay.tape import read_tape
from schemas.dsmr import with_crc
from schemas.errors import BadLog, ConfigError
from tests.logs_by_hand import LOGS, LONDON, OWN, PV, UCI, column, log, nem12, read


def test_the_formats_are_the_modules_of_the_folder_each_with_a_description() -> None:
    names = "dsmr ieee-lv london nem12 p1mon p1mon-daily pv-home sparkfun uci-household"
    assert list(formats()) == names.split()
    assert all((module.__doc__ or "").splitlines()[0].endswith(".") for module in formats().values())


def test_duplicates_conflicts_and_backward_steps_stay_and_are_counted(tmp_path: Path) -> None:
    header, *rows = (OWN / "p1-minutes" / "own-minutes.csv").read_text().splitlines(keepends=True)
    path = tmp_path / "log.csv.gz"
    other = rows[7].replace("15125.353", "15125.354")
    path.write_bytes(gzip.compress("".join([header, *rows[:8], rows[7], other, rows[5], rows[8]]).encode()))
    imported = read(path, "p1mon")
    assert imported.rows_in == len(imported.readings) == 12
    assert imported.defects["duplicate"] == 2
    assert imported.defects["conflict"] == 1
    assert imported.defects["backward_step"] == 1


@pytest.mark.parametrize(
    ("format", "source", "line", "change"),
    [
        ("dsmr", "dsmr5-1s/own-lf.txt", 20, lambda data: data.replace(b"231.1*V", b"231.9*V")),
        ("p1mon", "p1-minutes/own-minutes.csv", 2, lambda data: data.replace(b"5888.483", b"58x8", 1)),
        ("p1mon", "p1-minutes/own-minutes.csv", 2, lambda data: data.replace(b",P,", b",Q,", 1)),
        ("p1mon", "p1-minutes/own-minutes.csv", 2, lambda data: data.replace(b",P,", b",P,7,", 1)),
        ("p1mon", "p1-minutes/own-minutes.csv", 2, lambda data: data.replace(b"2024-02-03", b"3/2/2024", 1)),
        ("sparkfun", "sparkfun.csv", 2, lambda data: data.replace(b".301Z", b".301", 1)),
        ("sparkfun", "sparkfun.json", 1, lambda data: data.replace(b'"00.342"', b"[]", 1)),
        ("sparkfun", "sparkfun.json", 1, lambda data: data.replace(b'"00.342"', b'"NaN"', 1)),
        ("sparkfun", "sparkfun.json", 1, lambda data: data.replace(b'"timestamp"', b'"time"', 1)),
        ("sparkfun", "sparkfun.json", 1, lambda data: data.replace(b'"001967.277"', b'"99999999999999999"', 1)),
        ("sparkfun", "sparkfun.csv", 2, lambda data: data.replace(b"001967.277", b"99999999999999", 1)),
        ("sparkfun", "sparkfun.csv", 2, lambda data: data.replace(b"001967.277", b"1_967", 1)),
        ("sparkfun", "sparkfun.csv", 2, lambda data: data.replace(b"001967.277", b'1967".277', 1)),
        ("sparkfun", "sparkfun.csv", 2, lambda data: data.replace(b"2016-10-05", b"0001-01-01", 1)),
    ],
)
def test_what_a_format_does_not_allow_is_an_error_with_file_and_line_or_is_counted(
    tmp_path: Path, format: str, source: str, line: int, change: Callable[[bytes], bytes]
) -> None:
    data = (OWN / source).read_bytes()
    path = tmp_path / "changed"
    path.write_bytes(change(data))
    assert path.read_bytes() != data
    with pytest.raises(BadLog, match=r"changed:\d+: ") as caught:
        read(path, format)
    assert f":{line}: " in str(caught.value)
    going = read(path, format, keep_going=True)
    assert going.defects["refused"] == 1
    assert len(going.readings) + going.defects["refused"] + going.defects["cut_off"] == going.rows_in


@pytest.mark.parametrize("format", list(formats()))
@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"\x1f\x8b\x08", b"[1, 2]", b"[{", b"a,b\n1,2\n", b"/x\n!\n"])
def test_a_file_of_another_kind_gives_no_tape_but_a_reason(tmp_path: Path, format: str, data: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(data)
    (tmp_path / "load_profiles_1min_1.csv").write_text("p1\n0.1\n")
    with pytest.raises(BadLog, match="log"):
        import_log(path, format, tmp_path / "tape")
    assert not (tmp_path / "tape").exists()


def test_several_logs_make_one_tape_of_several_meters_named_by_their_files(tmp_path: Path) -> None:
    tape, refused = import_log(OWN / "p1-telegrams", "dsmr", tmp_path / "tape", keep_going=True)
    meters = tape.registry["meter_id"].to_pylist()
    assert "own-v5" in meters and "own-be" in meters
    assert len(meters) == len(tape.readings) == len(set(meters))
    assert tape.info.rows_in == len(tape.readings) + tape.info.defects["refused"] + tape.info.defects.get("cut_off", 0)
    assert any("own-v5-bit-flipped.txt:1: CRC" in line for line in refused)
    with pytest.raises(BadLog, match="own-"):
        import_log(OWN / "p1-telegrams", "dsmr", tmp_path / "other")


def test_a_meter_that_comes_in_two_logs_is_one_meter_and_is_told(tmp_path: Path) -> None:
    header, *rows = (OWN / "p1-minutes" / "own-minutes.csv").read_text().splitlines(keepends=True)
    for name, part in (("2024-a", rows[:4]), ("2024-b", rows[4:])):
        log(tmp_path / name / "same.csv", "".join([header, *part]))
    tape, _ = import_log([tmp_path / "2024-a" / "same.csv", tmp_path / "2024-b" / "same.csv"], "p1mon", tmp_path / "t")
    assert tape.registry["meter_id"].to_pylist() == ["same"]
    assert tape.info.defects["same_meter_again"] == 1
    assert len(tape.readings) == len(rows)
    log(tmp_path / "2024-c" / "same.csv", "".join([header, *rows[2:]]))
    tape, _ = import_log([tmp_path / "2024-a" / "same.csv", tmp_path / "2024-c" / "same.csv"], "p1mon", tmp_path / "t")
    assert (tape.info.defects["duplicate"], tape.info.defects["backward_step"]) == (2, 1), (
        "the logs overlap by two rows"
    )


@given(st.decimals(0, 10**6, places=4, allow_nan=False), st.sampled_from([1, 1000, 10**9]))
def test_a_number_is_read_as_exactly_as_a_decimal(value: Decimal, factor: int) -> None:
    found = pl.select(pl.lit(str(value)).alias("x")).select(number("x", factor).value).item()
    assert found == int((value * factor).to_integral_value())


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300", "-1", "1,5", "0x1", "1_000"])
def test_what_is_no_number_from_0_is_none(text: str) -> None:
    assert pl.DataFrame({"x": [text]}).select(number("x", 1).value).item() is None


@pytest.mark.parametrize("damage", ['"', "7" * 140_000])
def test_a_stray_quotation_mark_or_an_endless_field_harms_its_own_row_only(tmp_path: Path, damage: str) -> None:
    rows = [f"2024-01-0{day} 00:00:00,{day}" for day in range(1, 7)]
    rows[2] = damage + rows[2]
    path = log(tmp_path / "x.csv", "TIMESTAMP,VERBR_KWH_181\n" + "\n".join(rows) + "\n")
    with pytest.raises(BadLog, match=r"x\.csv:4: "):
        read(path, "p1mon-daily")
    imported = read(path, "p1mon-daily", keep_going=True)
    assert (imported.rows_in, len(imported.readings), imported.defects["refused"]) == (6, 5, 1)


@pytest.mark.parametrize(
    ("format", "name", "text", "line"),
    [
        (
            "uci-household",
            "x.txt",
            UCI + "16/12/2006;17:24:00;4.2;0.4;234.8;18.4;0;1;1\n16/13/2006;17:24:00;4;0;2;1;0;0;0\n",
            3,
        ),
        (
            "uci-household",
            "x.txt",
            UCI + "16/12/2006;17:24:00;4.2;0.4;234.8;18.4;0;1;1\n16/12/2006;17:25:00;-4;0;2;1;0;0;0\n",
            3,
        ),
        (
            "pv-home",
            "x.csv",
            PV + "2025-05-31T23:00:24Z,247,1,-10,1,1\n2025-05-31T23:00:35,247.7,1.3,-10,11.6,145.6\n",
            3,
        ),
        ("london", "MACx.csv", LONDON + "MAC1,2013-01-01 00:00:00,0.2\nMAC1,2013-01-01 00:30:00,x\n", 3),
        ("london", "MACx.csv", LONDON + "MAC1,2013-01-01 00:00:00,0.2\nMAC1,2013-01-01 00:30:00\n", 3),
        ("nem12", "x.csv", nem12("200,N,E1,1,E1,N1,S,kWh,720,", "300,20040201,1,1,A,", "777,1"), 4),
        ("p1mon-daily", "x.csv", 'TIMESTAMP,VERBR_KWH_181\n2024-01-01 00:00:00,1\n2024-01-02 00:00:00,"1,5"\n', 3),
    ],
)
def test_a_damaged_line_of_each_format_is_named_or_counted(
    tmp_path: Path, format: str, name: str, text: str, line: int
) -> None:
    path = log(tmp_path / name, text)
    with pytest.raises(BadLog, match=rf"{name}:{line}: "):
        read(path, format)
    going = read(path, format, keep_going=True)
    assert going.defects["refused"] == 1
    assert len(going.readings) > 0
    assert f"{name}:{line}: " in going.refused[0]


@pytest.mark.parametrize("format", ["p1mon", "uci-household"])
def test_both_clock_changes_come_out_right_in_every_format_with_local_stamps(tmp_path: Path, format: str) -> None:
    autumn = [
        "2024-10-27 01:30",
        "2024-10-27 02:00",
        "2024-10-27 02:30",
        "2024-10-27 02:00",
        "2024-10-27 02:30",
        "2024-10-27 03:00",
    ]
    spring = ["2024-03-31 01:30", "2024-03-31 02:30", "2024-03-31 03:00"]
    for walls, minutes, defects in ((autumn, 30, {}), (spring, 30, {"nonexistent_local_time": 1})):
        stamps = [datetime.fromisoformat(wall) for wall in walls]  # noqa: DTZ007
        if format == "p1mon":
            text = "TIMESTAMP,VERBR_KWH_181\n" + "".join(f"{stamp},1\n" for stamp in stamps)
        else:
            text = UCI + "".join(f"{stamp:%d/%m/%Y;%H:%M:%S};1;0;230;4;0;0;0\n" for stamp in stamps)
        imported = read(log(tmp_path / "x", text), format)
        found = column(imported, "observed_at")[-len(walls) :]
        steps = [(later - earlier) / timedelta(minutes=1) for earlier, later in zip(found, found[1:], strict=False)]
        assert steps == ([minutes] * 5 if walls is autumn else [60, -30])
        assert "ambiguous_local_time" not in imported.defects
        assert {name: imported.defects[name] for name in defects} == defects


def test_every_real_log_gives_as_many_readings_as_it_has_sound_records(tmp_path: Path) -> None:
    """Rows in and out of each folder, as docs/replay.md tells them; a register that is summed has one reading more."""
    expected = {
        "pv-home-voltage": ("pv-home", 4_465, 4_465, 1),
        "household-voltage-1min": ("uci-household", 37_283, 37_284, 1),
        "ieee-european-lv": ("ieee-lv", 79_200, 79_255, 55),
        "nem12": ("nem12", 29_091, 18_637, 11),
    }
    for folder, (format, rows_in, rows_out, meters) in expected.items():
        if (LOGS / folder).is_dir():
            tape, _ = import_log(LOGS / folder, format, tmp_path / folder)
            assert (tape.info.rows_in, tape.info.rows_out, len(tape.registry)) == (rows_in, rows_out, meters), folder


def test_wrong_arguments_are_the_operators_to_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format x"):
        import_log(OWN / "sparkfun.csv", "x", tmp_path / "tape")
    with pytest.raises(ConfigError, match="cannot read"):
        import_log(tmp_path / "nothing", "dsmr", tmp_path / "tape")
    with pytest.raises(ConfigError, match="no time zone"):
        import_log(OWN / "sparkfun.csv", "sparkfun", tmp_path / "tape", timezone="Europe/Nowhere")
    with pytest.raises(ConfigError, match="meter id"):
        import_log(OWN / "sparkfun.csv", "sparkfun", tmp_path / "tape", meter_id="a.b")
    with pytest.raises(ConfigError, match="no log of format london"):
        import_log(OWN, "london", tmp_path / "tape")
    with pytest.raises(ConfigError, match="--meter-id names one meter"):
        import_log(OWN / "p1-telegrams", "dsmr", tmp_path / "tape", meter_id="m")


def test_an_imported_log_is_a_tape_with_its_meter_in_the_registry(tmp_path: Path) -> None:
    import_log(OWN / "dsmr5-1s" / "own-lf.txt", "dsmr", tmp_path / "tape", meter_id="home-1")
    tape = read_tape(tmp_path / "tape")
    meter = tape.registry.to_pylist()[0]
    assert tape.registry.num_rows == 1
    assert (meter["meter_id"], meter["phases"], meter["nominal_mv"]) == ("home-1", "L1,L2,L3", 230_000)
    assert (meter["fuse_a"], meter["interval_s"], meter["jurisdiction"]) == (None, 1, "EN50160")
    assert (tape.info.format, tape.info.source, tape.info.rows_in, tape.info.rows_out) == ("dsmr", "own-lf.txt", 11, 10)


@pytest.mark.parametrize(
    ("fuse", "expected"), [(None, (None, None)), ("35", (35, None)), ("unlimited", (None, True))], ids=str
)
def test_the_connections_fuse_is_what_the_operator_says_where_the_log_does_not(
    tmp_path: Path, fuse: str | None, expected: tuple[int | None, bool | None]
) -> None:
    tape, _ = import_log(OWN / "sparkfun.csv", "sparkfun", tmp_path / "tape", fuse=fuse)
    meter = tape.registry.to_pylist()[0]
    assert (meter["fuse_a"], meter["is_unlimited"]) == expected


@pytest.mark.parametrize("fuse", ["0", "-3", "3x25", "10001", "", "\u0663"])
def test_a_fuse_that_is_none_is_the_operators_to_mend(tmp_path: Path, fuse: str) -> None:
    with pytest.raises(ConfigError, match=f"--fuse is A of each phase, 1 to 10000, or unlimited, not {fuse}"):
        import_log(OWN / "sparkfun.csv", "sparkfun", tmp_path / "tape", fuse=fuse)


def test_the_time_zone_goes_by_the_dialect_unless_it_is_named() -> None:
    assert read(OWN / "p1-telegrams" / "own-be.txt", "dsmr").time_zone == "Europe/Brussels"
    assert read(OWN / "p1-telegrams" / "own-be.txt", "dsmr", timezone="UTC").time_zone == "UTC"


def test_failures_of_a_telegrams_log_are_events_of_the_tape_each_once_where_they_lie_in_the_log(tmp_path: Path) -> None:
    def telegram(minute: int, failures: str) -> bytes:
        stamp = f"2405011{minute // 60}{minute % 60:02d}00S"
        text = f"/OWN5\\TEST\n\n1-3:0.2.8(50)\n0-0:1.0.0({stamp})\n1-0:1.8.1(000001.000*kWh)\n1-0:99.97.0{failures}\n!"
        return with_crc(text)

    old, new = "(240430120000S)(0000000400*s)", "(240501103000S)(0000001200*s)"
    pieces = [telegram(0, f"(1)(0-0:96.7.19){old}")]
    pieces += [telegram(minute, f"(2)(0-0:96.7.19){old}{new}") for minute in (31, 32)]
    log = tmp_path / "p1.txt"
    log.write_bytes(b"".join(pieces))
    tape, _ = import_log(log, "dsmr", tmp_path / "tape")
    events = [(row["observed_at"], row["source_table"], row["code"]) for row in tape.events.to_pylist()]
    assert events == [
        (datetime(2024, 5, 1, 8, 10, tzinfo=UTC), "failure_log", "failed"),
        (datetime(2024, 5, 1, 8, 30, tzinfo=UTC), "failure_log", "returned"),
    ]
    coded = with_meaning(pl.DataFrame(tape.events))
    assert coded.select("alarm_type", "edge").rows() == [("power_failure", "raise"), ("power_failure", "clear")]
