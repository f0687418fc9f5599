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


def column(imported, name):
    return imported.readings[name].to_pylist()


def minutes_after(imported, begin):
    return [(stamp - begin) / timedelta(minutes=1) for stamp in column(imported, "observed_at")]


def test_the_formats_are_the_modules_of_the_folder_each_with_a_description():
    assert list(formats()) == ["dsmr", "p1mon", "sparkfun"]
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
    for path in (LOGS / "p1-minutes").glob("*.csv*"):
        imported = read(path, "p1mon")
        assert imported.rows_in == len(imported.readings) > 0
        assert not set(imported.defects) - {"gap", "missing_reading"}
        for register in REGISTERS:
            wh = column(imported, f"{register}_wh")
            assert all(earlier <= later for earlier, later in zip(wh, wh[1:], strict=False))
        assert imported.interval_s in (60, 86400)
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


@pytest.mark.parametrize("format", ["dsmr", "p1mon", "sparkfun"])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"\x1f\x8b\x08", b"[1, 2]", b"[{", b"a,b\n1,2\n", b"/x\n!\n"])
def test_a_file_of_another_kind_gives_no_tape_but_a_reason(tmp_path, format, data):
    path = tmp_path / "log"
    path.write_bytes(data)
    with pytest.raises(BadLog, match="log"):
        import_log(path, format, tmp_path / "tape")
    assert not (tmp_path / "tape").exists()


def test_wrong_arguments_are_the_operators_to_mend(tmp_path):
    with pytest.raises(ConfigError, match="no format x"):
        import_log(OWN / "sparkfun.csv", "x", tmp_path / "tape")
    with pytest.raises(ConfigError, match="cannot read"):
        import_log(tmp_path / "nothing", "dsmr", tmp_path / "tape")
    with pytest.raises(ConfigError, match="no time zone"):
        import_log(OWN / "sparkfun.csv", "sparkfun", tmp_path / "tape", timezone="Europe/Nowhere")
    with pytest.raises(ConfigError, match="meter id"):
        import_log(OWN / "sparkfun.csv", "sparkfun", tmp_path / "tape", meter_id="a.b")


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
