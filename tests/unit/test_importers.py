"""Logs → readings; on the real logs of METER_LOGS where it is set, on our own otherwise."""

import gzip
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replay.importers import formats, import_log
from replay.tape import read_tape
from schemas.errors import BadLog, ConfigError
from schemas.tables import REGISTERS

OWN = Path(__file__).parent.parent / "logs"
LOGS = Path(os.environ.get("METER_LOGS") or OWN)


def read(path, format, **options):
    return formats()[format].read(path, **{"meter_id": "m1", **options})


def log(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def column(imported, name):
    return imported.readings[name].to_pylist()


def minutes_after(imported, begin):
    return [(stamp - begin) / timedelta(minutes=1) for stamp in column(imported, "observed_at")]


def test_the_formats_are_the_modules_of_the_folder_each_with_a_description():
    names = "dsmr ieee-lv london nem12 p1mon p1mon-daily pv-home sparkfun uci-household"
    assert list(formats()) == names.split()
    assert all(module.__doc__.splitlines()[0].endswith(".") for module in formats().values())


@pytest.mark.parametrize("name", ["sparkfun.json", "sparkfun.csv"])
def test_the_public_streams_eight_rows_give_the_figures_of_the_brief(name):
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


def test_both_exports_of_the_public_stream_give_the_same_readings():
    assert read(OWN / "sparkfun.json", "sparkfun").readings == read(OWN / "sparkfun.csv", "sparkfun").readings


def test_a_telegram_log_loses_only_its_cut_off_first_record():
    for path in (LOGS / "dsmr5-1s").glob("*.txt"):
        imported = read(path, "dsmr")
        assert imported.defects == {"cut_off": 1, "gap": 1, "missing_reading": 1}
        assert imported.rows_in == len(imported.readings) + 1
        stamps = column(imported, "observed_at")
        assert imported.interval_s == 1
        assert (stamps[-1] - stamps[0]).total_seconds() == len(stamps)  # a second each, one missing
        assert (imported.time_zone, set(column(imported, "meter_id"))) == ("Europe/Amsterdam", {"m1"})


def test_minute_rows_keep_every_row_and_whole_wh():
    for path in [log for log in (LOGS / "p1-minutes").glob("*.csv*") if "day" not in log.name]:
        imported = read(path, "p1mon")
        assert imported.rows_in == len(imported.readings) > 0
        assert not set(imported.defects) - {"gap", "missing_reading"}
        for register in REGISTERS:
            wh = column(imported, f"{register}_wh")
            assert all(earlier <= later for earlier, later in zip(wh, wh[1:], strict=False))
        assert imported.interval_s == 60
        assert set(column(imported, "tariff")) <= {1, 2, None}


def test_the_repeated_autumn_hour_is_told_apart_by_the_order_of_its_rows():
    imported = read(OWN / "p1mon-autumn.csv", "p1mon")
    begin = datetime(2024, 10, 26, 23, 58, tzinfo=UTC)
    assert minutes_after(imported, begin) == [0, 1, 2, 22, 42, 62, 82, 102, 122, 142]
    assert "ambiguous_local_time" not in imported.defects and "backward_step" not in imported.defects


def test_an_autumn_hour_that_comes_only_once_is_counted_as_ambiguous(tmp_path):
    lines = (OWN / "p1mon-autumn.csv").read_text().splitlines(keepends=True)
    path = tmp_path / "log.csv"
    path.write_text("".join(lines[:6] + lines[9:]))
    assert read(path, "p1mon").defects["ambiguous_local_time"] == 3


def test_a_time_that_the_spring_hour_skips_is_named_and_kept():
    imported = read(OWN / "p1mon-spring.csv", "p1mon")
    assert minutes_after(imported, datetime(2024, 3, 31, 0, 58, tzinfo=UTC)) == [0, 1, 2, 3, 4]
    assert imported.defects == {"nonexistent_local_time": 1}


def test_duplicates_conflicts_and_backward_steps_stay_and_are_counted(tmp_path):
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
    tmp_path, format, source, line, change
):
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


def test_half_a_telegram_in_the_middle_of_a_log_is_an_error_or_is_counted(tmp_path):
    whole = (OWN / "dsmr5-1s" / "own-lf.txt").read_bytes()
    path = tmp_path / "log"
    path.write_bytes(whole + whole)
    with pytest.raises(BadLog, match="part of a telegram"):
        read(path, "dsmr")
    assert read(path, "dsmr", keep_going=True).defects["cut_off"] == 2


