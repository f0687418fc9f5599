"""Logs → readings; on the real logs of METER_LOGS where it is set, on our own otherwise."""

import gzip
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from datetime import time as midnight
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from dsmr_parser.exceptions import InvalidChecksumError, ParseError
from dsmr_parser.parsers import TelegramParser
from hypothesis import given
from hypothesis import strategies as st

from replay.fields import number
from replay.importers import formats, import_log
from replay.log import Asked, Imported
from replay.tape import read_tape
from schemas.dsmr import split_telegrams
from schemas.errors import BadLog, ConfigError
from schemas.tables import REGISTERS

OWN = Path(__file__).parent.parent / "logs"
LOGS = Path(os.environ.get("METER_LOGS") or OWN)


def read(path: Path, format: str, **options: Any) -> Imported:
    imported: Imported = formats()[format].read(path, Asked(**{"meter_id": "m1", **options}))
    return imported


def log(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def column(imported: Imported, name: str) -> list[Any]:
    values: list[Any] = imported.readings[name].to_pylist()
    return values


def minutes_after(imported: Imported, begin: datetime) -> list[float]:
    return [(stamp - begin) / timedelta(minutes=1) for stamp in column(imported, "observed_at")]


def test_the_formats_are_the_modules_of_the_folder_each_with_a_description() -> None:
    names = "dsmr ieee-lv london nem12 p1mon p1mon-daily pv-home sparkfun uci-household"
    assert list(formats()) == names.split()
    assert all((module.__doc__ or "").splitlines()[0].endswith(".") for module in formats().values())


@pytest.mark.parametrize("name", ["sparkfun.json", "sparkfun.csv"])
def test_the_public_streams_eight_rows_give_the_figures_of_the_brief(name: str) -> None:
    imported = read(OWN / name, "sparkfun")
    stamps = column(imported, "observed_at")
    wh = column(imported, "import_t1_wh")
    assert len(stamps) == imported.rows_in == 8
    assert stamps[0] == datetime(2016, 10, 5, 0, 55, 40, 108_000, UTC)
    assert (stamps[-1] - stamps[0]).total_seconds() == 90.193
    assert [later - earlier for earlier, later in zip(wh, wh[1:], strict=False)] == [2, 0, 1, 2, 2, 1, 1]
    assert wh[-1] - wh[0] == 9
    assert round(9 * 3600 / 90.193) == 359
    assert (min(column(imported, "import_w")), max(column(imported, "import_w"))) == (341, 346)
    steps = [(later - earlier).total_seconds() for earlier, later in zip(stamps, stamps[1:], strict=False)]
    assert max(steps) == 29.362
    assert imported.interval_s == 10
    assert imported.defects == {"gap": 1, "missing_reading": 2}
    last = imported.readings.to_pylist()[-1]
    assert [last[f"{register}_wh"] for register in REGISTERS] == [1967277, 799063, 608596, 1375315]
    assert (last["export_w"], last["tariff"], last["voltage_l1_mv"]) == (0, 1, None)


def test_both_exports_of_the_public_stream_give_the_same_readings() -> None:
    assert read(OWN / "sparkfun.json", "sparkfun").readings == read(OWN / "sparkfun.csv", "sparkfun").readings


def test_a_telegram_log_loses_only_its_cut_off_first_record() -> None:
    for path in (LOGS / "dsmr5-1s").glob("*.txt"):
        imported = read(path, "dsmr")
        assert imported.defects == {"cut_off": 1, "gap": 1, "missing_reading": 1}
        assert imported.rows_in == len(imported.readings) + 1
        stamps = column(imported, "observed_at")
        assert imported.interval_s == 1
        assert (stamps[-1] - stamps[0]).total_seconds() == len(stamps)  # a second each, one missing
        assert (imported.time_zone, set(column(imported, "meter_id"))) == ("Europe/Amsterdam", {"m1"})


def test_minute_rows_keep_every_row_and_whole_wh() -> None:
    for path in [log for log in (LOGS / "p1-minutes").glob("*.csv*") if "day" not in log.name]:
        imported = read(path, "p1mon")
        assert imported.rows_in == len(imported.readings) > 0
        assert not set(imported.defects) - {"gap", "missing_reading"}
        for register in REGISTERS:
            wh = column(imported, f"{register}_wh")
            assert all(earlier <= later for earlier, later in zip(wh, wh[1:], strict=False))
        assert imported.interval_s == 60
        assert set(column(imported, "tariff")) <= {1, 2, None}


def test_the_repeated_autumn_hour_is_told_apart_by_the_order_of_its_rows() -> None:
    imported = read(OWN / "p1mon-autumn.csv", "p1mon")
    begin = datetime(2024, 10, 26, 23, 58, tzinfo=UTC)
    assert minutes_after(imported, begin) == [0, 1, 2, 22, 42, 62, 82, 102, 122, 142]
    assert "ambiguous_local_time" not in imported.defects and "backward_step" not in imported.defects


def test_an_autumn_hour_that_comes_only_once_is_counted_as_ambiguous(tmp_path: Path) -> None:
    lines = (OWN / "p1mon-autumn.csv").read_text().splitlines(keepends=True)
    path = tmp_path / "log.csv"
    path.write_text("".join(lines[:6] + lines[9:]))
    assert read(path, "p1mon").defects["ambiguous_local_time"] == 3


def test_a_time_that_the_spring_hour_skips_is_named_and_kept() -> None:
    imported = read(OWN / "p1mon-spring.csv", "p1mon")
    assert minutes_after(imported, datetime(2024, 3, 31, 0, 58, tzinfo=UTC)) == [0, 1, 2, 3, 4]
    assert imported.defects == {"nonexistent_local_time": 1}


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


def test_half_a_telegram_in_the_middle_of_a_log_is_an_error_or_is_counted(tmp_path: Path) -> None:
    whole = (OWN / "dsmr5-1s" / "own-lf.txt").read_bytes()
    path = tmp_path / "log"
    path.write_bytes(whole + whole)
    with pytest.raises(BadLog, match="part of a telegram"):
        read(path, "dsmr")
    assert read(path, "dsmr", keep_going=True).defects["cut_off"] == 2


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


def test_a_crc_is_wrong_exactly_where_dsmr_parser_finds_it_wrong() -> None:
    for path in sorted((LOGS / "p1-telegrams").glob("*.txt")):
        for _, piece in split_telegrams(path.read_bytes()):
            telegram = piece.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").decode()
            try:
                TelegramParser.validate_checksum(telegram)
                theirs = False
            except InvalidChecksumError:
                theirs = True
            except ParseError:  # no CRC
                continue
            try:
                read(path, "dsmr", first_at=datetime(2024, 1, 1, tzinfo=UTC))
                ours = ""
            except BadLog as error:
                ours = str(error)
            assert theirs == ("CRC is" in ours), path.name


def test_the_real_telegrams_come_in_by_one_command_that_names_what_it_leaves_out(tmp_path: Path) -> None:
    if (LOGS / "p1-telegrams" / "v5_ok.txt").exists():
        begin = datetime(2024, 1, 1, tzinfo=UTC)
        tape, refused = import_log(
            LOGS / "p1-telegrams", "dsmr", tmp_path / "tape", first_at=begin, ignore_crc=True, keep_going=True
        )
        assert tape.info.defects == {"wrong_crc": 13, "refused": 2, "cut_off": 2, "no_clock": 6}
        assert (tape.info.rows_in, len(tape.readings), len(tape.registry), len(refused)) == (29, 25, 25, 4)


def test_a_telegram_with_a_wrong_crc_is_taken_and_counted_where_that_is_asked_for() -> None:
    path = OWN / "p1-telegrams" / "own-v5-bit-flipped.txt"
    with pytest.raises(BadLog, match="CRC"):
        read(path, "dsmr")
    imported = read(path, "dsmr", ignore_crc=True)
    assert (len(imported.readings), imported.defects) == (1, {"wrong_crc": 1})


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


def test_a_telegram_without_a_clock_takes_the_begin_that_is_named_or_is_refused(tmp_path: Path) -> None:
    whole = (OWN / "p1-telegrams" / "own-v2.txt").read_text()
    path = log(tmp_path / "old.txt", whole + whole)
    with pytest.raises(BadLog, match="--first-at gives it one"):
        read(path, "dsmr")
    begin = datetime(2010, 1, 1, tzinfo=UTC)
    imported = read(path, "dsmr", first_at=begin)
    assert column(imported, "observed_at") == [begin, begin + timedelta(seconds=10)]


def test_a_day_row_is_read_when_its_day_is_over(tmp_path: Path) -> None:
    path = log(
        tmp_path / "days.csv",
        "TIMESTAMP,VERBR_KWH_181,VERBR_KWH_182\n2024-03-30 00:00:00,10.5,20\n2024-03-31 00:00:00,11,20.001\n",
    )
    imported = read(path, "p1mon-daily")
    ends = [datetime(2024, 3, 30, 23, tzinfo=UTC), datetime(2024, 3, 31, 22, tzinfo=UTC)]
    assert column(imported, "observed_at") == ends, "23 hours: the clocks change between"
    assert column(imported, "import_t1_wh") == [10_500, 11_000]
    assert column(imported, "import_t2_wh") == [20_000, 20_001]
    assert "backward_step" not in imported.defects


def test_rows_of_minutes_are_no_rows_of_days(tmp_path: Path) -> None:
    rows = ["2024-03-30 00:00:00,10.5", "2024-03-30 00:01:00,10.6", "2024-03-31 00:00:00,11", "2024-03-31 12:00:00,12"]
    path = log(tmp_path / "days.csv", "\n".join(["TIMESTAMP,VERBR_KWH_181", *rows]))
    with pytest.raises(BadLog, match=r"days.csv:3: 2024-03-30 00:01:00 is not the 00:00 of a day"):
        read(path, "p1mon-daily")
    going = read(path, "p1mon-daily", keep_going=True)
    assert (going.rows_in, going.defects["refused"]) == (4, 2)
    assert column(going, "import_t1_wh") == [10_500, 11_000]


def test_day_rows_say_what_the_minute_rows_of_the_same_meter_say() -> None:
    for days in (LOGS / "p1-minutes").glob("days*.csv*"):
        minutes = read(next((LOGS / "p1-minutes").glob("2*.csv*")), "p1mon").readings.to_pylist()
        registers = [f"{register}_wh" for register in REGISTERS]
        last = {}
        for row in minutes:
            last[(row["observed_at"] + timedelta(hours=1)).date()] = [row[name] for name in registers]
        daily = {
            (row["observed_at"] + timedelta(hours=1)).date() - timedelta(days=1): [row[name] for name in registers]
            for row in read(days, "p1mon-daily").readings.to_pylist()
        }
        same = [day for day in last if daily.get(day) == last[day]]
        assert len(same) >= len(last) - 1 > 15


UCI = "Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;S1;S2;S3\n"


def test_the_uci_household_gets_a_register_that_loses_nothing(tmp_path: Path) -> None:
    rows = [f"16/12/2006;17:{minute:02d}:00;0.1{minute % 10};0.1;234.84;18.4;0;0;0\n" for minute in range(60)]
    rows[30] = "16/12/2006;17:30:00;?;?;?;?;?;?;\n"
    imported = read(log(tmp_path / "log.txt", UCI + "".join(rows)), "uci-household")
    power_w = [value for value in column(imported, "import_w") if value is not None]
    assert len(imported.readings) == 60, "59 minutes and the register's begin"
    assert column(imported, "import_t1_wh")[-1] == sum(power_w) // 60
    assert imported.defects["empty_fields"] == imported.defects["missing_reading"] == 1
    assert column(imported, "observed_at")[1] == datetime(2006, 12, 16, 16, 0, tzinfo=UTC)
    assert (column(imported, "voltage_l1_mv")[1], column(imported, "current_l1_ma")[1]) == (234_840, 18_400)


def test_a_summed_register_is_exact_where_a_minute_is_no_whole_part_of_a_wh(tmp_path: Path) -> None:
    rows = [f"16/12/2006;{n // 60:02d}:{n % 60:02d}:00;0.001;0;234;1;0;0;0\n" for n in range(1200)]
    wh = column(read(log(tmp_path / "log.txt", UCI + "".join(rows)), "uci-household"), "import_t1_wh")
    assert wh == [minutes // 60 for minutes in range(1201)]


@given(st.decimals(0, 10**6, places=4, allow_nan=False), st.sampled_from([1, 1000, 10**9]))
def test_a_number_is_read_as_exactly_as_a_decimal(value: Decimal, factor: int) -> None:
    found = pl.select(pl.lit(str(value)).alias("x")).select(number("x", factor).value).item()
    assert found == int((value * factor).to_integral_value())


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300", "-1", "1,5", "0x1", "1_000"])
def test_what_is_no_number_from_0_is_none(text: str) -> None:
    assert pl.DataFrame({"x": [text]}).select(number("x", 1).value).item() is None


PV = "time,power.grid.voltage,power.grid.current,power.grid.power,total.grid.import,total.grid.export\n"


def test_the_pv_home_keeps_its_duplicates_and_its_mixed_steps_and_turns_the_sign(tmp_path: Path) -> None:
    rows = [
        "2025-05-31T23:00:24Z,247.7,1.3,-10,11.6,145.6\n",
        "2025-05-31T23:00:24Z,247.7,1.3,-10,11.6,145.6\n",
        "2025-05-31T23:00:35Z,253.4,9.3,2310,11.6,145.7\n",
        "2025-05-31T23:05:40Z,253.0,9.3,2300,11.7,145.9\n",
        "2025-05-31T23:05:51Z,253.0,9.3,2300,11.7,145.9\n",
    ]
    imported = read(log(tmp_path / "log.csv", PV + "".join(rows)), "pv-home")
    assert column(imported, "import_w") == [10, 10, 0, 0, 0]
    assert column(imported, "export_w") == [0, 0, 2310, 2300, 2300]
    assert column(imported, "export_t1_wh") == [145_600, 145_600, 145_700, 145_900, 145_900]
    assert column(imported, "import_t1_wh")[3] == 11_700
    assert imported.defects == {"duplicate": 1, "gap": 1, "missing_reading": 27}
    assert set(column(imported, "dialect")) == {"pv-home"}


def test_a_second_usual_step_is_no_gap_and_its_own_multiple_is(tmp_path: Path) -> None:
    begin = datetime(2025, 6, 1, tzinfo=UTC)
    at = [begin + timedelta(seconds=11 * n) for n in range(40)]
    at += [at[-1] + timedelta(seconds=300 * n) for n in range(1, 21)]
    at.append(at[-1] + timedelta(seconds=600))
    imported = read(
        log(tmp_path / "x.csv", PV + "".join(f"{t:%Y-%m-%dT%H:%M:%SZ},247,1,-10,1,1\n" for t in at)), "pv-home"
    )
    assert imported.defects == {"mixed_step": 20, "gap": 1, "missing_reading": 1}
    assert imported.interval_s == 300, "a reading is overdue after the longer step only"


LONDON = "LCLid,tstp,energy(kWh/hh)\n"


def test_londons_half_hours_become_a_register_that_is_read_at_their_ends(tmp_path: Path) -> None:
    rows = [
        "2013-01-01 00:00:00, 0.219 ",
        "2013-01-01 00:30:00, 0.2419 ",
        "2013-01-01 01:00:00,Null",
        "2013-01-01 01:30:00, 0.0002 ",
    ]
    path = log(tmp_path / "MAC1.csv", LONDON + "".join(f"MAC1,{row}\n" for row in rows))
    tariffs = "TariffDateTime,Tariff\n2013-01-01 00:00:00,High\n2013-01-01 00:30:00,Low\n2013-01-01 01:00:00,Normal\n"
    log(tmp_path / "dtou_tariffs_2013.csv", tariffs)
    imported = read(path, "london")
    begin = datetime(2012, 12, 31, 23, 30, tzinfo=UTC)
    assert minutes_after(imported, begin) == [0, 30, 60, 120]
    assert column(imported, "import_t1_wh") == [0, 219, 460, 461], "460.9 and 461.1: nothing is lost to rounding"
    assert column(imported, "tariff") == [None, None, 3, 1], "of the half hour that has just ended"
    assert set(column(imported, "meter_id")) == {"MAC1"}
    assert imported.defects == {"empty_fields": 1, "gap": 1, "missing_reading": 1}
    assert column(imported, "import_w") == [None] * 4


def test_londons_tariff_is_in_local_time_and_its_half_hours_are_not(tmp_path: Path) -> None:
    path = log(tmp_path / "MAC1.csv", LONDON + "MAC1,2013-06-01 16:30:00,1\nMAC1,2013-06-01 17:30:00,1\n")
    log(
        tmp_path / "dtou_tariffs_2013.csv", "TariffDateTime,Tariff\n2013-06-01 17:00:00,High\n2013-06-01 18:00:00,Low\n"
    )
    assert column(read(path, "london"), "tariff") == [None, 3, 2]


def test_a_log_of_several_homes_has_a_register_for_each(tmp_path: Path) -> None:
    rows = ["B,2013-01-01 00:30:00,1", "A,2013-01-01 00:30:00,2", "B,2013-01-01 01:00:00,3"]
    imported = read(log(tmp_path / "block.csv", LONDON + "\n".join(rows) + "\n"), "london")
    assert column(imported, "meter_id") == ["B", "B", "B", "A", "A"]
    assert column(imported, "import_t1_wh") == [0, 1000, 4000, 0, 2000]


def test_an_interval_that_comes_again_or_late_does_not_bend_the_register(tmp_path: Path) -> None:
    rows = ["00:30:00,1", "01:30:00,4", "01:30:00,4", "01:00:00,2", "01:30:00,5", "02:00:00,8"]
    path = log(tmp_path / "MAC1.csv", LONDON + "".join(f"MAC1,2013-01-01 {row}\n" for row in rows))
    imported = read(path, "london")
    assert column(imported, "import_t1_wh") == [0, 1000, 7000, 7000, 3000, 8000, 15000]
    assert [imported.defects[name] for name in ("duplicate", "conflict", "backward_step")] == [1, 1, 1]


def test_the_real_half_hours_end_at_midnight() -> None:
    """That a stamp is the end of its half hour is seen where a home's records stop early: always at 00:00."""
    stops = set()
    for path in (LOGS / "london-half-hourly").glob("MAC00000[2-9]*"):
        stamps = column(read(path, "london"), "observed_at")
        assert stamps[1].time() == midnight.min
        if stamps[-1] < datetime(2013, 12, 31, 23, tzinfo=UTC):
            stops.add(stamps[-1].time())
    assert stops <= {midnight.min}


def test_the_feeders_homes_have_power_a_register_and_their_place_in_the_grid(tmp_path: Path) -> None:
    home = "New Load.{} Phases=1 Bus1={} kV=0.23 kW=1 PF=0.95 Yearly=Shape_{}\n"
    loads = home.format("LOAD1", "34.1", 2) + home.format("LOAD2", "47.3", 1)
    path = log(tmp_path / "Loads.txt", loads)
    log(tmp_path / "load_profiles_1min_2.csv", "p1,p2\n" + "0.06,1.2\n" * 3)
    begin = datetime(2020, 5, 1, tzinfo=UTC)
    tape, _ = import_log(path, "ieee-lv", tmp_path / "tape", first_at=begin)
    rows = tape.readings.to_pylist()
    assert [row["import_t1_wh"] for row in rows] == [0, 20, 40, 60, 0, 1, 2, 3]
    assert [row["import_w"] for row in rows] == [None, 1200, 1200, 1200, None, 60, 60, 60]
    assert rows[3]["observed_at"] == begin + timedelta(minutes=3)
    assert tape.info.defects == {"no_clock": 6}
    homes = {row["meter_id"]: row for row in tape.registry.to_pylist()}
    assert (homes["LOAD2"]["usage_point_id"], homes["LOAD2"]["transformer_id"]) == ("bus-47-phase-3", "TR1")
    assert homes["LOAD1"]["interval_s"] == 60


def test_a_damaged_profile_of_the_feeder_is_named_by_its_own_file_and_line(tmp_path: Path) -> None:
    path = log(tmp_path / "Loads.txt", "New Load.LOAD1 Phases=1 Bus1=34.1 kV=0.23 kW=1 PF=0.95 Yearly=Shape_1\n")
    log(tmp_path / "load_profiles_1min_1.csv", "p1\n0.06\nx\n0.06\n")
    with pytest.raises(BadLog, match=r"load_profiles_1min_1.csv:3: p1 is no number"):
        read(path, "ieee-lv")
    imported = read(path, "ieee-lv", keep_going=True)
    assert (imported.rows_in, imported.defects["refused"], column(imported, "import_t1_wh")) == (3, 1, [0, 1, 2])
    assert column(imported, "observed_at")[-1] - column(imported, "observed_at")[0] == timedelta(minutes=3)


def nem12(*records: str) -> str:
    return "".join(f"{record}\n" for record in ("100,NEM12,200405011135,MDA1,Ret1", *records, "900"))


def test_nem12_channels_of_one_meter_meet_at_the_ends_of_their_intervals(tmp_path: Path) -> None:
    half, hour = ",".join(["0.5"] * 48), ",".join(["1000"] * 24)
    path = log(
        tmp_path / "log.csv",
        nem12(
            "200,NMI1,E1B1Q1,1,E1,N1,SER1,kwh,30,", f"300,20040201,{half},A,,,,", f"300,20040202,{half},V,,,,",
            "400,1,40,A,,", "400,41,47,S14,,", "400,48,48,E52,,",
            "200,NMI1,E1B1Q1,2,B1,N1,SER1,Wh,60,", f"300,20040201,{hour},F14,,,,",
            "200,NMI1,E1B1Q1,3,Q1,N1,SER1,kVArh,30,", f"300,20040201,{half},A,,,,",
        ),
    )  # fmt: skip
    imported = read(path, "nem12")
    assert (imported.rows_in, len(imported.readings)) == (96 + 24 + 48, 97)
    begin = datetime(2004, 1, 31, 14, tzinfo=UTC)
    assert minutes_after(imported, begin) == [30 * n for n in range(97)]
    assert column(imported, "import_t1_wh") == [500 * n for n in range(97)]
    assert column(imported, "export_t1_wh")[:6] == [0, None, 1000, None, 2000, None]
    assert imported.defects == {"other_quantity": 48, "substituted": 24 + 7, "estimated": 1}
    assert set(column(imported, "equipment_id")) == {"SER1"}


def day(date: int | str, *values: int | str, quality: str = "A") -> str:
    return f"300,{date},{','.join(map(str, values))},{quality},,,,"


def channel(suffix: str = "E1", minutes: int = 720, nmi: str = "NMI1") -> str:
    return f"200,{nmi},E1B1,1,{suffix},N1,SER1,kWh,{minutes},"


def test_a_channel_may_change_its_interval_length_and_its_days_may_come_in_any_order(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log.csv",
        nem12(channel(minutes=480), day(20240203, 4, 5, 6), channel(), day(20240202, 3, 3), day(20240201, 1, 2)),
    )
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 3000, 6000, 9000, 13000, 18000, 24000]
    assert minutes_after(imported, datetime(2024, 1, 31, 14, tzinfo=UTC)) == [
        0, 720, 1440, 2160, 2880, 3360, 3840, 4320,
    ]  # fmt: skip


def test_intervals_without_a_value_or_of_quality_n_add_nothing_and_have_no_reading(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log.csv",
        nem12(
            channel(minutes=360), day(20240201, 1, "", 2, 3, quality="V"), "400,1,2,A,,", "400,3,3,N,,", "400,4,4,A,,"
        ),
    )
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 4000]
    assert imported.defects["empty_fields"] == 2


