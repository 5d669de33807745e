"""Models trained in several ways (arms), each under several seeds, and how far apart they are on the same queries.

Trained by the same code as in the stages, but without Ray: a process on each core, one thread each. What a training
found is a file named for all that decides it, so a training that is done is not done again.
"""

import base64
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import yaml

from bench import claims, runs
from bench.claims import Line
from disranker import contract, metrics, pictures, stages
from disranker import recipe as recipes
from disranker.metrics import METRICS, Array
from disranker.recipe import Recipe
from disranker.report import HEADLINE, MINUS
from disranker.retrieval import BM25
from disranker.store import Store

if TYPE_CHECKING:
    from torch import nn

    from disranker.contract import Tokens
    from disranker.fit import Fit, Task

CORES = os.cpu_count() or 1
WHOLE = "training.json"  # the last file of a decoder
Found = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training of one arm."""

    arm: str
    recipe: Recipe  # its seed decides head and order, never the data
    start: Path  # folder of the model it begins with
    folder: Path  # of what jobs found
    split: str = "test"  # whose queries it is measured on
    stage: str = "finetune"
    task: Callable[..., "Task"] | None = None  # None: that of the stage

    @property
    def file(self) -> Path:
        """Of what it found: named for all that decides it."""
        decides = [stages.step(self.recipe, self.stage).fingerprint, self.start.name, self.split]
        return self.folder / f"{_plain(self.arm)}-{self.recipe.seed}-{recipes.digest(decides)}.json"


# Data and trainings


def lists(folder: Path, content: Mapping[str, Any], until: str = "sample", artefact: str = "groups") -> Recipe:
    """The recipe of a store in `folder` after the jobs up to its lists, or further; what stands is not made again."""
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, "root": str(folder.absolute() / "run")}))
    said(f"python -m jobs.pipeline --until {until}")
    runs.done(path, folder / "log", stage="pipeline", artefact=artefact, options=["--until", until])
    return recipes.load(path)


def seeded(recipe: Recipe, seed: int, stage: str = "finetune", **settings: Any) -> Recipe:
    """The same data, trained under another seed and with other settings of a stage."""
    trained = {**getattr(recipe, stage).model_dump(), **settings}
    return recipes.parse(recipe.model_dump() | {"seed": seed, stage: trained})


def decoders(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """Where the decoder of a seed lies: as it is at first, and after continued pre-training."""
    name = f"{recipe.seed}-{stages.step(recipe, 'pretrain').fingerprint}"
    return folder / f"first-{name}", folder / f"continued-{name}"


def pretrained(several: Sequence[Recipe], folder: Path) -> None:
    """Makes the decoders of each recipe that are not there yet."""
    done(_pretrain, [(each, folder) for each in several if not (decoders(each, folder)[1] / WHOLE).exists()])


def found(jobs: Sequence[Job]) -> list[Found]:
    """What training found in each job, in their order; only what is not known yet is trained."""
    done(_train, [(job,) for job in jobs if not job.file.exists()])
    return [json.loads(job.file.read_text()) for job in jobs]


def done(work: Callable[..., str], several: Sequence[tuple[Any, ...]]) -> None:
    """Does the work with each of these arguments, one on each core; the first that fails ends the others."""
    pool = ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn"), _alone)
    try:
        doing = [pool.submit(work, *arguments) for arguments in several]
        for number, future in enumerate(as_completed(doing), start=1):
            said(f"{number}/{len(several)} {future.result()}")
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _pretrain(recipe: Recipe, folder: Path) -> str:
    from disranker import teacher
    from jobs import pretrain as stage

    first, continued = decoders(recipe, folder)
    first.mkdir(parents=True, exist_ok=True)
    stage.start(recipe, Store(recipe.root), first)
    run, tokens, used = _trained("pretrain", recipe, first)
    teacher.save(run.model, tokens, first, continued)
    measured = {"best": run.best, "validations": run.validations, "cpu_s": used}
    (continued / WHOLE).write_text(json.dumps(measured))
    return f"CPT, seed {recipe.seed}: {_progress(measured)}"


def _train(job: Job) -> str:
    run, tokens, used = _trained(job.stage, job.recipe, job.start, job.task)
    measured = {"best": run.best, "validations": run.validations, "cpu_s": used}
    scored = tally(scorer(run.model, tokens), listed(job.recipe.root, job.split))
    unfinished = job.file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"arm": job.arm, "seed": job.recipe.seed, **measured, "tally": scored.tolist()}))
    unfinished.rename(job.file)
    return f"{job.arm}, seed {job.recipe.seed}: {_progress(measured)}"


def _progress(measured: Found) -> str:
    best = measured["best"]
    said = f"{best['metric'].replace('_', ' ')} {best['value']:.4g} at step {best['step']}, " if best else ""
    return f"{said}{measured['cpu_s']:.0f} s"


def listed(root: str, split: str) -> list[dict[str, Any]]:
    """Graded documents of the queries of a split that have some, in the order of queries."""
    groups = Store(root).read("groups", where=pc.field("split") == split).to_pylist()
    graded = [group | {"docs": [doc for doc in group["docs"] if doc["grade"] is not None]} for group in groups]
    return sorted((group for group in graded if group["docs"]), key=lambda group: group["query"])


def tally(scores: Callable[[dict[str, Any]], list[float | None]], groups: Sequence[dict[str, Any]]) -> Array:
    """`metrics.tally` of a model that scores the documents of a group; None: it has no score of one."""
    run: dict[str, dict[str, float]] = {}
    for group in groups:
        given = zip(group["docs"], scores(group), strict=True)
        run[group["query"]] = {doc["doc_id"]: score for doc, score in given if score is not None}
    return metrics.tally(metrics.judged(groups), run)


def bm25(recipe: Recipe) -> Array:
    """The tally of BM25, by titles and summaries, on the test queries."""
    index = BM25.of(Store(recipe.root).read("documents").to_pylist())

    def scores(group: dict[str, Any]) -> list[float | None]:
        return index.scores(group["query"], [doc["doc_id"] for doc in group["docs"]])

    return tally(scores, listed(recipe.root, "test"))


def _trained(
    stage: str, recipe: Recipe, start: Path, task: Callable[..., "Task"] | None = None
) -> tuple["Fit", "Tokens", float]:
    """As `jobs.training.train` does it, with one worker; and the seconds of its core that it took."""
    began = time.process_time()
    from disranker import fit
    from disranker.contract import Tokens
    from jobs import training

    module, cfg = importlib.import_module(f"jobs.{stage}"), getattr(recipe, stage)
    if stage == "distill":
        tokens = Tokens.agree(start, "encoder", recipe.student)
    else:
        tokens = Tokens.agree(start, contract.form(recipe.teacher.base), recipe.teacher)
    learned = (task or module.task)(recipe, Store(recipe.root), tokens)
    model, _ = training.model(stage, str(start), tokens, recipe.seed, cfg)
    run = fit.Fit(model, learned, fit.steps(learned, cfg, recipe.seed), cfg, recipe.seed * 1000)
    for _ in run.steps():
        pass
    run.finish()
    return run, tokens, time.process_time() - began


def scorer(model: "nn.Module", tokens: "Tokens") -> Callable[[dict[str, Any]], list[float]]:
    """Scores a model gives to the documents of a group."""
    import torch

    from disranker import teacher
    from disranker.batches import Rows

    model.eval()

    def of(group: dict[str, Any]) -> list[float]:
        with torch.no_grad():
            rows = Rows.padded(tokens.listed(group["query"], group["docs"]), tokens.contract.pad)
            scores: list[float] = teacher.raw_scores(model, rows).tolist()
            return scores

    return of


def _alone() -> None:
    """What a process does first: it has one core, and says nothing."""
    from jobs import launch

    os.environ.update(launch.ENVIRONMENT)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)


# Differences


@dataclass(frozen=True)
class Comparison:
    """Of two arms by their tallies [seeds, queries, metrics, 2]."""

    name: str
    a: Array
    b: Array


def compared(comparisons: Sequence[Comparison], recipe: Recipe) -> list[Found]:
    """A row for each: the difference in NDCG@10 and PNR, and how sure it is.

    Two-level intervals draw seeds and queries, the others queries alone, which says how sure these very models differ;
    p is of a paired randomisation test over queries, each the mean of its seeds, and Holm's of all comparisons here.
    """
    rows = [_compared(each, recipe) for each in comparisons]
    corrected = metrics.holm([row["p"] for row in rows])
    return [row | {"holm": p} for row, p in zip(rows, corrected, strict=True)]


def _compared(given: Comparison, recipe: Recipe) -> Found:
    cfg, at = recipe.evaluate, METRICS.index(HEADLINE)
    of_queries = metrics.compare(given.a.mean(0), given.b.mean(0), cfg, recipe.seed)
    both = two_level(given.a, given.b, cfg.resamples, cfg.confidence, recipe.seed)
    means = [each[:, :, at, 0].mean(1) for each in (given.a, given.b)]
    row = {"name": given.name, "a": means[0].mean(), "b": means[1].mean(), "seeds": len(means[0])}
    row |= {"queries": given.a.shape[1], "seeds_above": int((means[0] > means[1]).sum())}
    row |= {"value": of_queries[HEADLINE].difference, "p": of_queries[HEADLINE].p}
    row |= dict(zip(("low", "high"), both[:, at].tolist(), strict=True))
    row |= {"queries_low": of_queries[HEADLINE].low, "queries_high": of_queries[HEADLINE].high}
    pnr = {"value": of_queries["pnr"].difference, "low": both[0, -1], "high": both[1, -1]}
    return row | {"pnr": pnr}


def two_level(a: Array, b: Array, resamples: int, confidence: float, seed: int) -> Array:
    """[2, metrics]: low and high of the difference when seeds and queries are drawn, the same ones for both arms."""
    rng, (seeds, queries) = np.random.default_rng(seed), a.shape[:2]
    times = [rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in (seeds, queries)]
    sums = [np.einsum("rs,rq,sqmk->rmk", *times, each, optimize=True) for each in (a, b)]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = sums[0][..., 0] / sums[0][..., 1] - sums[1][..., 0] / sums[1][..., 1]
    outside = (1 - confidence) / 2
    return np.asarray(np.quantile(drawn, [outside, 1 - outside], axis=0, method="inverted_cdf"))


def summary(arm: str, tallies: Array) -> Found:
    """Mean and deviation over seeds of an arm's NDCG@10 and PNR; tallies [seeds, queries, metrics, 2]."""
    sums = tallies.sum(1)
    values = sums[..., 0] / sums[..., 1]
    row: Found = {"arm": arm, "seeds": len(tallies)}
    for name in (HEADLINE, "pnr"):
        column = values[:, METRICS.index(name)]
        sd = float(column.std(ddof=1)) if len(column) > 1 else None
        row[name] = {"mean": float(column.mean()), "sd": sd, "values": column.tolist()}
    return row


