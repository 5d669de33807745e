import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from builders import TINY, doc, save_decoder
from test_engine import save_student
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

from disranker import contract, losses, teacher
from disranker.batches import Group, Rows, collate
from disranker.contract import Tokens
from disranker.recipe import Finetune, Refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def tokens(folder):
    return Tokens.load(folder)


@pytest.fixture(scope="module")
def scorer(folder, tokens):
    return teacher.scorer(folder, tokens, seed=1).eval()


# What the teacher is to learn

LIST = [
    doc("a", grade=3, attractiveness=0.5, impressions=10),
    doc("b", grade=0, attractiveness=0.25, impressions=5),
    doc("c", attractiveness=0.125, impressions=4),
    doc("d", source="bm25"),
    doc("e", source="random"),
]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("grades", [3, 0, None, None, 0]),
        ("evidence", [0.5, 0.25, None, None, 0]),
        ("grades_then_evidence", [3, 0, None, None, 0]),
    ],
)
def test_targets_of_5_documents(labels, expected):
    assert teacher.targets(LIST, Finetune(labels=labels, min_impressions=5)) == expected


def test_a_list_whose_grades_are_all_equal_is_learned_from_evidence_unless_only_grades_are_wanted():
    equal = [dict(found, grade=2) if found["grade"] is not None else found for found in LIST]
    assert teacher.targets(equal, Finetune(labels="grades_then_evidence")) == [0.5, 0.25, None, None, 0]
    assert teacher.targets(equal, Finetune(labels="grades")) == [2, 2, None, None, 0]


def test_a_list_without_grades_has_no_target_of_grades_not_even_of_random_documents():
    bare = [dict(found, grade=None) for found in LIST]
    assert teacher.targets(bare, Finetune(labels="grades")) == [None] * 5


def test_a_random_document_keeps_a_grade_and_evidence_that_it_has():
    lucky = [doc("a", source="random", grade=2, attractiveness=0.5, impressions=9), doc("b", grade=0)]
    assert teacher.targets(lucky, Finetune(labels="grades")) == [2, 0]
    assert teacher.targets(lucky, Finetune(labels="evidence")) == [0.5, None]


def test_a_document_that_was_never_shown_has_no_evidence_even_where_0_impressions_are_enough():
    docs = [doc("a"), doc("b", attractiveness=0.5, impressions=1)]
    docs.append(doc("c", source="random"))
    assert teacher.targets(docs, Finetune(labels="evidence", min_impressions=0)) == [None, 0.5, 0]


# Models


def test_a_decoder_from_nothing_has_2_layers_a_vocabulary_and_no_secret_of_chance(folder, tmp_path):
    again, other = save_decoder(tmp_path / "1"), save_decoder(tmp_path / "2", seed=5)
    one, two, three = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, again, other))
    assert all(torch.equal(one[key], two[key]) for key in one) and not all(
        torch.equal(one[key], three[key]) for key in one
    )
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (2, 32, 24)
    assert config.intermediate_size == 96 and config.tie_word_embeddings
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_every_byte_has_a_token(tokens):
    text = "\x00 靴 ü \U0001f45f"
    ids = tokens._tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens._tokenizer.decode(ids) == text


def test_words_start_alike_inside_a_text_and_at_its_start(tokens):
    red = tokens.pairs(["red"], ["blue red"], ["red"])[0]
    assert red.count(red[1]) == 3


