"""A replica without Ray: what it serves, what it tries beside it, and what it writes down."""

import asyncio
import json
import random
import shutil

import pytest
from test_engine import some_pairs

from disranker.engine import Engine
from disranker.recipe import Refused
from serve.dialects import Asked, Rerank
from serve.faults import Fault
from serve.replica import Reranker
from serve.settings import Settings

TRIAL = {"name": "e1", "kind": "canary", "share": 1.0, "watched": 1.0, "min_requests": 5}


@pytest.fixture
def broken(released, tmp_path):
    folder = shutil.copytree(released, tmp_path / "broken")
    (folder / "config.json").write_text("{}")
    return str(folder)


def asked(number=0, client=None, documents=12, timeout_s=30.0):
    _, titles, summaries = some_pairs(documents, seed=number)
    rows = [{"title": t, "summary": s, "id": f"d{n}"} for n, (t, s) in enumerate(zip(titles, summaries, strict=True))]
    return Asked(Rerank(query="red shoe", documents=rows).pairs(), timeout_s, f"r{number}", client)


def scores(folder, request):
    return pytest.approx(
        Engine(folder).scores(request.pairs.queries, request.pairs.titles, request.pairs.summaries), abs=1e-4
    )


def run(work, **settings):
    """What an async function of a new replica gives."""

    async def whole():
        replica = Reranker(Settings(**settings))
        try:
            return await work(replica)
        finally:
            await asyncio.gather(*replica._background)
            replica.close()

    return asyncio.run(whole())


# What serves


def test_a_change_of_bundle_loses_no_request_that_runs_and_a_return_loads_nothing(released, other, monkeypatch):
    async def work(replica):
        await replica.reconfigure({"bundle": str(released)})
        first, answers, changed = replica._live(), [], asyncio.Event()

        async def client(number):
            while not changed.is_set():
                answers.append(await replica.rerank(asked(number)))

        clients = [asyncio.create_task(client(number)) for number in range(3)]
        await replica.reconfigure({"bundle": other})
        changed.set()
        await asyncio.gather(*clients)
        assert len(answers) >= 3
        assert (await replica.rerank(asked())).logits == scores(other, asked())
        monkeypatch.setattr("serve.replica.Loaded.of", lambda *_: pytest.fail("loaded again"))
        await replica.reconfigure({"bundle": str(released)})
        assert replica._live() is first
        assert (await replica.rerank(asked())).logits == scores(released, asked())

    run(work)


def test_a_bundle_that_was_written_anew_in_its_folder_is_loaded_anew(released, other, tmp_path):
    folder = shutil.copytree(released, tmp_path / "bundle")

    async def work(replica):
        await replica.reconfigure({"bundle": str(folder)})
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        await replica.reconfigure({"bundle": str(folder)})
        return (await replica.rerank(asked())).logits

    assert run(work) == scores(other, asked())


def test_a_broken_bundle_leaves_the_old_one_serving_and_ready_says_why(released, broken):
    async def work(replica):
        await replica.reconfigure({"bundle": str(released)})
        await replica.reconfigure({"bundle": broken})
        assert "config.json: sha256 expected" in (await replica.ready())["refused"]
        assert (await replica.rerank(asked())).logits == scores(released, asked())
        await replica.reconfigure({"bundle": str(released)})
        assert "refused" not in await replica.ready()

    run(work)


@pytest.mark.parametrize("config", [{"bundel": "b"}, {"bundle": 5}, {"bundle": "b", "experiment": {"name": "a b"}}])
def test_a_wrong_change_leaves_the_old_bundle_serving(released, config):
    async def work(replica):
        await replica.reconfigure({"bundle": str(released)})
        await replica.reconfigure(config)
        assert "there are bundle, experiment" in (await replica.ready())["refused"]
        assert (await replica.rerank(asked())).logits == scores(released, asked())

    run(work)


