"""The stages, what each reads and writes, and which of them have to run and why."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from disranker import contract, ledger, store, trec
from disranker.recipe import Recipe, Refused, digest

FORMAT = 2  # of the tables; a change does every stage again

# How a stage is done, not what comes out: a change of these leaves what stands.
HOW = frozenset(
    {
        "checkpoint_every_steps",
        "keep_checkpoints",
        "recompute",
        "cpus_per_worker",
        "gpus_per_worker",
        "actors",
        "max_actors",
        "tensor_parallel",
        "cpus_per_actor",
        "gpus_per_actor",
        "pairs_per_batch",
        "max_batched_tokens",
        "block_tokens",
        "kv_cache_gib",
        "max_bad_share",
        "max_missing_share",
    }
)


# Of these a stage keeps what still holds: it was paid for, or took long to read.
KEPT = frozenset({"documents", "judgments", "searches", "rejects", "labels"})
# Of these the one before stands until there is another: what a training is refused for, or fails on, costs no model.
MODELS = frozenset({"decoder", "teacher", "student"})


@dataclass(frozen=True)
class Stage:
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    sections: tuple[str, ...]  # of the recipe


STAGES = (
    Stage("generate", (), ("world",), ("world",)),
    Stage("ingest", ("world",), ("documents", "judgments", "searches", "rejects"), ("data", "ingest")),
    Stage("aggregate", ("searches", "judgments"), ("evidence", "queries"), ("cleaning", "aggregate")),
    Stage("sample", ("documents", "judgments", "evidence", "queries"), ("clicked", "groups"), ("sample",)),
    Stage("pretrain", ("documents", "clicked"), ("decoder",), ("teacher", "pretrain")),
    Stage("finetune", ("decoder", "groups"), ("teacher",), ("teacher", "finetune")),
    Stage("score", ("teacher", "groups"), ("labels",), ("score",)),
    Stage("distill", ("documents", "groups", "labels"), ("student",), ("student", "distill")),
    Stage(
        "evaluate",
        ("documents", "evidence", "groups", "labels", "student"),
        ("scores", "perturbed", "report"),
        ("evaluate",),
    ),
    Stage("publish", ("groups", "student", "report"), ("bundle",), ("publish",)),
)
NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class Step:
    stage: Stage
    fingerprint: str
    reads: dict[str, str]  # artefact -> fingerprint of the stage that makes it
    settings: dict[str, Any]
    inputs: list[list[Any]]  # files from outside: [path, bytes, time of change]


def steps(recipe: Recipe) -> list[Step]:
    """The stages that this recipe has, in order, with their fingerprints: all known before anything runs."""
    made: dict[str, str] = {}  # artefact -> fingerprint
    found = []
    for stage in STAGES:
        if not _has(recipe, stage):
            continue
        reads = {artefact: made[artefact] for artefact in stage.reads if artefact in made}
        settings = _settings(recipe, stage)
        inputs = identities(_outside(recipe, stage))
        fingerprint = digest([FORMAT, stage.name, recipe.seed, settings, reads, inputs])
        made |= dict.fromkeys(stage.writes, fingerprint)
        found.append(Step(stage, fingerprint, reads, settings, inputs))
    return found


def step(recipe: Recipe, name: str) -> Step:
    """One of `steps`. Raises `Refused` where this recipe does not have it."""
    found = {step.stage.name: step for step in steps(recipe)}
    if name not in found:
        raise Refused(f"this recipe has no stage {name}; it has {', '.join(found)}")
    return found[name]


def why(step: Step, at: store.Store) -> str | None:
    """Why a step has to run, or None if what it makes stands."""
    for artefact in step.stage.writes:
        manifest = at.finished(artefact)
        if manifest is None:
            return "not done yet"
        if manifest["fingerprint"] != step.fingerprint:
            return _difference(step, manifest)
    return None


def select(all_steps: list[Step], first: str | None, last: str | None) -> list[Step]:
    """The steps from one stage to another. Raises `Refused` for a name without stage, or the wrong way round."""
    names = [step.stage.name for step in all_steps]
    for name in (first, last):
        if name and name not in names:
            raise Refused(f"no stage '{name}' in this recipe; it has {', '.join(names)}")
    start, end = names.index(first) if first else 0, names.index(last) if last else len(names) - 1
    if start > end:
        raise Refused(f"stage {first} comes after {last}")
    return all_steps[start : end + 1]


def check_reads(step: Step, at: store.Store) -> None:
    """Raises `Refused` where what a step reads is not there, or was made with other settings."""
    makers = {artefact: stage.name for stage in STAGES for artefact in stage.writes}
    for artefact, fingerprint in step.reads.items():
        manifest = at.finished(artefact)
        if manifest is None or manifest["fingerprint"] != fingerprint:
            state = "is not there" if manifest is None else "was made with other settings or inputs"
            mend = f"run jobs.{makers[artefact]} first, or jobs.pipeline"
            raise Refused(f"{step.stage.name}: {artefact} {state} in {at.uri}; {mend}")


def resting(at: store.Store) -> list[str]:
    """Artefacts that were made, directly or through others, of searches of people who were forgotten since."""
    moment, of_searches = ledger.forgot_at(at), {"searches"}
    for stage in STAGES:
        if of_searches & set(stage.reads):
            of_searches |= set(stage.writes)
    if moment is None:
        return []
    made = {artefact: at.finished(artefact) for artefact in of_searches}
    return sorted(artefact for artefact, manifest in made.items() if manifest and manifest["finished"] <= moment)


def _has(recipe: Recipe, stage: Stage) -> bool:
    if stage.name == "generate":
        return recipe.made_up
    if stage.name == "pretrain":
        return contract.form(recipe.teacher.base) == "decoder"
    return True


def _settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    return {section: getattr(recipe, section).model_dump(exclude=HOW) for section in stage.sections}


def _outside(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """Files that the stage reads and no stage writes. Raises `Refused` for a path where nothing lies."""
    if stage.name == "ingest":
        for what, patterns in recipe.data.files().items():
            files = store.expand(patterns, what)
            yield from files
            if what == "judgments":
                yield from sorted({queries for file in files if (queries := trec.beside(file))})
        yield from _forgotten(recipe)
    if stage.name == "pretrain":
        yield from store.expand(recipe.pretrain.general, "general", "pretrain")
    if stage.name == "evaluate":
        yield from store.expand(recipe.evaluate.runs, "runs", "evaluate")
    if stage.name == "publish" and recipe.publish.in_service:
        yield _in_service(recipe, recipe.publish.in_service)
    bases = {"pretrain": recipe.teacher.base, "finetune": recipe.teacher.base, "distill": recipe.student.base}
    for name, base in bases.items():
        if stage.name == name and base != "scratch" and store.is_folder(base):
            yield from store.expand([base], f"{name}.base")


def _in_service(recipe: Recipe, folder: str) -> str:
    """The manifest of the bundle in service, which names all its files. Raises `Refused` where there is none."""
    from disranker import bundle  # brings torch, which who plans stages need not wait for

    own, (filesystem, path) = store.Store(recipe.root), store.locate(folder)
    if type(filesystem) is type(own.fs) and f"{path}/".startswith(own.at("bundle", "")):
        raise Refused(f"publish.in_service {folder} is where publish writes, and clears first; copy it elsewhere")
    return store.expand([f"{folder.rstrip('/')}/{bundle.MANIFEST}"], "in_service", "publish")[0]


def _forgotten(recipe: Recipe) -> Iterator[str]:
    root = store.Store(recipe.root)
    if ledger.forgot_at(root):
        yield f"{root.uri}/{ledger.FORGOTTEN}"


def identities(files: Iterable[str]) -> list[list[Any]]:
    """What tells a changed file from the same one without reading it: path, bytes, time of change."""
    found = []
    for uri in files:
        filesystem, path = store.locate(uri)
        info: fs.FileInfo = filesystem.get_file_info(path)
        found.append([uri, info.size, info.mtime_ns])
    return found


def _difference(step: Step, manifest: dict[str, Any]) -> str:
    changed = [
        f"{section}.{key} {old.get(key)} -> {value}"
        for section, values in step.settings.items()
        if (old := manifest["settings"].get(section)) is not None
        for key, value in values.items()
        if old.get(key) != value
    ]
    changed += [f"{name} made anew" for name, made in step.reads.items() if manifest["reads"].get(name) != made]
    changed += ["input files changed"] if manifest["inputs"] != step.inputs else []
    return ", ".join(changed) or "seed or version changed"
