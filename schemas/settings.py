"""Reading a process's settings once: from flags, then from `METERSTREAM_…` in the environment."""

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import ConfigError


class Settings(BaseSettings):
    """Root of each process's settings class."""

    model_config = SettingsConfigDict(env_prefix="METERSTREAM_", extra="ignore", frozen=True)


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
            f"METERSTREAM_{'_'.join(map(str, e['loc'])).upper()} {'is not set' if e['type'] == 'missing' else e['msg']}"
            for e in error.errors()
        ]
        raise ConfigError("; ".join(wrong) + " (each is also a flag: see --help)") from error