def test_an_engine_that_does_not_run_here_is_refused_in_one_line(released, monkeypatch):
    def engine(*_):
        raise RuntimeError("Check 'false' failed\nunsupported opset\n")

    monkeypatch.setattr("serve.loaded.Engine", engine)
    with pytest.raises(Refused, match=r"the engine torch does not run here: Check 'false' failed$"):
        run(lambda replica: replica.reconfigure({"bundle": str(released)}))


def test_a_replica_with_nothing_but_a_broken_bundle_refuses_in_one_line(broken):
    with pytest.raises(Refused, match=r"^[^\n]*config\.json: sha256 expected[^\n]*$"):
        run(lambda replica: replica.reconfigure({"bundle": broken}))


def test_a_new_replica_serves_what_served_last_where_the_present_bundle_is_broken(released, broken, tmp_path):
    async def first(replica):
        await replica.reconfigure({"bundle": str(released)})

    async def second(replica):
        await replica.reconfigure({"bundle": broken})
        assert "sha256 expected" in (await replica.ready())["refused"]
        return (await replica.rerank(asked())).logits

    run(first, state=str(tmp_path))
    assert run(second, state=str(tmp_path)) == scores(released, asked())


def test_a_replica_on_another_host_without_keys_does_not_start(monkeypatch):
    monkeypatch.setattr("serve.replica._host", lambda: "0.0.0.0")
    with pytest.raises(Refused, match="there are no keys"):
        Reranker(Settings())


def test_before_a_bundle_is_there_requests_and_probes_are_a_503():
    async def work(replica):
        for call in (replica.rerank(asked()), replica.ready()):
            with pytest.raises(Fault) as fault:
                await call
            assert (fault.value.status_code, fault.value.detail) == (503, "no bundle is loaded yet")

    run(work)


# What is tried


def trial(released, candidate, requests, prepare=lambda replica: None, settings=(), **experiment):
    """Answers of so many requests while a candidate is tried, and the replica's word at the end."""

    async def work(replica):
        await replica.reconfigure({"bundle": str(released), "experiment": TRIAL | {"bundle": candidate} | experiment})
        prepare(replica)
        found = []
        for number in range(requests):
            found.append(await replica.rerank(asked(number, client=f"c{number % 10}")))
            await asyncio.gather(*replica._background)
        return found, await replica.ready()

    return run(work, **dict(settings))


def test_in_a_shadow_live_answers_all_and_the_difference_is_known(released, other):
    found, ready = trial(released, other, 4, kind="shadow")
    assert [one.logits for one in found] == [scores(released, asked(number)) for number in range(4)]
    assert ready["experiment"]["compared"] == ready["experiment"]["candidate_requests"] == 4
    assert -1 <= ready["experiment"]["tau"] < 0.9 and ready["experiment"]["candidate_errors"] == 0


def test_in_a_canary_a_client_keeps_its_student(released, other):
    found, ready = trial(released, other, 40, share=0.5, min_tau=-1.0, max_latency_ratio=1e6)
    assert ready["experiment"]["compared"] >= 5
    arms = {}
    for number, one in list(enumerate(found))[20:]:
        candidate = one.logits == scores(other, asked(number))
        assert candidate or one.logits == scores(released, asked(number))
        arms.setdefault(number % 10, set()).add(candidate)
    assert all(len(of) == 1 for of in arms.values())
    assert {True, False} == {arm for of in arms.values() for arm in of}


def shuffled(replica):
    """The candidate's scores, in another order each time."""
    engine, draw = replica._trial.candidate.engine, random.Random(0)
    logits = engine.logits
    engine.logits = lambda prompts: draw.sample(found := logits(prompts), len(found))


def test_shuffled_scores_are_out_by_themselves_also_on_a_new_replica_and_live_answers(released, tmp_path):
    copy, state = str(shutil.copytree(released, tmp_path / "copy")), {"state": str(tmp_path / "state")}
    found, ready = trial(released, copy, 40, shuffled, state.items())
    assert "experiment" not in ready and "the candidate is out: mean Kendall tau" in ready["refused"]
    assert [one.logits for one in found] == [scores(released, asked(number)) for number in range(40)]
    _, again = trial(released, copy, 1, settings=state.items())
    assert "experiment" not in again and again["refused"] == ready["refused"]


