"""Answers and clicks as UBI 1.3 (github.com/o19s/ubi), in files that `jobs.ingest` reads as they are: the loop closes.

By their nature these files hold what people typed, and who: they exist only where a folder was set.
"""

import contextlib
import json
import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Self

import psutil
import pydantic

from disranker import logs, ubi

MAX_TEXT_CHARS = 1024  # of each text in an event
MAX_EVENT_BYTES = 16 * 1024  # as it is written
MAX_EVENTS = 100  # in one POST
MAX_WAITING = 2048  # records; one with a thousand hits has 40 KB
TICK_S = 1.0  # between looks at how old the open file is
OPEN = ".open-"  # before the name of a file that is not finished: no glob `ubi_*` finds it
NUMBERS = count()  # of files: no two of a process share a name
Clock = Callable[[], float]  # seconds since 1970


def query_record(
    *,
    query_id: str,
    client: str,
    query: str,
    hits: Sequence[str],
    time: float,
    application: str,
    attributes: Mapping[str, str | float | int | bool],
    teams: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """One answer, with the ids of its documents in rank order; `time` in seconds since 1970.

    `attributes` name at least `experiment` and `arm`; ingest also knows `start`, the offset of a later page. `teams`:
    the one of each position, of an interleaved page. Ingest refuses blank ids, clients and queries, and no hits.
    """
    if teams is not None and len(teams) != len(hits):
        raise ValueError(f"{len(teams)} teams for {len(hits)} hits; each position has one, or None")
    return {
        "application": application,
        "query_id": query_id,
        "client_id": client,
        "user_query": query,
        "query_response_id": query_id,  # one answer to each
        "query_response_hit_ids": list(hits),
        "object_id_field": "doc_id",  # as the catalogue calls it
        "query_attributes": dict(attributes) | ({"teams": list(teams)} if teams else {}),
        "timestamp": _iso(time * logs.MS),
    }


def _iso(time: Any) -> str:
    moment = datetime.now(UTC) if time is None else logs.moment(time)  # raises `ValueError`
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"  # no NaN, no half of a character


def _longest(value: Any) -> int:
    """Characters of the longest text in it, names included."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return len(value) if isinstance(value, str) else max(map(_longest, parts), default=0)


class Event(pydantic.BaseModel):
    """What somebody did with an answer. One that is accepted can be read by ingest, which decides what it needs."""

    model_config = pydantic.ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, pydantic.JsonValue]
    action_name: str
    query_id: str | None = None
    client_id: str | None = None
    user_query: str | None = None
    message: str | None = None
    timestamp: Annotated[str, pydantic.BeforeValidator(_iso), pydantic.Field(default=None, validate_default=True)]
    event_attributes: dict[str, pydantic.JsonValue] | None = None  # object {object_id}, position {ordinal}, dwell_time

    @pydantic.model_validator(mode="after")
    def _readable(self) -> Self:
        line = _line(self.record())
        if len(line) > MAX_EVENT_BYTES or _longest(self.record()) > MAX_TEXT_CHARS:
            raise ValueError(f"more than {MAX_EVENT_BYTES} bytes, or than {MAX_TEXT_CHARS} characters in a text of it")
        if reason := ubi.record(line, "", 0, "events").get("reason"):
            raise ValueError(reason)
        return self

    def record(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


_EVENTS = pydantic.TypeAdapter(Annotated[list[Event], pydantic.Field(max_length=MAX_EVENTS)])


def events(sent: Any) -> list[Event]:
    """The events of one POST, which sends one or a list. Raises `pydantic.ValidationError`, also for too many."""
    return _EVENTS.validate_python(sent if isinstance(sent, list) else [sent])


class Writer:
    """Appends records to files of a folder, on a thread of its own: nobody waits for the disk.

    Until it is `max_bytes` long or `max_age_s` old, or the writer closes, the name of a file begins with `.open-`. A
    kill loses only what waits. `dropped` counts records that found no room, `errors` what could not be written.
    """

    def __init__(self, folder: str | Path, prefix: str, max_bytes: int, max_age_s: float, clock: Clock = time.time):
        """Finishes files that processes of this host left when they died."""
        self.dropped = self.errors = 0
        self._folder, self._prefix, self._host = Path(folder), prefix, socket.gethostname()
        self._max_bytes, self._max_age_s, self._clock = max_bytes, max_age_s, clock
        self._file: FileIO | None = None
        self._begun, self._closed = 0.0, False  # when the last file was; whether all is over
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(MAX_WAITING)  # None: the end
        self._try(self._finish_of_the_dead)
        self._thread = threading.Thread(target=self._run, name=f"writes {prefix}", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Returns at once. From one event loop; the record is not to be changed afterwards."""
        if self._closed or self._waiting.full():
            self.dropped += 1
        else:
            self._waiting.put_nowait(record)

    def close(self) -> None:
        """Writes what waits and finishes the file."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        record: Mapping[str, Any] | None = {}
        while record is not None:
            with contextlib.suppress(queue.Empty):
                record = self._waiting.get(timeout=TICK_S if self._file else None)
                self._try(self._finish if record is None else partial(self._append, record))
            self._try(self._rotate)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of one record or one file, whatever it is: the next may do better
            self.errors += 1
            if self.errors == 1:
                logging.getLogger(__name__).error("%s: a loss, the next are only counted: %s", self._prefix, error)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = _line(record)
        file = self._file or self._begin()
        try:
            if file.write(line) < len(line):
                raise OSError(f"no room for a whole line in {file.name}")
        except OSError:
            self._finish()  # which cuts the part off
            raise

    def _begin(self) -> FileIO:
        if not self._begun:  # only the first time: a folder that went away may have been a disk
            self._folder.mkdir(parents=True, exist_ok=True)
        self._begun = self._clock()
        begun = f"{datetime.fromtimestamp(self._begun, UTC):%Y%m%dT%H%M%S%fZ}"
        name = f"{OPEN}{self._prefix}-{begun}-{self._host}-{os.getpid()}-{next(NUMBERS)}.ndjson"
        self._file = FileIO(self._folder / name, "x")
        return self._file

    def _rotate(self) -> None:
        age_s = self._clock() - self._begun  # below 0 where the clock was set back
        if self._file and (self._file.tell() >= self._max_bytes or not 0 <= age_s < self._max_age_s):
            self._finish()

    def _finish(self) -> None:
        file, self._file = self._file, None
        if file:
            file.close()
            _finish(Path(file.name))

    def _finish_of_the_dead(self) -> None:
        mine = rf"{re.escape(OPEN + self._prefix)}-\w+-{re.escape(self._host)}-(\d+)-\d+\.ndjson"
        for path in self._folder.glob(f"{OPEN}*"):
            with contextlib.suppress(FileNotFoundError):  # another process that starts was first
                if (found := re.fullmatch(mine, path.name)) and not _lives(int(found[1]), path.stat().st_mtime):
                    _finish(path)


def _finish(path: Path) -> None:
    """Gives a file its name, without a last line that was cut off; one without lines goes."""
    length = path.read_bytes().rfind(b"\n") + 1
    if length:
        os.truncate(path, length)
        path.rename(path.with_name(path.name.removeprefix(OPEN)))
    else:
        path.unlink()


def _lives(pid: int, written: float) -> bool:
    """Whether the process that wrote then is still there, and not a later one of its number, as containers have."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written
    return False
