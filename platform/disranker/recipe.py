"""Every number of a run: one frozen model per stage, YAML in, `--set` overrides, fingerprints."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
import yaml
from annotated_types import Ge, Gt, Le, Lt

from disranker.inputs import Amount, Cleaning, Count, Data, Ingest, Positive, Settings, Share, World

Pairs = Literal["all", "neighbours", "gaps", "sampled"]  # of one query's documents, by the teacher's scores


class Refused(ValueError):
    """Input or settings that a person must mend; jobs print the message alone and exit 2."""


def in_a_line(error: Exception) -> str:
    """What a library says in several, for a message of ours."""
    return " ".join(str(error).split()) or type(error).__name__


def _changed(settings: Settings, name: str) -> bool:
    """Whether a setting has another value than its default: a recipe that was written out has all of them."""
    return bool(getattr(settings, name) != type(settings).model_fields[name].default)


class Aggregate(Settings):
    # auto: of the others, what agrees best with human grades on the validation queries; without grades, pbm
    click_model: Literal["auto", "ctr", "coec", "pbm", "dbn"] = "auto"
    em_rounds: Count = 30
    satisfied_dwell_s: Positive = 30.0  # a click satisfied that took the shopper away for so long (dbn)
    held_out_share: Annotated[float, Gt(0), Lt(1)] = 0.1  # of impressions, to see how well the models predict clicks
    prior_impressions: Positive = 4.0  # pseudo-impressions at the mean attractiveness
    head_share: Share = 0.5  # the most frequent queries that make up this share of searches
    torso_share: Share = 0.3  # the next ones; what remains is the tail
    validation_share: Share = 0.1
    test_share: Share = 0.2


class Bands(Settings):
    """A share for the queries of each frequency band."""

    head: Share = 1.0
    torso: Share = 1.0
    tail: Share = 1.0


class Sample(Settings):
    """Candidates for each query: graded ones, shown ones, first by BM25, random ones; each document once."""

    ungraded: Bands = Bands()  # of the training queries that nobody graded, this share; graded ones are all taken
    tail_floor: Annotated[float, Ge(0), Lt(1)] = 0.2  # least share of the tail among those; the others give way to it
    judged: Amount = 10  # graded documents in a training list; a test list holds all of them and nothing else
    shown: Amount = 10  # seen by shoppers, most impressions first
    bm25: Amount = 6  # first by BM25 among those never shown
    random: Amount = 4
    asked_share: Annotated[float, Gt(0), Le(1)] = 1.0  # of a training list, that the teacher scores: both ends by BM25
    min_clicks: Count = 1  # of a pair to become a pre-training example


class Model(Settings):
    """What teacher and student share; vocabulary, width, layers and heads are those of `scratch`."""

    base: str = "scratch"  # or a folder or hub name
    vocabulary: Count = 1000
    width: Count = 96
    layers: Count = 2
    heads: Count = 3
    max_query_tokens: Count = 16
    max_title_tokens: Count = 24
    max_tokens: Count = 64  # query, title, summary and special tokens together; the summary gives way first

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        if self.max_query_tokens + self.max_title_tokens + 4 > self.max_tokens:
            raise ValueError("max_tokens must leave room for max_query_tokens, max_title_tokens and 4 special tokens")
        return self


class Teacher(Model):
    """A decoder, or a sequence-classification encoder."""

    # Of a decoder: the last token, which alone has seen all before it, or the mean of all; an encoder has its own way.
    pooling: Literal["last", "mean"] = "last"

    @pydantic.model_validator(mode="after")
    def _runs_on_vllm(self) -> Self:
        if self.base == "scratch" and self.width // self.heads % 32:
            raise ValueError(
                f"width {self.width} over heads {self.heads} is {self.width // self.heads} a head; "
                "vLLM's attention on CPUs needs a multiple of 32"
            )
        return self


class Student(Model):
    """A BERT. `layers` counts also what is taken of a base."""

    # Which layers of the base; none: its vocabulary alone, for a BERT of random weights in the width of the recipe.
    take: Literal["first", "last", "every_second", "none"] = "first"

    @pydantic.model_validator(mode="after")
    def _has_one_size(self) -> Self:
        changed = [name for name in ("width", "heads") if _changed(self, name)]
        if changed and self.base != "scratch" and self.take != "none":
            raise ValueError(
                f"{' and '.join(changed)} are those of base; with take: none a student is as the recipe says"
            )
        return self


class Training(Settings):
    """What the three training stages share."""

    epochs: Count = 1
    lr: Positive = 1e-3
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.1
    weight_decay: Annotated[float, Ge(0)] = 0.01
    clip_norm: Positive = 1.0
    tokens_per_batch: Count = 2048  # of one worker, padding included
    accumulate: Count = 1  # batches of each worker to a step
    validations: Count = 4  # evenly over the run; the weights of the best one are what the stage gives
    patience: Amount = 0  # validations in a row without a better one that end the run early; 0: none do
    precision: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and optimiser keep float32
    recompute: bool = False  # activations are computed again for the gradient: a third more time, far less memory
    lora_rank: Amount = 0  # 0: all weights are trained
    lora_alpha: Count = 32
    checkpoint_every_steps: Count = 100
    keep_checkpoints: Count = 2
    workers: Count = 1  # data parallel
    sharding: Literal["ddp", "fsdp"] = "ddp"  # each worker holds the whole model, or a share of it
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Ge(0), Le(1)] = 0


class Pretrain(Training):
    epochs: Count = 4
    lr: Positive = 2e-3
    satisfied_weight: Annotated[float, Ge(1)] = 2.0  # a click that satisfied counts as so many
    general: list[str] = pydantic.Field(
        default_factory=list
    )  # files of plain text, so that a pretrained model does not forget its language
    general_share: Annotated[float, Ge(0), Lt(1)] = 0.1  # of the tokens of an epoch, where there are such files


class Finetune(Training):
    epochs: Count = 3
    documents_per_list: Annotated[int, Ge(2)] = 6  # a longer list is dealt into several, each over all targets
    labels: Literal["grades", "evidence", "grades_then_evidence"] = "grades_then_evidence"
    loss: Literal["margin", "ranknet", "listwise", "pointwise"] = "ranknet"
    margin: Positive = 0.5
    margin_by_gap: bool = False  # the margin is that of a difference of 1 in the targets, and grows with it
    min_impressions: Amount = 5  # below, a pair's attractiveness is no label

    @pydantic.model_validator(mode="after")
    def _one_scale(self) -> Self:
        # A loss that sees only the order within a list does not mind that lists differ in scale; these two do.
        by_value = "margin_by_gap" if self.margin_by_gap else f"loss {self.loss}"
        if (self.loss == "pointwise" or self.margin_by_gap) and self.labels == "grades_then_evidence":
            raise ValueError(
                f"{by_value} learns the targets' values, and labels {self.labels} are grades in some lists and clicks "
                "from 0 to 1 in others; set labels: grades or labels: evidence"
            )
        return self


class Score(Settings):
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    actors: Count = 1  # engines
    max_actors: Amount = 0  # more than actors: the pool grows while there is a queue; 0: it does not
    tensor_parallel: Count = 1  # GPUs that share one engine
    cpus_per_actor: Positive = 1  # for each of these GPUs; 0.5 leaves Ray room to read, and is one thread
    gpus_per_actor: Amount = 0
    pairs_per_batch: Count = 512  # scored together and written together; what a crash costs at most, per engine
    max_batched_tokens: Count = 4096
    block_tokens: Count = 32  # of the prefix cache: a common start counts in whole blocks
    kv_cache_gib: Count = 1  # CPU only
    max_bad_share: Share = 0.001  # of the pairs to score that may fail; one more fails the stage

    @pydantic.model_validator(mode="after")
    def _pool(self) -> Self:
        if 0 < self.max_actors < self.actors:
            raise ValueError(f"max_actors {self.max_actors} is less than actors {self.actors}")
        if self.tensor_parallel > 1 and self.gpus_per_actor != 1:
            raise ValueError("tensor_parallel shares an engine among GPUs: with it, gpus_per_actor is 1")
        return self


class Distill(Training):
    epochs: Count = 6
    lr: Positive = 7e-4  # a small BERT from nothing stays on its plateau with much more
    documents_per_list: Annotated[int, Ge(2)] = 6  # as in finetune
    targets: Literal["teacher", "grades", "evidence", "grades_then_evidence"] = "teacher"  # others: finetune.labels
    loss: Literal["hybrid", "ranknet", "kl", "margin"] = "hybrid"
    alpha: Annotated[float, Ge(0)] = 1.0  # weight of Point-MSE in hybrid
    beta: Annotated[float, Ge(0)] = 1.0  # weight of Margin-MSE
    pairs: Pairs = "all"  # that Margin-MSE compares
    pair_share: Annotated[float, Gt(0), Le(1)] = 0.5  # of the pairs of a list, for gaps and sampled
    temperature: Positive = 1.0  # of kl
    margin: Positive = 0.5
    lexical: Annotated[float, Ge(0)] = 0.0  # weight of telling which query tokens stand in the document; 0: not asked
    max_missing_share: Share = 0.01  # of the pairs that the teacher was asked for; more without a label are refused

    @pydantic.model_validator(mode="after")
    def _some_loss(self) -> Self:
        hybrid = self.loss == "hybrid"
        if hybrid and self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0: nothing would be learned")
        if self.targets != "teacher" and self.loss not in ("ranknet", "margin"):
            raise ValueError(f"loss {self.loss} learns scores; targets {self.targets} go with ranknet or margin")
        if self.pairs != "all" and not (hybrid and self.beta):
            raise ValueError(f"pairs {self.pairs} is a choice for Margin-MSE, which needs loss hybrid and beta above 0")
        for name, loss in (("temperature", "kl"), ("margin", "margin")):
            if _changed(self, name) and self.loss != loss:
                raise ValueError(f"{name} {getattr(self, name):g} is for loss {loss}, not {self.loss}")
        if _changed(self, "pair_share") and self.pairs not in ("gaps", "sampled"):
            raise ValueError(f"pair_share {self.pair_share:g} is for pairs gaps or sampled, not {self.pairs}")
        return self


class Evaluate(Settings):
    resamples: Count = 2000  # of queries, for intervals
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95
    runs: list[str] = pydantic.Field(default_factory=list)  # TREC runs of others, as paths, globs, folders or URIs
    perturb: bool = True  # queries with a typo, words swapped or a word less are scored too


class Publish(Settings):
    """The gate: what a student must reach on the test queries to be released."""

    min_share_of_teacher: Share = 0.95  # of the teacher's NDCG@10
    beat_bm25: bool = True  # the interval of the difference in NDCG@10 lies above 0
    in_service: str | None = None  # a bundle, as a local folder: the student that serves now
    max_loss: Share = 0.01  # of NDCG@10 against it: the interval of the difference lies above the negative of it
    int8: bool = True  # the bundle has an engine of 8 bits
    bf16: bool = True  # and, where `publish` runs on a CPU that computes in it, one of bfloat16
    max_rounding_loss: Share = 0.005  # of the NDCG@10 of float32, in either
    min_rounding_tau: Annotated[float, Ge(-1), Le(1)] = 0.98  # Kendall's, mean over the lists, to the order of float32
    max_difference: Positive = 1e-3  # of a score of the float32 engines to torch's
    calibration_lists: Count = 100  # of the training split, for the ranges of 8 bits
    test_lists: Count = 1000  # that the engines are compared on, evenly over all
    timed_lists: Count = 30  # of them, that their speed is measured on
    timing_rounds: Count = 5  # over them, after a first one that does not count; the median is told


class Refresh(Settings):
    """What a night calls a drift of the day's log, beyond what chance does, and who sees its student first."""

    max_new_queries: Share = 0.3  # of the day's searches, of queries that no day before has
    max_new_documents: Share = 0.3  # of the results that the day showed
    max_click_change: Positive = 0.25  # of the click-through, up or down, as a share of that before
    max_position_shift: Positive = 0.25  # population stability index of the positions of clicks
    share: Annotated[float, Gt(0), Le(1)] = 0.1  # of clients, whom the canary answers


