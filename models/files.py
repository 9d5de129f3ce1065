"""Small files of a registry: in a local folder, or on any pyarrow filesystem.

A local folder needs no pyarrow: that is 30 MB less in every node's forecaster, where the registry is local.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol


class Files(Protocol):
    """What a registry does with files; names are relative to its root, with slashes. All raise OSError."""

    def folders(self) -> Iterable[str]:
        """Names of the folders at the root; none where there is no root yet."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all: a temporary file beside it, then a move; makes the folder."""
        ...


def open_files(uri: str) -> Files:
    """A local folder or a URI (file://, s3://, gs://, hdfs://); raises OSError or ValueError on any other."""
    return _Remote(uri) if "://" in uri else _Folder(Path(uri).expanduser().absolute())


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def folders(self) -> Iterable[str]:
        return [path.name for path in self._root.iterdir() if path.is_dir()] if self._root.is_dir() else []

    def exists(self, name: str) -> bool:
        return (self._root / name).is_file()

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_bytes(content)
        beside.replace(path)


class _Remote:
    def __init__(self, uri: str) -> None:
        import pyarrow.fs as pafs  # noqa: PLC0415 - 30 MB that a local folder does not need

        self._pafs: Any = pafs
        self._fs, root = pafs.FileSystem.from_uri(uri)
        self._root = root.rstrip("/")

    def folders(self) -> Iterable[str]:
        inside = self._fs.get_file_info(self._pafs.FileSelector(self._root, allow_not_found=True))
        return [info.base_name for info in inside if info.type == self._pafs.FileType.Directory]

    def exists(self, name: str) -> bool:
        return bool(self._fs.get_file_info(f"{self._root}/{name}").is_file)

    def read(self, name: str) -> bytes:
        with self._fs.open_input_stream(f"{self._root}/{name}") as source:
            return bytes(source.read())

    def write(self, name: str, content: bytes) -> None:
        folder, _, base = f"{self._root}/{name}".rpartition("/")
        self._fs.create_dir(folder, recursive=True)
        with self._fs.open_output_stream(f"{folder}/.{base}.tmp") as sink:
            sink.write(content)
        self._fs.move(f"{folder}/.{base}.tmp", f"{folder}/{base}")