def test_a_canary_answers_once_as_many_were_compared_as_a_bar_is_judged_on(released, other):
    found, _ = trial(released, other, 8, min_tau=-1.0, max_latency_ratio=1e6)
    live, candidate = ([scores(bundle, asked(number)) for number in range(8)] for bundle in (released, other))
    assert [one.logits for one in found] == live[:5] + candidate[5:]


def test_the_same_student_as_its_own_candidate_stays(released, tmp_path):
    copy = str(shutil.copytree(released, tmp_path / "copy"))
    _, ready = trial(released, copy, 40)
    assert ready["experiment"]["tau"] == pytest.approx(1.0) and "refused" not in ready


def memory_error(_):
    raise MemoryError


def no_numbers(prompts):
    return [float("nan")] * len(prompts)


@pytest.mark.parametrize("logits", [memory_error, no_numbers])
@pytest.mark.parametrize("kind", ["shadow", "canary", "interleave"])
def test_users_of_a_candidate_that_fails_get_their_answer_from_live_until_it_is_out(released, other, kind, logits):
    def failing(replica):
        replica._trial.candidate.engine.logits = logits

    found, ready = trial(released, other, 12, failing, kind=kind)
    assert [one.logits for one in found] == [scores(released, asked(number)) for number in range(12)]
    assert "the candidate is out: error rate 1" in ready["refused"]


@pytest.mark.parametrize("logits", [memory_error, no_numbers])
def test_where_live_fails_the_answer_is_a_503_and_the_next_may_do_better(released, monkeypatch, logits):
    async def work(replica):
        await replica.reconfigure({"bundle": str(released)})
        with monkeypatch.context() as broken:
            broken.setattr(replica._live().engine, "logits", logits)
            with pytest.raises(Fault, match="the model failed") as fault:
                await replica.rerank(asked())
        assert fault.value.status_code == 503 and fault.value.headers["Retry-After"] == "1"
        assert (await replica.rerank(asked())).logits == scores(released, asked())

    run(work)


def test_a_candidate_that_cannot_be_loaded_is_not_tried(released, broken):
    found, ready = trial(released, broken, 1)
    assert "experiment" not in ready and "sha256 expected" in ready["refused"]
    assert found[0].logits == scores(released, asked(0))


def test_an_interleaved_answer_takes_turns_and_its_scores_fall_in_its_order(released, other):
    (found,), _ = trial(released, other, 1, kind="interleave")
    assert sorted(found.order) == list(range(12)) and set(found.teams) == {"live", "candidate"}
    assert [found.logits[place] for place in found.order] == sorted(found.logits, reverse=True)
    both = [
        Engine(folder).scores(asked().pairs.queries, asked().pairs.titles, asked().pairs.summaries)
        for folder in (released, other)
    ]
    best = {team: max(range(12), key=of.__getitem__) for team, of in zip(("live", "candidate"), both, strict=True)}
    assert found.order[0] == best[found.teams[0]]


# What is written down


def test_an_answer_is_a_record_of_its_documents_in_order_and_of_its_arm(released, other, tmp_path):
    bars = {"min_tau": -1.0, "max_latency_ratio": 1e6}
    found, _ = trial(released, other, 6, settings={"records": str(tmp_path)}.items(), **bars)
    (file,) = tmp_path.glob("ubi_queries*")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["query_response_hit_ids"] for record in records] == [
        [f"d{place}" for place in one.ranked()] for one in found
    ]
    assert {record["query_attributes"]["experiment"] for record in records} == {"e1"}
    assert [record["query_attributes"]["arm"] for record in records] == ["shadow"] * 5 + ["candidate"]
    assert [record["query_id"] for record in records] == [f"r{number}" for number in range(6)]
    assert records[1]["client_id"] == "c1"


def test_without_a_folder_nothing_is_written_and_events_are_a_404(released):
    async def work(replica):
        await replica.reconfigure({"bundle": str(released)})
        with pytest.raises(Fault) as fault:
            replica.keep([])
        assert fault.value.status_code == 404 and replica._queries is None

    run(work)
