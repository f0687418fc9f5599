"""Objects on HDFS: each is written beside its name and renamed, so nobody reads half of one.

The name node takes or refuses a rename in one step, which is all that `put_new` needs. What a killed process was
writing stays, under a name that begins with a dot: nobody lists it.
"""

import uuid
from typing import Any
from urllib.parse import urlsplit


class Hdfs:
    """Objects of a folder of an HDFS; see `lake.store.Store`, which has the same calls.

    Name services are those of `HADOOP_CONF_DIR`, the user is `HADOOP_USER_NAME`. What goes wrong is an `OSError`, such
    as `FileNotFoundError`, or a `RuntimeError`.
    """

    def __init__(self, url: str) -> None:
        """Asks nobody yet.

        Raises:
            OSError: there is no such name service; ValueError and RuntimeError likewise.
        """
        from hdfs_native import Client  # of this store alone

        self._root = urlsplit(url).path.rstrip("/")
        self._client = Client(url)

    def put(self, path: str, content: bytes | memoryview) -> None:
        """Writes an object; one of that name is replaced, in one step."""
        self._rename(path, content, overwrite=True)

    def put_new(self, path: str, content: bytes) -> bool:
        """Writes an object where there is none of that name. Returns whether it did."""
        if self.has(path):
            return False
        try:
            self._rename(path, content, overwrite=False)
        except FileExistsError:
            return False
        return True

    def get(self, path: str) -> bytes:
        """An object's bytes."""
        content: bytes = self._client.read(f"{self._root}/{path}").read()
        if not content and self._client.get_file_info(f"{self._root}/{path}").length:
            msg = "it is there, and no data node has said that it has it"  # where the name node closes files so early
            raise OSError(msg)
        return content

    def has(self, path: str) -> bool:
        """Whether an object of that name is there."""
        try:
            return not self._client.get_file_info(f"{self._root}/{path}").isdir
        except FileNotFoundError:
            return False

    def paths(self, folder: str) -> list[str]:
        """All objects of a folder and of those in it."""
        found = self._listed(folder, recursive=True)
        return [entry.path.removeprefix(f"{self._root}/") for entry in found if not entry.isdir]

    def folders(self, folder: str) -> list[str]:
        """The folders in a folder."""
        return [entry.path for entry in self._listed(folder, recursive=False) if entry.isdir]

    def delete(self, paths: list[str]) -> None:
        """Removes objects; those that are not there already are no error."""
        for path in paths:
            self._client.delete(f"{self._root}/{path}")

    def _listed(self, folder: str, recursive: bool) -> list[Any]:
        found = self._client.list_status(f"{self._root}/{folder}", recursive)
        return [entry for entry in found if not entry.path.rpartition("/")[2].startswith(".")]

    def _rename(self, path: str, content: bytes | memoryview, overwrite: bool) -> None:
        folder, _, name = f"{self._root}/{path}".rpartition("/")
        fresh = f"{folder}/.{name}.{uuid.uuid4().hex}"
        with self._client.create(fresh) as file:
            file.write(content)
        try:
            self._client.rename(fresh, f"{folder}/{name}", overwrite)
        except BaseException:
            self._client.delete(fresh)
            raise