def test_a_day_that_comes_again_is_kept_as_duplicate_or_conflict_and_summed_once(tmp_path: Path) -> None:
    path = log(tmp_path / "log.csv", nem12(channel(), day(20240201, 1, 2), day(20240201, 1, 5), day(20240202, 1, 1)))
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 1000, 3000, 6000, 4000, 5000]
    assert (imported.defects["duplicate"], imported.defects["conflict"]) == (1, 1)


@pytest.mark.parametrize(
    ("records", "line", "reason"),
    [
        ([day(20240201, 1, 2)], 2, "a day without a channel"),
        ([channel(minutes=7), day(20240201, 1, 2)], 2, "no interval length"),
        ([channel(minutes=0), day(20240201, 1, 2)], 2, "no interval length"),
        ([channel(nmi="N 1"), day(20240201, 1, 2)], 2, "no NMI"),
        ([channel(), day(20240201, 1, 2, quality="V"), "400,1,3,A,,"], 4, "no stretch of 2 intervals"),
        ([channel(), day(20240201, -1, 2)], 3, "not 2 values and a quality"),
    ],
)
def test_a_nem12_record_that_does_not_follow_is_refused_with_what_hangs_on_it(
    tmp_path: Path, records: list[str], line: int, reason: str
) -> None:
    sound = [channel("B1", nmi="NMI2"), day(20240201, 1, 1)]
    path = log(tmp_path / "log.csv", nem12(*records, *sound))
    with pytest.raises(BadLog, match=rf"log.csv:{line}: .*{reason}"):
        read(path, "nem12")
    going = read(path, "nem12", keep_going=True)
    assert going.refused[0].startswith(f"{path}:{line}: ")
    assert [wh for wh in column(going, "export_t1_wh") if wh is not None] == [0, 1000, 2000]


