"""Where the tables of a run lie: parts, manifests, and what makes a write whole or absent.

A table is `root/<name>/part-*.parquet`. Its `manifest.json` is written last and removed first, so a table without one
does not exist, whatever files a killed stage left.
"""

import contextlib
import fnmatch
import json
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from pyarrow import fs

from disranker import tables
from disranker.recipe import Refused

MANIFEST = "manifest.json"
ARROW = pa.ipc.IpcWriteOptions(compression="lz4")


class Store:
    """The folder of a run, on any file system that pyarrow knows. Cheap to send to another process."""

    def __init__(self, root: str):
        self.root = root
        if "://" in root:
            self.fs, self.path = fs.FileSystem.from_uri(root)
        else:
            self.fs, self.path = fs.LocalFileSystem(), str(Path(root).absolute())

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.uri,)

    @property
    def uri(self) -> str:
        """The root as another process finds it: a URI, or an absolute path."""
        return self.root if "://" in self.root else self.path

    @property
    def local(self) -> bool:
        return isinstance(self.fs, fs.LocalFileSystem)

    def at(self, *names: str) -> str:
        return "/".join((self.path, *names))

    # Tables

    def write(self, table: str, part: int, rows: pa.Table | list[dict[str, Any]]) -> None:
        """One part of a table; writing it again replaces it."""
        self.put_table(tables.conform(table, rows), table, f"part-{part:05d}.parquet")

    def parts(self, table: str) -> list[str]:
        """Files of a finished table, in order. Raises `FileNotFoundError` if there is no such table."""
        return [self.at(table, name) for name in self.manifest(table)["parts"]]

    def written(self, table: str) -> list[str]:
        """Files of a table, finished or not, in order."""
        return sorted(info.path for info in self.files(table) if info.extension == "parquet")

    def read(
        self, table: str, columns: list[str] | None = None, part: int | None = None, where: Any = None
    ) -> pa.Table:
        """A finished table, or one part of it, in memory, in the order of parts; `where` is a pyarrow expression."""
        parts = self.parts(table)
        if part is not None:
            wanted = self.at(table, f"part-{part:05d}.parquet")
            parts = [wanted] if wanted in parts else []
        return self.read_files(table, parts, columns, where)

    def read_files(self, table: str, files: list[str], columns: list[str] | None = None, where: Any = None) -> pa.Table:
        """Files of a table in memory, in the order given."""
        if not files:
            return tables.SCHEMAS[table].empty_table().select(columns or tables.SCHEMAS[table].names)
        source = pyarrow.dataset.dataset(files, schema=tables.SCHEMAS[table], filesystem=self.fs, format="parquet")
        return source.to_table(columns=columns, filter=where)

    # Manifests

    def manifest(self, name: str) -> dict[str, Any]:
        """Raises `FileNotFoundError` where the artefact is not finished."""
        return self.read_json(name, MANIFEST)

    def finished(self, name: str) -> dict[str, Any] | None:
        """The manifest, or None."""
        try:
            return self.manifest(name)
        except FileNotFoundError:
            return None

    def unfinish(self, name: str) -> None:
        """Removes the manifest of an artefact and leaves its files."""
        if self.fs.get_file_info(self.at(name, MANIFEST)).type != fs.FileType.NotFound:
            self.fs.delete_file(self.at(name, MANIFEST))

    def clear(self, name: str) -> None:
        """Removes an artefact, its manifest first, so that a kill in between leaves it unfinished, not wrong."""
        self.unfinish(name)
        if self.fs.get_file_info(self.at(name)).type != fs.FileType.NotFound:
            self.fs.delete_dir(self.at(name))

    def drop_run(self, stage: str) -> None:
        """Removes what a stage kept to go on from, of this and of earlier settings."""
        for info in self.fs.get_file_info(fs.FileSelector(self.at("runs"), allow_not_found=True)):
            if info.base_name.startswith(f"{stage}-"):
                self.fs.delete_dir(info.path)

    def commit(self, name: str, manifest: dict[str, Any]) -> None:
        """Makes an artefact exist: its manifest, with the size of what was written."""
        whole = manifest | {"bytes": sum(info.size for info in self.files(name))}
        if name in tables.SCHEMAS:
            schema = {field.name: str(field.type) for field in tables.SCHEMAS[name]}
            parts = self.written(name)
            rows = sum(self._rows(part) for part in parts)
            whole |= {"schema": schema, "parts": [part.removeprefix(self.at(name, "")) for part in parts], "rows": rows}
        self.put_text(json.dumps(whole, indent=1), name, MANIFEST)

    def files(self, name: str) -> list[fs.FileInfo]:
        """All files below an artefact, finished or not."""
        selector = fs.FileSelector(self.at(name), recursive=True, allow_not_found=True)
        return [info for info in self.fs.get_file_info(selector) if info.type == fs.FileType.File]

    def remove(self, name: str, unwanted: Callable[[str], bool]) -> None:
        """Removes files of an artefact by their name."""
        for info in self.files(name):
            if unwanted(info.base_name):
                self.fs.delete_file(info.path)

    # Files and folders

    def put_table(self, rows: pa.Table, *names: str) -> None:
        """One parquet file, whole or absent."""
        self._put(self.at(*names), lambda out: pq.write_table(rows, out))

    def put_arrow(self, rows: pa.Table, *names: str) -> None:
        """One file in Arrow's own format, whole or absent: for what is soon read again, and never by column."""
        self._put(self.at(*names), partial(_write_arrow, rows))

    def read_arrow(self, path: str, fields: list[int] | None = None) -> pa.Table:
        """What `put_arrow` wrote, or some of its columns, by number."""
        with self.fs.open_input_file(path) as file:
            return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields)).read_all()

    def read_bytes(self, *names: str) -> bytes:
        """One file as it is. Raises `FileNotFoundError` where there is none."""
        with self.fs.open_input_stream(self.at(*names)) as file:
            content: bytes = file.read()
            return content

    def read_json(self, *names: str) -> dict[str, Any]:
        """Raises `FileNotFoundError` where there is none."""
        found: dict[str, Any] = json.loads(self.read_bytes(*names))
        return found

    def put_text(self, text: str, *names: str) -> None:
        self._put(self.at(*names), lambda out: out.write(text.encode()))

    def put(self, write: Callable[[IO[bytes]], None], *names: str) -> None:
        """One file, whole or absent; without names, the root itself is the file."""
        self._put(self.at(*names), write)

    def put_folder(self, folder: str | Path, name: str) -> None:
        """A local folder as an artefact (its manifest is committed apart)."""
        self.fs.create_dir(self.at(name), recursive=True)
        fs.copy_files(
            str(folder), self.at(name), source_filesystem=fs.LocalFileSystem(), destination_filesystem=self.fs
        )

    def folder(self, name: str) -> str:
        """A local folder with the files of an artefact: itself, or a copy of what lies far away."""
        if self.local:
            return self.at(name)
        copy = tempfile.mkdtemp(prefix="disranker-")
        fs.copy_files(self.at(name), copy, source_filesystem=self.fs, destination_filesystem=fs.LocalFileSystem())
        return copy

    def _rows(self, path: str) -> int:
        with self.fs.open_input_file(path) as file:
            return int(pq.ParquetFile(file).metadata.num_rows)

    def _put(self, path: str, write: Any) -> None:
        # An object store shows a file only when it is closed; a disk needs the rename.
        self.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        unfinished = f"{path}.{uuid.uuid4().hex}.unfinished" if self.local else path
        try:
            with self.fs.open_output_stream(unfinished) as out:
                write(out)
            if self.local:
                self.fs.move(unfinished, path)
        except OSError:  # a full disk: what was begun would stay and fill it
            if self.local:
                with contextlib.suppress(FileNotFoundError):  # it could not even be opened
                    self.fs.delete_file(unfinished)
            raise


