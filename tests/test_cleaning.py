# ruff: noqa: RUF001 - letters that look alike are what this is about

import unicodedata
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import cleaning, tables
from disranker.inputs import Cleaning

NOON = datetime(2026, 10, 1, 12, tzinfo=UTC)
OFF = Cleaning(
    max_searches_per_hour=0,
    max_searches_per_day=0,
    max_click_share=0.0,
    max_searches_without_click=0,
    max_repeats_per_day=0,
)
# Letters that meet: joiners, viramas, Arabic, kana, jamo, accents that fold, digits, what is invisible.
HARD = (
    "\u200c\u200d\u094d\u0915\u0628\u062f\u0640\ufe71\u0653\u0627\u309b\uff9e\u304b\u1100\u1161\u3164\u0345\u0130\u0316"
)
HARD += "\u0338\u00ad\ufeff\u2764\ufe0f\U0001f525\U0001f3fd\x00\x85\u3000 aB@.+-()0123456789\u0663\uff11"

# Spelling


@pytest.mark.parametrize(
    ("typed", "one"),
    [
        ("  Red\tSHOE ", "red shoe"),
        ("\uff33\uff28\uff2f\uff25\u3000\uff14\uff12", "shoe 42"),
        ("手机\u3000壳", "手机 壳"),
        ("ﾌﾞﾙｰ", "ブルー"),
        ("ﾊﾟﾝ", "パン"),
        ("か\u309b は\u309c", "が ぱ"),  # NFKC alone: か, space, mark
        ("ﻼ", "لا"),
        ("كتـــاب", "كتاب"),
        ("ب\ufe70", "ب\u064b"),
        ("ا\u0640\u0653", "\u0622"),
        ("co\u00adop", "coop"),
        ("\ufeffshoe\u200b", "shoe"),
        ("\u202bنعل\u202c \u2066x\u2069\u200e\u061c", "نعل x"),
        ("red\x00shoe\x1b\x85", "red shoe"),
        ("❤\ufe0f", "❤"),
        ("葛\U000e0100", "葛"),
        ("\U0001f3f4\U000e0067\U000e007f", "\U0001f3f4"),
        ("\u3164", ""),
        ("\u0130\u0316", "i\u0316\u0307"),
    ],
)
def test_spellings_become_one(typed, one):
    assert cleaning.normalise(typed) == one


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",  # Persian
        "بِ\u200cها",  # with a vowel mark
        "क्\u200dष",
        "क्\u200cष",
        "ශ්\u200dරී",
        "র\u200d\u09cdযাম",  # the joiner stands before the virama
        "ന്\u200d",  # at the end of a word
        "\U0001f469\u200d\U0001f4bb",
        "\U0001f469\U0001f3fd\u200d\U0001f4bb",
        "\U0001f642\u200d\u2194",
    ],
)
def test_a_joiner_that_a_reader_sees_stays(text):
    assert cleaning.normalise(text) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize(
    ("typed", "one"),
    [
        ("a\u200cb", "ab"),
        ("\u200dshoe\u200c", "shoe"),
        ("کار\u200cخانه", "کارخانه"),  # ر joins nothing, so nothing is parted
        ("ب\u200dب", "بب"),
        ("ب\u200c", "ب"),
        ("می\u200c\u200c\u200dخواهم", "می\u200cخواهم"),
        ("\U0001f525\u200ca", "\U0001f525a"),
        ("\u1100\u200c\u1161", "가"),
    ],
)
def test_a_joiner_that_nobody_sees_goes(typed, one):
    assert cleaning.normalise(typed) == one


@settings(deadline=None, max_examples=1000)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(HARD))
def test_normalising_and_masking_twice_is_doing_so_once(text):
    once, (masked, kinds) = cleaning.normalise(text), cleaning.mask(text)
    assert cleaning.normalise(once) == once and "  " not in once and once == once.strip()
    assert cleaning.mask(masked) == (masked, ()) and cleaning.normalise(masked) == masked
    assert (masked == once) == (not kinds)


def test_each_character_alone_and_between_letters_is_normalised_once_and_for_all():
    for code in [*range(0xD800), *range(0xF900, 0x10000), *range(0x1F000, 0x1FAFF)]:
        for text in (chr(code), f"ب{chr(code)}ب"):
            once = cleaning.normalise(text)
            assert cleaning.normalise(once) == once


@given(st.text(st.characters(max_codepoint=127, exclude_categories=["Cc"]) | st.sampled_from("\t\n\v\f\r\x1c\x1f")))
def test_ascii_is_spelt_as_the_log_spells_it(text):
    assert cleaning.normalise(text) == cleaning.normalise(text)