def test_a_nem12_day_that_is_refused_counts_all_its_intervals(tmp_path: Path) -> None:
    path = log(
        tmp_path / "x.csv", nem12(channel(), day(20240201, 1, 1), day(20240202, 1, 2, quality=""), day(20240203, 1, 1))
    )
    going = read(path, "nem12", keep_going=True)
    assert (going.rows_in, going.defects["refused"]) == (6, 2)
    assert len(going.readings) == 5, "the begin, and four intervals"


@pytest.mark.parametrize(
    ("records", "refused"),
    [
        ([channel(nmi="N 1"), day(20240202, 1, "", 1, 1)], 1 + 4),  # its channel is unknown, its values are four
        ([channel(nmi="N 1"), day(20240202, 1, 1, quality="")], 1 + 2),
        ([channel(minutes=7), "300,20240202"], 1 + 1),
        ([channel(minutes=7), day(20240202, 1, 1), "400,1,1,A,,"], 1 + 2),
        (["400,1,3,A,,"], 1),
        (["250,1"], 1),
        (["777,1"], 1),
        ([day(20240202, "1e16", 1)], 2),
        ([day(20240202, "1e999999999", 1)], 2),
        ([day(99991231, 1, 1)], 2),
    ],
)
def test_what_a_nem12_file_is_refused_is_part_of_its_rows_in(tmp_path: Path, records: list[str], refused: int) -> None:
    path = log(tmp_path / "x.csv", nem12(channel(), day(20240201, 1, 1), *records))
    going = read(path, "nem12", keep_going=True)
    assert (going.rows_in, going.defects["refused"]) == (2 + refused, refused)
    assert column(going, "import_t1_wh") == [0, 1000, 2000]


