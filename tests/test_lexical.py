import math

import pytest
import torch
from builders import TINY_STUDENT, doc, stepped
from test_engine import save_student
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from disranker import fit, lexical, lora, spread, student, teacher
from disranker.batches import Rows
from disranker.contract import Tokens
from disranker.recipe import Distill
from disranker.teacher import raw_scores
from jobs import training

CLS, SEP = 2, 3
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# [CLS] 7 8 7 [SEP] 9 8 7 [SEP]; [CLS] 7 [SEP] 5 [SEP]; [CLS] [SEP] 6 [SEP]; [CLS] 6 4 [SEP] [SEP]
ROWS = Rows.padded(
    [
        ([CLS, 7, 8, 7, SEP, 9, 8, 7, SEP], 5),
        ([CLS, 7, SEP, 5, SEP], 3),
        ([CLS, SEP, 6, SEP], 2),
        ([CLS, 6, 4, SEP, SEP], 4),
    ],
    pad=0,
)
LABELLED = [
    ({"query": "red shoe", "docs": [doc("a", title="red shoe"), doc("b", title="blue"), doc("c", title="rain red")]}, s)
    for s in ([3.0, 0.0, 1.0], [2.0, 1.0, 0.0])
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("base"), **STILL)


@pytest.fixture(scope="module")
def tokens(base):
    return Tokens.agree(base, "encoder", TINY_STUDENT)


def telling(base):
    return lexical.Telling(student.load(base), seed=1)


def task(tokens, **settings):
    lists = student.taught(LABELLED, tokens, 1.0, 1.0)
    return student.Distillation(lists, lists, [], tokens.contract.pad, Distill(**settings))


def test_query_tokens_are_those_between_cls_and_the_first_sep():
    assert lexical.query_tokens(ROWS).nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 1], [3, 1], [3, 2]]


def test_a_query_token_whose_id_stands_in_segment_1_is_in_the_document():
    found = lexical.in_document(ROWS) & lexical.query_tokens(ROWS)
    assert found.nonzero().tolist() == [[0, 1], [0, 2], [0, 3]]
    assert not lexical.in_document(Rows.padded([([CLS, 0, SEP, 5, SEP], 3), ([CLS] * 9, 3)], 0))[
        0, 1
    ]  # padding is none


def test_of_red_shoes_only_red_stands_in_red_jacket(tokens):
    rows = Rows.padded(tokens.prompts(["red shoes"], ["jacket"], ["warm red"]), 0)
    asked = lexical.query_tokens(rows)[0]
    assert [tokens._tokenizer.id_to_token(i) for i in rows.ids[0][asked]] == ["red", "shoes"]
    assert lexical.in_document(rows)[0][asked].tolist() == [True, False]


def test_the_loss_is_the_mean_cross_entropy_of_each_rows_query_tokens_by_hand():
    occurs = torch.full((4, 9), 9.0)
    occurs[0, 1:4] = torch.tensor([0.0, math.log(3), -math.log(3)])  # chances 1/2, 3/4, 1/4 of what is so
    occurs[1, 1] = math.log(4)  # 4/5 of what is not
    occurs[3, 1:3] = 0.0
    expected = [(math.log(2) + math.log(4 / 3) + math.log(4)) / 3, math.log(5), 0.0, math.log(2)]
    assert lexical.loss(occurs, ROWS).tolist() == pytest.approx(expected)


def test_the_head_changes_no_score_and_is_drawn_by_the_seed(base):
    model = telling(base).eval()
    with torch.no_grad():
        found, missed = lexical.scores(model, ROWS)
        plain = raw_scores(student.load(base).eval(), ROWS)
        assert torch.allclose(found, plain, atol=1e-6) and torch.allclose(raw_scores(model, ROWS), plain, atol=1e-6)
        hidden = model.model.bert(**ROWS.inputs(model)).last_hidden_state
        by_hand = lexical.loss(hidden @ model.head.weight[0] + model.head.bias, ROWS)
    assert missed.item() == pytest.approx(by_hand.mean().item(), abs=1e-6) and missed > 0
    other = lexical.Telling(student.load(base), seed=2)
    assert torch.equal(telling(base).head.weight, model.head.weight)
    assert not torch.equal(other.head.weight, model.head.weight)