@torch.no_grad()
def test_a_score_is_the_same_alone_and_in_a_padded_batch_to_5_digits(scorer, tokens):
    rows = tokens.prompts(["red"] * 4, ["blue", "shoe " * 6, "", "rain jacket"], ["", "warm " * 9, "x", "light"])
    assert len({len(ids) for ids, _ in rows}) == 4
    together = teacher.raw_scores(scorer, Rows.padded(rows, tokens.contract.pad))
    alone = torch.cat([teacher.raw_scores(scorer, Rows.padded([row], 0)) for row in rows])
    assert together.shape == (4,) and together.isfinite().all() and len(set(together.tolist())) == 4
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
def test_33_rows_go_in_8_pieces_of_like_length_and_their_scores_come_back_in_order(scorer, tokens, monkeypatch):
    monkeypatch.setattr(teacher, "LEAST_TOKENS", 40)
    texts = ["warm " * (n * 7 % 13) for n in range(33)]
    rows = Rows.padded(tokens.prompts(["red"] * 33, ["blue"] * 33, texts), tokens.contract.pad)
    shapes: list[torch.Size] = []
    handle = scorer.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    found = teacher.raw_scores(scorer, rows)
    handle.remove()
    assert len(shapes) == 8 and sum(n for n, _ in shapes) == 33 and {n for n, _ in shapes} == {4, 5}
    assert sum(n * length for n, length in shapes) < 1.2 * int(rows.real.sum()) < rows.ids.numel()
    whole = scorer(**rows.inputs(scorer)).logits.squeeze(-1)
    assert torch.allclose(found, whole, atol=1e-5)


@torch.no_grad()
def test_2_rows_with_the_tokens_of_5_pieces_go_in_2(scorer, tokens, monkeypatch):
    rows = Rows.padded(tokens.prompts(["red"] * 2, ["blue", "shoe"], ["", "rain"]), tokens.contract.pad)
    whole = teacher.raw_scores(scorer, rows)
    monkeypatch.setattr(teacher, "LEAST_TOKENS", int(rows.real.sum()) // 5)
    assert torch.allclose(teacher.raw_scores(scorer, rows), whole, atol=1e-5)


def test_8_pieces_share_one_look_up_of_their_tokens_and_have_the_gradients_of_one(folder, tokens, monkeypatch):
    texts = ["warm " * (n * 7 % 13) for n in range(33)]
    rows = Rows.padded(tokens.prompts(["red"] * 33, ["blue"] * 33, texts), tokens.contract.pad)
    weights, found, looked_up = torch.linspace(-1, 1, 33), {}, []
    plain = torch.nn.functional.embedding
    monkeypatch.setattr(torch.nn.functional, "embedding", lambda *of: looked_up.append(of[0].shape) or plain(*of))
    for least in (40, 10**6):
        monkeypatch.setattr(teacher, "LEAST_TOKENS", least)
        model = teacher.scorer(folder, tokens, seed=1)
        (teacher.raw_scores(model, rows) * weights).sum().backward()
        assert "forward" not in vars(model.get_input_embeddings())
        found[least] = [weight.grad for weight in model.parameters()]
    assert looked_up == [rows.ids.unique().shape, rows.ids.shape]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found.values(), strict=True))


@torch.no_grad()
def test_the_score_is_that_of_the_closing_token(scorer, tokens):
    rows = tokens.prompts(["red", "red"], ["blue", "shoe " * 6], ["", ""])
    found = teacher.raw_scores(scorer, Rows.padded(rows, 0))
    hidden = scorer.model(input_ids=torch.tensor([rows[0][0]])).last_hidden_state[0, -1]
    assert found[0].item() == pytest.approx((scorer.score.weight[0] @ hidden).item(), abs=1e-5)


def test_fsdp_finds_the_1_tensor_in_what_a_mean_pooled_scorer_gives(folder):
    tokens = Tokens.agree(folder, "decoder", TINY.model_copy(update={"pooling": "mean"}))
    model = teacher.scorer(folder, tokens, 1)
    rows = Rows.padded(tokens.prompts(["red", "red"], ["shoe", "rain jacket"], ["", ""]), 0)
    assert [leaf.shape for leaf in tree_leaves(model(**rows.inputs(model)))] == [(2, 1)]