def test_a_nem12_file_that_is_no_csv_is_refused_with_its_line(tmp_path: Path) -> None:
    path = log(tmp_path / "x.csv", nem12(channel(), day(20240201, 1, 1), '300,20240202,"' + "1," * 70_000))
    with pytest.raises(BadLog, match=r"x\.csv:4: field larger"):
        read(path, "nem12")
    going = read(path, "nem12", keep_going=True)
    assert (going.rows_in, going.defects["refused"]) == (3, 1)


def test_days_below_a_garbled_channel_are_nobodys(tmp_path: Path) -> None:
    """Else reactive energy would count as the channel's above it."""
    garbled = channel(suffix="Q1").replace("200,", "Z200,").replace("kWh", "kVArh")
    text = nem12(channel(), day(20240201, 1, 1), garbled, day(20240201, 7, 7))
    imported = read(log(tmp_path / "x.csv", text), "nem12", keep_going=True)
    assert (imported.rows_in, imported.defects["refused"], imported.defects["conflict"]) == (5, 3, 0)
    assert column(imported, "import_t1_wh") == [0, 1000, 2000]


@pytest.mark.parametrize("damage", ['"', "7" * 140_000])
def test_a_stray_quotation_mark_or_an_endless_field_harms_its_own_row_only(tmp_path: Path, damage: str) -> None:
    rows = [f"2024-01-0{day} 00:00:00,{day}" for day in range(1, 7)]
    rows[2] = damage + rows[2]
    path = log(tmp_path / "x.csv", "TIMESTAMP,VERBR_KWH_181\n" + "\n".join(rows) + "\n")
    with pytest.raises(BadLog, match=r"x\.csv:4: "):
        read(path, "p1mon-daily")
    imported = read(path, "p1mon-daily", keep_going=True)
    assert (imported.rows_in, len(imported.readings), imported.defects["refused"]) == (6, 5, 1)


