"""Made-up shoppers search through the endpoint and click; what it wrote down must tell which student is better.

    python -m bench.shoppers

Both students know how good a document is, and err by what has nothing to do with that, one little and one much. The
rest is the real path: interleaved answers, events, records, and `disranker.interleaving` on these.
"""

import asyncio
import contextlib
import itertools
import json
import random
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import claims, fuzz
from bench.claims import Line

GRADES = (3, 2, 2, 1, 1, 0, 0, 0, 0, 0)  # of the documents of each search
WORDS = ("poor", "fair", "good", "perfect")  # by grade
TONES = tuple(f"tone{number}" for number in range(16))  # what students err by
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WIDTH, STEP = 8, 0.15  # of a student; what a grade counts
BETTER, WORSE, BAD = (1.0, 0.5), (1.0, 3.0), (0.0, -3.0)  # what grade and tone count
POWER, ALPHA = 0.8, 0.05
SEARCHES = 2  # of each shopper
AT_ONCE = 8


@dataclass(frozen=True)
class Plan:
    folder: Path
    pilot: int = 300  # shoppers, from whom it is guessed how many are needed
    trials: int = 100  # of two students, and as many of equal ones
    canary: int = 1_500  # shoppers at most, before a bad student is out
    seed: int = 1


SMALL = {"pilot": 100, "trials": 5}


def measure(plan: Plan) -> Iterator[Line]:
    better, worse, bad = (student(plan.folder / n, w) for n, w in (("1", BETTER), ("2", WORSE), ("3", BAD)))
    same = student(plan.folder / "4", BETTER)
    pilot = in_process(plan.folder / "pilot", worse, better, plan.pilot, plan.seed)
    guess = _preference(pilot)
    decided = _needed(guess.low)
    more = {"decided": decided, "share": claims.shown(guess.share), "at_least": claims.shown(guess.low)}
    for claim, candidate, live in (("the better student is found", better, worse), ("equal students", same, better)):
        shoppers = _enough(plan.trials * decided, pilot)
        found = in_process(plan.folder / claim, live, candidate, shoppers, plan.seed + 1)
        yield verdict(claim, trials(found, decided)[: plan.trials], live != better, **more)
    yield over_http(plan, better, worse, decided, _enough(2 * decided, pilot))
    yield asyncio.run(canary(plan, better, bad))


# Students


def student(folder: Path, weights: tuple[float, float]) -> str:
    """A bundle of a BERT that adds up what the words of a document count, by weights that are written, not trained."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from disranker import bundle
    from disranker.contract import Tokens
    from disranker.recipe import Student

    source, vocabulary = folder / "student", {word: n for n, word in enumerate((*SPECIAL, *WORDS, *TONES, "shoe"))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True))).save_pretrained(
        source
    )
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": WIDTH}
    more = {"vocab_size": len(vocabulary), "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0}
    model = BertForSequenceClassification(BertConfig(**shape, **more))
    _write(model, [counts(word, *weights) for word in vocabulary])
    model.save_pretrained(source)
    Tokens.agree(source, "encoder", Student()).contract.save(source)
    bundle.write(folder / "bundle", source, name="shoppers", report={})
    return str(folder / "bundle")


def counts(word: str, of_grade: float, of_tone: float) -> float:
    """What a word adds to the score."""
    if word in WORDS:
        return STEP * of_grade * (WORDS.index(word) - 1.5)
    return STEP * of_tone * (TONES.index(word) / 7.5 - 1) if word in TONES else 0.0


def _write(model: Any, values: Sequence[float]) -> None:
    """Each word's embedding is its value, and what makes all embeddings as long, so that no norm changes it.

    Attention without queries and keys is a mean, a norm after it keeps its order, and so do the tanh and the head.
    """
    import torch

    first, pair = torch.zeros(WIDTH, WIDTH), torch.tensor([1.0, -1.0])
    first[0, 0] = first[1, 1] = 1.0
    a = torch.tensor(list(values))[:, None]
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.fill_(1.0 if "LayerNorm.weight" in name else 0.0)
        embeddings, layer = model.bert.embeddings.word_embeddings.weight, model.bert.encoder.layer[0].attention
        embeddings[:, :4] = torch.cat([a * pair, (1 - a**2).sqrt() * pair], 1)
        layer.self.value.weight.copy_(first)
        layer.output.dense.weight.copy_(first)
        model.bert.pooler.dense.weight.copy_(first)
        model.classifier.weight[0, 0] = 4.0


# Shoppers


async def shop(client: httpx.AsyncClient, shopper: int, seed: int) -> list[int]:
    """One shopper's searches and clicks, and the statuses of what the endpoint answered."""
    draw, statuses = random.Random(f"{seed} {shopper}"), []
    for _ in range(SEARCHES):
        grades = draw.sample(GRADES, len(GRADES))
        documents = [{"id": f"d{n}", "text": f"{WORDS[g]} {draw.choice(TONES)}"} for n, g in enumerate(grades)]
        asked = {"query": "shoe", "documents": documents}
        reply = await client.post("/v1/rerank", json=asked, headers={"x-client-id": _name(shopper)})
        statuses.append(reply.status_code)
        found = reply.json()
        places = [result["index"] for result in found.get("results", [])]
        if events := [_click(shopper, found["id"], place) for place in clicked(places, grades, draw)]:
            statuses.append((await client.post("/v1/events", json=events)).status_code)
    return statuses