class Serve(Settings):
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    tokens_per_batch: Count = 1024
    max_documents: Count = 1000


class Recipe(Settings):
    root: str  # every table, model and report of the run: a path or a `pyarrow.fs` URI
    seed: int = 1
    world: World = World()
    data: Data = Data()
    ingest: Ingest = Ingest()
    cleaning: Cleaning = Cleaning()
    aggregate: Aggregate = Aggregate()
    sample: Sample = Sample()
    teacher: Teacher = Teacher()
    student: Student = Student()
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()
    score: Score = Score()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()
    refresh: Refresh = Refresh()
    serve: Serve = Serve()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.aggregate.validation_share + self.aggregate.test_share >= 1:
            raise ValueError("aggregate: validation_share and test_share leave no query to train on")
        if self.aggregate.head_share + self.aggregate.torso_share > 1:
            raise ValueError("aggregate: head_share and torso_share exceed 1")
        per_list = self.sample.judged + self.sample.shown + self.sample.bm25 + self.sample.random
        if per_list < 2:
            raise ValueError("sample: judged, shown, bm25 and random give fewer than the 2 documents a rank loss needs")
        if self.pretrain.tokens_per_batch < self.teacher.max_tokens:
            raise ValueError(
                f"pretrain: tokens_per_batch {self.pretrain.tokens_per_batch} cannot hold one text of "
                f"{self.teacher.max_tokens} tokens (teacher.max_tokens)"
            )
        for stage, model in (("finetune", self.teacher), ("distill", self.student)):
            cfg = getattr(self, stage)
            documents = min(per_list, cfg.documents_per_list)
            if cfg.tokens_per_batch < documents * model.max_tokens:
                raise ValueError(
                    f"{stage}: tokens_per_batch {cfg.tokens_per_batch} cannot hold one list of {documents} documents "
                    f"of {model.max_tokens} tokens; {documents * model.max_tokens} or more can"
                )
        return self

    @property
    def made_up(self) -> bool:
        """Whether the run reads the made-up world."""
        return not self.data.documents


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a word; 1.2, and whoever writes a recipe, for a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with `a.b=value` overrides laid over it. Raises `Refused` in one line."""
    try:
        content = yaml.load(Path(path).read_text(), _Loader) or {}
    except OSError as error:
        raise Refused(f"recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"recipe {path} is not YAML: {in_a_line(error)}") from error
    if not isinstance(content, dict):
        raise Refused(f"recipe {path} holds {type(content).__name__}, not settings by name")
    for override in overrides or []:
        _set(content, override)
    return parse(content)


def parse(content: dict[str, Any]) -> Recipe:
    """A checked recipe from plain values. Raises `Refused` that names the key and what would be right."""
    try:
        return Recipe.model_validate(content)
    except pydantic.ValidationError as error:
        raise Refused("; ".join(_explain(fault) for fault in error.errors())) from error


def digest(value: Any) -> str:
    """A short, stable name for a JSON-like value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _set(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise Refused(f"--set {override}: write it as section.key=value")
    *sections, key = name.strip().split(".")
    for section in sections:
        inner = content.get(section)
        if inner is None:
            inner = content[section] = {}
        if not isinstance(inner, dict):
            raise Refused(f"--set {override}: {section} is one value, not a section")
        content = inner
    try:
        content[key] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise Refused(f"--set {override}: the value is not YAML") from error


def _explain(fault: Any) -> str:
    *path, last = fault["loc"] or ("recipe",)
    where = ".".join(map(str, path)) or "the recipe"
    if fault["type"] == "extra_forbidden":
        model = _section(path)
        return f"no setting '{last}' in {where}; it has {', '.join(model.model_fields)}"
    if fault["type"] == "value_error":
        return f"{'.'.join(map(str, fault['loc'])) or 'recipe'}: {fault['ctx']['error']}"
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, not {fault['input']!r}"


def _section(path: list[Any]) -> type[pydantic.BaseModel]:
    model: type[pydantic.BaseModel] = Recipe
    for name in path:
        annotation = model.model_fields[name].annotation
        model = annotation if isinstance(annotation, type) else get_args(annotation)[0]
    return model