def test_western_power_keeps_its_own_markets_time(tmp_path: Path) -> None:
    text = nem12(channel(), day(20240201, 1, 2)).replace("MDA1", "WPNTKS")
    imported = read(log(tmp_path / "log.csv", text), "nem12")
    assert (imported.time_zone, column(imported, "observed_at")[0]) == (
        "Australia/Perth",
        datetime(2024, 1, 31, 16, tzinfo=UTC),
    )
    assert read(tmp_path / "log.csv", "nem12", timezone="Australia/Sydney").time_zone == "Australia/Sydney"


def test_nem13_reads_are_registers_as_they_stand(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log.csv",
        "100,NEM13,200401101030,MDA1,Ret1\n"
        "250,NMI2,11,1,11,11,SER2,E,006342.8,20031005093055,A,,,007654.9,20040107100333,E64,,,1312.1,kWh,,,\n900\n",
    )
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [6_342_800, 7_654_900]
    assert column(imported, "observed_at")[0] == datetime(2003, 10, 4, 23, 30, 55, tzinfo=UTC)
    assert (imported.rows_in, imported.defects) == (1, {"estimated": 1})


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


def test_a_local_day_of_25_or_23_hours_has_its_day_row_at_its_end(tmp_path: Path) -> None:
    days = ["2024-10-26", "2024-10-27", "2024-10-28", "2025-03-29", "2025-03-30"]
    text = "TIMESTAMP,VERBR_KWH_181\n" + "".join(f"{day} 00:00:00,1\n" for day in days)
    found = column(read(log(tmp_path / "days.csv", text), "p1mon-daily"), "observed_at")
    hours = [(later - earlier) / timedelta(hours=1) for earlier, later in zip(found, found[1:], strict=False)]
    assert hours == [25, 24, 152 * 24, 23]


