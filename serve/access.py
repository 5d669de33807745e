"""Who may call, and how often: bearer tokens, of which only hashes are kept. `python -m serve.access new` makes one."""

import argparse
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import Field, StringConstraints, ValidationError

from disranker.inputs import Amount, Settings
from disranker.recipe import Refused

Right = Literal["rerank", "events", "judge"]
VARIABLE = "DISRANKER_KEYS"


class Unauthorised(Exception):
    """No token, or one that is unknown or has expired: 401."""


class Forbidden(Exception):
    """A known key that has not this right: 403."""


class Key(Settings):
    """One caller. Its name goes into logs, and is too short to be a token or a hash in the wrong place."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,32}$")]
    # Plain SHA-256: slow, salted hashes protect what people choose; 32 random bytes cannot be guessed.
    sha256: Annotated[str, StringConstraints(to_lower=True, pattern="^[0-9a-fA-F]{64}$"), Field(repr=False)]
    rights: Annotated[Sequence[Right], Field(min_length=1)] = get_args(Right)
    requests_per_minute: Amount = 0  # of each replica; 0: no limit
    expires: date | None = None  # the first day, in UTC, on which it is no longer valid


class KeyFile(Settings):
    keys: Annotated[list[Key], Field(min_length=1)]


@dataclass(frozen=True)
class Keys:
    """All callers; without any, everybody may call."""

    keys: Sequence[Key] = ()
    clock: Callable[[], float] = time.time

    @classmethod
    def load(cls, file: str | None, environ: Mapping[str, str]) -> "Keys":
        """Those of a YAML file and of `DISRANKER_KEYS`. Raises `Refused`: what is named but empty is no open door."""
        keys = [] if file is None else _parse(f"keys in {file}", Path(file))
        if VARIABLE in environ:
            keys += _parse(f"keys in {VARIABLE}", environ[VARIABLE])
        for one, other in combinations(keys, 2):
            if one.name == other.name or one.sha256 == other.sha256:
                raise Refused(f"keys: {one.name} and {other.name} have the same name or the same sha256")
        return cls(keys)

    @property
    def open(self) -> bool:
        return not self.keys

    def caller(self, authorization: str | None, right: Right) -> Key | None:
        """The key whose token an Authorization header has; None where everybody may call.

        Raises `Unauthorised` or `Forbidden`; a reply may repeat what they say.
        """
        if self.open:
            return None
        digest = hashlib.sha256(_token(authorization)).hexdigest()
        # With every key, each in constant time, so that how long it takes tells nothing of them.
        known = [key for key in self.keys if hmac.compare_digest(key.sha256, digest)]
        if not known:
            raise Unauthorised("the token is not known here")
        key = known[0]
        if key.expires is not None and key.expires <= datetime.fromtimestamp(self.clock(), UTC).date():
            raise Unauthorised("the token has expired")
        if right not in key.rights:
            raise Forbidden(f"the key {key.name} has not the right {right}")
        return key


class Limiter:
    """A token bucket for each key, for one thread. It knows one replica: N replicas together allow N times as much."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # by name: (requests left, at this time)

    def take(self, key: Key | None) -> float:
        """0.0 if the request may pass, else the seconds until one may; what is turned away costs nothing."""
        if key is None or not key.requests_per_minute:
            return 0.0
        per_s, burst = key.requests_per_minute / 60, max(1.0, key.requests_per_minute / 10)
        now = self._clock()
        left, then = self._buckets.get(key.name, (burst, now))
        left = min(burst, left + (now - then) * per_s)
        passes = left >= 1
        self._buckets[key.name] = (left - passes, now)
        return 0.0 if passes else (1 - left) / per_s


def check_host(host: str, keys: Keys) -> None:
    """Raises `Refused` where other machines could call and nobody would be asked for a token."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host.lower() == "localhost"  # any other name may lead anywhere
    if keys.open and not loopback:
        makes = f"`python -m serve.access new NAME` makes one for a file or {VARIABLE}"
        raise Refused(f"host {host!r} is open to other machines and there are no keys: {makes}; or use 127.0.0.1")


def _token(authorization: str | None) -> bytes:
    """What follows `Bearer`, or stands alone, as LlamaIndex's client of TEI sends it."""
    words = (authorization or "").split()
    if words and words[0].lower() == "bearer":
        words = words[1:]
    if len(words) != 1:
        raise Unauthorised("send a token, as Authorization: Bearer TOKEN")
    return words[0].encode("utf-8", "surrogatepass")


def _parse(where: str, source: Path | str) -> list[Key]:
    # YAML and pydantic quote their input in what they raise: no error is chained, since a traceback would show it.
    try:
        content = source if isinstance(source, str) else source.read_bytes()
        return KeyFile.model_validate(yaml.safe_load(content)).keys
    except OSError as error:
        raise Refused(f"{where}: {error.strerror}") from None
    except ValidationError as error:
        raise Refused(f"{where}: {_explain(error)}") from None
    except Exception as error:  # for odd words PyYAML raises anything, such as KeyError
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise Refused(f"{where}{line}: not YAML, or a date that does not exist") from None


def _explain(error: ValidationError) -> str:
    """The faults, without what was given: a token may stand in any place, even in that of a setting's name."""
    faults = []
    for fault in error.errors():
        place, message = fault["loc"], fault["msg"]
        if fault["type"] in ("extra_forbidden", "invalid_key"):
            place = place[:-1]
            message = f"an unknown setting; it has {', '.join((Key if place else KeyFile).model_fields)}"
        faults.append(".".join(map(str, place)) + ": " * bool(place) + message)
    return "; ".join(faults)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.access", description="Makes keys; writes no file.")
    commands = parser.add_subparsers(required=True, metavar="new")
    new = commands.add_parser("new", help="print a token and its lines", argument_default=argparse.SUPPRESS)
    new.add_argument("name", metavar="NAME", help="of the caller: letters, digits and _.-")
    new.add_argument("--rights", type=lambda text: text.split(","), help="such as rerank,events; without it, all")
    new.add_argument("--requests-per-minute", type=int, metavar="N", help="of each replica; without it, no limit")
    new.add_argument("--expires", type=date.fromisoformat, help="first day, in UTC, without the key: 2027-01-01")
    token = secrets.token_urlsafe(32)
    try:
        key = Key(sha256=hashlib.sha256(token.encode()).hexdigest(), **vars(parser.parse_args(argv)))
    except ValidationError as error:
        parser.error(_explain(error))
    lines = yaml.safe_dump([key.model_dump(exclude_none=True)], sort_keys=False, allow_unicode=True)
    print(f"The token of {key.name}, shown this once; it goes into `Authorization: Bearer TOKEN`:\n\n{token}\n")
    print(f"To let it in, put this under `keys:` in the file of keys:\n\n{lines}", end="")


if __name__ == "__main__":
    main()
