"""Logs → readings, each format by its own rules; NEM12 in test_nem12.py, what holds of all in test_importers.py."""

import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from datetime import time as midnight
from pathlib import Path

import pytest
from dsmr_parser.exceptions import InvalidChecksumError, ParseError
from dsmr_parser.parsers import TelegramParser

from replay.importers import import_log
from replay.log import Imported
from schemas.dsmr import split_telegrams
from schemas.errors import BadLog
from schemas.tables import REGISTERS
from tests.logs_by_hand import LOGS, LONDON, OWN, PV, UCI, column, log, minutes_after, read

USED = ("import_t1", "import_t2", "export_t1", "export_t2")


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
    assert [last[f"{register}_wh"] for register in USED] == [1967277, 799063, 608596, 1375315]
    assert [last[f"{register}_wh"] for register in REGISTERS if register not in USED] == [None] * 4
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
    for path in [path for path in (LOGS / "p1-minutes").glob("*.csv*") if "day" not in path.name]:
        imported = read(path, "p1mon")
        assert imported.rows_in == len(imported.readings) > 0
        assert not set(imported.defects) - {"gap", "missing_reading"}
        for register in USED:
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


def test_half_a_telegram_in_the_middle_of_a_log_is_an_error_or_is_counted(tmp_path: Path) -> None:
    whole = (OWN / "dsmr5-1s" / "own-lf.txt").read_bytes()
    path = tmp_path / "log"
    path.write_bytes(whole + whole)
    with pytest.raises(BadLog, match="part of a telegram"):
        read(path, "dsmr")
    assert read(path, "dsmr", keep_going=True).defects["cut_off"] == 2


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


def stamped(tmp_path: Path, steps_s: Iterable[float]) -> Imported:
    """A log whose readings lie so far apart."""
    at = [datetime(2025, 6, 1, tzinfo=UTC)]
    for step_s in steps_s:
        at.append(at[-1] + timedelta(seconds=step_s))
    rows = "".join(f"{t:%Y-%m-%dT%H:%M:%SZ},247,1,-10,1,1\n" for t in at)
    return read(log(tmp_path / "x.csv", PV + rows), "pv-home")


def test_a_clock_that_jitters_has_one_usual_step_and_makes_no_gaps(tmp_path: Path) -> None:
    drawn = random.Random(1)
    steps_s = [200 if number % 25 == 7 else 900 + drawn.randint(-40, 40) for number in range(1_000)]
    imported = stamped(tmp_path, steps_s)
    assert imported.interval_s is not None
    assert abs(imported.interval_s - 900) <= 5, "though no second comes as often as the 200 s of a reading sent again"
    assert imported.defects == {}


def test_a_log_that_changes_its_step_has_gaps_by_the_step_where_they_lie(tmp_path: Path) -> None:
    imported = stamped(tmp_path, [10] * 3_000 + [60] + [10] * 3_000 + [900] * 3_000 + [1_800])
    assert imported.interval_s == 900, "the one at the end"
    assert imported.defects["gap"] == 2
    assert imported.defects["missing_reading"] == 5 + 1


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


def test_a_local_day_of_25_or_23_hours_has_its_day_row_at_its_end(tmp_path: Path) -> None:
    days = ["2024-10-26", "2024-10-27", "2024-10-28", "2025-03-29", "2025-03-30"]
    text = "TIMESTAMP,VERBR_KWH_181\n" + "".join(f"{day} 00:00:00,1\n" for day in days)
    found = column(read(log(tmp_path / "days.csv", text), "p1mon-daily"), "observed_at")
    hours = [(later - earlier) / timedelta(hours=1) for earlier, later in zip(found, found[1:], strict=False)]
    assert hours == [25, 24, 152 * 24, 23]