def clicked(places: Sequence[int], grades: Sequence[int], draw: random.Random) -> list[int]:
    """Those that a shopper clicks, who looks less the lower a place is, and likes what is good."""
    from disranker.world import ATTRACTIVENESS, EXAMINATION

    likely = (EXAMINATION[rank] * ATTRACTIVENESS[grades[place]] for rank, place in enumerate(places))
    return [place for place, chance in zip(places, likely, strict=True) if draw.random() < chance]


def _name(shopper: int) -> str:
    return f"{shopper:06d}"  # in order as text, too


def _click(shopper: int, query_id: str, place: int) -> dict[str, Any]:
    attributes = {"object": {"object_id": f"d{place}", "object_id_field": "doc_id"}}
    click = {"action_name": "click", "query_id": query_id, "client_id": _name(shopper)}
    return click | {"event_attributes": attributes}


async def crowd(client: httpx.AsyncClient, shoppers: Iterable[int], seed: int) -> list[int]:
    """The statuses of many, some at once."""
    left, statuses = iter(shoppers), []

    async def some() -> None:
        for shopper in left:
            statuses.extend(await shop(client, shopper, seed))

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return statuses


# What was written down


def outcomes(folder: Path) -> list[int]:
    """One of each shopper, by their numbers: the sign of what their searches say together."""
    from disranker.interleaving import credit

    clicks, sums = defaultdict(set), defaultdict(int)
    for event in _records(folder, "ubi_events"):
        clicks[event["query_id"]].add(event["event_attributes"]["object"]["object_id"])
    for query in _records(folder, "ubi_queries"):
        hits, teams = query["query_response_hit_ids"], query["query_attributes"]["teams"]
        sums[query["client_id"]] += credit(teams, [hits.index(each) for each in clicks[query["query_id"]]])
    return [(total > 0) - (total < 0) for _, total in sorted(sums.items())]


def _records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob(f"{name}-*") for line in path.read_text().splitlines()]


def trials(found: Iterable[int], decided: int) -> list[Any]:
    """The preference of each so many outcomes that were no tie."""
    whole = iter([outcome for outcome in found if outcome])
    parts = iter(lambda: list(itertools.islice(whole, decided)), [])
    return [_preference(part) for part in parts if len(part) == decided]


def verdict(claim: str, found: Sequence[Any], differ: bool, **more: Any) -> Line:
    """How often so many outcomes say that the candidate is better, or of equal ones that they are not equal."""
    from scipy.stats import binomtest

    hits = sum(each.p <= ALPHA and (each.share > 0.5 or not differ) for each in found)
    near = binomtest(hits, len(found)).proportion_ci(method="wilson")
    bar, passes = (POWER, near.high >= POWER) if differ else (ALPHA, near.low <= ALPHA)
    interval = [claims.shown(near.low), claims.shown(near.high)]
    kind = "found" if differ else "false alarms"
    line = {"claim": f"shoppers: {claim}", "ours": claims.shown(hits / len(found)), "unit": f"share {kind}", "bar": bar}
    return line | {"passes": bool(passes), "interval": interval, "runs": len(found)} | more