def test_a_new_head_is_drawn_by_the_seed(folder, tokens):
    heads = [teacher.scorer(folder, tokens, seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_saved_scorer_is_loaded_with_contract_and_the_same_scores(scorer, tokens, folder, tmp_path):
    teacher.save(scorer, tokens, folder, tmp_path)
    loaded = Tokens.load(tmp_path)
    again = teacher.scorer(tmp_path, loaded, seed=9).eval()
    rows = Rows.padded(loaded.prompts(["red"], ["shoe"], ["warm"]), 0)
    assert loaded.contract.digest == tokens.contract.digest
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with torch.no_grad():
        mine, theirs = (teacher.raw_scores(model, rows) for model in (again, scorer))
    assert mine.tolist() == pytest.approx(theirs.tolist(), abs=1e-6)  # memory is laid out anew: not bit by bit
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in scorer.state_dict().items())


def test_a_tokenizer_file_laid_out_in_another_way_is_saved_byte_by_byte(scorer, folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    file = base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    teacher.save(scorer, Tokens.agree(base, "decoder", TINY), base, tmp_path / "saved")
    assert Tokens.load(tmp_path / "saved").contract.form == "decoder"


def test_a_copied_base_has_the_same_weights_and_a_tokenizer_to_agree_on(folder, tmp_path):
    teacher.copy(str(folder), tmp_path, "decoder", TINY.max_tokens)
    one, two = (teacher.language_model(path).state_dict() for path in (folder, tmp_path))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert Tokens.agree(tmp_path, "decoder", TINY).contract.close == 2


def test_a_copied_encoder_has_one_score(tmp_path):
    save_student(tmp_path / "base", num_labels=1)
    teacher.copy(str(tmp_path / "base"), tmp_path / "copy", "encoder", TINY.max_tokens)
    assert contract.form(str(tmp_path / "copy")) == "encoder"
    tokens = Tokens.agree(tmp_path / "copy", "encoder", TINY)
    model = teacher.scorer(tmp_path / "copy", tokens, 1)
    rows = Rows.padded(tokens.prompts(["red"], ["shoe"], [""]), 0)
    assert teacher.raw_scores(model, rows).shape == (1,)


def test_a_copied_encoder_without_a_head_gets_one_of_one_score(tmp_path):
    save_student(tmp_path / "base", num_labels=2)
    BertModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    teacher.copy(str(tmp_path / "base"), tmp_path / "copy", "encoder", TINY.max_tokens)
    assert AutoConfig.from_pretrained(tmp_path / "copy").num_labels == 1


def test_the_form_of_a_base_is_told_by_its_config(folder, tmp_path):
    assert contract.form("scratch") == contract.form(str(folder)) == "decoder"
    with pytest.raises(Refused, match=r"teacher\.base .*: no model there .*give a folder, a hub name, or scratch"):
        contract.form(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("model_type", "architecture", "form"),
    [
        ("gpt2", "GPT2LMHeadModel", "decoder"),
        ("bloom", "BloomForCausalLM", "decoder"),
        ("bert", "BertForMaskedLM", "encoder"),
        ("xlm-roberta", "XLMRobertaForSequenceClassification", "encoder"),
    ],
)
def test_a_language_head_is_known_by_its_class_whatever_its_name(model_type, architecture, form, tmp_path):
    AutoConfig.for_model(model_type, architectures=[architecture]).save_pretrained(tmp_path)
    assert contract.form(str(tmp_path)) == form


def test_a_model_that_counts_no_positions_has_no_limit():
    config = AutoConfig.for_model("bloom", vocab_size=9, hidden_size=8, n_layer=1, n_head=1)
    contract.check_positions(AutoModelForSequenceClassification.from_config(config), 100_000, "teacher")


def test_a_decoder_without_its_language_head_is_refused(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).base_model.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"LlamaModel has no causal head to pre-train with, and is no encoder"):
        contract.form(str(tmp_path))


@pytest.mark.parametrize(("model_type", "positions"), [("bert", 16), ("roberta", 18)])
def test_a_text_longer_than_the_positions_of_the_base_is_refused(model_type, positions, tmp_path):
    """RoBERTa leaves two of its positions to padding."""
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        **{"max_position_embeddings": positions, "pad_token_id": 1 if model_type == "roberta" else 0},
    )
    found = AutoModelForSequenceClassification.from_config(config)
    contract.check_positions(found, 16, "teacher")
    with pytest.raises(Refused, match=r"^teacher\.max_tokens 17: the model of teacher\.base has 16 positions"):
        contract.check_positions(found, 17, "teacher")


