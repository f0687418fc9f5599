"""How a store is found and opened: its URL, and what AWS's variables and files say of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lake.spark import hadoop_options, uri
from lake.store import AWS_VARIABLES, Store, aws_variables, store, used
from schemas.errors import ConfigError, RetryLater
from settings import OWN_STORE, load, own_credentials
from stack.parts import s3_keys, store_variables
from stack.settings import ROOT, StackSettings, remember, store_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*AWS_VARIABLES, "AWS_PROFILE", "AWS_DEFAULT_REGION", "METERSTREAM_STORE"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is set meanwhile
        monkeypatch.delenv(name)
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path / "home"))
    for name, file in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
        monkeypatch.setenv(name, str(tmp_path / file))
    return tmp_path


def test_without_a_word_the_store_is_the_home_and_a_stack_remembers_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store().url == f"file://{home}/home"
    remember(load(StackSettings, home=home / "home", store=f"file://{home}/other"), "native", False, False)
    assert store().url == f"file://{home}/other"
    assert load(StackSettings, home=home / "home").store == f"file://{home}/other"
    monkeypatch.setenv("METERSTREAM_STORE", f"file://{home}/third")
    assert store().url == f"file://{home}/third"


def test_what_is_no_store_is_told(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"METERSTREAM_STORE is s3:, expected file://…, s3://…"):
        Store("s3:")


@pytest.mark.parametrize("name", ["a b", "ü", "a#1", "a?x=1", "[1]", "a*", "a=b", "a%20b", "a;b", "(x)"])
def test_a_name_that_some_reader_takes_for_another_is_refused(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"s3://bucket/{name}", f"file://{home}/{name}"):
        with pytest.raises(ConfigError, match="only letters from A to Z, digits"):
            Store(url)
    monkeypatch.setenv("METERSTREAM_HOME", str(home / name))
    with pytest.raises(ConfigError, match="METERSTREAM_HOME is"):
        store()


def test_keys_that_nobody_can_read_are_an_error_of_use(home: Path) -> None:
    (home / "credentials").write_text("no section\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        Store("s3://bucket/prefix")


def test_keys_are_those_of_the_variables_else_of_the_profile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "config").write_text("[default]\nregion = eu-central-1\n[profile grid]\nregion = eu-west-3\n")
    (home / "credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
        "[grid]\naws_access_key_id = c\naws_secret_access_key = d\nendpoint_url = http://10.0.0.9:7070\n"
    )
    assert aws_variables("s3://meters") == {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "eu-central-1"
    }  # fmt: skip
    monkeypatch.setenv("AWS_PROFILE", "grid")
    assert aws_variables("s3://meters") == {
        "AWS_ACCESS_KEY_ID": "c", "AWS_SECRET_ACCESS_KEY": "d", "AWS_REGION": "eu-west-3",
        "AWS_ENDPOINT_URL": "http://10.0.0.9:7070", "AWS_ALLOW_HTTP": "true",
    }  # fmt: skip
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "e")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "f")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")  # as compose passes on what is not set
    found = aws_variables("s3://meters")
    assert (found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"], found["AWS_REGION"]) == ("e", "f", "us-west-2")
    assert found["AWS_ENDPOINT_URL"] == "http://10.0.0.9:7070"


def test_the_stacks_own_server_has_keys_that_the_home_keeps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(StackSettings, home=home / "home", store=OWN_STORE, s3_port=7171)
    keys = s3_keys(settings)
    assert s3_keys(settings) == keys
    assert own_credentials(settings.folder).stat().st_mode & 0o077 == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of somebody's account")
    expected = {
        **keys,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:7171",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    assert aws_variables(OWN_STORE) == expected
    assert store_variables(settings).items() >= {"METERSTREAM_STORE": OWN_STORE, **keys}.items()
    assert store_variables(load(StackSettings, home=home / "home", store="")) == {"METERSTREAM_STORE": ""}


def test_the_stacks_own_server_hears_nothing_of_an_account_in_the_shell(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "of somebody's account")
    (home / "config").write_text("[default]\nregion = eu-central-1\n")
    settings = load(StackSettings, home=home / "home", store=OWN_STORE)
    keys = s3_keys(settings)
    expected = {**keys, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": "http://127.0.0.1:7070"}
    assert aws_variables(OWN_STORE) == expected | {"AWS_ALLOW_HTTP": "true"}
    for name, value in store_variables(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("METERSTREAM_HOME", str(home / "a-worker's"))
    assert aws_variables(OWN_STORE) == expected | {"AWS_ALLOW_HTTP": "true"}


def test_each_store_has_its_own_variables_while_it_is_used_and_the_shells_come_back(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    s3_keys(load(StackSettings, home=home / "home", store=OWN_STORE, s3_port=7171))
    with used(OWN_STORE):
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:7171"
        assert store().filled == ["AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY"]
    with used("s3://meters"):
        assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ.get("AWS_ENDPOINT_URL")) == ("a", None)
        assert "AWS_SESSION_TOKEN" not in os.environ
    with used(OWN_STORE):
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:7171"


def test_what_is_asked_for_is_a_store_or_refused() -> None:
    assert [store_of(said) for said in ("s3", "home", "s3://a/b/")] == [OWN_STORE, "", "s3://a/b"]
    for said in ("S3", "ftp://a", "s3://"):
        with pytest.raises(ConfigError, match=f"STORE is s3, home or a URL .*, not {said}"):
            store_of(said)
    with pytest.raises(ConfigError, match="another folder in each container"):
        store_of("file:///srv", in_containers=True)


def test_spark_is_told_where_a_store_is_and_reads_it_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:7070")
    options = hadoop_options("s3://meters/grid")
    assert options["spark.hadoop.fs.s3a.endpoint"] == "http://127.0.0.1:7070"
    assert options["spark.hadoop.fs.s3a.connection.ssl.enabled"] == "false"
    assert hadoop_options("file:///srv/meters") == {}
    assert uri("s3://meters/grid/x") == "s3a://meters/grid/x"


def test_a_file_is_an_object_at_its_end_or_refused(home: Path) -> None:
    with store().writing("state/a/rows") as file:
        file.write(b"rows")
    assert store().get("state/a/rows") == b"rows"
    with pytest.raises(RetryLater, match="state/a"), store().writing("state/a"):  # a folder
        pass
    with pytest.raises(ValueError, match="of its own"), store().writing("state/b"):
        msg = "of its own"
        raise ValueError(msg)


def test_a_file_that_a_full_disk_cuts_off_is_no_file_and_is_to_be_tried_again(home: Path) -> None:
    program = """
import resource, signal, polars as pl
from lake.tables import put_part
from schemas.errors import RetryLater
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
try:
    put_part("readings", pl.DataFrame({"meter_id": [f"m{n * 7919}" for n in range(20_000)]}), "rows", "2024-01-01")
except RetryLater:
    print("later")
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "later\n", said.stderr
    assert [path for path in (home / "home").rglob("*") if path.is_file()] == []
