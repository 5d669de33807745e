"""The whole way once, and one request to the endpoint: what `make demo` runs."""

import json
import sys

import httpx
import ray.serve

from disranker import recipe as recipes
from disranker import report
from disranker.recipe import Recipe
from disranker.store import Store
from jobs import launch, pipeline
from jobs.launch import say
from jobs.publish import BUNDLE
from serve.app import serve_here
from serve.settings import Served, Settings


def run(recipe: Recipe) -> None:
    pipeline.run(recipe)
    store = Store(recipe.root)
    launch.connect()
    found = store.read_json("report", "report.json")
    print(f"\n{_heading(recipe, found)}\n{report.table(found)}\n", flush=True)
    settings = Settings(tokens_per_batch=recipe.serve.tokens_per_batch, max_documents=recipe.serve.max_documents)
    try:
        url = serve_here(Served(bundle=store.folder(BUNDLE)), settings, port=recipe.serve.port)
        say(f"serve: {url}")
        _ask(url, store)
    finally:
        ray.serve.shutdown()
        ray.shutdown()
    say(f"report: {store.uri}/report/report.html")


def _heading(recipe: Recipe, found: report.Report) -> str:
    world = "a made-up world" if recipe.made_up else "your data"
    return f"{found['queries']} test queries of {world}, value [{found['confidence']:.0%} interval]"


def _ask(url: str, store: Store) -> None:
    """One rerank request with a test query, and the answer, as a client would see them."""
    group = max(
        store.read("groups", part=0).to_pylist(), key=lambda group: (group["split"] == "test", len(group["docs"]))
    )
    documents = [{"title": doc["title"], "summary": doc["summary"]} for doc in group["docs"]]
    body = {"query": group["query"], "documents": documents, "top_n": 3, "return_documents": True}
    answer = httpx.post(f"{url}/v1/rerank", json=body, timeout=60).raise_for_status().json()
    print(f"\nPOST {url}/v1/rerank  query {body['query']!r}, {len(documents)} documents, top_n 3")
    print(json.dumps(answer, indent=1) + "\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = launch.parser("python -m jobs.demo", __doc__).parse_args(argv)
    return launch.guarded(lambda: run(recipes.load(arguments.recipe, arguments.set)))


if __name__ == "__main__":
    sys.exit(main())
