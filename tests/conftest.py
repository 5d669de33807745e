from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

TINY = {
    "seed": 3,
    "world": {"documents": 300, "queries": 120, "judged": 100, "searches": 2000, "shards": 2},
    "ingest": {"parts": 2},
    "aggregate": {"em_rounds": 5},
    "sample": {"judged": 6, "shown": 4, "bm25": 2, "random": 2},
    "teacher": {"vocabulary": 400, "width": 32, "layers": 1, "heads": 1},
    "student": {"vocabulary": 400, "width": 32, "layers": 1, "heads": 2},
    "pretrain": {"epochs": 1, "checkpoint_every_steps": 5},
    "finetune": {"epochs": 1, "checkpoint_every_steps": 5},
    "score": {"pairs_per_batch": 64},
    "distill": {"epochs": 1, "checkpoint_every_steps": 5},
    "evaluate": {"resamples": 200},
    "publish": {"min_share_of_teacher": 0.0, "beat_bm25": False},
}


@pytest.fixture(scope="session")
def ray_here():
    """One Ray on this machine for all tests."""
    import ray

    ray.init(
        address="local",  # not a cluster that happens to run here
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The recipe of a run that takes a minute."""
    return TINY | {"root": str(tmp_path_factory.mktemp("tiny") / "run")}


@pytest.fixture(scope="session")
def tiny_run(ray_here, tiny):
    """The store of a finished, undisturbed run of all stages. Read only: a test that changes it works on a copy."""
    from disranker import recipe
    from disranker.store import Store
    from jobs import pipeline

    pipeline.run(recipe.parse(tiny))
    return Store(tiny["root"])
