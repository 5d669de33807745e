"""How fast training is, of the BERT in `--model FOLDER` or a made-up one: against a peer, by workers, on a GPU.

Every training has a process of its own, one at a time. The made-up BERT has the size of MiniLM-L6 and random weights.
"""

import argparse
import functools
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench import claims, made_up, mfu, runs, trainers
from bench.claims import Line
from bench.made_up import Size
from disranker import recipe as recipes
from disranker import world
from disranker.inputs import World
from disranker.recipe import Finetune, Pretrain, Recipe, Refused, Student, Teacher
from disranker.store import Store

SPARE = 40  # judged queries more than lists: some have one grade alone
DOCUMENTS_PER_QUERY = 5  # of the shop
LIKE_MINILM = Size(vocabulary=30_000, width=384, layers=6, heads=12)
LIMITS = {"max_query_tokens": 32, "max_title_tokens": 64}  # no text reaches them


@dataclass(frozen=True)
class Plan:
    """Sizes of the full run; a setting that is a number is also an option of the command line."""

    folder: Path
    lists: int = 96
    sample_lists: int = 24  # to find the peer's best setting
    documents: int = 8  # in a list
    descriptions: int = 4  # that a summary may hold, at least one: lengths vary as those of real products do
    tokens_per_batch: int = 4096
    size: Size = LIKE_MINILM  # of the made-up BERT
    max_tokens: int = 192  # no pair is longer
    gpu_lists: int = 2_000
    gpu_tokens_per_batch: int = 32_768
    peak_tflops: int = 0  # of the GPU in bfloat16; 0: as its maker says
    runs: int = 3
    seed: int = 1

    @functools.cache  # noqa: B019
    def recipe(self, base: Path | None, lists: int) -> Path:
        """Of a store with so many lists and nothing else, ready for the stage `finetune`."""
        folder = self.folder / f"{lists} lists"
        content = self.settings(folder, base or self.made_up_base())
        recipe = recipes.parse(content)
        Store(recipe.root).write("groups", 0, groups(self, lists))
        made_up.commit(recipe, Store(recipe.root), "groups")
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def settings(self, folder: Path, base: Path) -> dict[str, Any]:
        finetune = {
            "epochs": 1,
            "lr": 5e-5,
            "labels": "grades",
            "documents_per_list": self.documents,
            "tokens_per_batch": self.tokens_per_batch,
            "validations": 1,
            "checkpoint_every_steps": 1_000_000,
        }
        model = {"base": str(base.absolute()), "max_tokens": self.max_tokens, **LIMITS}
        margins = {name: value for name, value in finetune.items() if name != "labels"} | {"alpha": 0.0}
        return {
            "root": str(folder.absolute() / "run"),
            "seed": self.seed,
            "ingest": {"parts": 1},
            "teacher": model,
            "student": {**model, "layers": self.size.layers},
            "finetune": finetune,
            "distill": margins,
        }

    @functools.cache  # noqa: B019
    def made_up_base(self) -> Path:
        """A BERT with random weights that drops out as a pretrained one does, and a WordPiece tokenizer."""
        from transformers import BertConfig, BertForSequenceClassification

        from disranker import student

        folder = self.folder / "base"
        folder.mkdir()
        size = asdict(self.size) | {"max_tokens": self.max_tokens} | LIMITS
        texts = (f"{doc['title']} {doc['summary']}" for row in groups(self, self.lists) for doc in row["docs"])
        student.scratch(folder, texts, Student(**size), self.seed)
        config = BertConfig.from_pretrained(folder)
        config.vocab_size = self.size.vocabulary  # the tokenizer found fewer
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
        BertForSequenceClassification(config).save_pretrained(folder)
        return folder


SMALL = {
    **{"lists": 6, "sample_lists": 4, "documents": 4, "tokens_per_batch": 1024, "runs": 1},
    "size": Size(vocabulary=1000, width=32, layers=1, heads=2),
}


