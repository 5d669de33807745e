"""Settings of what comes in: the made-up world, where real input lies, how a log is read and cleaned."""

import codecs
from typing import Annotated, Literal, Self

import pydantic
from annotated_types import Ge, Gt, Le

Count = Annotated[int, Gt(0)]
Amount = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]


def told(error: pydantic.ValidationError) -> str:
    """What is wrong with settings, in one line."""
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


class Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class World(Settings):
    """Size of the made-up search engine (`world.py`)."""

    documents: Count = 3000
    queries: Count = 1500
    judged: Count = 1000  # queries that people graded
    searches: Count = 40_000
    shards: Count = 4  # log files written side by side; part of what the seed decides


class Columns(Settings):
    """Which column of a flat log says what; without a header, their numbers from 1, as text. Empty: there is none."""

    query: str = "query"
    document: str = "doc_id"
    client: str = "client"
    time: str = "time"
    position: str = ""
    click: str = ""  # without one, every row is a click
    conversion: str = ""
    dwell_s: str = ""
    query_id: str = ""  # without one, a page is what a client sees for a query without a gap
    separator: Literal["", "tab", "comma", "semicolon", "blanks"] = ""  # empty: by the name of the file
    header: bool = True
    encoding: str = "utf-8"  # as Python names it: gb18030, latin-1
    time_format: str = ""  # of strptime; empty: ISO 8601, or seconds or milliseconds since 1970
    first_position: Literal[0, 1] = 1

    @pydantic.field_validator("encoding")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            codecs.lookup(name)
        except LookupError:
            raise ValueError(f"no encoding {name!r} is known") from None
        return name

    def named(self) -> list[str]:
        """The columns that a file must have."""
        given = ("query", "document", "client", "time", "position", "click", "conversion", "dwell_s", "query_id")
        return [column for name in given if (column := getattr(self, name))]


class Data(Settings):
    """Where real input lies: paths, globs or `pyarrow.fs` URIs. Empty: the made-up world is written and read."""

    queries: list[str] = []  # UBI 1.3 query records: NDJSON, a JSON array, OpenSearch bulk or parquet
    events: list[str] = []  # UBI 1.3 events, the same
    flat: list[str] = []  # logs of one row a click or an impression: TSV, CSV, JSONL or parquet
    columns: Columns = Columns()  # of the flat logs
    documents: list[str] = []  # doc_id, title, summary, in any form of docs/formats.md
    judgments: list[str] = []  # query, doc_id, grade and, if given, split; or TREC's and BEIR's qrels, by query id
    topics: list[str] = []  # the texts of these ids: `id<TAB>text` lines or BEIR's queries.jsonl

    @pydantic.model_validator(mode="after")
    def _together(self) -> Self:
        logged = bool(self.queries and self.events) or bool(self.flat and not self.queries and not self.events)
        given = any(paths for what, paths in self.files().items() if what != "topics")
        if given and not (logged and self.documents):
            raise ValueError(
                "documents and a log belong together: documents with queries and events, or with flat; "
                "or none of them for the made-up world"
            )
        if self.topics and not self.judgments:
            raise ValueError("topics are the queries of judgments: give judgments too, or no topics")
        return self

    def files(self) -> dict[str, list[str]]:
        """The settings that name files."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), list)}


class Ingest(Settings):
    parts: Count = 8  # of clients, and of each table; one task holds one part in memory, of one period
    period_days: Count = 30  # a period is joined at a time, and again when lines for it arrive later
    late_s: Count = 86_400  # an event counts for a page shown at most so long before it
    page_gap_s: Count = 1800  # without a query_id, an event is of the client's last page for the query within it
    mask_personal_data: bool = True  # e-mail addresses, phone and card numbers in queries
    max_bad_share: Share = 0.01  # of the lines; more refused ones fail the stage

    @pydantic.model_validator(mode="after")
    def _late(self) -> Self:
        if max(self.late_s, self.page_gap_s) > self.period_days * 86_400:
            raise ValueError("late_s and page_gap_s must be within one period of period_days")
        return self


class Cleaning(Settings):
    """What is left out before anything is counted. A limit of 0 is off.

    The limits on a client are for one person at a shop of any size, however long the log: each page of results that
    is turned to is a search, and whoever exceeds one is a program, or many people behind one name.
    """

    max_searches_per_hour: Amount = 200  # of the clock; one every 18 seconds
    max_searches_per_day: Amount = 500  # UTC
    max_click_share: Share = 0.4  # of the documents that a client was shown; people open a tenth
    min_pages_for_click_share: Count = 20  # below, a client's share says nothing
    max_searches_without_click: Amount = 100  # by a client that never clicks at all
    max_repeats_per_day: Amount = 50  # of one query by one client
    merge_repeats: bool = True  # the same page of the same query in one session is one look
    session_gap_s: Positive = 1800.0  # without a search, then a new session begins
    min_clients: Amount = 0  # distinct ones that a query needs to be kept (k-anonymity); 0 and 1 keep all
