"""`ray job submit` to a cluster that asks for a token, as docs/cluster.md says it: the run that other tests read."""

import httpx
import pytest

from disranker import stages
from disranker.store import Store


@pytest.mark.slow
def test_the_pipeline_submitted_to_a_cluster_with_a_token_runs_to_the_end(submitted, tiny):
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-1000:]
    assert all(f"{name}: done in" in submitted.stdout for name in stages.NAMES)
    assert Store(tiny["root"]).finished("bundle")


def test_without_the_token_nothing_is_submitted(cluster):
    assert httpx.get(f"{cluster.jobs}/api/jobs/").status_code in (401, 403)
    job = {"entrypoint": "true"}
    assert httpx.post(f"{cluster.jobs}/api/jobs/", json=job).status_code in (401, 403)
