import pytest
import torch
from builders import TEXTS, TINY_STUDENT, doc, save_decoder
from test_engine import save_student
from transformers import AutoConfig, BertForSequenceClassification

from disranker import losses, student
from disranker.batches import Rows
from disranker.contract import Tokens
from disranker.recipe import Distill, Refused, Student
from disranker.teacher import raw_scores


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("base"), num_hidden_layers=5, hidden_dropout_prob=0.3, num_labels=2)


@pytest.fixture(scope="module")
def tokens(base):
    return Tokens.agree(base, "encoder", TINY_STUDENT)


@pytest.fixture(scope="module")
def model(base):
    return student.load(save_student(base.parent / "scorer")).eval()


def cfg(take, layers):
    return Student(take=take, layers=layers)


@pytest.mark.parametrize(
    ("take", "available", "layers", "expected"),
    [
        ("first", 12, 3, [0, 1, 2]),
        ("last", 12, 3, [9, 10, 11]),
        ("every_second", 12, 6, [0, 2, 4, 6, 8, 10]),
        ("every_second", 12, 2, [0, 2]),
        ("every_second", 5, 3, [0, 2, 4]),
        ("first", 3, 3, [0, 1, 2]),
        ("last", 3, 3, [0, 1, 2]),
    ],
)
def test_which_layers_a_student_takes(take, available, layers, expected):
    assert student.layers(available, cfg(take, layers)) == expected


@pytest.mark.parametrize(
    ("take", "available", "layers", "found"), [("first", 2, 3, 2), ("last", 2, 3, 2), ("every_second", 12, 7, 6)]
)
def test_too_few_layers_are_refused_with_both_numbers(take, available, layers, found):
    with pytest.raises(Refused, match=f"{take} gives {found} of {available} layers, layers asks for {layers}"):
        student.layers(available, cfg(take, layers))


@pytest.mark.parametrize(("take", "chosen"), [("first", [0, 1]), ("last", [3, 4]), ("every_second", [0, 2])])
def test_a_shortened_base_keeps_embeddings_and_its_2_layers_and_gets_one_score(base, tmp_path, take, chosen):
    student.shortened(str(base), tmp_path, cfg(take, 2), seed=1)
    whole, short = BertForSequenceClassification.from_pretrained(base), student.load(tmp_path)
    assert short.config.num_hidden_layers == len(short.bert.encoder.layer) == 2 and short.config.num_labels == 1
    assert torch.equal(whole.bert.embeddings.word_embeddings.weight, short.bert.embeddings.word_embeddings.weight)
    for place, layer in zip(chosen, short.bert.encoder.layer, strict=True):
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight, whole.bert.encoder.layer[place].state_dict()[name])
    assert short.config.hidden_dropout_prob == short.config.attention_probs_dropout_prob == 0
    assert Tokens.agree(tmp_path, "encoder", TINY_STUDENT).contract.close == 3


def test_the_new_head_is_drawn_by_the_seed(base, tmp_path):
    heads = []
    for place, seed in enumerate((1, 1, 2)):
        student.shortened(str(base), tmp_path / str(place), cfg("first", 1), seed)
        heads.append(student.load(tmp_path / str(place)).classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_base_that_gives_one_score_keeps_its_head(tmp_path):
    whole = student.load(save_student(tmp_path / "base"))
    student.shortened(str(tmp_path / "base"), tmp_path / "short", cfg("first", 1), seed=1)
    assert torch.equal(student.load(tmp_path / "short").classifier.weight, whole.classifier.weight)


def test_a_base_that_is_nowhere_or_no_bert_or_too_short_is_refused(base, tmp_path):
    with pytest.raises(Refused, match=r"student\.base .*none: no model there"):
        student.shortened(str(tmp_path / "none"), tmp_path, cfg("first", 2), 1)
    with pytest.raises(Refused, match="is a llama; a student is a bert"):
        student.shortened(str(save_decoder(tmp_path / "llama")), tmp_path, cfg("first", 2), 1)
    with pytest.raises(Refused, match="gives 3 of 5 layers, layers asks for 4"):
        student.shortened(str(base), tmp_path, cfg("every_second", 4), 1)
    long = cfg("first", 1).model_copy(update={"max_tokens": 10_000})
    with pytest.raises(Refused, match=r"student\.max_tokens 10000: the model of student\.base has \d+ positions"):
        student.shortened(str(base), tmp_path, long, 1)


def test_a_student_from_nothing_has_the_shape_of_the_recipe_and_the_same_weights_again(tmp_path):
    for name, seed in (("1", 1), ("2", 1), ("3", 2)):
        student.scratch(tmp_path / name, TEXTS, TINY_STUDENT, seed)
    one, two, three = (student.load(tmp_path / name).state_dict() for name in "123")
    assert all(torch.equal(one[key], two[key]) for key in one) and not all(
        torch.equal(one[key], three[key]) for key in one
    )
    config = AutoConfig.from_pretrained(tmp_path / "1")
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.max_position_embeddings)
    assert shape == (2, 16, 64, 24) and config.num_labels == 1 and config.hidden_dropout_prob == 0
    tokens = Tokens.agree(tmp_path / "1", "encoder", TINY_STUDENT)
    ids = tokens.pairs(["RED shoe"], ["Blue"], [""])[0]
    readable = [tokens._tokenizer.id_to_token(i) for i in ids]
    assert readable == ["[CLS]", "red", "shoe", "[SEP]", "blue", "[SEP]"] and max(ids) < config.vocab_size


