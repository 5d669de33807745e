"""The released artefact: a folder with the student in every form, its contract, card and report, and what proves them.

model.safetensors config.json tokenizer.json tokenizer_config.json contract.json   a plain Hugging Face folder
model.onnx openvino_model.xml openvino_model.bin openvino_int8.xml openvino_int8.bin   other engines (`engines`)
README.md report.html report.json                                                  for people
selftest.json   some lists and the scores they have, which whoever loads it compares
bundle.json   the manifest: which engine is chosen and why, what the student was made of, the sha256 of every file
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pydantic

from disranker import card, contract, engines
from disranker.inputs import Settings, told
from disranker.lineage import Chain
from disranker.recipe import Refused

FORMAT = 2  # 1 had the weights alone
MANIFEST = "bundle.json"
CARD = "README.md"
SELFTEST = "selftest.json"
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", contract.FILE)
ENGINE_FILES = tuple(
    dict.fromkeys(file for files in engines.FILES.values() for file in files if file not in MODEL_FILES)
)
REPORT_FILES = ("report.html", "report.json")
# None of them runs code when it is read, as a pickle does: ONNX and OpenVINO graphs name operations of the runtime, and
# ask for others only where the program that reads them has registered a library of its own. OpenVINO's .bin are bare
# numbers; any other .bin may be a pickle.
KINDS = (".safetensors", ".json", ".txt", ".md", ".html", ".onnx", ".xml")


class Manifest(Settings):
    format: Literal[2] = 2
    name: str
    created: str  # ISO 8601, UTC
    contract: str  # its digest
    engine: engines.Name  # the one to serve with
    engines: dict[str, dict[str, Any]]  # what was measured of each: pairs_per_s by threads, ndcg@10, nearness to torch
    gate: dict[str, Any]  # the bars that it passed, as in gate.json
    lineage: Chain  # artefact -> what it was made of, back to the log files
    report: dict[str, Any]  # what the evaluation found, as in report.json
    files: dict[str, str]  # name -> sha256
    digest: str = ""  # sha256 of all of the above, as JSON

    def found_digest(self) -> str:
        """What `digest` must be."""
        return hashlib.sha256(self.model_dump_json(exclude={"digest"}).encode()).hexdigest()


def write(
    folder: str | Path,
    model_folder: str | Path,
    *,
    name: str,
    report: Mapping[str, Any],
    facts: Mapping[str, object] | None = None,
    engine: engines.Name = "torch",
    measured: Mapping[str, Mapping[str, Any]] | None = None,
    gate: Mapping[str, Any] | None = None,
    chain: Chain | None = None,
) -> dict[str, Any]:
    """The manifest of a new bundle in `folder`, which must not exist or be empty; it is written last.

    Engines and pages that lie in the model folder go in too. `report` goes into the manifest, and its `runs` into the
    card; `facts` are the lines of the card that say what the model was trained on ("training queries": 1200); the rest
    as in `Manifest`. Raises `Refused` if the model folder lacks a file, or its contract is none of an encoder.
    """
    source, target = Path(model_folder), Path(folder)
    files = _present(source, engine)
    if target.exists() and any(target.iterdir()):
        raise Refused(f"{target} is not empty: a bundle needs a folder of its own")
    agreed = contract.Tokens.load(source).contract
    if agreed.form != "encoder":
        raise Refused(f"{source} cannot be released: its contract is of a {agreed.form}, a bundle holds an encoder")
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(source / file, target / file)
    _for_cross_encoder(target, agreed)
    about = card.text(name, agreed, report, facts or {}, engine, measured or {}, chain or {})
    (target / CARD).write_text(about, encoding="utf-8")
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        contract=agreed.digest,
        engine=engine,
        engines={of: dict(found) for of, found in (measured or {}).items()},
        gate=dict(gate or {}),
        lineage=chain or {},
        report=dict(report),
        files={file: _sha256(target / file) for file in (*files, CARD)},
    )
    manifest = manifest.model_copy(update={"digest": manifest.found_digest()})
    (target / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return verify(target)


def digest(folder: str | Path) -> str | None:
    """That of the manifest in a folder, unchecked; None where there is none."""
    try:
        return _manifest(Path(folder)).digest
    except Refused:
        return None


def verify(folder: str | Path) -> dict[str, Any]:
    """The manifest of a bundle in which every file is as it was written, and no other lies.

    Raises `Refused` naming the file and both digests, the one expected and the one found.
    """
    target = Path(folder)
    manifest = _manifest(target)
    found = {path.name: path for path in target.iterdir() if path.name != MANIFEST}
    needed = {*MODEL_FILES, *engines.FILES[manifest.engine]}
    for file in sorted({*needed, *manifest.files, *found}):
        if Path(file).suffix not in KINDS and file not in ENGINE_FILES:
            raise Refused(f"{target}: {file} may hold code; a bundle has only {', '.join(KINDS)} files")
        expected = manifest.files.get(file, "none")
        here = _sha256(found[file]) if file in found and found[file].is_file() else "none"
        if expected != here or here == "none":
            raise Refused(f"{target}: {file}: sha256 expected {expected}, found {here}")
    agreed = contract.Tokens.load(target).contract.digest
    if agreed != manifest.contract:
        raise Refused(f"{target}: {contract.FILE} has digest {agreed}, {MANIFEST} says {manifest.contract}")
    if manifest.digest != (here := manifest.found_digest()):
        raise Refused(f"{target}: {MANIFEST}: digest expected {manifest.digest or 'none'}, found {here}")
    return manifest.model_dump()


def _present(source: Path, engine: engines.Name) -> list[str]:
    """The files of a bundle that lie in a folder. Raises `Refused` where some that it needs do not."""
    halves = [files for files in engines.FILES.values() if any((source / file).is_file() for file in files)]
    needed = {*MODEL_FILES, *engines.FILES[engine], *(file for files in halves for file in files)}
    if missing := [file for file in (*MODEL_FILES, *ENGINE_FILES) if file in needed and not (source / file).is_file()]:
        raise Refused(f"{source} cannot be released: it has no {', '.join(missing)}")
    every = (*MODEL_FILES, *ENGINE_FILES, *REPORT_FILES, SELFTEST)
    return [file for file in every if (source / file).is_file()]


def _for_cross_encoder(target: Path, agreed: contract.Contract) -> None:
    """Makes sentence-transformers give the raw logit, where its default is a sigmoid, and cut where we do."""
    for file, key, value in (
        ("config.json", "sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity"}),
        ("tokenizer_config.json", "model_max_length", agreed.max_tokens),
    ):
        content = json.loads((target / file).read_bytes())
        (target / file).write_text(json.dumps(content | {key: value}, indent=2), encoding="utf-8")


def _manifest(target: Path) -> Manifest:
    try:
        content = (target / MANIFEST).read_bytes()
        _check_format(target, content)
        return Manifest.model_validate_json(content)
    except OSError as error:
        raise Refused(f"{target} is no bundle: {MANIFEST}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        raise Refused(f"{target / MANIFEST} is no manifest: {told(error)}") from error


def _check_format(target: Path, content: bytes) -> None:
    """Raises `Refused` for a bundle of another version, whatever else it holds."""
    try:
        found = json.loads(content)
    except ValueError:
        return  # the manifest is checked as a whole
    if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
        raise Refused(
            f"{target}: {MANIFEST} has format {found['format']}, this version reads {FORMAT}; publish it again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