def test_a_base_is_not_copied_for_longer_texts_than_it_has_positions_for(tmp_path):
    save_student(tmp_path / "base")
    with pytest.raises(Refused, match="max_tokens 10000"):
        teacher.copy(str(tmp_path / "base"), tmp_path / "copy", "encoder", 10_000)


# Fine-tuning


def group(query="red", docs=LIST):
    return {"query": query, "docs": docs}


def test_lists_with_2_different_targets_are_learned_from_and_documents_without_one_left_out(tokens):
    equal = [doc("a", grade=1), doc("b", grade=1)]
    task = teacher.Ranking([group(), group(docs=equal), group(docs=[doc("a")])], [], tokens, Finetune())
    batch = task.batch([0])
    assert teacher.Ranking([group(docs=equal)], [], tokens, Finetune(labels="grades")).sizes == []
    assert len(task.sizes) == 1 and sorted(batch.targets[0].tolist()) == [0, 0, 3] and batch.real.all()
    assert task.sizes[0] == (3, batch.rows.ids.shape[1])
    assert math.isnan(task.validate(torch.nn.Linear(1, 1))["pair_accuracy"])


@pytest.mark.parametrize(
    ("grades", "found"), [((1, 1), False), ((1, None), False), ((1, 0), True), ((), False), ((1, 1, 2), True)]
)
def test_a_list_is_comparable_where_two_targets_differ(grades, found):
    docs = [doc(str(n), grade=grade) for n, grade in enumerate(grades)]
    assert teacher.comparable(docs, Finetune(labels="grades")) == found


@pytest.mark.parametrize("loss", ["margin", "ranknet", "listwise", "pointwise"])
def test_the_loss_of_the_recipe_is_taken(scorer, tokens, loss):
    docs = [doc("a", title="shoe", grade=2), doc("b", title="rain", grade=1), doc("c", title="kids", grade=0)]
    task = teacher.Ranking([group(docs=docs)], [], tokens, Finetune(loss=loss, labels="grades", margin=0.25))
    batch = task.batch([0])
    with torch.no_grad():
        scores = teacher.raw_scores(scorer, batch.rows).view(1, 3)
        expected = getattr(losses, loss)(scores, batch.targets, batch.real, *([0.25] if loss == "margin" else []))
        assert task.loss(scorer, batch).item() == pytest.approx(expected.item())


class ByLength(torch.nn.Module):
    """Scores a text by the number of its tokens."""

    def __init__(self):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.ones(1)), SimpleNamespace()

    def forward(self, attention_mask, **_):
        return SimpleNamespace(logits=attention_mask.sum(1, keepdim=True) * self.weight)


def test_4_of_5_pairs_in_the_right_order_are_an_accuracy_of_080():
    groups = [
        Group([([1], 1), ([1, 1], 1), ([1, 1, 1], 1)], [0.0, 2.0, 1.0]),  # 2 of 3
        Group([([1], 1), ([1, 1], 1), ([1, 1], 1)], [0.0, 1.0, 1.0]),  # 2 of 2
    ]
    model = ByLength()
    assert teacher.pair_accuracy(model, groups, 0) == pytest.approx(4 / 5)
    assert teacher.pair_accuracy(model, groups[:1], 0) == pytest.approx(2 / 3)
    assert model.training and math.isnan(teacher.pair_accuracy(model, [], 0))
    assert model(**collate(groups, 0).rows.inputs(model)).logits.shape == (6, 1)


def test_saving_to_a_folder_with_another_tokenizer_replaces_it(scorer, tokens, folder, tmp_path):
    save_student(tmp_path)
    teacher.save(scorer, tokens, folder, tmp_path)
    assert Tokens.load(tmp_path).contract.form == "decoder"


def test_3_of_4_pairs_of_2_lists_are_in_order_where_a_tie_is_not_and_equal_targets_do_not_count():
    lists = [((2.0, 1.0, 0.0), (0.9, 0.5, 0.5)), ((1.0, 1.0), (0.1, 0.2)), ((0.0, 3.0), (-2.0, -1.0))]
    assert teacher.in_order(lists) == 3 / 4
    assert teacher.in_order([lists[1]]) is None is teacher.in_order([])