# Personal data

MASKED = {
    "email": [
        "foo@bar.com", "Foo.Bar+x@Mail.Example.co.uk", "müller@web.de", "用户@例子.公司", "अजय@डाटा.भारत",
        "\uff46\uff4f\uff4f\uff20\uff42\uff41\uff52\uff0e\uff43\uff4f\uff4d",
    ],
    "card": [
        "4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "٤١١١١١١١١١١١١١١١", "378282246310005",
        "3782 822463 10005", "3056 930902 5904", "5555555555554444", "6011111111111117", "3530111333300000",
        "2200 0000 0000 0053", "4222222222222",
    ],
    "phone": [
        "+49 171 1234567", "+1 (555) 123-4567", "+8613800138000", "+49 (0)171 1234567", "0049 171 1234567",
        "00491711234567", "+٩٦٦ ٥٥ ١٢٣ ٤٥٦٧", "(555) 123-4567", "555-123-4567", "555.123.4567", "1 555 123 4567",
        "0171 1234567", "0171/1234567", "089 / 123 45 67", "06 12 34 56 78", "03-1234-5678",
        "０９０ー１２３４ー５６７８", "138 0013 8000", "13800138000", "010-1234-5678", "(11) 91234-5678",
        "055 123 4567", "8 (912) 345-67-89", "8-912-345-67-89", "01711234567", "+46 8 1234 56",
    ],
}  # fmt: skip
KEPT = [
    "iphone 15 pro 256", "rtx 4090", "10x20x30", "10 x 20 x 30 cm", "100 200 300", "600 600 2000", "1920x1080",
    "2019 2020 2021", "2024-12-24 18:30", "24.12.2024", "978-3-16-148410-0", "9783161484100", "3-16-148410-0",
    "0306402152", "316148410x", "4006381333931", "4 006381 333931", "036000291452", "00012345678905", "96385074",
    "10012345678902", "b08n5wrwnl", "205 55 16 91", "90915-10003", "0 986 494 104", "0986494104", "11 42 7 566 327",
    "192.168.100.100", "1.234.567,89", "12v@2.5a", "4k@60hz", "canon @ 50mm", "@nike", "1234567890", "123-456-789",
    "lego 75192 7541 pieces", "32gb 3200 mhz ddr4 2x16", "4111111111111112", "1234567812345670",
    "89490200001234567890", "+2 ps5 controller", "x13800138000", "g4111111111111111", "s/n 490154203237518",
    "0.171 1234567", "iphone (2023) 128 256 512", "41 11 11 11 11 11 11 11", "01 02 2024", "<email> <card> <phone>",
    "4000000000006", "0012345678905", "411111 11 1111 1111",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in MASKED.items() for text in texts])
def test_personal_data_is_masked_alone_in_a_sentence_and_between_chinese(kind, text):
    assert cleaning.mask(text) == (f"<{kind}>", (kind,))
    assert cleaning.mask(f"Call {text}, now") == (f"call <{kind}>, now", (kind,))
    if text.isascii():
        assert cleaning.mask(f"联系{text}谢谢") == (f"联系<{kind}>谢谢", (kind,))


@pytest.mark.parametrize("text", KEPT)
def test_the_numbers_of_products_are_kept(text):
    assert cleaning.mask(text) == (text, ())


@pytest.mark.parametrize(
    ("typed", "masked"),
    [
        ("visa 4111 1111 1111 1111 12/25", "visa <card> 12/25"),
        ("4111 1111 1111 1111 12 25", "<card> 12 25"),
        ("call 0171 1234567 128 gb case", "call <phone> 128 gb case"),
        ("+49 171 1234567 2024", "<phone> 2024"),
        ("x/13800138000@b.co shoe", "<email> shoe"),
        ("13800138000\u0338", "<phone\u226f"),  # the accent joins with the ">"
        ("a@b.co c@d.co 0171 1234567", "<email> <email> <phone>"),
    ],
)
def test_what_stands_beside_personal_data_is_kept(typed, masked):
    assert cleaning.mask(typed)[0] == masked


def test_kinds_stand_in_one_order_and_once():
    assert cleaning.mask("+49 171 1234567 a@b.co c@d.co")[1] == ("email", "phone")


