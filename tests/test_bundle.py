import hashlib
import json
import shutil

import pytest
from test_engine import save_student, some_pairs

from disranker import bundle
from disranker.contract import Contract
from disranker.engine import Engine
from disranker.recipe import Refused

INTERVAL = {"value": 0.81234, "low": 0.79, "high": 0.83}
REPORT = {"queries": 300, "runs": {"bm25": {"mrr@10": {"value": 0.5}}, "student": {"ndcg@10": INTERVAL}}, "pairs": []}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def released(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "bundle"
    bundle.write(folder, student, name="shoes", report=REPORT, facts={"training queries": 1200})
    return folder


@pytest.fixture
def copy(released, tmp_path):
    return shutil.copytree(released, tmp_path / "bundle")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(folder):
    with pytest.raises(Refused) as caught:
        bundle.verify(folder)
    return str(caught.value)


def test_a_bundle_scores_as_the_student_it_was_made_of(released, student):
    pairs = some_pairs(5)
    assert Engine.from_bundle(released).scores(*pairs) == Engine(student).scores(*pairs)


def test_the_manifest_has_the_sha256_of_6_files_the_contract_and_the_report(released, student):
    manifest = bundle.verify(released)
    assert manifest == json.loads((released / "bundle.json").read_text())
    assert manifest["files"] == {path.name: sha256(path) for path in released.iterdir() if path.name != "bundle.json"}
    assert len(manifest["files"]) == 6
    assert manifest["contract"] == Contract.model_validate_json((student / "contract.json").read_text()).digest
    assert (manifest["format"], manifest["name"], manifest["report"]) == (1, "shoes", REPORT)


def test_the_card_names_what_it_was_trained_on_and_every_metric(released):
    card = (released / "README.md").read_text()
    assert "# shoes" in card and "- training queries: 1200" in card and "On 300 queries." in card
    assert "| run | mrr@10 | ndcg@10 |" in card
    assert "| bm25 | 0.500 | not measured |" in card
    assert "| student | not measured | 0.812 (0.790 to 0.830) |" in card


def test_one_changed_byte_is_refused_with_both_digests(copy):
    weights = copy / "model.safetensors"
    before = sha256(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = refusal(copy)
    assert "model.safetensors" in message and f"expected {before}, found {sha256(weights)}" in message
    with pytest.raises(Refused, match=r"model\.safetensors"):
        Engine.from_bundle(copy)


def test_a_missing_file_is_refused_with_the_digest_it_had(copy):
    before = sha256(copy / "config.json")
    (copy / "config.json").unlink()
    assert f"config.json: sha256 expected {before}, found none" in refusal(copy)


def test_an_extra_file_is_refused_with_the_digest_it_has(copy):
    (copy / "notes.txt").write_text("hello")
    assert f"notes.txt: sha256 expected none, found {sha256(copy / 'notes.txt')}" in refusal(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pkl", "modeling.py", "folder"])
def test_a_file_that_may_hold_code_is_refused_even_if_the_manifest_lists_it(copy, name):
    (copy / name).write_text("x")
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"][name] = sha256(copy / name)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    assert f"{name} may hold code" in refusal(copy)


def test_a_manifest_that_leaves_out_the_weights_is_refused_without_them(copy):
    (copy / "model.safetensors").unlink()
    manifest = json.loads((copy / "bundle.json").read_text())
    del manifest["files"]["model.safetensors"]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    assert "model.safetensors: sha256 expected none, found none" in refusal(copy)


def test_a_manifest_with_another_contract_is_refused_with_both_digests(copy):
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | {"contract": "0123"}))
    assert f"contract.json has digest {manifest['contract']}, bundle.json says 0123" in refusal(copy)


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "Invalid JSON"), ('{"format": 2}', "format"), ('{"format": 1}', "files")]
)
def test_a_broken_manifest_is_refused(copy, content, reason):
    (copy / "bundle.json").write_text(content)
    assert reason in refusal(copy)


def test_a_model_folder_is_no_bundle(student):
    assert "no bundle" in refusal(student)


def test_a_second_bundle_needs_a_folder_of_its_own(released, student):
    with pytest.raises(Refused, match="not empty"):
        bundle.write(released, student, name="again", report={})


def test_a_model_without_contract_is_not_released_and_nothing_is_written(student, tmp_path):
    bare = shutil.copytree(student, tmp_path / "bare")
    (bare / "contract.json").unlink()
    with pytest.raises(Refused, match=r"no contract\.json"):
        bundle.write(tmp_path / "bundle", bare, name="x", report={})
    assert not (tmp_path / "bundle").exists()


def test_only_an_encoder_is_released(student, tmp_path):
    decoder = shutil.copytree(student, tmp_path / "decoder")
    agreed = Contract.model_validate_json((decoder / "contract.json").read_text())
    agreed.model_copy(update={"form": "decoder"}).save(decoder)
    with pytest.raises(Refused, match="of a decoder"):
        bundle.write(tmp_path / "bundle", decoder, name="x", report={})
