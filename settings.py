"""Reading a process's settings once: flags, then the environment, then what the stack of the home was started with."""

import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from schemas.errors import ConfigError

PREFIX = "METERSTREAM_"


UNLIKE = re.compile(r"[^A-Za-z0-9/._~+@,:&'-]")
"""What some reader of a store takes for a pattern, a partition or an escape, or drops with all that comes after it."""


def require_plain(name: str, place: str) -> None:
    """Refuses a place that not every library takes as it is written.

    Raises:
        ConfigError: it names the characters.
    """
    if wrong := sorted(set(UNLIKE.findall(place))):
        msg = f"{name} is {place}, which has {' '.join(map(repr, wrong))}: only letters from A to Z, digits and "
        raise ConfigError(msg + "/ . _ ~ + @ , : & ' - are taken by all that reads and writes there")


def home() -> Path:
    """Root of all data: `METERSTREAM_HOME`, else `data/` in the checkout.

    Raises:
        ConfigError: see `require_plain`.
    """
    found = Path(os.environ.get("METERSTREAM_HOME") or Path(__file__).parent / "data").resolve()
    require_plain("METERSTREAM_HOME", str(found))
    return found


OWN_STORE = "s3://meterstream-local"
"""The bucket of the S3 server that a stack runs of its own, where it is asked to."""


def store_url() -> str:
    """URL of what has lake, state and reports: `METERSTREAM_STORE`, else that of the stack, else the home."""
    folder = home()
    return os.environ.get(f"{PREFIX}STORE") or started_with(folder).get("store") or f"file://{folder}"


def own_credentials(folder: Path) -> Path:
    """Where a home keeps the keys of its own S3 server: a file as AWS's tools read it."""
    return folder / "s3" / "credentials"


def started_file(folder: Path) -> Path:
    """Where a home says what its stack was started with: JSON, setting → value."""
    return folder / "run" / "started.json"


def started_with(folder: Path) -> dict[str, Any]:
    """What the stack of a home was started with; empty where there was none, or where nobody can read it."""
    started = _read(started_file(folder))
    return {name: value for name, value in (started or {}).items() if _can_be(name, value)}


def damage(folder: Path) -> str | None:
    """What to say where a home does not know any more what its stack was started with."""
    file = started_file(folder)
    started = _read(file)
    if not file.exists() or (started is not None and all(_can_be(*item) for item in started.items())):
        return None
    return f"{file} is damaged: nobody knows the ports that the stack of {folder} was started with"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _can_be(name: str, value: object) -> bool:
    """Whether a damaged file has left a value as it was written."""
    if name.endswith("_port"):
        return type(value) is int and 1 <= value <= 65_535
    return isinstance(value, bool if name in ("cluster", "critical") else str)


class _Started(PydanticBaseSettingsSource):
    """The settings that the stack of the home was started with."""

    def __init__(self, kind: type["Settings"], folder: Path) -> None:
        super().__init__(kind)
        self._found = {name: value for name, value in started_with(folder).items() if name in kind.of_stack}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._found.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._found


class Settings(BaseSettings):
    """Root of each process's settings class.

    Attributes:
        of_stack: names of the settings that are taken from what the home's stack was started with.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)
    of_stack: ClassVar[frozenset[str]] = frozenset({"mqtt_port", "kafka_bootstrap"})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the home."""
        flags = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        return init_settings, env_settings, _Started(cls, Path(flags.get("home") or home()))


S = TypeVar("S", bound="Settings")


def load(kind: type[S], **flags: Any) -> S:
    """The settings, flags first; a flag that is None was not given.

    Raises:
        ConfigError: all missing and wrong ones, together.
    """
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        wrong = [
            f"{PREFIX}{'_'.join(map(str, e['loc'])).upper()} {'is not set' if e['type'] == 'missing' else e['msg']}"
            for e in error.errors()
        ]
        raise ConfigError("; ".join(wrong) + " (each is also a flag: see --help)") from error


def contradictions(kind: type[Settings], folder: Path) -> list[str]:
    """Where the environment says otherwise than the stack of a home was started with, a sentence each."""
    started = started_with(folder)
    asked = {name: os.environ.get(f"{PREFIX}{name.upper()}") for name in sorted(kind.of_stack & set(started))}
    return [
        f"{PREFIX}{name.upper()} is {value}, and the stack in {folder} was started with {started[name]}"
        for name, value in asked.items()
        if value is not None and value != str(started[name])
    ]
