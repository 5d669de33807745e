"""Other people's clients, unchanged but for the address, against the endpoint over HTTP."""

import pytest
from endpoints import over_http, reranking
from test_access import key

from serve.access import Keys
from serve.dialects import ranked, sigmoid

TEXTS = ["red trail shoe", "warm rain jacket", "blue kids size", "running light", "sale"]
TOKEN = "t" * 43


@pytest.fixture(scope="module")
def url(released):
    """An endpoint that asks for a token."""
    with reranking(released) as reranker:
        reranker.keys = Keys([key("shop", TOKEN)])
        with over_http(reranker) as (host, port):
            yield f"http://{host}:{port}"


@pytest.fixture(scope="module")
def expected(student):
    """(index, score) of the texts, best first."""
    logits = student.scores(["shoe"] * 5, [""] * 5, TEXTS)
    return [(place, pytest.approx(sigmoid(logits[place]), abs=1e-5)) for place in ranked(logits)]


@pytest.mark.parametrize("version", [1, 2])
def test_cohere(url, expected, version):
    import cohere

    client = (cohere.Client if version == 1 else cohere.ClientV2)(TOKEN, base_url=url)
    reply = client.rerank(model="disranker", query="shoe", documents=TEXTS, top_n=3)
    assert [(result.index, result.relevance_score) for result in reply.results] == expected[:3]
    assert reply.meta.api_version.version == str(version)


def test_cohere_names_what_is_wrong(url):
    import cohere

    with pytest.raises(cohere.errors.UnauthorizedError):
        cohere.ClientV2("wrong", base_url=url).rerank(model="disranker", query="shoe", documents=TEXTS)
    with pytest.raises(cohere.errors.NotFoundError, match=r"no model .rerank-v3\.5. here"):
        cohere.ClientV2(TOKEN, base_url=url).rerank(model="rerank-v3.5", query="shoe", documents=TEXTS)
    with pytest.raises(cohere.errors.UnprocessableEntityError, match="query: String should have at least 1 character"):
        cohere.ClientV2(TOKEN, base_url=url).rerank(model="disranker", query="", documents=TEXTS)


def test_langchain_with_cohere(url, expected):
    from langchain_cohere import CohereRerank
    from langchain_core.documents import Document

    compressor = CohereRerank(model="disranker", base_url=url, cohere_api_key=TOKEN, top_n=3)
    found = compressor.compress_documents([Document(page_content=text) for text in TEXTS], "shoe")
    assert [(TEXTS.index(one.page_content), one.metadata["relevance_score"]) for one in found] == expected[:3]


def llama_index(reranker):
    """(index, score) of the texts as a postprocessor leaves them."""
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in TEXTS]
    return [(TEXTS.index(one.text), one.score) for one in reranker.postprocess_nodes(nodes, QueryBundle("shoe"))]


def test_llama_index_with_cohere(url, expected):
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    assert llama_index(CohereRerank(model="disranker", base_url=url, api_key=TOKEN, top_n=3)) == expected[:3]


def test_llama_index_with_jina(url, expected):
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    reranker = JinaRerank(model="disranker", base_url=f"{url}/v1", api_key=TOKEN, top_n=3)
    assert llama_index(reranker) == expected[:3]


@pytest.mark.parametrize("token", [TOKEN, f"Bearer {TOKEN}"])
def test_llama_index_with_tei(url, expected, token):
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    assert llama_index(TextEmbeddingInference(base_url=url, auth_token=token, top_n=3)) == expected[:3]