def _preference(found: Iterable[int]) -> Any:
    from disranker.interleaving import preference

    return preference(found)


def _needed(share: float) -> int:
    from disranker.interleaving import needed

    return needed(share, POWER, ALPHA)


def _enough(decided: int, pilot: Sequence[int]) -> int:
    """Shoppers for so many outcomes that are no tie, with some to spare."""
    return int(1.2 * decided * len(pilot) / sum(map(abs, pilot))) + 20


# Endpoints


@contextlib.asynccontextmanager
async def here(live: str, experiment: dict[str, Any], records: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a replica in this process."""
    from serve.api import api
    from serve.replica import Reranker
    from serve.settings import Settings

    replica = Reranker(Settings(records=str(records)))
    try:
        await replica.reconfigure({"bundle": live, "experiment": experiment})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api(replica)), base_url="http://here") as client:
            yield client
    finally:
        await asyncio.gather(*replica._background)
        replica.close()


def interleaved(candidate: str) -> dict[str, Any]:
    # Both are of one size, so no latency says anything of them.
    return {"name": "e", "kind": "interleave", "bundle": candidate, "share": 1.0, "max_latency_ratio": 100.0}


def in_process(records: Path, live: str, candidate: str, shoppers: int, seed: int) -> list[int]:
    async def whole() -> list[int]:
        async with here(live, interleaved(candidate), records) as client:
            return await crowd(client, range(shoppers), seed)

    _all_answered(asyncio.run(whole()))
    return outcomes(records)


def over_http(plan: Plan, better: str, worse: str, decided: int, shoppers: int) -> Line:
    """One trial over Ray Serve and sockets."""
    from serve.settings import Served, Settings

    records = plan.folder / "http"

    async def whole(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await crowd(client, range(shoppers), plan.seed + 2)

    served = Served.checked({"bundle": worse, "experiment": interleaved(better)})
    with fuzz.served(served, Settings(records=str(records))) as url:
        _all_answered(asyncio.run(whole(url)))
    found = trials(outcomes(records), decided)[0]
    line = {"claim": "shoppers: one run over HTTP", "ours": claims.shown(found.share), "unit": "share of wins"}
    return line | {
        "p": claims.shown(found.p),
        "passes": bool(found.p <= ALPHA and found.share > 0.5),
        "decided": decided,
    }


async def canary(plan: Plan, live: str, bad: str) -> Line:
    """How many answers a bad student gave until it was out by itself, and of how many searches."""
    records, experiment = plan.folder / "canary", {"name": "e", "kind": "canary", "bundle": bad, "share": 0.5}
    statuses, after = [], 100
    async with here(live, experiment, records) as client:
        for shopper in range(plan.canary):
            statuses += await crowd(client, [shopper], plan.seed)
            ready = (await client.get("/readyz")).json()
            if "refused" in ready:
                break
        statuses += await crowd(client, range(plan.canary, plan.canary + after), plan.seed)
    arms = [query["query_attributes"]["arm"] for query in _records(records, "ubi_queries")]
    line = {"claim": "shoppers: answers of a bad student before it is out", "ours": arms.count("candidate")}
    line |= {"of": len(arms) - after * SEARCHES, "reason": ready.get("refused"), "bar": None}
    failed = sum(status >= 400 for status in statuses)
    return line | {"failed": failed, "after": arms[-after * SEARCHES :].count("candidate")}


def _all_answered(statuses: Sequence[int]) -> None:
    assert {*statuses} <= {200, 202}, "an honest shopper had a failed request"


def main(argv: list[str] | None = None) -> int:
    return claims.command("bench.shoppers", Plan, {"shoppers": measure}, SMALL, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
