import json
import pickle
import shutil

import pytest
from builders import TINY, TINY_STUDENT, respecial, save_decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine import WORDS, save_student

from disranker.contract import Contract, Tokens, file_digest
from disranker.recipe import Refused

FORMS = {"decoder": TINY, "encoder": TINY_STUDENT}
words = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
texts = words | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "decoder": save_decoder(tmp_path_factory.mktemp("decoder")),
        "encoder": save_student(tmp_path_factory.mktemp("encoder")),
    }


@pytest.fixture(scope="module")
def agreed(folders):
    return {form: Tokens.agree(folders[form], form, limits) for form, limits in FORMS.items()}


@pytest.fixture
def copy(folders, tmp_path):
    return {form: shutil.copytree(folder, tmp_path / form) for form, folder in folders.items()}


def one(tokens, query, title, summary):
    return tokens.prompts([query], [title], [summary])[0]


def readable(tokens, ids):
    return [tokens._tokenizer.id_to_token(i) for i in ids]


@pytest.mark.parametrize("form", FORMS)
def test_tokens_sent_to_another_process_give_the_same_ids_and_take_typed_special_tokens_for_text(agreed, form):
    tokens = agreed[form]
    typed = ("[SEP] </s> shoe", "red [CLS] <pad>", "")
    ids, _ = one(tokens, *typed)
    assert one(pickle.loads(pickle.dumps(tokens)), *typed)[0] == ids
    contract = tokens.contract
    assert ids.count(contract.close) == (2 if form == "encoder" else 1) and contract.pad not in ids


def test_a_decoder_reads_query_title_summary_on_3_lines(agreed):
    ids, of_query = one(agreed["decoder"], "red shoe", "blue", "rain")
    newline = "\u010a"  # how a byte-level vocabulary writes it
    space = "\u0120"
    found = "".join(readable(agreed["decoder"], ids))
    assert found == f"<s>{space}red{space}shoe{newline}{space}blue{newline}{space}rain</s>"
    assert "".join(readable(agreed["decoder"], ids[:of_query])) == f"<s>{space}red{space}shoe{newline}"


def test_an_encoder_reads_query_then_title_and_summary_between_separators(agreed):
    ids, of_query = one(agreed["encoder"], "red shoe", "blue", "rain")
    assert readable(agreed["encoder"], ids) == ["[CLS]", "red", "shoe", "[SEP]", "blue", "rain", "[SEP]"]
    assert of_query == 4


def test_an_empty_summary_leaves_no_line_behind(agreed):
    ids, _ = one(agreed["decoder"], "red", "blue", "")
    assert "".join(readable(agreed["decoder"], ids)).endswith("blue</s>")


@pytest.mark.parametrize(("form", "least"), [("decoder", 3), ("encoder", 3)])
def test_nothing_at_all_is_opened_parted_and_closed(agreed, form, least):
    ids, of_query = one(agreed[form], "", "", "")
    assert (len(ids), of_query) == (least, 2) and ids[-1] == agreed[form].contract.close


@pytest.mark.parametrize("form", FORMS)
def test_every_text_of_0_to_40_words_is_closed_and_no_longer_than_24_ids(agreed, form):
    tokens = agreed[form]
    for count in range(40):
        for fields in (("red", "blue", "red " * count), ("red", "blue " * count, ""), ("red " * count, "", "blue")):
            ids, of_query = one(tokens, *fields)
            assert len(ids) <= 24 and ids[-1] == tokens.contract.close and ids[0] == tokens.contract.open
            assert of_query <= 1 + 6 + 1 and tokens.contract.pad not in ids


@pytest.mark.parametrize("form", FORMS)
def test_the_summary_gives_way_first_and_query_and_title_have_limits_of_6_and_8(agreed, form):
    tokens = agreed[form]
    ids, of_query = one(tokens, "red " * 20, "blue " * 20, "rain " * 20)
    found = [token.removeprefix("\u0120") for token in readable(tokens, ids)]
    assert len(ids) == 24 and of_query == 8
    counts = [found.count(word) for word in ("red", "blue", "rain")]
    assert counts == [6, 8, 24 - 1 - 6 - 1 - 8 - 1 - (form == "decoder")]


@pytest.mark.parametrize("form", FORMS)
def test_one_word_too_many_is_cut_and_at_the_limit_none(agreed, form):
    tokens = agreed[form]
    room = 24 - len(one(tokens, "red", "blue", "rain")[0]) + 1
    fits, over = (one(tokens, "red", "blue", " ".join(["rain"] * n))[0] for n in (room, room + 1))
    assert len(fits) == 24 and fits == over
    assert len(one(tokens, "red", "blue", " ".join(["rain"] * (room - 1)))[0]) == 23


@pytest.mark.parametrize("form", FORMS)
def test_a_passage_of_50_words_is_cut_into_pieces_of_22_22_and_6_each_opened_and_closed(agreed, form):
    tokens = agreed[form]
    long, none, short = tokens.passages(["shoe " * 49 + "rain", "", "red"])
    bounds = {(piece[0], piece[-1]) for piece in (*long, *short)}
    assert bounds == {(tokens.contract.open, tokens.contract.close)} and none == []
    assert [len(piece) for piece in long] == [24, 24, 8] and [len(piece) for piece in short] == [3]
    words = [token.removeprefix("\u0120") for piece in long for token in readable(tokens, piece[1:-1])]
    assert words == ["shoe"] * 49 + ["rain"]


def test_a_tokenizer_without_an_opening_token_leaves_room_for_one_more(agreed):
    tokens = agreed["decoder"]
    bare = Tokens(tokens.contract.model_copy(update={"open": None}), tokens._tokenizer)
    [[first, second]] = bare.passages(["shoe " * 23 + "rain"])
    assert (len(first), len(second)) == (24, 2) and first[0] == first[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts, texts, texts)
