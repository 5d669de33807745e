"""A bundle as it serves: verified, loaded, and tried on pairs of its own."""

import time
from dataclasses import dataclass
from typing import Self

from disranker import bundle, selftest
from disranker.contract import Tokens
from disranker.engine import Engine, Prompt
from disranker.recipe import Refused
from serve.batching import WHOLE
from serve.encoding import Encoder
from serve.settings import Settings

WARM_ROWS = (1, 8, 8, 8)  # of the batches that are run before the first request; the last tells the speed


@dataclass(frozen=True)
class Loaded:
    """A student with what its requests need."""

    folder: str
    digest: str  # of the bundle
    engine: Engine
    encoder: Encoder
    tokens_per_s: float  # measured on full pairs

    @classmethod
    def of(cls, folder: str, settings: Settings) -> Self:
        """Raises `Refused` as `bundle.verify` and `selftest.check` do, and for an engine that does not run here."""
        manifest = bundle.verify(folder)
        name = settings.engine or manifest["engine"]
        try:
            engine = Engine(folder, settings.threads, WHOLE * settings.tokens_per_batch, name)
            selftest.check(folder, engine, name)
        except Refused:
            raise
        except Exception as error:  # each engine has its own
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise Refused(f"{folder}: the engine {name} does not run here: {said[0]}") from error
        encoder = Encoder(engine.tokens, settings.cache_mib * 2**20)
        return cls(folder, manifest["digest"], engine, encoder, _speed(engine))

    def unchanged(self) -> bool:
        """Whether the folder still holds this bundle, by its manifest alone."""
        return bundle.digest(self.folder) == self.digest


def _speed(engine: Engine) -> float:
    """Tokens per second of full pairs, after batches that do not count."""
    took, tokens = 1.0, 0
    for rows in WARM_ROWS:
        prompts = [_longest(engine.tokens)] * rows
        began = time.perf_counter()
        engine.logits(prompts)
        took, tokens = time.perf_counter() - began, sum(len(ids) for ids, _ in prompts)
    return tokens / took


def _longest(tokens: Tokens) -> Prompt:
    """A pair that fills the contract."""
    c = tokens.contract
    return tokens.pair(*([c.close] * most for most in (c.max_query_tokens, c.max_title_tokens, c.max_tokens)))