# What is shown


def lines(rows: Sequence[Found], title: str) -> Iterator[Line]:
    """One for each comparison."""
    for row in rows:
        rounded = {name: claims.shown(row[name]) for name in ("value", "low", "high", "p", "holm")}
        more = {"difference": rounded.pop("value"), **rounded, "runs": row["seeds"], "queries": row["queries"]}
        yield claims.against(f"{title}: {row['name']}", [row["a"]], [row["b"]], "NDCG@10", None, **more)


def show(folder: Path, arms: Sequence[Found], rows: Sequence[Found], facts: Mapping[str, Any]) -> None:
    """Writes results.json, results.md and differences.svg."""
    whole = {"facts": dict(facts), "arms": list(arms), "comparisons": list(rows)}
    (folder / "results.json").write_text(json.dumps(whole, indent=1))
    (folder / "results.md").write_text(tables(arms, rows))
    drawn = pictures.differences([row["name"] for row in rows], rows, "difference in NDCG@10")
    (folder / "differences.svg").write_bytes(base64.b64decode(drawn.partition(",")[2]))


def tables(arms: Sequence[Found], rows: Sequence[Found]) -> str:
    """Markdown: arms, then comparisons."""
    text = ["| arm | NDCG@10 | SD over seeds | PNR | SD |", "|---|---|---|---|---|"]
    text += [
        f"| {arm['arm']} | {arm[HEADLINE]['mean']:.4f} | {_sd(arm[HEADLINE], 4)} "
        f"| {arm['pnr']['mean']:.2f} | {_sd(arm['pnr'], 2)} |"
        for arm in arms
    ]
    text += [
        "",
        "| on the same queries | NDCG@10 | over seeds and queries | queries alone | seeds above | p | Holm | PNR |",
    ]
    text += ["|---|---|---|---|---|---|---|---|"]
    text += [
        f"| {row['name']} | {signed(row['value'])} | [{signed(row['low'])}, {signed(row['high'])}] "
        f"| [{signed(row['queries_low'])}, {signed(row['queries_high'])}] "
        f"| {row['seeds_above']} of {row['seeds']} | {row['p']:.4f} | {row['holm']:.4f} | {_pnr(row['pnr'])} |"
        for row in rows
    ]
    return "\n".join(text) + "\n"


def signed(number: float, digits: int = 4) -> str:
    return f"{number:+.{digits}f}".replace("-", MINUS)


def said(text: str) -> None:
    """One line of progress, beside the lines of the claims."""
    print(f"{datetime.now():%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def _pnr(found: Mapping[str, float]) -> str:
    value, low, high = (signed(found[name], 2) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _sd(found: Found, digits: int) -> str:
    return "" if found["sd"] is None else f"{found['sd']:.{digits}f}"


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
