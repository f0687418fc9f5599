"""What several unit tests of the replay play: a small tape, into a data folder of their own."""

from pathlib import Path

import pytest

from tests.wire import small_tape


@pytest.fixture(scope="session")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tape") / "small"
    small_tape.write(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    return tmp_path
