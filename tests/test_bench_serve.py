import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench import runs, serve
from bench.endpoints import environment
from disranker.contract import Tokens


def said(rate, p50, p99=50.0, **more):
    return {"docs_per_s": rate, "p50_ms": p50, "p99_ms": p99, "lost": 0, "faults": []} | more


def lines(found):
    return {line["claim"]: line for line in found}


def test_the_best_of_1_4_and_16_clients_is_held_against_the_engine_and_the_peers_best():
    turns = {("disranker", 1): [said(80, 12)], ("disranker", 4): [said(90, 50)], ("disranker", 16): [said(70, 200)]}
    turns |= {("vllm", 1): [said(60, 30)], ("vllm", 4): [said(40, 30)], ("vllm", 16): [said(30, 30)]}
    engines = [{"docs_per_s": 100.0, "p50_ms": 10.0}]
    found = lines(serve._compared(serve.Plan(Path()), turns, engines, {"disranker": 0.7, "vllm": 0.69}))
    assert found["serve: throughput of the bare engine's"]["ratio"] == 0.9
    assert found["serve: p50 of one client"]["ratio"] == pytest.approx(10 / 12, abs=1e-4)  # smaller is better
    against = found["serve: against vllm"]
    assert (against["ratio"], against["ndcg@10"], against["ndcg@10 of peer"]) == (1.5, 0.7, 0.69)
    assert found["serve: disranker, 16 clients"]["ours"] == 70
    assert found["serve: against infinity"]["refused"] and found["serve: against infinity"]["ours"] is None


def test_what_a_client_lost_counts_whatever_had_no_200_in_the_end():
    one = said(1, 1, statuses={"200": 10, "0": 1}, requests=11, retried=2, late=0, faults=["a"])
    other = said(1, 1, statuses={"200": 5, "429": 1}, requests=6, retried=1, late=1, faults=[])
    line = serve.lost("a test", one, other)
    assert line["ours"] == 2 and line["ratio"] < 1
    assert line["statuses"] == {"200": 15, "0": 1, "429": 1} and (line["requests"], line["retried"]) == (17, 3)
    kept = said(1, 1, statuses={"200": 3}, requests=3, retried=0, late=0, faults=[])
    assert serve.lost("a test", kept)["ratio"] == 1


def test_texts_are_cut_so_that_neither_we_nor_a_peer_has_to(released, tmp_path):
    limits = Tokens.load(released).contract
    row = {
        "query": "red shoe " * 50,
        "docs": [
            {"title": "warm rain jacket " * 30, "summary": "blue " * 200, "doc_id": "a", "grade": 1},
            {"title": "sale", "summary": "", "doc_id": "b", "grade": 0},
        ],
    }
    padding = shutil.copytree(released, tmp_path / "padding")  # as that of MiniLM does
    tokenizer = Tokenizer.from_file(str(padding / "tokenizer.json"))
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(padding / "tokenizer.json"))
    found = serve.cut(row, released)
    assert serve.cut(row, padding) == found and found["query"].startswith("red shoe red")
    assert found["ids"] == ["a", "b"] and found["grades"] == [1, 0] and found["texts"][1].strip() == "sale"
    tokens = Tokens.load(released)
    queries, titles, texts = [found["query"]] * 2, [""] * 2, found["texts"]
    fields = zip(*(tokens.ids(each) for each in (queries, titles, texts)), strict=True)
    assert not any(tokens.cuts(*each) for each in fields)
    assert max(len(ids) for ids in tokens.pairs(queries, titles, texts)) == limits.max_tokens - 1


@pytest.mark.slow
def test_an_endpoint_of_two_nodes_loses_no_request_while_parts_of_it_die_and_change():
    command = [sys.executable, "-m", "bench.serve", "--small", "--only", "faults"]
    done = subprocess.run(command, cwd=runs.ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = lines(map(json.loads, done.stdout.splitlines()))
    assert len(found) == 5 and all(line["requests"] > 20 for line in found.values())
    assert {name: line["ours"] for name, line in found.items()} == dict.fromkeys(found, 0)
