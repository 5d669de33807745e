import math
from types import SimpleNamespace

import pytest
import ray.train
import torch
from builders import save_decoder
from test_engine import WORDS
from torch.nn.functional import one_hot

from disranker import pretraining, recipe, teacher
from disranker.contract import Tokens
from disranker.pretraining import Pretraining
from disranker.recipe import Pretrain, Refused
from disranker.store import Store
from jobs import launch, pretrain
from jobs.sample import Sampler

CFG = Pretrain()
WARM = " ".join(["warm"] * 20)
RAIN = [f"{word} {n} rain" for n in range(200) for word in WORDS[:3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def tokens(folder):
    return Tokens.load(folder)


def example(query="red", title="blue shoe", summary="rain", band="head", attractiveness=1.0, satisfied_share=0.0):
    texts = {"query": query, "title": title, "summary": summary, "split": "train"}
    return texts | {"band": band, "attractiveness": attractiveness, "satisfied_share": satisfied_share}


class Knows(torch.nn.Module):
    """Gives each next token a chance of 1 in `chances[query]`, told by the first word of the row."""

    def __init__(self, chances, vocabulary, dtype=torch.float32):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.zeros(1)), SimpleNamespace()
        self.chances, self.vocabulary, self.dtype = chances, vocabulary, dtype
        self.asked = []  # (whether in training, ids) of each call

    def forward(self, input_ids, **_):
        self.asked.append((self.training, input_ids.numel()))
        one_in = torch.tensor([float(self.chances[int(row[1])]) for row in input_ids])
        surplus = ((self.vocabulary - 1) / (one_in - 1)).log()
        following = one_hot(input_ids.roll(-1, 1), self.vocabulary)
        return SimpleNamespace(logits=(following * surplus[:, None, None] + self.weight).to(self.dtype))


def knows(tokens, chances, **how):
    ids = {tokens.passages([word])[0][0][1]: one_in for word, one_in in chances.items()}
    return Knows(ids, tokens._tokenizer.get_vocab_size(), **how)


# Weights


@pytest.mark.parametrize(
    ("clicks", "satisfied", "satisfied_weight", "weight"),
    [(2, 1, 2.0, 0.75), (2, 0, 2.0, 0.5), (2, 2, 2.0, 1.0), (4, 1, 5.0, 1.0), (4, 3, 1.0, 0.5)],
)
def test_a_pair_of_attractiveness_05_weighs_so_much(clicks, satisfied, satisfied_weight, weight):
    row = example(attractiveness=0.5, satisfied_share=satisfied / clicks)
    assert pretraining.weights([row], satisfied_weight) == [weight]


def test_the_loss_is_weighted_by_the_clicks_and_the_query_carries_none(folder, tokens):
    model = teacher.language_model(folder).eval()
    rows = [example(satisfied_share=0.5), example("red shoe sale", "jacket", "warm rain")]
    task = Pretraining(rows, [], tokens, Pretrain(satisfied_weight=5.0))
    both = task.batch([0, 1])
    assert both.weights.tolist() == [3, 1]
    assert task.sizes == [(1, int(n)) for n in both.rows.real.sum(1)]
    with torch.no_grad():
        single = [task.loss(model, task.batch([place])).item() for place in (0, 1)]
        counts = both.learned.sum(1).tolist()
        expected = (3 * counts[0] * single[0] + counts[1] * single[1]) / (3 * counts[0] + counts[1])
        assert task.loss(model, both).item() == pytest.approx(expected, rel=1e-5)
    ids, of_query = tokens.prompts(["red"], ["blue shoe"], ["rain"])[0]
    assert counts[0] == len(ids) - of_query


def test_the_loss_of_bfloat16_logits_is_a_float32_number(tokens):
    task = Pretraining([example()], [], tokens, CFG)
    loss = task.loss(knows(tokens, {"red": 7}, dtype=torch.bfloat16), task.batch([0]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(7), rel=0.01)


# Perplexity


def test_perplexity_counts_document_tokens_alone_and_each_of_them_once(folder, tokens):
    rows = [example(), example("red shoe sale", "jacket", "", attractiveness=50.0), example("x", "", "kids " * 9)]
    found = Pretraining(rows[:1], rows, tokens, CFG).validate(model := teacher.language_model(folder))
    surprise = []
    with torch.no_grad():
        for ids, of_query in tokens.prompts(*([row[name] for row in rows] for name in ("query", "title", "summary"))):
            chances = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
            surprise += [-chances[place - 1, ids[place]].item() for place in range(of_query, len(ids))]
    assert found["perplexity"] == pytest.approx(math.exp(sum(surprise) / len(surprise)), rel=1e-4)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tokens):
    vocabulary = tokens._tokenizer.get_vocab_size()
    found = Pretraining([], [example()], tokens, CFG).validate(knows(tokens, {"red": vocabulary}))
    assert found == pytest.approx({"perplexity": vocabulary, "perplexity_head": vocabulary}, rel=1e-4)


def test_perplexity_of_each_band_by_hand_and_of_all_with_each_token_equal(tokens):
    rows = [example("sale", "rain " * 3, "", "tail"), example("red", "blue", "", "head"), example("sale", band="tail")]
    model = knows(tokens, {"red": 5, "sale": 80})
    found = Pretraining([], rows, tokens, Pretrain(tokens_per_batch=12)).validate(model)
    learned = [len(ids) - of_query for ids, of_query in (tokens.listed(row["query"], [row])[0] for row in rows)]
    of_head, of_tail = learned[1], learned[0] + learned[2]
    whole = math.exp((of_head * math.log(5) + of_tail * math.log(80)) / (of_head + of_tail))
    assert found == pytest.approx({"perplexity": whole, "perplexity_head": 5, "perplexity_tail": 80}, rel=1e-4)
    assert list(found) == ["perplexity", "perplexity_head", "perplexity_tail"]
    assert len(model.asked) == 3 and all(ids <= 12 and not training for training, ids in model.asked)


def test_perplexity_does_not_depend_on_how_many_are_scored_together(folder, tokens):
    rows = [example(title=" ".join(WORDS[:n]), band=("head", "torso")[n % 2]) for n in range(1, 8)]
    model = teacher.language_model(folder)
    few, many = (Pretraining([], rows, tokens, Pretrain(tokens_per_batch=n)).validate(model) for n in (24, 4096))
    assert few == pytest.approx(many, rel=1e-5) and set(few) == {"perplexity", "perplexity_head", "perplexity_torso"}
    assert model.training and Pretraining([], [], tokens, CFG).validate(model) == {}


def test_perplexity_decides_which_weights_are_best_and_less_is_better():
    assert (Pretraining.metric, Pretraining.larger_is_better) == ("perplexity", False)


# General text


@pytest.mark.parametrize(("clicked", "share", "tokens"), [(90, 0.1, 10), (15, 0.15, 3), (10, 0.5, 10), (100, 0.0, 0)])
def test_so_many_tokens_beside_the_clicked_ones_make_up_the_share(clicked, share, tokens):
    assert pretraining.wanted(clicked, share) == tokens


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_general_text_makes_up_its_share_of_the_tokens_within_one_passage(tokens, share):
    task = Pretraining([example()] * 30, [], tokens, Pretrain(general_share=share), RAIN)
    whole = sum(longest for _, longest in task.sizes)
    assert task.general_tokens + task.clicked_tokens == whole
    assert task.clicked_tokens == 30 * task.sizes[0][1] and task.general_tokens >= share * whole
    assert task.general_tokens - task.sizes[-1][1] < share * (whole - task.sizes[-1][1])


def test_a_general_row_is_learned_but_for_its_first_token_and_weighs_as_the_mean(tokens):
    rows = [example(attractiveness=0.2), example(attractiveness=0.6, satisfied_share=0.5)]  # 0.2 and 0.6 * 1.5
    task = Pretraining(rows, [], tokens, Pretrain(general_share=0.5), [WARM])
    batch = task.batch([2])
    assert len(task.sizes) == 3 and batch.rows.real.all()
    assert batch.learned.tolist() == [[False] + [True] * 21] and batch.weights.tolist() == pytest.approx([0.55])
    assert batch.rows.ids.tolist() == tokens.passages([WARM])[0]


def test_the_seed_decides_which_passages_are_taken(tokens):
    found = [Pretraining([example()] * 9, [], tokens, CFG, RAIN, seed) for seed in (1, 1, 2)]
    ids = [[one.batch([place]).rows.ids.tolist() for place in range(9, len(one.sizes))] for one in found]
    assert ids[0] == ids[1] != ids[2] and ids[0]


def test_a_share_of_0_takes_none(tokens):
    assert len(Pretraining([example()], [], tokens, Pretrain(general_share=0.0), RAIN).sizes) == 1


# The jobs around it


@pytest.fixture
def store(tmp_path):
    """Two training queries and a test query over three documents."""
    found = Store(str(tmp_path / "run"))
    documents = [{"doc_id": doc, "title": f"title {doc}", "summary": "warm rain"} for doc in "abc"]
    queries = [("red", "head", "train"), ("blue", "torso", "validation"), ("sale", "tail", "test")]
    found.write("documents", 0, documents)
    found.write("judgments", 0, [])
    found.write("queries", 0, [{"query": q, "band": band, "split": split} for q, band, split in queries])
    rows = [("red", "a", 4, 1, 0.5), ("red", "b", 1, 1, 0.9), ("red", "z", 9, 9, 0.9), ("blue", "c", 2, 2, 0.25)]
    names = ("query", "doc_id", "clicks", "satisfied", "attractiveness")
    shown = [dict(zip(names, row, strict=True)) for row in (*rows, ("sale", "a", 9, 9, 1.0))]
    found.write("evidence", 0, [row | {"impressions": 10} for row in shown])
    for table in ("documents", "judgments", "queries", "evidence"):
        found.commit(table, {})
    return found


def sampled(store, min_clicks=2):
    cfg = recipe.parse({"root": store.root, "sample": {"min_clicks": min_clicks}})
    Sampler(cfg, store, dict.fromkeys(("head", "torso", "tail"), 1.0))(0)
    store.commit("clicked", {})
    return store.read("clicked").to_pylist()


def test_a_clicked_pair_has_the_band_of_its_query_and_the_share_of_its_clicks_that_satisfied(store):
    red = {"query": "red", "split": "train", "band": "head", "attractiveness": 0.5, "satisfied_share": 0.25}
    blue = {"query": "blue", "split": "validation", "band": "torso", "attractiveness": 0.25, "satisfied_share": 1.0}
    texts = {"summary": "warm rain"}
    assert sampled(store) == [red | texts | {"title": "title a"}, blue | texts | {"title": "title c"}]
    assert len(sampled(store, min_clicks=1)) == 3


def settings(store, *general, share=0.1):
    return recipe.parse({"root": store.root, "pretrain": {"general": list(general), "general_share": share}})


def test_general_text_has_its_full_name_before_a_worker_reads_it(store, tmp_path, monkeypatch):
    sampled(store)
    (tmp_path / "a.txt").write_text("rain\n")
    monkeypatch.chdir(tmp_path)
    assert pretrain.checked(settings(store, "*.txt"), store).pretrain.general == [str(tmp_path / "a.txt")]
    assert pretrain.checked(settings(store), store) == settings(store)


def test_what_a_worker_would_fail_on_is_refused_before(store, tmp_path):
    sampled(store, min_clicks=5)
    with pytest.raises(Refused, match=r"^pretrain: no clicked document; lower sample\.min_clicks"):
        pretrain.checked(settings(store), store)
    sampled(store)
    (tmp_path / "a.jsonl").write_text('{"body": "rain"}')
    with pytest.raises(Refused, match=r"a\.jsonl: no column text; it has body"):
        pretrain.checked(settings(store, str(tmp_path / "a.jsonl")), store)
    with pytest.raises(Refused, match=r"^pretrain\.general: nothing at .*none"):
        pretrain.checked(settings(store, str(tmp_path / "none")), store)


def worker(rank, monkeypatch):
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: rank))


