import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from pyarrow import fs
from torch.utils.tensorboard import SummaryWriter

from bench import (
    ablate_student,
    ablate_teacher,
    arms,
    claims,
    engine,
    esci_teacher,
    exactly_once,
    killed_training,
    logs,
    made_up,
    mfu,
    runs,
    score,
    train,
    trainers,
)
from disranker import clicks, metrics, speed, stages, student, tables, teacher, world
from disranker import recipe as recipes
from disranker.contract import Tokens
from disranker.inputs import World
from disranker.recipe import Finetune, Pretrain, Refused, Student, Teacher
from disranker.report import MINUS
from disranker.store import Store

ROOT = Path(__file__).parents[1]
PARTS = {
    "__init__",
    "arms",
    "claims",
    "endpoints",
    "hostile",
    "load",
    "machines",
    "mfu",
    "one_host",
    "runs",
    "scale",
    "trainers",
}  # what the programs share, and what measures nothing
PROGRAMS = sorted({path.stem for path in (ROOT / "bench").glob("*.py")} - PARTS)
SHAPE = made_up.Shape(documents=4, pair_tokens=48, query_tokens=5, instruction_tokens=16)


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory):
    """The recipe of a made-up store of 12 lists of 4 documents."""
    folder = tmp_path_factory.mktemp("bench")
    return recipes.load(made_up.make(folder, range(12), made_up.TINY, SHAPE, {"pairs_per_batch": 8}, parts=3))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_measurement_has_a_small_run(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.{name}").main(["--help"])
    assert ended.value.code == 0
    assert "--small" in capsys.readouterr().out


def test_importing_a_measurement_does_nothing(tmp_path):
    modules = [
        f"bench.{name}" for name in (*PROGRAMS, *PARTS - {"__init__", "one_host"})
    ]  # the last is Ray's to import
    program = (
        "import importlib, os, sys\n"
        "before = dict(os.environ)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "changed = {name for name in os.environ if os.environ[name] != before.get(name)}\n"
        "assert not {name for name in changed if not name.startswith('_RJEM')}, changed\n"  # Polars' allocator
        "print(sorted({'ray', 'torch', 'vllm', 'transformers'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"
    assert not list(tmp_path.iterdir())


def test_a_rate_of_3_against_2_has_ratio_1_5_and_so_have_2_seconds_against_3():
    faster = claims.against("a", [1, 3, 9], [2, 2, 2], "pairs/s", 1.5)
    assert faster == {"claim": "a", "ours": 3, "peer": 2, "ratio": 1.5, "unit": "pairs/s", "bar": 1.5, "runs": 3}
    shorter = claims.against("a", [2.0], [3.0], "s", 1.6, pairs=7)
    assert (shorter["ratio"], shorter["pairs"]) == (1.5, 7)
    assert faster["ratio"] >= faster["bar"]
    assert shorter["ratio"] < shorter["bar"]


def test_16_seconds_within_20_hold_and_1280_mib_within_1024_do_not():
    time, memory = claims.within("a", [16.0], 20, "s"), claims.within("a", [1280], 1024, "MiB")
    assert (time["ratio"], memory["ratio"]) == (1.25, 0.8)
    assert (time["peer"], time["limit"], time["bar"]) == (None, 20, 1.0)
    assert memory["ratio"] < memory["bar"] < time["ratio"]


def test_nothing_measured_is_still_a_number():
    line = claims.within("a", [0], 1024, "MiB")
    assert json.loads(json.dumps(line, allow_nan=False))["ratio"] == 1_024_000 and line["ours"] == 0


def test_what_is_held_to_a_limit_may_not_be_larger_whatever_its_unit():
    assert claims.within("a", [0.6], 0.5, "thousandths off")["ratio"] < 1 < claims.within("a", [0.4], 0.5, "x")["ratio"]


def test_a_line_is_printed_and_added_to_the_file(tmp_path, capsys):
    for number in (1, 2):
        claims.emit({"claim": number}, tmp_path / "lines")
    assert (tmp_path / "lines").read_text() == '{"claim": 1}\n{"claim": 2}\n' == capsys.readouterr().out


def test_words_are_distinct_and_fill_the_vocabulary():
    words = made_up.words(16_384)
    assert len(set(words)) == len(words) == 16_384 - len(made_up.SPECIALS)
    with pytest.raises(ValueError, match="between 6 and 1000000"):
        made_up.words(5)


def test_the_default_teacher_has_over_20_million_parameters_and_heads_that_vllm_takes():
    size = made_up.FULL
    layer = 4 * size.width**2 + 3 * size.width * (size.width * 3)
    assert size.vocabulary * size.width + size.layers * layer > 20e6
    assert size.width // size.heads % 32 == 0


def test_the_stage_score_finds_all_it_reads(tiny_store):
    step = stages.step(tiny_store, "score")
    store = Store(tiny_store.root)
    stages.check_reads(step, store)
    assert stages.why(step, store) == "not done yet"
    assert store.manifest("groups")["rows"] == 12


def test_lists_lie_in_the_part_of_their_query_and_start_with_the_instruction(tiny_store):
    store = Store(tiny_store.root)
    queries = []
    for part in range(3):
        found = store.read("groups", part=part)["query"].to_pylist()
        assert set(tables.part_of(found, 3)) <= {part}
        queries += found
    assert len(set(queries)) == 12
    assert len({tuple(query.split(" ")[:16]) for query in queries}) == 1


def test_a_pair_has_as_many_tokens_as_asked_for_and_none_is_unknown(tiny_store):
    store = Store(tiny_store.root)
    tokens = Tokens.load(store.folder("teacher"))
    groups = store.read("groups").to_pylist()
    ids = [ids for group in groups for ids, _ in tokens.listed(group["query"], group["docs"])]
    assert np.mean([len(pair) for pair in ids]) == pytest.approx(48 + 16, rel=0.1)
    assert max(map(len, ids)) <= tokens.contract.max_tokens == 16 + 60
    unknown = made_up.SPECIALS.index("<unk>")
    assert not any(unknown in pair for pair in ids)
    assert len({tuple(pair) for pair in ids}) == 48


def test_a_query_has_the_same_list_in_every_store():
    words = made_up.words(600)
    once, again = (made_up.group(5, "a query", SHAPE, words, 1) for _ in range(2))
    assert once == again
    assert once != made_up.group(6, "a query", SHAPE, words, 1) != made_up.group(6, "a query", SHAPE, words, 2)


def test_the_scores_of_the_random_teacher_differ(tiny_store):
    from bench import peers

    said = peers.transformers(tiny_store, peers.pairs(tiny_store, 20), threads=1)
    assert said["pairs"] == 20
    assert said["highest"] - said["lowest"] > 0.2


def test_labels_of_a_store_are_those_of_its_pairs_and_as_many_others(tiny_store):
    made_up.label(tiny_store, 100)
    rows = runs.rows(Path(tiny_store.root) / "labels")
    assert len(dict(rows)) == len(rows) == 100


def test_a_store_made_again_with_more_queries_keeps_its_labels_and_its_teacher(tmp_path):
    def store(queries):
        return recipes.load(made_up.make(tmp_path, range(queries), made_up.TINY, SHAPE, parts=2))

    few = store(3)
    made_up.label(few, 12)
    before = sorted(runs.rows(tmp_path / "run" / "labels"))
    many = store(4)
    made_up.label(many, 12)
    after = sorted(runs.rows(tmp_path / "run" / "labels"))
    assert len(before) == 12
    assert len(after) == 16
    assert {key for key, _ in before} < {key for key, _ in after}


def test_labels_are_compared_with_those_of_an_undisturbed_run():
    wanted = [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    assert runs.compare(wanted, wanted) == runs.Difference(0, 0, 0, 0.0)
    mine = [("a", 1.0), ("a", 1.25), ("b", 1.5), ("x", 9.0)]
    assert runs.compare(mine, wanted) == runs.Difference(keys_wrong=1, doubled=1, missing=1, most_difference=0.5)
    assert runs.worst([runs.Difference(0, 1, 0, 0.5), runs.Difference(2, 0, 0, 0.25)]) == {
        "keys_wrong": 2,
        "doubled": 1,
        "missing": 0,
        "most_difference": 0.5,
    }


def batch(folder: Path, name: str, pairs: int) -> None:
    """As the label store writes one: whole, under its final name."""
    folder.mkdir(exist_ok=True)
    rows = pa.table({"key": [f"{name}{n}" for n in range(pairs)], "score": [0.0] * pairs})
    pq.write_table(rows, folder / "unfinished")
    (folder / "unfinished").rename(folder / f"new-{name}.parquet")


def test_a_batch_that_is_scored_again_counts_twice_and_one_that_stays_counts_once(tmp_path):
    with runs.Written(tmp_path) as written:
        batch(tmp_path / "teacher", "a", 8)
        runs_until(lambda: written.pairs == 8)
        batch(tmp_path / "teacher", "b", 4)
        runs_until(lambda: written.pairs == 12)
        batch(tmp_path / "teacher", "a", 8)
        runs_until(lambda: written.pairs == 20)
        (tmp_path / "teacher" / "new-a.parquet").unlink()
    assert written.pairs == 20


def runs_until(what) -> None:
    """Waits two seconds at most."""
    over = threading.Event()
    for _ in range(200):
        if what() or over.wait(0.01):
            return
    raise AssertionError("it did not come")


def sleeper(title: str = "") -> subprocess.Popen:
    """A shell with a child that sleeps under a title."""
    program = f"{sys.executable} -c 'import time; time.sleep(60)' & wait"
    named = f"exec -a '{title}' {program}" if title else program
    return subprocess.Popen(["bash", "-c", f"({named}) & wait"])


def test_a_worker_is_found_by_its_title_below_the_given_processes_alone():
    process = sleeper("ray::MapWorker(MapBatches(Scorer)).submit")
    try:
        found = runs.until(lambda: runs.workers([process.pid], "Scorer"), process, 10)
        assert len(found) == 1
        assert found[0].pid != process.pid
        assert not runs.workers([process.pid], "Trainer")
        assert not runs.workers([2**22 + 1], "Scorer")
    finally:
        runs.end(process)
    runs_until(lambda: not found[0].is_running() or found[0].status() == psutil.STATUS_ZOMBIE)


def test_waiting_for_a_job_that_ended_or_never_comes_is_an_error():
    process = sleeper()
    with pytest.raises(runs.Broken, match=r"not there in 0 s"):
        runs.until(lambda: None, process, 0.0)
    runs.end(process)
    with pytest.raises(runs.Broken, match="the job ended with -9"):
        runs.until(lambda: None, process)


def test_a_measurement_that_is_told_to_stop_ends_its_job_too():
    program = (
        "import subprocess, sys; from bench import runs; runs.end_on_sigterm()\n"
        "job = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "try: print(job.pid, flush=True); job.wait()\n"
        "finally: runs.end(job)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    job = psutil.Process(int(process.stdout.readline()))
    process.terminate()
    assert process.wait(timeout=10) == 143
    assert not job.is_running()


def test_the_worst_kill_decides_over_all_of_a_kind():
    fine, twice = (
        exactly_once.Kill(0.5, runs.Difference(0, 0, 0, 1e-7), 0.0, share, survived)
        for share, survived in ((0.03, True), (0.06, False))
    )
    scoring = exactly_once.Scoring(Path(), Path(), [("a", 1.0)] * 100, batch=3, engines=1, batch_s=1.0)
    good = exactly_once.line("actor", [fine, fine], scoring)
    assert good["claim"] == "exactly once: actor killed"
    assert (good["times"], good["survived"], good["most_paid_twice_share"], good["bar"]) == (2, 2, 0.03, 0.05)
    assert exactly_once.holds(good)
    assert not exactly_once.holds(exactly_once.line("actor", [fine, twice], scoring))
    for name in ("keys_wrong", "doubled", "missing"):
        assert not exactly_once.holds(good | {name: 1})
    assert not exactly_once.holds(good | {"most_difference": 2e-5})


def test_two_jobs_may_both_pay_but_not_differ():
    two = {"most_paid_twice_share": 1.0, "bar": None} | runs.worst([runs.Difference(0, 0, 0, 1e-7)])
    assert exactly_once.holds(two)
    assert not exactly_once.holds(two | {"doubled": 1})


def test_bare_vllm_has_all_cores_whatever_the_pool_of_the_stage(monkeypatch, tiny_store):
    from bench import peers
    from jobs import scorer

    pool = tiny_store.score.model_copy(update=score.POOLS["an engine on each core"] | {"max_actors": 3})
    monkeypatch.setattr(scorer, "engine", lambda folder, most, cfg: cfg)
    cfg = peers._engine(tiny_store.model_copy(update={"score": pool}))
    assert (cfg.actors, cfg.max_actors, cfg.pairs_per_batch) == (1, 0, 64)


@pytest.mark.parametrize("faster", score.POOLS)
def test_the_faster_pool_scores_all_pairs(monkeypatch, tmp_path, faster):
    plan = score.Plan(tmp_path, pairs=400, sample_pairs=40, bf16_pairs=20)
    made = []

    def make(folder, queries, size, shape, score, seed):
        made.append((len(queries) * shape.documents, score))
        return folder

    def run(plan, recipe, labels=None):
        return {"counts": {"scored": 10, "scoring_s": 1.0 if recipe.name.startswith(faster) else 2.0}}

    monkeypatch.setattr(made_up, "make", make)
    monkeypatch.setattr(score.Plan, "run", run)
    score.whole(plan)
    assert made[-1] == (400, score.POOLS[faster])
    assert [pairs for pairs, _ in made[:-1]] == [40] * len(score.POOLS)
    assert score.pool(plan, "bfloat16") == faster
    assert made[-1] == (20, {"dtype": "bfloat16"} | list(score.POOLS.values())[-1])


def test_an_unknown_claim_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit):
        score.main(["--small", "--only", "bare-vllm,sparkle"])
    assert "no claim sparkle; there are bare-vllm" in capsys.readouterr().err


# Logs


def test_the_query_of_the_peer_counts_what_aggregate_counts(tiny, tiny_run, tmp_path):
    log = logs.Log(tmp_path, logs.Plan(tmp_path), 2000)
    (tmp_path / "run").symlink_to(tiny_run.path)
    with duckdb.connect() as base:
        base.execute(logs.COUNTS.format(files=f"{tmp_path}/run/searches/*.parquet"))
        theirs = base.sql("select query, doc_id, impressions, clicks from counts order by all").fetchall()
    searches = [pq.read_table(path) for path in tiny_run.parts("searches")]
    counted = pl.concat([clicks.frame(clicks.counts(table, 30)) for table in searches])
    sums = counted.group_by("query", "doc_id").agg(pl.col("impressions", "clicks").sum()).sort("query", "doc_id")
    assert theirs == sums.rows() and log.searches == 2000


def test_the_largest_process_is_seen_with_memory_of_its_own():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "import time; kept = b'x' * (300 << 20); time.sleep(1.5)"
    process = subprocess.Popen([sys.executable, "-c", program, child])
    with logs.Largest(process.pid) as largest:
        process.wait()
    assert 300 <= largest.mib < 400


def test_an_unknown_claim_about_logs_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        logs.main(["--only", "speed"])
    assert "no claim speed; there are ingest, aggregate, growth" in capsys.readouterr().err


# Arms


def tallies(*seeds):
    """[seeds, queries, metrics, 2] of NDCG@10 alone, by seed and query."""
    values = np.array(seeds, float)
    found = np.ones((*values.shape, len(metrics.METRICS), 2))
    found[..., metrics.METRICS.index("ndcg@10"), 0] = values
    return found


def test_an_interval_over_seeds_and_queries_is_as_wide_as_the_seeds_differ():
    a, b = tallies([0.5, 0.7], [0.9, 1.0]), tallies([0.4, 0.6], [0.6, 0.7])
    low, high = arms.two_level(a, b, 2000, 0.95, seed=1)[:, metrics.METRICS.index("ndcg@10")]
    assert (low, high) == pytest.approx((0.1, 0.3))
    low, high = arms.two_level(a[:1], b[:1], 2000, 0.95, seed=1)[:, metrics.METRICS.index("ndcg@10")]
    assert (low, high) == pytest.approx((0.1, 0.1))


def test_a_comparison_says_both_intervals_and_in_how_many_seeds_the_first_is_above():
    rng = np.random.default_rng(0)
    b = rng.uniform(0.2, 0.6, (3, 40))
    given = [arms.Comparison("a", tallies(*(b + np.array([[0.2], [0.1], [-0.03]]))), tallies(*b))]
    given += [arms.Comparison("same", tallies(*b), tallies(*b))]
    rows = arms.compared(given, recipes.parse({"root": "x"}))
    assert rows[0]["value"] == pytest.approx(0.09) == rows[0]["a"] - rows[0]["b"]
    assert (rows[0]["seeds_above"], rows[0]["seeds"], rows[0]["queries"]) == (2, 3, 40)
    assert (rows[0]["queries_low"], rows[0]["queries_high"]) == pytest.approx((0.09, 0.09))
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((-0.03, 0.2))  # one seed three times is of 27 one
    assert (rows[0]["p"], rows[0]["holm"], rows[1]["p"]) == pytest.approx((1 / 2001, 2 / 2001, 1.0))


def test_an_arm_has_the_mean_and_the_deviation_of_its_seeds():
    row = arms.summary("an arm", tallies([0.2, 0.4], [0.4, 0.6]))
    assert row["ndcg@10"]["mean"] == pytest.approx(0.4)
    assert row["ndcg@10"]["sd"] == pytest.approx(0.02**0.5)
    assert arms.summary("one seed", tallies([0.2, 0.4]))["ndcg@10"]["sd"] is None


def test_a_table_has_both_intervals_of_a_difference_and_that_of_pnr_with_signs():
    pnr = {"value": 0.5, "low": -0.25, "high": 1.0}
    row = {"name": "a - b", "value": -0.01, "low": -0.02, "high": 0.0, "queries_low": 0.1, "queries_high": 0.2}
    row |= {"seeds_above": 2, "seeds": 3, "p": 0.04, "holm": 0.08, "pnr": pnr}
    *_, line = arms.tables([], [row]).splitlines()
    assert line == (
        f"| a - b | {MINUS}0.0100 | [{MINUS}0.0200, +0.0000] | [+0.1000, +0.2000] "
        f"| 2 of 3 | 0.0400 | 0.0800 | +0.50 [{MINUS}0.25, +1.00] |"
    )


def test_all_comparisons_of_the_ablation_are_of_its_arms():
    plan = ablate_teacher.Plan(Path())
    assert len(plan.arms()) == len(set(plan.arms())) == 14
    assert {arm for _, *pair in plan.pairs() for arm in pair} == set(plan.arms())
    assert len(plan.pairs()) == len({name for name, *_ in plan.pairs()}) == 7 + 1 + 6 + 2


def test_a_share_of_the_training_queries_is_held_out_and_no_test_query_moves(tmp_path):
    rows = [{"query": f"q{n}", "doc_id": "d", "grade": 1, "split": "train" if n % 4 else "test"} for n in range(400)]
    pl.DataFrame(rows).write_parquet(tmp_path / "judgments.parquet")
    moved = pl.read_parquet(esci_teacher.held(tmp_path / "judgments.parquet", tmp_path))
    assert moved.filter(pl.col("split") == "test")["query"].to_list() == [f"q{n}" for n in range(0, 400, 4)]
    assert moved.filter(pl.col("split") == "validation").height == pytest.approx(0.3 * 300, abs=20)


def shop(folder: Path, seed: int = 3) -> Path:
    """Documents, judgments with a split and a log, as `bench.esci_teacher` reads them."""
    cfg = World(**TINY["world"])
    graded = pl.DataFrame(pl.from_arrow(world.judgments(cfg, seed)))
    test = pl.Series(graded["query"].unique().sort()[:20])
    split = pl.when(pl.col("query").is_in(test.implode())).then(pl.lit("test")).otherwise(pl.lit("train"))
    graded.with_columns(split=split).write_parquet(folder / "judgments.parquet")
    pq.write_table(world.documents(cfg, seed), folder / "documents.parquet")
    for index in range(cfg.shards):
        world.write_shard(cfg, seed, index, fs.LocalFileSystem(), str(folder))
    return folder


@pytest.mark.slow
def test_the_gain_of_a_log_is_measured_on_the_queries_that_the_judgments_hold_out(tmp_path, capsys):
    data, model, folder = (tmp_path / name for name in ("data", "model", "out"))
    data.mkdir()
    settings = Student(**TINY["student"])
    student.scratch(model, [" ".join(made_up.words(300))], settings, seed=1)
    options = ["--data", shop(data), "--model", model, "--folder", folder, "--small", "--seeds", 1]
    assert esci_teacher.main([*map(str, options)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["claim"].partition(": ")[2] for line in said] == [
        "grades \N{MINUS SIGN} BM25",
        "grades and log \N{MINUS SIGN} BM25",
        "grades and log \N{MINUS SIGN} grades",
    ]
    assert {line["queries"] for line in said} == {20}
    assert (folder / "differences.svg").read_text().count("grades and log") >= 1


LOSSES = {"losses": ablate_teacher.SMALL["losses"]}


@pytest.mark.slow
def test_an_ablation_trains_each_arm_once_under_each_seed(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arms, "lists", lambda folder, content: recipes.parse(content | {"root": str(tiny_run.path)}))
    assert ablate_teacher.main(["--small", "--folder", str(tmp_path)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 5 + 1 + 2 + 2
    assert {line["runs"] for line in said} == {2}
    shown = json.loads((tmp_path / "results.json").read_text())
    assert [row["arm"] for row in shown["arms"]] == [arm.name for arm in ablate_teacher.Plan(tmp_path, **LOSSES).arms()]
    trained = sorted((tmp_path / "trained").glob("*.json"))
    assert len(trained) == 2 * 10
    before = [path.stat().st_mtime_ns for path in trained]
    assert ablate_teacher.main(["--small", "--folder", str(tmp_path)]) == 0
    assert [path.stat().st_mtime_ns for path in trained] == before
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == said


@pytest.mark.slow
def test_students_are_compared_with_each_other_their_teacher_and_bm25(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arms, "lists", lambda *given, **_: recipes.parse(given[1] | {"root": str(tiny_run.path)}))
    monkeypatch.setattr(ablate_student, "PAIRS", {"hybrid, gaps": {"pairs": "gaps"}})
    monkeypatch.setattr(ablate_student, "LAYERS", {"hybrid, 1 layer": {"layers": 1}})
    assert ablate_student.main(["--small", "--seeds", "1", "--folder", str(tmp_path)]) == 0
    said = {json.loads(line)["claim"] for line in capsys.readouterr().out.splitlines()}
    compared = {"hybrid - kl", "hybrid - hard labels", "hybrid, gaps - hybrid", "hybrid, 1 layer - hybrid"}
    compared |= {"hybrid, graded alone - hybrid", "hybrid, without random - hybrid"}
    compared |= {"hybrid - teacher", "hybrid - BM25"}
    assert said == {f"student: {name.replace(' - ', f' {MINUS} ')}" for name in compared}
    shown = json.loads((tmp_path / "results.json").read_text())
    report = json.loads(Path(tiny_run.at("report", "report.json")).read_text())["runs"]
    for arm, run in (("teacher", "teacher"), ("BM25", "bm25")):
        (found,) = [row["ndcg@10"]["mean"] for row in shown["arms"] if row["arm"] == arm]
        assert found == pytest.approx(report[run]["ndcg@10"]["value"], abs=1e-6)


def test_on_products_students_take_2_layers_of_the_model_whose_teacher_learned_from_grades_and_log():
    shop = ablate_student.esci(Path("data"), Path("model"))
    plan = ablate_student.Plan(Path(), **shop)
    recipe = recipes.parse(plan.recipe | {"root": "x"})
    assert (recipe.student.layers, recipe.student.take) == (2, "every_second")
    assert recipe.student.base == recipe.teacher.base == str(Path("model").absolute())
    assert recipe.finetune.labels == "grades_then_evidence" and recipe.sample.ungraded.head > 0
    layers = [dict(arm.student)["layers"] for arm in plan.arms() if arm.student]
    assert layers == [3, 6] and plan.settings == {"grades alone": {"epochs": 2}}
    assert len(plan.arms()) == 13 and {"hybrid, gaps", "hybrid, graded alone"} < {arm.name for arm in plan.arms()}


def test_data_without_a_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        ablate_student.main(["--data", "x"])
    assert "--data and --model go together" in capsys.readouterr().err


# Training


@pytest.fixture(scope="module")
def tiny_lists(tmp_path_factory):
    """The recipe of a store of 6 lists of 4 documents and a made-up BERT to fine-tune."""
    plan = train.Plan(tmp_path_factory.mktemp("train"), **train.SMALL)
    return recipes.load(plan.recipe(None, 6))


def test_lists_to_train_on_go_from_lowest_to_highest_grade_and_vary_in_length_as_products_do():
    rows = train.groups(train.Plan(Path()), 40)
    grades = [[doc["grade"] for doc in row["docs"]] for row in rows]
    assert len(rows) == 40 == len({row["query"] for row in rows})
    assert all(len(each) == 8 and each == sorted(each) and each[0] < each[-1] for each in grades)
    words = np.array([len(f"{doc['title']} {doc['summary']}".split()) for row in rows for doc in row["docs"]])
    assert 0.25 < words.std() / words.mean() < 0.45


def test_both_trainers_see_the_same_tokens_and_start_from_the_same_loss(tiny_lists):
    mine = trainers.finetuned(tiny_lists)
    theirs = trainers.ranknet(tiny_lists, lists_per_step=3, pairs_at_once=4)
    assert mine["pairs"] == theirs["pairs"] == 24
    assert mine["tokens"] == theirs["tokens"] > 24 * 10
    assert theirs["steps"] == 2
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=0.01) == pytest.approx(np.log(2), abs=0.01)


def test_both_distil_the_same_tokens_into_students_that_begin_without_any_margin(tiny_lists):
    mine, theirs = trainers.distilled(tiny_lists), trainers.margin_mse(tiny_lists, lists_per_step=6, lists_at_once=3)
    assert mine["pairs"] == theirs["pairs"] == 24
    assert mine["tokens"] == theirs["tokens"] > 24 * 10
    assert theirs["steps"] == 1
    given = np.array(trainers.grades(trainers.lists(tiny_lists)))
    margins = given[:, :, None] - given[:, None, :]
    every = (margins**2).sum((1, 2)) / (4 * 3)
    assert mine["loss"] == pytest.approx(every.mean(), rel=0.05)
    assert theirs["loss"] == pytest.approx((margins[:, 0, 1:] ** 2).mean(), rel=0.05)


@pytest.mark.slow
def test_each_form_of_a_student_is_measured_against_torch_or_refused_with_a_reason(capsys):
    assert engine.main(["--small"]) == 0
    said = {line["claim"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert said.keys() == {f"engine: {form}" for form in (*engine.FORMS, "chosen")}
    measured = {form: line for form, line in said.items() if "refused" not in line}
    assert said.keys() - measured.keys() <= {"engine: openvino-bf16"}
    assert all(line["ours"] > 0 and line["pairs"] == 12 for line in measured.values())
    exact = [said[f"engine: {form}"]["max_difference"] for form in ("onnx", "openvino")]
    rounded = [line["max_difference"] for form, line in measured.items() if "int8" in form or "bf16" in form]
    assert max(exact) < 1e-5 < min(rounded)
    chosen = said["engine: chosen"]
    assert chosen["ours"] == max(said[f"engine: {form}"]["ours"] for form in chosen["passing"]) and chosen["bar"] == 4
    assert {"torch", "openvino"} <= set(chosen["passing"]) <= set(speed.CHOICE)
    assert all(measured[f"engine: {form}"].get("kendall_tau", 1) >= 0.98 for form in chosen["passing"])


def test_flops_of_a_pair_are_those_that_torch_counts(tiny_lists):
    from torch.utils.flop_counter import FlopCounterMode

    tokens, model = trainers.start(tiny_lists)
    model.set_attn_implementation("eager")  # the fused one on a CPU is not counted
    ids = torch.full((2, 12), tokens.contract.pad)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    pooler = mfu.weights(model) - mfu.weights(model.bert.encoder)  # of one token, where we count all
    assert 2 * engine.flops(model, [12, 12]) - counted.get_total_flops() == pytest.approx(2 * 2 * 11 * pooler, rel=0.01)


def test_what_is_turned_off_changes_the_batches_and_not_what_is_learned(tiny_lists):
    whole, off = trainers.finetuned(tiny_lists), trainers.finetuned(tiny_lists, trainers.TURNED_OFF)
    assert (whole["tokens"], whole["steps"]) == (off["tokens"], off["steps"])
    assert whole["loss"] == pytest.approx(off["loss"], abs=0.01)
    assert whole["padding"] < off["padding"]


def test_a_plan_without_sorting_has_each_list_once():
    planned = trainers.unsorted(10, steps=4, seed=1)
    assert len(planned) == 4
    assert sorted(place for ((*places,),) in planned for place in places) == list(range(10))


def test_groups_a_second_run_from_the_end_of_the_first_step(tmp_path):
    with SummaryWriter(str(tmp_path)) as events:
        for step, seconds in enumerate((100.0, 102.0, 103.0, 104.0, 108.0)):
            events.add_scalar("loss", 0.5, step, walltime=seconds)
    assert train.groups_per_second(tmp_path, lists=[12] * 5) == pytest.approx(60 * 4 / 5 / 8)
    assert train.groups_per_second(tmp_path, lists=[5, 3, 4, 5, 6]) == pytest.approx(18 / 8)


@pytest.mark.parametrize(("workers", "lists"), [(1, [1] * 6), (2, [2, 2, 2]), (4, [4]), (5, [5])])
def test_of_6_batches_of_a_list_workers_are_credited_only_with_those_of_their_plans(tiny_lists, workers, lists):
    given = arms.seeded(tiny_lists, 1, tokens_per_batch=768)
    assert train.lists_per_step(given, workers) == lists


def test_a_training_that_did_not_go_on_as_often_as_it_was_killed_is_no_measurement():
    log = "finetune: rank 0 goes on after step 25\nfinetune: rank 0 goes on after step 100\n"
    assert killed_training.resumed(log, kills=2) == [25, 100]
    for kills in (1, 3):
        with pytest.raises(
            runs.Broken, match=rf"{kills} kills, but the training went on 2 times, after steps \[25, 100"
        ):
            killed_training.resumed(log, kills)


def test_10_weights_2_layers_3_wide_cost_1080_flops_for_rows_of_2_and_4_tokens():
    tokens, squares = 2 + 4, 4 + 16
    assert mfu.flops(10, layers=2, width=3, tokens=tokens, squares=squares) == 6 * 10 * 6 + 6 * 2 * 3 * 20 == 1080
    assert mfu.flops(10, layers=2, width=3, tokens=tokens, squares=squares, causal=False) == 360 + 2 * 720


@pytest.mark.parametrize("head", ["tied", "score"])
def test_flops_are_those_that_torch_counts_in_a_step_of_a_llama(head):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    tied = head == "tied"
    config = teacher.llama(Teacher(width=64, layers=2, heads=2), 50, tie_word_embeddings=tied, num_labels=1)
    model = (LlamaForCausalLM if tied else LlamaForSequenceClassification)(config)
    model.set_attn_implementation("eager")  # the fused one on a CPU is not counted
    layer = 4 * 64 * 64 + 3 * 64 * 192
    assert mfu.weights(model) == 2 * layer + (50 * 64 if tied else 64)
    seen = trainers.Seen().watch(model)
    with FlopCounterMode(display=False) as counted:
        ids = torch.randint(3, 50, (3, 16))
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert (seen.tokens, seen.squares, seen.padding()) == (48, 3 * 256, 0)
    wanted = mfu.flops(mfu.weights(model), 2, 64, int(seen.tokens), int(seen.squares), causal=False)
    assert counted.get_total_flops() == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA H200", 989), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("GeForce 1", 0)]
)
def test_the_peak_of_a_gpu_is_that_of_the_longest_name_that_fits(name, tflops):
    assert mfu.peak(name) == tflops


def test_utilisation_is_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(["--only", "mfu"]) == 2
    assert capsys.readouterr().err.startswith("refused: mfu: there is no GPU here")


def test_utilisation_of_a_gpu_that_nobody_knows_wants_its_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce 1")
    assert mfu.gpu(40) == ("GeForce 1", 40)
    with pytest.raises(Refused, match="peak of GeForce 1 is not known here; give it in bfloat16 as --peak-tflops"):
        mfu.gpu()


def test_the_time_of_operations_is_shared_out_by_kind():
    times = {"aten::addmm": 5.0, "aten::_flash_attention_backward": 2.0, "aten::_fused_adamw_": 1.0, "aten::copy_": 1.0}
    found = mfu.shares(times | {"aten::gelu": 1.0})
    assert found == {"attention": 0.2, "optimiser": 0.1, "matrix products": 0.5, "copies and casts": 0.1, "other": 0.1}
    assert sum(mfu.shares({}).values()) == 0


def test_the_time_of_a_kernel_counts_once_on_a_gpu_and_that_of_an_operation_on_a_cpu():
    from torch.autograd import DeviceType

    def event(key, on, seconds, named=False):
        times = {"self_device_time_total": seconds * 1e6, "self_cpu_time_total": 1e6}
        return SimpleNamespace(key=key, device_type=on, is_user_annotation=named, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 3.0),
        event("cudaLaunchKernel", DeviceType.CPU, 0.0),
        event("sm90_gemm", DeviceType.CUDA, 3.0),
        event("Optimizer.step", DeviceType.CPU, 2.0, named=True),
        event("Optimizer.step", DeviceType.CUDA, 2.0, named=True),
        event("fused_adam_kernel", DeviceType.CUDA, 2.0),
    ]
    assert mfu.device_times(events, on_gpu=True) == {"sm90_gemm": 3.0, "fused_adam_kernel": 2.0}
    assert mfu.device_times(events[:2], on_gpu=False) == {"aten::mm": 1.0, "cudaLaunchKernel": 1.0}
    assert mfu.shares({"nvjet_tst_128x256": 3.0, "fmha_cutlassF": 1.0})["matrix products"] == 0.75


def test_a_utilisation_says_flops_padding_and_what_the_device_was_busy_with():
    rows = train.groups(train.Plan(Path()), 24)
    size = Teacher(vocabulary=400, width=32, layers=1, heads=1, max_tokens=192, **train.LIMITS)
    cfg = {"epochs": 1, "tokens_per_batch": 3072, "validations": 1}
    said = mfu.pretraining(rows, size, Pretrain(**cfg), "cpu", seed=1)
    assert said["tflops"] * 1e12 / said["tokens_per_s"] > 6 * said["weights"]
    assert 0 < said["padding"] < 0.5
    assert sum(said["of_busy"].values()) == pytest.approx(1, abs=0.01)
    with pytest.raises(Refused, match="mfu: 1 steps are too few"):
        mfu.finetuning(rows[:1], size, Finetune(documents_per_list=8, **cfg), "cpu", seed=1)
