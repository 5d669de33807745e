import itertools
import json
import shutil

import pytest
import torch
from builders import TEXTS, TINY_STUDENT, doc, save_decoder
from test_engine import save_student
from transformers import AutoConfig, BertForSequenceClassification

from disranker import losses, student
from disranker.batches import Group, Rows
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
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return student.load(save_student(base.parent / "scorer", **still))


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
    kept = short.bert.embeddings.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in whole.bert.embeddings.state_dict().items())
    assert kept["word_embeddings.weight"].shape == (120, 32) and torch.equal(
        whole.bert.pooler.dense.weight, short.bert.pooler.dense.weight
    )
    old, new = ((folder / "tokenizer.json").read_text() for folder in (base, tmp_path))
    assert json.loads(old)["model"]["vocab"] == json.loads(new)["model"]["vocab"]
    for place, layer in zip(chosen, short.bert.encoder.layer, strict=True):
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight, whole.bert.encoder.layer[place].state_dict()[name])
    assert short.config.hidden_dropout_prob == short.config.attention_probs_dropout_prob == 0
    assert Tokens.agree(tmp_path, "encoder", TINY_STUDENT).contract.close == 3


@pytest.mark.parametrize("layers", range(2, 13))
def test_a_base_of_12_layers_gives_2_to_12_of_them(layers):
    assert student.layers(12, cfg("first", layers)) == list(range(layers))
    assert student.layers(12, cfg("last", layers)) == list(range(12 - layers, 12))
    if layers <= 6:
        assert student.layers(12, cfg("every_second", layers)) == list(range(0, 2 * layers, 2))


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