@pytest.mark.parametrize(("share", "short"), [(0.15, ""), (0.6, " where 60.0% were wanted: the files hold no more")])
def test_the_first_worker_says_how_much_general_text_there_is_and_whether_it_is_less_than_wanted(
    store, tokens, tmp_path, monkeypatch, share, short
):
    sampled(store)
    said = []
    (tmp_path / "a.txt").write_text("warm\n")
    monkeypatch.setattr(launch, "say", said.append)
    for rank in (1, 0):
        assert not said
        worker(rank, monkeypatch)
        task = pretrain.task(settings(store, str(tmp_path / "a.txt"), share=share), store, tokens)
        assert (task.general_tokens, task.clicked_tokens) == (3, 15)
    assert said == [f"pretrain: 3 tokens of general text, 16.7% of an epoch{short}"]


def test_the_seed_of_the_recipe_takes_the_passages(store, tokens, tmp_path, monkeypatch):
    sampled(store)
    worker(1, monkeypatch)
    (tmp_path / "a.txt").write_text("\n".join(RAIN))
    cfg = settings(store, str(tmp_path / "a.txt"))
    tasks = [pretrain.task(cfg.model_copy(update={"seed": seed}), store, tokens) for seed in range(3)]
    assert len({str(task.batch([1]).rows.ids.tolist()) for task in tasks}) == 3


def test_a_worker_learns_the_training_pairs_and_is_measured_on_the_others(store, tokens):
    sampled(store)
    task = pretrain.task(settings(store), store, tokens)
    assert task.sizes == [(1, len(tokens.pairs(["red"], ["title a"], ["warm rain"])[0]))]
    found = task.validate(knows(tokens, {"blue": 9, "red": 3}))
    assert found == pytest.approx({"perplexity": 9, "perplexity_torso": 9}, rel=1e-4)