def test_any_text_is_closed_once_opened_once_and_parted_where_the_prompt_ends(agreed, query, title, summary):
    for form, tokens in agreed.items():
        ids, of_query = one(tokens, query, title, summary)
        assert 2 <= len(ids) <= 24 and ids[-1] == tokens.contract.close and ids[0] == tokens.contract.open
        assert of_query < len(ids)
        parting = tokens.contract.close if form == "encoder" else tokens._newline[-1]
        assert ids[of_query - 1] == parting
        assert one(tokens, query, "red", "")[0][:of_query] == ids[:of_query]


def test_pairs_of_a_batch_equal_those_one_by_one(agreed):
    fields = (["red", "blue shoe", ""], ["a", "", "rain"], ["", "warm " * 30, "x"])
    for tokens in agreed.values():
        assert tokens.pairs(*fields) == [one(tokens, *each)[0] for each in zip(*fields, strict=True)]


def test_lists_of_unequal_length_are_an_error(agreed):
    with pytest.raises(ValueError):
        agreed["encoder"].pairs(["a", "b"], ["c"], ["d"])


def test_the_digest_changes_with_every_field(agreed):
    contract = agreed["decoder"].contract
    changed = [
        {"version": 2},
        {"form": "encoder"},
        {"tokenizer": "other"},
        {"pad": 9},
        {"open": None},
        {"close": 9},
        {"pooling": "mean"},
        *({name: getattr(contract, name) + 1} for name in ("max_query_tokens", "max_title_tokens", "max_tokens")),
    ]
    digests = {contract.model_copy(update=change).digest for change in changed}
    assert len(digests) == 10 == len(Contract.model_fields) and contract.digest not in digests
    assert contract.digest == Contract.model_validate_json(contract.model_dump_json()).digest


def test_which_tokens_are_scored_is_the_choice_of_a_decoder_alone(folders, agreed):
    mean = TINY.model_copy(update={"pooling": "mean"})
    assert Tokens.agree(folders["decoder"], "decoder", mean).contract.pooling == "mean"
    assert agreed["decoder"].contract.pooling == "last" and agreed["encoder"].contract.pooling is None
    assert Tokens.agree(folders["encoder"], "encoder", TINY).contract.pooling is None
    with pytest.raises(Refused, match=r"teacher\.pooling mean is for decoders; .* holds an encoder"):
        Tokens.agree(folders["encoder"], "encoder", mean)


def test_a_saved_contract_gives_the_same_ids_when_loaded(copy, agreed):
    for form, folder in copy.items():
        agreed[form].contract.save(folder)
        loaded = Tokens.load(folder)
        assert loaded.contract == agreed[form].contract
        assert one(loaded, "red shoe", "blue", "rain " * 30) == one(agreed[form], "red shoe", "blue", "rain " * 30)


def test_a_swapped_tokenizer_is_refused_with_both_digests(copy):
    before = file_digest(copy["decoder"] / "tokenizer.json")
    shutil.copy(copy["encoder"] / "tokenizer.json", copy["decoder"])
    after = file_digest(copy["decoder"] / "tokenizer.json")
    with pytest.raises(Refused, match=rf"made for tokenizer {before} and template 1, but here are tokenizer {after}"):
        Tokens.load(copy["decoder"])


def test_a_contract_of_another_template_is_refused(copy):
    file = copy["encoder"] / "contract.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    with pytest.raises(Refused, match=r"template 2, but here are .* template 1"):
        Tokens.load(copy["encoder"])


@pytest.mark.parametrize(
    ("specials", "told"),
    [
        (
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
            "one token (2) for pad_token and eos_token; set pad_token to another",
        ),
        (
            {"bos_token": "<s>", "eos_token": "</s>"},
            "no pad_token; set pad_token, to another token than eos_token (2)",
        ),
        (
            {"bos_token": "<s>", "pad_token": "<pad>"},
            "no eos_token, which closes every text; set eos_token",
        ),
        ({"bos_token": "<s>"}, "no eos_token, which closes every text; set eos_token"),
    ],
)
def test_a_tokenizer_that_cannot_close_a_text_or_pads_with_the_closing_token_is_refused(copy, specials, told):
    respecial(copy["decoder"], **specials)
    with pytest.raises(Refused) as refusal:
        Tokens.agree(copy["decoder"], "decoder", TINY)
    assert str(refusal.value) == f"tokenizer in {copy['decoder']} has {told} in its tokenizer_config.json"


def test_an_encoder_without_a_separator_is_told_to_set_one(copy):
    respecial(copy["encoder"], cls_token="[CLS]", pad_token="[PAD]")
    with pytest.raises(Refused, match=r" has no sep_token, which closes every text; set sep_token in its tokenizer_c"):
        Tokens.agree(copy["encoder"], "encoder", TINY_STUDENT)


def test_a_decoder_without_an_opening_token_starts_with_the_query(copy):
    respecial(copy["decoder"], eos_token="</s>", pad_token="<pad>")
    tokens = Tokens.agree(copy["decoder"], "decoder", TINY)
    ids, of_query = one(tokens, "red", "", "")
    assert tokens.contract.open is None and readable(tokens, ids) == ["\u0120red", "\u010a", "</s>"] and of_query == 2


def test_a_tokenizer_file_that_cuts_and_pads_does_neither_here(copy, agreed):
    file = copy["encoder"] / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    file.write_text(json.dumps(content))
    tokens = Tokens.agree(copy["encoder"], "encoder", TINY_STUDENT)
    fields = ("red shoe blue red", "rain rain rain rain", "")
    assert one(tokens, *fields) == one(agreed["encoder"], *fields)