@torch.no_grad()
def test_a_score_is_the_same_alone_and_in_a_padded_batch(model, tokens):
    rows = tokens.prompts(["red"] * 3, ["blue", "shoe " * 6, ""], ["", "warm " * 9, "rain"])
    together = raw_scores(model, Rows.padded(rows, 0))
    alone = torch.cat([raw_scores(model, Rows.padded([row], 0)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5) and len(set(together.tolist())) == 3


# Distillation

GROUP = {"query": "red", "docs": [doc("a", title="shoe"), doc("b", title="rain jacket"), doc("c", title="kids")]}


def distillation(tokens, scores=((2.0, 6.0, 4.0),), validation=(), **settings):
    train = [(GROUP, of) for of in scores]
    return student.Distillation(train, [(GROUP, of) for of in validation], tokens, Distill(**settings), 4.0, 2.0)


def test_teacher_scores_of_2_6_4_become_minus_1_1_0_by_a_mean_of_4_and_a_deviation_of_2(tokens):
    assert student.standardised([2.0, 6.0, 4.0], 4.0, 2.0) == [-1, 1, 0]
    task = distillation(tokens)
    batch = task.batch([0])
    assert sorted(batch.targets[0].tolist()) == [-1, 0, 1] and task.sizes == [(3, 6)]
    longest = batch.rows.real.sum(1).argmax().item()  # b, of the highest score, has the longest title
    assert batch.targets[0, longest] == 1


def test_a_list_of_4_is_dealt_into_2_of_2_for_training_and_stays_whole_for_validation(tokens):
    four = {"query": "red", "docs": [*GROUP["docs"], doc("d", title="warm")]}
    lists = [(four, (2.0, 6.0, 4.0, 3.0))]
    task = student.Distillation(lists, lists, tokens, Distill(documents_per_list=2), 4.0, 2.0)
    assert [rows for rows, _ in task.sizes] == [2, 2]
    assert [group.size[0] for group in task._validation] == [4]


@pytest.mark.parametrize("deviation", [0.0, float("nan"), -1.0])
def test_a_teacher_that_scores_all_alike_teaches_nothing(deviation):
    with pytest.raises(ValueError, match="the same score"):
        student.standardised([1.0], 1.0, deviation)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_loss_is_alpha_point_plus_beta_margin(model, tokens, alpha, beta):
    task = distillation(tokens, alpha=alpha, beta=beta)
    batch = task.batch([0])
    with torch.no_grad():
        scores = raw_scores(model, batch.rows).view(1, 3)
        point = losses.point_mse(scores, batch.targets, batch.real)
        pairs = losses.margin_mse(scores, batch.targets, batch.real)
        assert task.loss(model, batch).item() == pytest.approx((alpha * point + beta * pairs).item(), rel=1e-6)


def test_agreement_is_1_with_ones_own_scores_and_0_with_them_turned_round(model, tokens):
    with torch.no_grad():
        own = raw_scores(model, Rows.padded(tokens.listed("red", GROUP["docs"]), 0)).tolist()
    turned = [-score for score in own]
    found = [distillation(tokens, validation=[of]).validate(model) for of in (own, turned)]
    assert found == [{"teacher_pair_accuracy": 1.0}, {"teacher_pair_accuracy": 0.0}]