def test_a_column_counts_rows_and_keeps_its_order_and_nulls():
    queries = pl.Series("query", ["RED", None, "a@b.co", "red", "A@b.co", "x 13800138000"])
    found, counts = cleaning.masked(queries)
    assert found.to_list() == ["red", None, "<email>", "red", "<email>", "x <phone>"] and found.name == "query"
    assert counts == {"email": 2, "card": 0, "phone": 1}
    assert cleaning.masked(queries.clear())[0].len() == 0


# Bots


def searches(*rows):
    """Rows of (client, query, seconds after noon, clicks), a page of 10 hits each, or (…, hits)."""
    found = []
    for number, (client, query, second, clicks, *hits) in enumerate(rows):
        shown = hits[0] if hits else [page_hit(f"d{n}", n + 1, n < clicks) for n in range(10)]
        at = NOON + timedelta(seconds=second)
        found.append({"query_id": f"{number:05d}", "query": query, "client": client, "time": at, "hits": shown})
    return tables.conform("searches", found)


def page_hit(doc_id, position, clicked=False, dwell_s=None, converted=False):
    return {"doc_id": doc_id, "position": position, "clicked": clicked, "dwell_s": dwell_s, "converted": converted}


def caught(cfg, *rows):
    return cleaning.bots(cleaning.activity(searches(*rows)), cfg).rows()


def settings_of(**limits):
    return OFF.model_copy(update=limits)


def test_4_searches_in_an_hour_of_the_clock_exceed_3():
    cfg, rows = settings_of(max_searches_per_hour=3), [("a", f"q{n}", 1199 * n, 1) for n in range(3)]
    assert caught(cfg, *rows, ("a", "q", 3600, 1), ("b", "q", 0, 1)) == []
    assert caught(cfg, *rows, ("a", "q", 3599, 1), ("b", "q", 0, 1)) == [("a", "rate")]


def test_4_searches_on_a_day_exceed_3_and_midnight_parts_days():
    cfg, rows = settings_of(max_searches_per_day=3), [("a", f"q{n}", 3600 * n, 1) for n in range(3)]
    assert caught(cfg, *rows, ("a", "q", 12 * 3600, 1)) == []
    assert caught(cfg, *rows, ("a", "q", 12 * 3600 - 1, 1)) == [("a", "volume")]


def test_a_share_of_5_clicks_in_10_exceeds_0_4_and_4_do_not():
    cfg = settings_of(max_click_share=0.4, min_pages_for_click_share=2)
    assert caught(cfg, ("a", "q", 0, 4), ("a", "r", 0, 4)) == []
    assert caught(cfg, ("a", "q", 0, 4), ("a", "r", 0, 5)) == [("a", "click_through")]
    assert caught(cfg, ("a", "q", 0, 10)) == []  # one page is too few


def test_pages_of_4_hits_say_nothing_about_click_through_and_of_5_do():
    cfg = settings_of(max_click_share=0.4, min_pages_for_click_share=1)
    four = [page_hit(f"d{n}", n, True) for n in range(4)]
    assert caught(cfg, ("a", "q", 0, 0, four), ("a", "q", 0, 1)) == []
    assert caught(cfg, ("a", "q", 0, 0, [*four, page_hit("e", 5)]), ("b", "q", 0, 0)) == [("a", "click_through")]


def test_3_searches_without_any_click_exceed_2_and_one_click_clears():
    cfg, rows = settings_of(max_searches_without_click=2), [("a", f"q{n}", 0, 0) for n in range(3)]
    assert caught(cfg, *rows) == [("a", "no_click")] and caught(cfg, *rows[:2]) == []
    assert caught(cfg, *rows, ("a", "q", 0, 1)) == []


def test_a_query_3_times_on_a_day_exceeds_2():
    cfg, day = settings_of(max_repeats_per_day=2), 86_400
    assert caught(cfg, ("a", "q", 0, 1), ("a", "q", 1, 1), ("a", "r", 2, 1), ("a", "q", day, 1)) == []
    assert caught(cfg, ("a", "q", 0, 1), ("a", "q", 1, 1), ("a", "q", 7200, 1)) == [("a", "repetition")]


def test_a_client_may_exceed_2_limits_and_0_switches_all_off():
    rows = [("a", "q", 0, 0)] * 3
    both = settings_of(max_repeats_per_day=2, max_searches_per_hour=2)
    assert caught(both, *rows) == [("a", "rate"), ("a", "repetition")]
    assert caught(OFF, *[("a", "q", 0, 10)] * 300) == [] and caught(Cleaning()) == []


def test_activity_of_2_tables_adds_up():
    halves = [cleaning.activity(searches(("a", "q", 0, 1), ("a", "q", 1, 1))) for _ in range(2)]
    assert cleaning.bots(pl.concat(halves), settings_of(max_searches_per_hour=3)).rows() == [("a", "rate")]