@pytest.mark.parametrize("format", list(formats()))
@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"\x1f\x8b\x08", b"[1, 2]", b"[{", b"a,b\n1,2\n", b"/x\n!\n"])
def test_a_file_of_another_kind_gives_no_tape_but_a_reason(tmp_path, format, data):
    path = tmp_path / "log"
    path.write_bytes(data)
    (tmp_path / "load_profiles_1min_1.csv").write_text("p1\n0.1\n")
    with pytest.raises(BadLog, match="log"):
        import_log(path, format, tmp_path / "tape")
    assert not (tmp_path / "tape").exists()


def test_several_logs_make_one_tape_of_several_meters_named_by_their_files(tmp_path):
    tape, refused = import_log(OWN / "p1-telegrams", "dsmr", tmp_path / "tape", keep_going=True)
    meters = tape.registry["meter_id"].to_pylist()
    assert "own-v5" in meters and "own-be" in meters
    assert len(meters) == len(tape.readings) == len(set(meters))
    assert tape.info.rows_in == len(tape.readings) + tape.info.defects["refused"] + tape.info.defects.get("cut_off", 0)
    assert any("own-v5-bit-flipped.txt:1: CRC" in line for line in refused)
    with pytest.raises(BadLog, match="own-"):
        import_log(OWN / "p1-telegrams", "dsmr", tmp_path / "other")


def test_a_meter_that_comes_in_two_logs_is_one_meter_and_is_told(tmp_path):
    header, *rows = (OWN / "p1-minutes" / "own-minutes.csv").read_text().splitlines(keepends=True)
    for name, part in (("2024-a", rows[:4]), ("2024-b", rows[4:])):
        log(tmp_path / name / "same.csv", "".join([header, *part]))
    tape, _ = import_log([tmp_path / "2024-a" / "same.csv", tmp_path / "2024-b" / "same.csv"], "p1mon", tmp_path / "t")
    assert tape.registry["meter_id"].to_pylist() == ["same"]
    assert tape.info.defects["same_meter_again"] == 1
    assert len(tape.readings) == len(rows)


def test_a_telegram_without_a_clock_takes_the_begin_that_is_named_or_is_refused(tmp_path):
    whole = (OWN / "p1-telegrams" / "own-v2.txt").read_text()
    path = log(tmp_path / "old.txt", whole + whole)
    with pytest.raises(BadLog, match="--first-at gives it one"):
        read(path, "dsmr")
    begin = datetime(2010, 1, 1, tzinfo=UTC)
    imported = read(path, "dsmr", first_at=begin)
    assert column(imported, "observed_at") == [begin, begin + timedelta(seconds=10)]


def test_a_day_row_is_read_when_its_day_is_over(tmp_path):
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


def test_day_rows_say_what_the_minute_rows_of_the_same_meter_say():
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


def test_the_uci_household_gets_a_register_that_loses_nothing(tmp_path):
    rows = [f"16/12/2006;17:{minute:02d}:00;0.1{minute % 10};0.1;234.84;18.4;0;0;0\n" for minute in range(60)]
    rows[30] = "16/12/2006;17:30:00;?;?;?;?;?;?;\n"
    imported = read(log(tmp_path / "log.txt", UCI + "".join(rows)), "uci-household")
    power_w = [value for value in column(imported, "import_w") if value is not None]
    assert len(imported.readings) == 60, "59 minutes and the register's begin"
    assert column(imported, "import_t1_wh")[-1] == sum(power_w) // 60
    assert imported.defects["empty_fields"] == imported.defects["missing_reading"] == 1
    assert column(imported, "observed_at")[1] == datetime(2006, 12, 16, 16, 0, tzinfo=UTC)
    assert (column(imported, "voltage_l1_mv")[1], column(imported, "current_l1_ma")[1]) == (234_840, 18_400)


PV = "time,power.grid.voltage,power.grid.current,power.grid.power,total.grid.import,total.grid.export\n"


def test_the_pv_home_keeps_its_duplicates_and_its_mixed_steps_and_turns_the_sign(tmp_path):
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


LONDON = "LCLid,tstp,energy(kWh/hh)\n"


