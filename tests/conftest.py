from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_here():
    import ray

    root = Path(__file__).parents[1]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": f"{root}:{root}/platform"}},
    )
    yield
    ray.shutdown()
