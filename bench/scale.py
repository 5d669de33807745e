"""What a day of a large shop asks for: bytes, tokens, hours of CPUs and GPUs, and money for each stage, on paper.

    python -m bench.scale
    python -m bench.scale --searches 10_000_000 --gpu-price 2.5

Measured here, on two cores: lines a second of `ingest`, impressions of `aggregate`, bytes of a page in the log, in the
tables and of a label, documents a second of the endpoint. Not measured: GPUs. Their hours are operations (6 for each
parameter and token in training, 2 in scoring) over the peak of a card times the share of it that one hopes for.
Prices are yours to put in.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple


@dataclass(frozen=True)
class Shop:
    searches: int = 100_000_000  # a day
    days: int = 30  # of log that evidence is of
    hits: int = 10  # of a result page
    queries: int = 1_000_000  # with a list
    documents: int = 30  # of a list
    new: float = 0.05  # share of the pairs that are new each day
    clicked: int = 20_000_000  # pairs to pre-train on
    graded: int = 50_000  # queries that people graded
    pair_tokens: int = 180  # of 256 at most
    peak: float = 3.0  # searches of the busiest second, times the mean
    reranked: int = 20  # documents of a search


@dataclass(frozen=True)
class Hardware:
    gpu_flops: float = 989e12  # H100 SXM, bfloat16, dense
    gpu_share: float = 0.4  # of that
    gpu_price: float = 3.0  # an hour, in dollars
    core_price: float = 0.05  # an hour of a virtual CPU
    storage_price: float = 0.023  # a GB and month
    busy: float = 0.6  # of the endpoint's peak, which keeps p99 near 3 times p50


@dataclass(frozen=True)
class Measured:
    """On two cores; docs/logs.md, docs/scoring.md and docs/serving.md say how."""

    lines_per_search: float = 2.53
    lines_per_s: float = 62_700 / 2  # a core
    impressions_per_s: float = 20_000_000 / 16.7 / 2  # a core
    log_bytes: float = 219.0  # of a search in the log, as gzipped UBI
    table_bytes: float = 386.0  # of the same in `records` and `searches`
    label_bytes: float = 40.0
    scorer_share: float = 0.98  # of vLLM alone
    docs_per_s: float = 309 / 2  # a core, MiniLM-L6, pairs of 64 tokens


TEACHER, STUDENT = 7.07e9, 42.5e6  # parameters that a token meets: of a 7B scorer, of six layers of BERT-base
EPOCHS = {"pretrain": 1, "finetune": 2, "distill": 2}
LIST = 8  # documents of a list in training


class Row(NamedTuple):
    stage: str
    amount: str
    gigabytes: float = 0.0
    core_hours: float = 0.0
    gpu_hours: float = 0.0


def rows(shop: Shop, hardware: Hardware, measured: Measured) -> Iterator[Row]:
    """The stages in order."""
    pairs = shop.queries * shop.documents
    flops = hardware.gpu_flops * hardware.gpu_share * 3600

    def gpu(tokens: float, parameters: float, operations: int) -> float:
        return tokens * parameters * operations / flops

    lines, impressions = shop.searches * measured.lines_per_search, shop.searches * shop.hits * shop.days
    kept = shop.searches * (measured.log_bytes + measured.table_bytes) / 1e9
    yield Row("ingest, a day", f"{lines:.3g} lines", kept, core_hours=lines / measured.lines_per_s / 3600)
    seconds = impressions / measured.impressions_per_s
    yield Row("aggregate, all days", f"{impressions:.3g} impressions", core_hours=seconds / 3600)
    for name, scored in (("score, new pairs of a day", pairs * shop.new), ("score, all pairs once", pairs)):
        tokens = scored * shop.pair_tokens
        hours = gpu(tokens, TEACHER, 2) / measured.scorer_share
        yield Row(name, f"{tokens:.3g} tokens", scored * measured.label_bytes / 1e9, gpu_hours=hours)
    for name, learned, parameters in (
        ("pretrain, once", shop.clicked, TEACHER),
        ("finetune, once", shop.graded * LIST, TEACHER),
        ("distill, a day", pairs, STUDENT),
    ):
        tokens = learned * shop.pair_tokens * EPOCHS[name.partition(",")[0]]
        yield Row(name, f"{tokens:.3g} tokens", gpu_hours=gpu(tokens, parameters, 6))
    rate = shop.searches / 86_400 * shop.peak * shop.reranked
    cores = rate / hardware.busy / measured.docs_per_s
    yield Row("serve, a day", f"{rate:,.0f} documents/s at the peak", core_hours=24 * cores)


def table(shop: Shop, hardware: Hardware, measured: Measured) -> str:
    """As Markdown."""
    lines = ["| stage | amount | new GB | core hours | GPU hours | dollars |", "|---|---|---|---|---|---|"]
    for row in rows(shop, hardware, measured):
        cost = row.core_hours * hardware.core_price + row.gpu_hours * hardware.gpu_price
        cost += row.gigabytes * hardware.storage_price * shop.days / 30
        cells = [row.stage, row.amount, *(_short(n) for n in (row.gigabytes, row.core_hours, row.gpu_hours, cost))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(number: float) -> str:
    if not number:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").splitlines()[0])
    kinds = (Shop, Hardware, Measured)
    for kind in kinds:
        for each in fields(kind):
            parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    given = vars(parser.parse_args(argv))
    print(table(*(kind(**{each.name: given[each.name] for each in fields(kind)}) for kind in kinds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