def test_a_base_that_lacks_weights_of_a_layer_is_refused_by_their_names(base, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    lacking = "bert.encoder.layer.0.output.dense.weight"
    save_file(
        {name: one for name, one in weights.items() if name != lacking}, broken / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(Refused, match=rf"is no whole bert: it lacks 1 weights, one is {lacking}"):
        student.shortened(str(broken), tmp_path / "short", cfg("first", 1), seed=1)


def test_a_narrower_student_has_the_vocabulary_of_its_base_and_random_weights_of_the_seed(base, tmp_path):
    narrow = Student.model_validate(TINY_STUDENT.model_dump() | {"base": str(base), "take": "none"})
    for name, seed in (("1", 1), ("2", 1), ("3", 2)):
        student.shortened(str(base), tmp_path / name, narrow, seed)
    one, two, three = (student.load(tmp_path / name) for name in "123")
    assert (one.config.hidden_size, one.config.num_hidden_layers, one.config.vocab_size) == (16, 2, 120)
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    table = [model.bert.embeddings.word_embeddings.weight for model in (one, two, three)]
    assert torch.equal(table[0], table[1]) and not torch.equal(table[0], table[2])


def test_sizes_beside_a_base_are_refused():
    with pytest.raises(ValueError, match="width are those of base; with take: none"):
        Student(base="x", width=48)


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


def test_a_tokenizer_of_words_that_tie_is_the_same_3_times_and_knows_them(tmp_path):
    texts = ["".join(letters) for letters in itertools.product("abcde", repeat=4)] * 2
    for name in "123":
        student.scratch(tmp_path / name, iter(texts), TINY_STUDENT, seed=1)
    one, *others = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in "123")
    assert others == [one, one]
    assert [token["content"] for token in one["added_tokens"]] == list(student.SPECIAL)
    pieces = one["model"]["vocab"]
    assert len(pieces) == TINY_STUDENT.vocabulary and {"a", "##a"} < pieces.keys()


@torch.no_grad()
def test_a_score_is_the_same_alone_and_in_a_padded_batch(model, tokens):
    rows = tokens.prompts(["red"] * 3, ["blue", "shoe " * 6, ""], ["", "warm " * 9, "rain"])
    together = raw_scores(model, Rows.padded(rows, 0))
    alone = torch.cat([raw_scores(model, Rows.padded([row], 0)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5) and len(set(together.tolist())) == 3


# Distillation

TITLES = {"a": "shoe", "b": "rain jacket", "c": "kids"}
GROUP = {"query": "red", "split": "train", "docs": [doc(doc_id, title=title) for doc_id, title in TITLES.items()]}


def distillation(tokens, scores=((2.0, 6.0, 4.0),), validation=(), graded=(), **settings):
    train, held_out = (
        student.taught([(GROUP, of) for of in lists], tokens, 4.0, 2.0) for lists in (scores, validation)
    )
    return student.Distillation(train, held_out, graded, tokens.contract.pad, Distill(**settings))


def test_teacher_scores_of_2_6_4_become_minus_1_1_0_by_a_mean_of_4_and_a_deviation_of_2(tokens):
    assert student.standardised([2.0, 6.0, 4.0], 4.0, 2.0) == [-1, 1, 0]
    task = distillation(tokens)
    batch = task.batch([0])
    assert sorted(batch.targets[0].tolist()) == [-1, 0, 1] and task.sizes == [(3, 6)] and task.query(0) == "red"
    longest = batch.rows.real.sum(1).argmax().item()  # b, of the highest score, has the longest title
    assert batch.targets[0, longest] == 1


def test_a_list_of_4_is_dealt_into_2_of_2_for_training_and_stays_whole_for_validation(tokens):
    four = {"query": "red", "docs": [*GROUP["docs"], doc("d", title="warm")]}
    lists = student.taught([(four, (2.0, 6.0, 4.0, 3.0))], tokens, 4.0, 2.0)
    task = student.Distillation(lists, lists, [], 0, Distill(documents_per_list=2))
    assert [rows for rows, _ in task.sizes] == [2, 2]
    assert [sorted(task.batch([hand]).targets[0].tolist()) for hand in (0, 1)] == [[-1, 0], [-0.5, 1]]
    assert [group.size[0] for group in task._validation["teacher_pair_accuracy"]] == [4]


@pytest.mark.parametrize(
    ("mean", "deviation"), [(1.0, 0.0), (0.0, 0.0), (1.0, float("nan")), (1.0, -1.0), (-0.1, 1.4e-17)]
)
def test_a_teacher_that_scores_all_alike_is_refused(mean, deviation):
    for call in (lambda: student.standardised([1.0], mean, deviation), lambda: student.check_scale(mean, deviation)):
        with pytest.raises(Refused, match=rf"the same score, {mean:g}: nothing can be distilled"):
            call()


def test_a_deviation_of_2_hundred_thousandths_of_the_mean_is_a_scale():
    student.check_scale(-100.0, 2e-3)
    student.check_scale(0.0, 1e-9)


def counted(*scores, split="train", asked=True):
    docs = [doc(str(place), asked=asked) for place in range(len(scores))]
    return student.asked({"query": "red", "split": split, "docs": docs}, scores)


def test_pairs_that_were_asked_for_and_have_no_label_are_missing_and_2_labels_are_a_list():
    assert counted(1.0, None, 2.0) == {"pairs": 3, "missing": 1, "lists": 1}
    assert counted(1.0, None, 2.0, asked=False) == {"pairs": 0, "missing": 0, "lists": 1}
    assert counted(0.0, 0.0, split="validation") == {"pairs": 2, "missing": 0, "lists": 0}
    assert counted(1.0, None)["lists"] == 0 and counted(None, None)["missing"] == 2


def test_the_302nd_missing_label_of_30_100_is_refused_with_both_numbers():
    cfg = Distill()
    student.check_labels({"pairs": 30_100, "missing": 301, "lists": 1}, cfg)
    with pytest.raises(Refused, match=r"302 of 30100 pairs \(1\.0%\) have no label, .*max_missing_share 0\.01 allows"):
        student.check_labels({"pairs": 30_100, "missing": 302, "lists": 1}, cfg)
    student.check_labels({"pairs": 4, "missing": 4, "lists": 1}, Distill(max_missing_share=1.0))


@pytest.mark.parametrize("counts", [{}, {"pairs": 9, "missing": 0, "lists": 0}])
def test_labels_without_a_training_list_are_refused(counts):
    with pytest.raises(Refused, match=r"no training list has two documents to compare by targets teacher"):
        student.check_labels(counts, Distill())


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "ranknet"}, losses.ranknet),
        ({"loss": "ranknet", "targets": "grades"}, losses.ranknet),
        ({"loss": "margin", "margin": 3.0}, lambda *given: losses.margin(*given, 3.0)),
        ({"loss": "kl", "temperature": 3.0}, lambda *given: losses.kl(*given, 3.0)),
        (
            {"alpha": 0.5, "beta": 2.0, "pairs": "neighbours"},
            lambda *given: losses.hybrid(*given, 0.5, 2.0, "neighbours"),
        ),
        (
            {"alpha": 0.5, "beta": 2.0, "pairs": "gaps", "pair_share": 0.2},
            lambda *given: losses.hybrid(*given, 0.5, 2.0, "gaps", 0.2),
        ),
    ],
)
def test_the_loss_of_the_recipe_is_taken(model, tokens, settings, expected):
    task = distillation(tokens, **settings)
    batch = task.batch([0])
    scores = raw_scores(model, batch.rows).view(1, 3)
    found = task.loss(model, batch).item()
    assert found == pytest.approx(expected(scores, batch.targets, batch.real).item(), rel=1e-6) and found > 0
    assert found != pytest.approx(distillation(tokens).loss(model, batch).item(), rel=1e-3)


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
    own = scores(model, tokens)
    turned = [-score for score in own]
    found = [distillation(tokens, validation=[of]).validate(model) for of in (own, turned)]
    assert found == [{"teacher_pair_accuracy": 1.0}, {"teacher_pair_accuracy": 0.0}]


def test_grades_of_validation_queries_are_measured_beside_the_teacher_and_decide_nothing(model, tokens):
    own = scores(model, tokens)
    graded = [Group(tokens.listed("red", GROUP["docs"]), [-score for score in own])]
    task = distillation(tokens, validation=[own], graded=graded)
    assert task.validate(model) == {"teacher_pair_accuracy": 1.0, "pair_accuracy": 0.0}
    assert (task.metric, task.larger_is_better) == ("teacher_pair_accuracy", True)


def test_without_the_teacher_the_agreement_with_hard_labels_decides(model, tokens):
    own = scores(model, tokens)
    task = distillation(tokens, validation=[own], targets="grades", loss="ranknet")
    assert task.metric == "pair_accuracy" and task.validate(model) == {"pair_accuracy": 1.0}


@torch.no_grad()
def scores(model, tokens):
    return raw_scores(model, Rows.padded(tokens.listed("red", GROUP["docs"]), 0)).tolist()