def finetune(plan: Plan, base: Path | None) -> Iterator[Line]:
    """The loop of the stage against CrossEncoderTrainer: same model, lists, loss, precision, tokens; by turns."""
    several = (plan.documents // 2, plan.documents, 2 * plan.documents, plan.sample_lists * plan.documents)
    yield from _against(plan, base, "finetune", "ranknet", several)


def distill(plan: Plan, base: Path | None) -> Iterator[Line]:
    """As `finetune`, with Margin-MSE; the teacher's scores are the grades, and nobody drops anything out."""
    yield from _against(plan, base, "distill", "margin-mse", (1, 2, 4, plan.sample_lists))


def _against(plan: Plan, base: Path | None, stage: str, theirs: str, several: Sequence[int]) -> Iterator[Line]:
    for precision in ("float32", "bfloat16"):
        at_once = fastest(plan, base, stage, theirs, several, precision)
        yield _compared(plan, base, stage, theirs, at_once, precision)


def _compared(plan: Plan, base: Path | None, stage: str, theirs: str, at_once: int, precision: str) -> Line:
    ours, peer = [], []
    for _ in range(plan.runs):
        ours.append(_ours(plan, base, plan.lists, stage, "--precision", precision))
        peer.append(_peer(plan, base, plan.lists, theirs, ours[-1]["steps"], at_once, precision))
    tokens = {said["tokens"] for said in ours + peer}
    if len(tokens) > 1:
        raise runs.Broken(f"the trainings saw different texts: {sorted(tokens)} tokens")
    more = {"precision": precision, "pairs": ours[0]["pairs"], "tokens": tokens.pop(), "peer_at_once": at_once}
    for name in ("steps", "padding", "loss"):
        more |= {name: claims.shown(ours[0][name]), f"peer_{name}": claims.shown(peer[0][name])}
    claim = f"train: {stage} vs CrossEncoderTrainer, {theirs}"
    return claims.against(claim, _rates(ours), _rates(peer), "pairs/s", 1.5, **more)


def parts(plan: Plan, base: Path | None) -> Iterator[Line]:
    """What the speed of ours is made of: against itself with one thing done otherwise, by turns."""
    others = {f"without {off}": ["--off", off] for off in trainers.TURNED_OFF}
    others["in bfloat16"] = ["--precision", "bfloat16"]
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in ("as it is", *others)}
    for _ in range(plan.runs):
        for name, measured in said.items():
            measured.append(_ours(plan, base, plan.sample_lists, "finetune", *others.get(name, ())))
    whole = said.pop("as it is")
    for name, measured in said.items():
        more = {key: claims.shown(each[0]["padding"]) for key, each in (("padding", whole), ("peer_padding", measured))}
        yield claims.against(f"train: finetune vs {name}", _rates(whole), _rates(measured), "pairs/s", None, **more)


def workers(plan: Plan, base: Path | None) -> Iterator[Line]:
    """The real command with two workers of one thread each against one such worker, from its first step's end on."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    seen = {count: lists_per_step(recipes.load(plan.recipe(base, plan.lists)), count) for count in rates}
    for _ in range(plan.runs):
        for count, measured in rates.items():
            measured.append(groups_per_second(_trained(plan, base, count), seen[count]))
    more = {"lists": plan.lists, "tokens_per_batch": plan.tokens_per_batch}
    yield claims.against("train: two workers vs one", rates[2], rates[1], "groups/s", 1.6, **more)


def utilisation(plan: Plan, base: Path | None) -> Iterator[Line]:
    """Both trainings of a decoder of half a billion random weights, in bfloat16, as a share of the GPU's peak."""
    name, peak = mfu.gpu(plan.peak_tflops)
    size = Teacher(vocabulary=32_000, width=1280, layers=23, heads=20, max_tokens=plan.max_tokens, **LIMITS)
    more = {"epochs": 1, "precision": "bfloat16", "tokens_per_batch": plan.gpu_tokens_per_batch, "validations": 1}
    ranking = Finetune(labels="grades", documents_per_list=plan.documents, **more)
    rows = groups(plan, plan.gpu_lists)
    for stage, measure, cfg in (
        ("pretrain", mfu.pretraining, Pretrain(**more)),
        ("finetune", mfu.finetuning, ranking),
    ):
        said = [measure(rows, size, cfg, "cuda", plan.seed) for _ in range(plan.runs)]
        reached = [each["tflops"] / peak for each in said]
        claim = f"train: {stage}, model FLOP utilisation"
        yield claims.against(claim, reached, [1.0], "of the peak", 0.45, gpu=name, peak_tflops=peak, **said[0])


CLAIMS: dict[str, Callable[[Plan, Path | None], Iterator[Line]]] = {
    "finetune": finetune,
    "distill": distill,
    "parts": parts,
    "workers": workers,
    "mfu": utilisation,
}
ASKED_FOR = ("mfu",)  # not done unless named: it needs a GPU