def test_a_slice_of_a_table_and_an_empty_page_are_counted_right():
    table = pa.concat_tables([searches(("z", "q", 0, 9)), searches(("a", "q", 0, 0, []), ("a", "q", 0, 3))]).slice(1)
    found = cleaning.activity(table)
    assert found["clicks"].to_list() == [0, 3] and found["telling_hits"].to_list() == [0, 10]


def test_a_keen_person_of_60_pages_an_hour_with_a_click_on_every_second_page_is_no_bot():
    assert caught(Cleaning(), *[("a", f"q{n // 5}", 60 * n, n % 2) for n in range(60)]) == []


def test_the_defaults_catch_a_harvester_a_scraper_and_a_rank_tracker():
    harvester = [("h", f"q{n}", 7200 * n, 6) for n in range(20)]
    scraper = [("s", f"q{n}", 7200 * n, 0) for n in range(101)]
    tracker = [("t", "q", 600 * n, 1) for n in range(144)]
    assert caught(Cleaning(), *harvester, *scraper, *tracker) == [
        ("h", "click_through"), ("s", "no_click"), ("t", "repetition"),
    ]  # fmt: skip


# Sessions


def frame(*rows):
    return pl.DataFrame(pl.from_arrow(searches(*rows)))


def unrepeated(*rows):
    """(searches in their order, counts) where pages that were loaded again are one."""
    table = searches(*rows)
    pages = cleaning.pages(table, 1800)
    again = pages.is_duplicated()
    merged, counts = cleaning.merged(table.filter(again.to_arrow()), pages.filter(again))
    both = [table.filter((~again).to_arrow()), merged]
    assert all(one.schema == table.schema for one in both)
    return pl.DataFrame(pl.from_arrow(pa.concat_tables(both))).sort("query_id"), counts


def test_a_pause_of_more_than_30_minutes_begins_a_session():
    rows = [("b", "q", 1801 + 1800, 0), ("a", "q", 5, 0), ("b", "q", 0, 0), ("b", "q", 1800, 0), ("a", "q", 9000, 0)]
    found = cleaning.sessions(frame(*rows), 1800)
    assert found["session"].to_list() == [1, 0, 0, 0, 1] and found["client"].to_list() == ["b", "a", "b", "b", "a"]


@pytest.mark.parametrize("turn", [1, -1])
def test_a_page_loaded_again_is_one_look_with_the_clicks_of_both(turn):
    first = [page_hit("x", 1), page_hit("y", 2, True, 5), page_hit("z", 3, True)]
    again = [page_hit("y", 1, True, 7, True), page_hit("x", 2, True, 2), page_hit("w", 3, True)]
    found, counts = unrepeated(*[("a", "q", 60, 0, again), ("a", "q", 0, 0, first)][::turn])
    assert counts == {"repeated_pages": 1, "lost_clicks": 1} and found["time"].to_list() == [NOON]
    assert found["hits"].to_list() == [
        [page_hit("x", 1, True, 2), page_hit("y", 2, True, 12, True), page_hit("z", 3, True)]
    ]


def test_another_page_session_query_or_client_is_no_repetition():
    second = [page_hit("d0", 11)]
    rows = [("a", "q", 0, 1), ("a", "q", 9, 0, second), ("a", "q", 9000, 1), ("a", "r", 0, 1), ("b", "q", 0, 1)]
    rows += [("c", "q", 0, 0, [page_hit("d0", 10), page_hit("d1", 11)]), ("c", "q", 9, 0, second)]
    found, counts = unrepeated(*rows)
    assert found.equals(frame(*rows)) and counts == {"repeated_pages": 0, "lost_clicks": 0}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("qr"), st.integers(0, 9000), st.integers(0, 2))))
def test_what_is_left_has_no_repetition_and_no_click_is_lost_on_equal_pages(rows):
    once, counts = unrepeated(*rows)
    assert once.height + counts["repeated_pages"] == len(rows) and counts["lost_clicks"] == 0
    keys = cleaning.sessions(frame(*rows), 1800).select("client", "session", "query").unique()
    assert keys.height == once.height


# Clients of a query


def test_a_query_of_3_clients_stays_where_3_are_asked_for():
    queries = pl.DataFrame({"query": ["x", "y", "z"], "clients": [2, 3, 4]})
    assert cleaning.few_clients(queries, 3).to_list() == ["x"] and cleaning.few_clients(queries, 0).is_empty()