@pytest.mark.parametrize(
    ("date", "defect"), [("20240407", "ambiguous_local_time"), ("20241006", "nonexistent_local_time")]
)
def test_a_nem12_file_in_a_zone_that_changes_its_clock_names_the_intervals_it_cannot_tell(
    tmp_path: Path, date: str, defect: str
) -> None:
    path = log(tmp_path / "log.csv", nem12(channel(minutes=60), day(date, *[1] * 24)))
    assert read(path, "nem12", timezone="Australia/Sydney").defects[defect] == 1
    assert not read(path, "nem12").defects, "market time has no summer time"


def test_every_real_log_gives_as_many_readings_as_it_has_sound_records(tmp_path: Path) -> None:
    """Rows in and out of each folder, as docs/replay.md tells them; a register that is summed has one reading more."""
    expected = {
        "pv-home-voltage": ("pv-home", 4_465, 4_465, 1),
        "household-voltage-1min": ("uci-household", 37_283, 37_284, 1),
        "ieee-european-lv": ("ieee-lv", 79_200, 79_255, 55),
        "nem12": ("nem12", 29_091, 18_639, 11),
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


def test_the_time_zone_goes_by_the_dialect_unless_it_is_named() -> None:
    assert read(OWN / "p1-telegrams" / "own-be.txt", "dsmr").time_zone == "Europe/Brussels"
    assert read(OWN / "p1-telegrams" / "own-be.txt", "dsmr", timezone="UTC").time_zone == "UTC"