def groups(plan: Plan, lists: int) -> list[dict[str, Any]]:
    """Judged queries of the made-up shop, as rows of the table `groups`: documents from lowest to highest grade.

    A summary is that of the document and those of up to three others, so that lengths vary by a third of their mean.
    """
    asked = lists + SPARE
    cfg = World(documents=DOCUMENTS_PER_QUERY * asked, queries=asked, judged=asked)
    shop, rng = world.documents(cfg, plan.seed).to_pylist(), np.random.default_rng(plan.seed)
    texts = {}
    for place, doc in enumerate(shop):
        others = (shop[(place + n) % len(shop)]["summary"] for n in range(int(rng.integers(plan.descriptions))))
        texts[doc["doc_id"]] = {"title": doc["title"], "summary": " ".join([doc["summary"], *others])}
    graded: dict[str, list[dict[str, Any]]] = {}
    for row in world.judgments(cfg, plan.seed).to_pylist():
        graded.setdefault(row["query"], []).append(row)
    found = [_list(query, rows, texts, plan.documents) for query, rows in graded.items()]
    return [row for row in found if len({doc["grade"] for doc in row["docs"]}) > 1][:lists]


def _list(query: str, rows: list[dict[str, Any]], texts: dict[str, dict[str, str]], documents: int) -> dict[str, Any]:
    """Of the judged documents of a query so many, evenly from the lowest to the highest grade."""
    ranked = sorted(rows, key=lambda row: row["grade"])
    chosen = [ranked[place * len(ranked) // documents] for place in range(documents)]
    known = {"source": "judged", "attractiveness": None, "impressions": None, "asked": True}
    docs = [{"doc_id": row["doc_id"], "grade": row["grade"], **texts[row["doc_id"]], **known} for row in chosen]
    return {"query": query, "split": "train", "band": "head", "docs": docs}


def fastest(plan: Plan, base: Path | None, stage: str, theirs: str, several: Sequence[int], precision: str) -> int:
    """How many pairs or lists of these the peer is best given to the model together."""
    steps = _ours(plan, base, plan.sample_lists, stage)["steps"]
    rates = {count: _peer(plan, base, plan.sample_lists, theirs, steps, count, precision)["rate"] for count in several}
    return max(rates, key=lambda count: rates[count])


def _ours(plan: Plan, base: Path | None, lists: int, stage: str, *options: Any) -> dict[str, Any]:
    return runs.measured("bench.trainers", stage, "--recipe", plan.recipe(base, lists), *options)


def _peer(
    plan: Plan, base: Path | None, lists: int, theirs: str, steps: int, at_once: int, precision: str
) -> dict[str, Any]:
    """With as many lists to a step as ours has on average, no more steps than ours."""
    sizes = ["--lists-per-step", math.ceil(lists / steps), "--at-once", at_once, "--precision", precision]
    return runs.measured("bench.trainers", theirs, "--recipe", plan.recipe(base, lists), *sizes)


def _trained(plan: Plan, base: Path | None, count: int) -> Path:
    """The tracker's folder of a run of the stage with so many workers."""
    recipe = plan.recipe(base, plan.lists)
    root = runs.root(recipe)
    for name in ("teacher", "runs", "tracking"):
        shutil.rmtree(root / name, ignore_errors=True)
    options = ["--set", f"finetune.workers={count}"]
    runs.done(recipe, plan.folder / "log", stage="finetune", artefact="teacher", options=options)
    (folder,) = (root / "tracking").iterdir()
    return folder


def lists_per_step(recipe: Recipe, workers: int) -> list[int]:
    """How many lists all workers together learn at each step: of an odd number of batches, two leave one out."""
    from disranker import fit, teacher

    cfg, (tokens, _) = recipe.finetune, trainers.start(recipe)
    task = teacher.Ranking(trainers.lists(recipe), [], tokens, cfg)
    plans = [fit.steps(task, cfg, recipe.seed, rank, workers) for rank in range(workers)]
    return [sum(len(batch) for step in together for batch in step) for together in zip(*plans, strict=True)]


def groups_per_second(tracked: Path, lists: Sequence[int]) -> float:
    """Of a run over so many lists at each step, by the times that its tracker noted, from the first step's end on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    times = [event.wall_time for event in EventAccumulator(str(tracked)).Reload().Scalars("loss")]
    assert len(times) == len(lists), f"{len(times)} steps are not the {len(lists)} of the plan"
    return sum(lists[1:]) / (times[-1] - times[0])


def _rates(said: Sequence[dict[str, Any]]) -> list[float]:
    return [each["rate"] for each in said]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path, help="a folder with a BERT; default: made up")
    given, _ = parser.parse_known_args(argv)
    measurements = {name: functools.partial(measure, base=given.model) for name, measure in CLAIMS.items()}
    try:
        return claims.command(
            "bench.train", Plan, measurements, SMALL, argv, __doc__ or "", ASKED_FOR, parents=[parser]
        )
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