def test_scores_and_losses_of_rows_in_pieces_are_those_of_all_at_once(base, monkeypatch):
    model = telling(base).eval()
    with torch.no_grad():
        whole = lexical.scores(model, ROWS)
        monkeypatch.setattr(teacher, "LEAST_TOKENS", 6)
        pieces = lexical.scores(model, ROWS)
    assert torch.allclose(whole[0], pieces[0], atol=1e-5)
    assert whole[1].item() == pytest.approx(pieces[1].item(), abs=1e-5)


def test_a_weight_of_2_adds_twice_the_missed_tokens_to_the_loss(base, tokens):
    model = telling(base)
    alone, both = task(tokens), task(tokens, lexical=2.0)
    batch = alone.batch([0, 1])
    missed = lexical.scores(model, batch.rows)[1]
    expected = alone.loss(model, batch) + 2 * missed
    assert both.loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_the_head_asks_for_reaches_the_encoder(base):
    model = telling(base)
    lexical.scores(model, ROWS)[1].backward()
    layers = [layer.output.dense.weight.grad for layer in model.model.bert.encoder.layer]
    assert all(grad.abs().sum() > 0 for grad in [*layers, model.head.weight.grad])
    assert not model.model.classifier.weight.grad.any()


def test_a_training_has_the_head_only_where_its_weight_is_above_0(base, tokens):
    plain, _ = training.model("distill", str(base), tokens, 1, Distill())
    model, adapters = training.model("distill", str(base), tokens, 1, Distill(lexical=0.1, lora_rank=2))
    assert type(plain) is BertForSequenceClassification and isinstance(model, lexical.Telling)
    assert adapters.base_model.model is model.model


def test_a_saved_student_is_a_plain_bert_without_the_head(base, tokens, tmp_path):
    model = telling(base)
    teacher.save(model, tokens, base, tmp_path)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    kept = student.load(base).state_dict()
    assert type(found) is BertForSequenceClassification and found.state_dict().keys() == kept.keys()
    assert all(torch.equal(weight, kept[name]) for name, weight in found.state_dict().items())


def test_25_steps_halve_what_the_head_misses_and_a_run_that_died_goes_on_with_it(base, tokens):
    cfg = Distill(lexical=10.0, epochs=25, lr=1e-2, tokens_per_batch=999, validations=1)
    learned = task(tokens, lexical=10.0)
    planned = fit.steps(learned, cfg, seed=1)

    def run(state=None, stop=None):
        return stepped(fit.Fit(telling(base), learned, planned, cfg), state, stop)

    whole, half = run(), run(stop=7).state()
    assert {"head.weight", "head.bias"} < half["model"].keys()
    again = run(half)
    assert all(torch.equal(w, again.model.state_dict()[name]) for name, w in whole.model.state_dict().items())
    batch = learned.batch([0, 1])
    before, after = (lexical.scores(model.eval(), batch.rows)[1].item() for model in (telling(base), whole.model))
    assert after < 0.5 * before


def test_activations_computed_again_give_the_same_gradients(base):
    found = []
    for model in (telling(base), telling(base)):
        if found:
            spread.recompute(model)
        lexical.scores(model.train(), ROWS)[1].backward()
        found.append(model.model.bert.embeddings.word_embeddings.weight.grad)
    assert torch.allclose(*found, atol=1e-6) and found[0].any()


def test_fsdp_finds_the_2_tensors_in_what_the_model_gives(base):
    model = telling(base)
    assert [leaf.shape for leaf in tree_leaves(model(**ROWS.inputs(model)))] == [(4, 1), (4, 9, 1)]


def test_adapters_go_beside_the_encoder_and_the_head_is_trained_whole(base):
    model = telling(base)
    adapters = lora.adapt(model, Distill(lora_rank=2))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    assert all(name.startswith("head") or "lora_" in name or "classifier" in name for name in trained)
    lexical.scores(model, ROWS)[1].backward()
    lora.merge(adapters)
    assert teacher.hugging_face(model).state_dict().keys() == student.load(base).state_dict().keys()