def _write_arrow(rows: pa.Table, out: IO[bytes]) -> None:
    with pa.ipc.new_file(out, rows.schema, options=ARROW) as writer:
        writer.write_table(rows)


def expand(patterns: list[str], what: str, section: str = "data") -> list[str]:
    """The files that paths, globs, folders or URIs name, sorted. Raises `Refused` for one that names none.

    The patterns are the setting `what` of a section of the recipe.
    """
    found: list[str] = []
    for pattern in patterns:
        files = _matches(pattern)
        if not files:
            raise Refused(f"{section}.{what}: nothing at {pattern}; give a file, a folder or a glob that exists")
        found += files
    return sorted(set(found))


def _matches(pattern: str) -> list[str]:
    pattern = pattern.rstrip("/") or "/"
    filesystem, path = locate(pattern)
    # In a URI, the options of an object store follow a question mark.
    address, mark, options = pattern.partition("?") if "://" in pattern else (path, "", "")
    prefix, suffix = address[: len(address) - len(path)], mark + options
    if filesystem.get_file_info(path).type == fs.FileType.File:
        return [prefix + path + suffix]
    if not any(sign in path for sign in "*?["):
        path = f"{path}/*"
    folder = path.split("*")[0].split("?")[0].split("[")[0].rsplit("/", 1)[0] or "/"
    listed = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return [prefix + f.path + suffix for f in listed if f.type == fs.FileType.File and fnmatch.fnmatch(f.path, path)]


def is_folder(uri: str) -> bool:
    filesystem, path = locate(uri)
    return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)


def locate(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path in it of a path or URI."""
    if "://" in uri:
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path
    return fs.LocalFileSystem(), str(Path(uri).absolute())
