"""The released artefact: a folder with weights, tokenizer, contract and card, and a manifest that proves them.

model.safetensors config.json tokenizer.json tokenizer_config.json contract.json   a plain Hugging Face folder
README.md     the card
bundle.json   {"format": 1, "name", "created", "contract": digest, "report": {...}, "files": {name: sha256}}
"""

import hashlib
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pydantic

from disranker import contract
from disranker.inputs import Settings
from disranker.recipe import Refused

MANIFEST = "bundle.json"
CARD = "README.md"
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", contract.FILE)
KINDS = (".safetensors", ".json", ".txt", ".md")  # none of them runs code when it is read, as a pickle does


class Manifest(Settings):
    format: Literal[1] = 1
    name: str
    created: str  # ISO 8601, UTC
    contract: str  # its digest
    report: dict[str, Any]  # what the evaluation found, as in report.json
    files: dict[str, str]  # name -> sha256


def write(
    folder: str | Path,
    model_folder: str | Path,
    *,
    name: str,
    report: Mapping[str, Any],
    facts: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """The manifest of a new bundle in `folder`, which must not exist or be empty; it is written last.

    `report` goes into the manifest, and its `runs` into the card; `facts` are the lines of the card that say what the
    model was trained on ("training queries": 1200). Raises `Refused` if the model folder lacks a file, or its contract
    is none of an encoder.
    """
    source, target = Path(model_folder), Path(folder)
    missing = [file for file in MODEL_FILES if not (source / file).is_file()]
    if missing:
        raise Refused(f"{source} cannot be released: it has no {', '.join(missing)}")
    if target.exists() and any(target.iterdir()):
        raise Refused(f"{target} is not empty: a bundle needs a folder of its own")
    agreed = contract.Tokens.load(source).contract
    if agreed.form != "encoder":
        raise Refused(f"{source} cannot be released: its contract is of a {agreed.form}, a bundle holds an encoder")
    target.mkdir(parents=True, exist_ok=True)
    for file in MODEL_FILES:
        shutil.copyfile(source / file, target / file)
    (target / CARD).write_text(_card(name, agreed, report, facts or {}), encoding="utf-8")
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        contract=agreed.digest,
        report=dict(report),
        files={file: _sha256(target / file) for file in (*MODEL_FILES, CARD)},
    )
    (target / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return verify(target)


def verify(folder: str | Path) -> dict[str, Any]:
    """The manifest of a bundle in which every file is as it was written, and no other lies.

    Raises `Refused` naming the file and both digests, the one expected and the one found.
    """
    target = Path(folder)
    manifest = _manifest(target)
    found = {path.name: path for path in target.iterdir() if path.name != MANIFEST}
    for file in sorted({*MODEL_FILES, *manifest.files, *found}):
        if Path(file).suffix not in KINDS:
            raise Refused(f"{target}: {file} may hold code; a bundle has only {', '.join(KINDS)} files")
        expected = manifest.files.get(file, "none")
        here = _sha256(found[file]) if file in found and found[file].is_file() else "none"
        if expected != here or here == "none":
            raise Refused(f"{target}: {file}: sha256 expected {expected}, found {here}")
    agreed = contract.Tokens.load(target).contract.digest
    if agreed != manifest.contract:
        raise Refused(f"{target}: {contract.FILE} has digest {agreed}, {MANIFEST} says {manifest.contract}")
    return manifest.model_dump()


def _manifest(target: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((target / MANIFEST).read_bytes())
    except OSError as error:
        raise Refused(f"{target} is no bundle: {MANIFEST}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise Refused(f"{target / MANIFEST} is no manifest: {faults}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(name: str, agreed: contract.Contract, report: Mapping[str, Any], facts: Mapping[str, object]) -> str:
    trained = [f"- {fact}: {value}" for fact, value in facts.items()]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-ranking",
        "---",
        f"# {name}",
        "",
        "A BERT cross-encoder that scores (query, title, summary), distilled by disranker. The score is a raw logit:",
        "larger is more relevant, and only the order within one query has a meaning.",
        "",
        "## Trained on",
        "",
        *(trained or ["Not stated."]),
        "",
        "## Evaluation",
        "",
        *_metrics(report),
        "",
        "## Input",
        "",
        f"`[CLS] query [SEP] title summary [SEP]`, at most {agreed.max_tokens} tokens: {agreed.max_query_tokens} of "
        f"the query, {agreed.max_title_tokens} of the title, the summary in what is left. `{contract.FILE}` is binding "
        f"(digest {agreed.digest}); `{MANIFEST}` has the sha256 of every file.",
        "",
    ]
    return "\n".join(lines)


def _metrics(report: Mapping[str, Any]) -> list[str]:
    """A table with a row for each run and a column for each metric, and intervals where the report has them."""
    runs = report.get("runs", {})
    names = list(dict.fromkeys(metric for metrics in runs.values() for metric in metrics))
    if not names:
        return ["Not evaluated."]
    rows = [[run, *(_interval(metrics.get(metric)) for metric in names)] for run, metrics in runs.items()]
    table = [["run", *names], ["---"] * (len(names) + 1), *rows]
    return [f"On {report.get('queries', '?')} queries.", "", *("| " + " | ".join(row) + " |" for row in table)]


def _interval(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return "not measured"
    low, high = metric.get("low"), metric.get("high")
    return f"{metric['value']:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")
