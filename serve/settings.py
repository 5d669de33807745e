"""What an operator may set: of the endpoint as a whole, and of what it serves."""

from collections.abc import Mapping
from typing import Any, Self

import pydantic

from disranker.engines import Name
from disranker.inputs import Count, Positive, told
from disranker.recipe import Refused
from serve.rollout import Experiment


class _Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")  # not strict: `serve run` passes numbers as text

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> Self:
        """Raises `Refused` in one line, with the names that there are."""
        try:
            return cls.model_validate(given)
        except pydantic.ValidationError as error:
            raise Refused(f"serve: {told(error)}; there are {', '.join(cls.model_fields)}") from error


class Settings(_Settings):
    """Under `args`. Changing one of these restarts the replicas, one after the other."""

    model: str = "disranker"  # the name that requests may give and replies carry
    engine: Name | None = None  # None: the one that the bundle chose when it was made
    threads: Count | None = None  # of the engine; None: what Ray Serve sets, the replica's num_cpus
    tokens_per_batch: Count = 1024  # of small requests together, with padding; of large ones a piece has half as many
    max_documents: Count = 1000  # in one request
    max_query_chars: Count = 4096
    max_body_bytes: Count = 4 * 1024 * 1024
    timeout_s: Positive = 10.0  # until a request is answered; a client may ask for less
    max_wait_s: Positive = 2.0  # what waits when a request comes; more, and it is refused
    cache_mib: Count = 64  # of tokenised documents
    keys: str | None = None  # a file that every replica can read; or DISRANKER_KEYS in the environment of each node
    records: str | None = None  # a folder for queries and events, as UBI; None: none are kept
    state: str | None = None  # a folder that all replicas share: which bundle served last, which candidates are out
    application: str = "disranker"  # in the records
    record_bytes: Count = 16 * 1024 * 1024  # of a file of records
    record_age_s: Positive = 300.0


class Served(_Settings):
    """Under `user_config`. Changing it restarts nothing: replicas load what is new while they serve what is old."""

    bundle: str  # a folder that every replica can read
    experiment: Experiment | None = None