def test_londons_half_hours_become_a_register_that_is_read_at_their_ends(tmp_path):
    rows = [
        "2013-01-01 00:00:00, 0.219 ",
        "2013-01-01 00:30:00, 0.2419 ",
        "2013-01-01 01:00:00,Null",
        "2013-01-01 01:30:00, 0.0002 ",
    ]
    path = log(tmp_path / "MAC1.csv", LONDON + "".join(f"MAC1,{row}\n" for row in rows))
    tariffs = "TariffDateTime,Tariff\n2013-01-01 00:00:00,Low\n2013-01-01 00:30:00,High\n2013-01-01 01:30:00,Normal\n"
    log(tmp_path / "dtou_tariffs_2013.csv", tariffs)
    imported = read(path, "london")
    begin = datetime(2013, 1, 1, tzinfo=UTC)
    assert minutes_after(imported, begin) == [0, 30, 60, 120]
    assert column(imported, "import_t1_wh") == [0, 219, 460, 461], "460.9 and 461.1: nothing is lost to rounding"
    assert column(imported, "tariff") == [None, 2, 3, 1]
    assert set(column(imported, "meter_id")) == {"MAC1"}
    assert imported.defects == {"empty_fields": 1, "gap": 1, "missing_reading": 1}
    assert column(imported, "import_w") == [None] * 4


def test_the_feeders_homes_have_power_a_register_and_their_place_in_the_grid(tmp_path):
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
    homes = {row["meter_id"]: row for row in tape.registry.to_pylist()}
    assert (homes["LOAD2"]["usage_point_id"], homes["LOAD2"]["transformer_id"]) == ("bus-47-phase-3", "TR1")
    assert homes["LOAD1"]["interval_s"] == 60


def nem12(*records):
    return "".join(f"{record}\n" for record in ("100,NEM12,200405011135,MDA1,Ret1", *records, "900"))


def test_nem12_channels_of_one_meter_meet_at_the_ends_of_their_intervals(tmp_path):
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


def test_nem13_reads_are_registers_as_they_stand(tmp_path):
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
        ("nem12", "x.csv", nem12("200,N,E1,1,E1,N1,S,kWh,720,", "300,20040201,1,1,A,", "300,20040202,1,A,"), 4),
        ("nem12", "x.csv", nem12("200,N,E1,1,E1,N1,S,kWh,720,", "300,20040201,1,1,A,", "777,1"), 4),
        ("p1mon-daily", "x.csv", 'TIMESTAMP,VERBR_KWH_181\n2024-01-01 00:00:00,1\n2024-01-02 00:00:00,"1,5"\n', 3),
    ],
)
def test_a_damaged_line_of_each_format_is_named_or_counted(tmp_path, format, name, text, line):
    path = log(tmp_path / name, text)
    with pytest.raises(BadLog, match=rf"{name}:{line}: "):
        read(path, format)
    going = read(path, format, keep_going=True)
    assert going.defects["refused"] == 1
    assert len(going.readings) > 0
    assert f"{name}:{line}: " in going.refused[0]


@pytest.mark.parametrize("format", ["p1mon", "uci-household"])
def test_both_clock_changes_come_out_right_in_every_format_with_local_stamps(tmp_path, format):
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


def test_every_real_log_gives_as_many_readings_as_it_has_sound_records(tmp_path):
    """Rows in and out of each folder, as docs/replay.md tells them; a register that is summed has one reading more."""
    expected = {
        "pv-home-voltage": ("pv-home", 4_465, 4_465, 1),
        "household-voltage-1min": ("uci-household", 37_283, 37_284, 1),
        "ieee-european-lv": ("ieee-lv", 79_200, 79_255, 55),
        "nem12": ("nem12", 29_101, 18_639, 11),
    }
    for folder, (format, rows_in, rows_out, meters) in expected.items():
        if (LOGS / folder).is_dir():
            tape, _ = import_log(LOGS / folder, format, tmp_path / folder)
            assert (tape.info.rows_in, tape.info.rows_out, len(tape.registry)) == (rows_in, rows_out, meters), folder


def test_wrong_arguments_are_the_operators_to_mend(tmp_path):
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


def test_an_imported_log_is_a_tape_with_its_meter_in_the_registry(tmp_path):
    import_log(OWN / "dsmr5-1s" / "own-lf.txt", "dsmr", tmp_path / "tape", meter_id="home-1")
    tape = read_tape(tmp_path / "tape")
    meter = tape.registry.to_pylist()[0]
    assert tape.registry.num_rows == 1
    assert (meter["meter_id"], meter["phases"], meter["nominal_mv"]) == ("home-1", "L1,L2,L3", 230_000)
    assert (meter["fuse_a"], meter["interval_s"], meter["jurisdiction"]) == (None, 1, "EN50160")
    assert (tape.info.format, tape.info.source, tape.info.rows_in, tape.info.rows_out) == ("dsmr", "own-lf.txt", 11, 10)


def test_the_time_zone_goes_by_the_dialect_unless_it_is_named():
    assert read(OWN / "p1-telegrams" / "own-be.txt", "dsmr").time_zone == "Europe/Brussels"
    assert read(OWN / "p1-telegrams" / "own-be.txt", "dsmr", timezone="UTC").time_zone == "UTC"
