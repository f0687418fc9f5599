"""The store: the one seam to file systems and object stores, where lake, state and reports lie, by one URL.

An object is written as a whole or not at all, under whatever name; `put_new` is the only conditional step, and of
several that try it at once one succeeds. Nothing is renamed, linked or locked, so a local folder and an object store
are the same to all that is built on it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

from schemas.errors import ConfigError, RetryLater
from settings import store_url

SCHEMES = ("file", "s3", "gs", "az")


class Store:
    """A store by its URL.

    Attributes:
        url: of its root, without a slash at the end.
    """

    def __init__(self, url: str) -> None:
        """Opens nothing that is not there: a local folder is made when something is written.

        Raises:
            ConfigError: the URL is of no kind that we know.
        """
        self.url = url.rstrip("/")
        scheme, _, rest = self.url.partition("://")
        if scheme not in SCHEMES or not rest:
            msg = f"METERSTREAM_STORE is {url}, expected {', '.join(f'{each}://…' for each in SCHEMES)}"
            raise ConfigError(msg)
        self.is_local = scheme == "file"
        try:
            if self.is_local:
                Path(rest).mkdir(parents=True, exist_ok=True)
            self._store = from_url(self.url)
        except (BaseError, ValueError, OSError) as error:
            msg = f"METERSTREAM_STORE is {url}, which cannot be opened: {error}"
            raise ConfigError(msg) from error

    def uri(self, path: str) -> str:
        """An object or folder as other libraries take it: a path where the store is a local folder, else a URL."""
        return f"{self.url}/{path}".removeprefix("file://")

    def put(self, path: str, content: bytes | memoryview) -> None:
        """Writes an object; one of that name is replaced, in one step.

        Raises:
            RetryLater: the store does not take it.
        """
        try:
            obstore.put(self._store, path, content)
        except (BaseError, OSError) as error:
            raise self._away(path, error) from error

    def put_new(self, path: str, content: bytes) -> bool:
        """Writes an object where there is none of that name. Returns whether it did; of several at once one does.

        Raises:
            RetryLater: the store does not answer: nobody knows whether it did.
        """
        try:
            obstore.put(self._store, path, content, mode="create")
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise self._away(path, error) from error
        return True

    def get(self, path: str) -> bytes:
        """An object's bytes.

        Raises:
            FileNotFoundError: there is none.
            RetryLater: the store does not answer.
        """
        try:
            return obstore.get(self._store, path).bytes().to_bytes()
        except FileNotFoundError:
            msg = f"{self.uri(path)} is not there"
            raise FileNotFoundError(msg) from None
        except (BaseError, OSError) as error:
            raise self._away(path, error) from error

    def has(self, path: str) -> bool:
        """Whether an object of that name is there.

        Raises:
            RetryLater: the store does not answer.
        """
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise self._away(path, error) from error
        return True

    def paths(self, folder: str) -> list[str]:
        """All objects of a folder and of those in it, from the store's root, by name; none where there is no folder.

        Raises:
            RetryLater: the store does not answer.
        """
        try:
            return sorted(entry["path"] for chunk in obstore.list(self._store, f"{folder}/") for entry in chunk)
        except FileNotFoundError:
            return []
        except (BaseError, OSError) as error:
            raise self._away(folder, error) from error

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder.

        Raises:
            RetryLater: the store does not answer.
        """
        try:
            found = obstore.list_with_delimiter(self._store, f"{folder}/")["common_prefixes"]
        except FileNotFoundError:
            return []
        except (BaseError, OSError) as error:
            raise self._away(folder, error) from error
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def delete(self, paths: Iterable[str]) -> None:
        """Removes objects; those that are not there already are no error.

        Raises:
            RetryLater: the store does not answer.
        """
        for path in paths:
            try:
                obstore.delete(self._store, path)
            except FileNotFoundError:
                continue
            except (BaseError, OSError) as error:
                raise self._away(path, error) from error

    def _away(self, path: str, error: Exception) -> RetryLater:
        why = str(error).partition("\n")[0]
        return RetryLater(f"the store {self.url} did not take or give {path}: {why}")


@lru_cache(maxsize=8)
def _opened(url: str) -> Store:
    return Store(url)


_used: ContextVar[str | None] = ContextVar("store", default=None)


def store() -> Store:
    """The store of this home: `METERSTREAM_STORE`, else the home itself; opened once a process.

    Raises:
        ConfigError: see `Store`.
    """
    return _opened(_used.get() or store_url())


@contextmanager
def used(url: str) -> Iterator[None]:
    """While it holds, `store` is the one of this URL: for a task, whose process knows nothing of the driver's home."""
    token = _used.set(url)
    try:
        yield
    finally:
        _used.reset(token)
