"""The page at `/`, in a browser, over HTTP, with real models."""

import hashlib
import json
import os
import re
import shutil
import time
from base64 import b64encode

import pytest
from endpoints import over_http, reranking

from serve import page as served
from serve.access import Key, Keys
from serve.judgments import left

TOKEN = "t" * 43
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def test_the_page_asks_nobody_else_and_runs_what_its_policy_names():
    html, policy = served.html(), served.headers()["Content-Security-Policy"]
    fetched = [link for link in re.findall(r"\b(?:src|href|action)=\"([^\"]*)|url\(|@import", html) if link != "data:,"]
    assert not fetched
    assert "innerHTML" not in html and "style=" not in html and not re.search(r"<[^>]+ on\w+=", html)
    assert (html.count("<script"), html.count("<style")) == (1, 1)
    script = html.split("<script>")[1].split("</script>")[0]
    assert f"script-src 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def reranker(released, other, records):
    experiment = {"name": "e1", "kind": "shadow", "bundle": other, "share": 0.1}
    with reranking(released, experiment, max_documents=50, max_query_chars=200, records=str(records)) as made:
        yield made


@pytest.fixture(scope="module")
def url(reranker):
    with over_http(reranker) as (host, port):
        yield f"http://{host}:{port}/"


@pytest.fixture(scope="module")
def browser(url):  # after the models: its event loop would be in their way
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        root = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=root)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page, open; afterwards nothing went wrong in it but what the server refused."""
    page, wrong = browser.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(url)
    yield page
    page.close()
    assert not [text for text in wrong if "Failed to load resource" not in text]


def ask(page, query="red shoe", documents=("red trail shoe\tLight", "warm rain jacket", "blue kids size", "sale")):
    page.fill("#query", query)
    page.fill("#documents", "\n".join(documents))
    page.click("#run")


def said(page, where, words):
    """Waits until the page says so."""
    page.locator(f"#{where}").filter(has_text=words).wait_for()


def rows(records, query):
    """Judgments of a query, once there are any; a thread of the replica writes them."""
    for _ in range(500):
        lines = [line for path in records.glob("*gsb_judgments*") for line in path.read_text().splitlines()]
        if found := [row for row in map(json.loads, lines) if row["query"] == query]:
            return found
        time.sleep(0.02)
    raise AssertionError("no judgment was written")


def test_an_example_is_compared_judged_and_written_by_keyboard_alone(page, records, reranker):
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.press("Tab")
    page.keyboard.press("w")  # of the list, the example that begins with it
    query = page.input_value("#query")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#found:not([hidden])")
    texts = [page.locator(f"#{side} .title").all_inner_texts() for side in ("left", "right")]
    assert len(texts[0]) == 8 and sorted(texts[0]) == sorted(texts[1])
    assert "Two rankings" in page.inner_text("#spoken")
    assert page.evaluate("document.activeElement.id") == "asked"
    assert "model" not in page.inner_text("#lists") and "candidate" not in page.inner_text("#lists")
    assert page.locator(".score").count() == 0
    page.keyboard.press("g")
    page.wait_for_selector("#next:not([hidden])")
    (row,) = rows(records, query)
    assert row["left"] == left(row["request_id"]) and row["verdict"] == ("good" if row["left"] == "old" else "bad")
    assert (row["old"], row["new"]) == (reranker._live().digest, reranker._trial.candidate.digest)
    better = "better" if row["verdict"] == "good" else "worse"
    assert page.inner_text("#status").startswith(f"Saved: the candidate ({row['new'][:8]}) is {better} than the live")
    assert page.inner_text("#left-name") == f"Left is {named('live' if row['left'] == 'old' else 'candidate', row)}"
    assert page.locator(".score").count() == 16
    assert page.evaluate("document.activeElement.id") == "next"
    page.keyboard.press("b")  # too late: the names are in sight
    page.keyboard.press("n")
    assert page.evaluate("document.activeElement.id") == "query"
    assert len(rows(records, query)) == 1


def named(role, row):
    known = {"live": ("the live model", row["old"]), "candidate": ("the candidate", row["new"])}
    return f"{known[role][0]} ({known[role][1][:8]})"


def test_moves_are_marked_and_drawn_from_rank_to_rank(page):
    ask(page, documents=[f"shoe {letter * 3}" for letter in "abcdefg"])
    page.wait_for_selector("#found:not([hidden])")
    left_to, right_to = (page.locator(f"#{side} .title").all_inner_texts() for side in ("left", "right"))
    moves = [left_to.index(text) - rank for rank, text in enumerate(right_to)]
    assert any(moves)
    signs = [f"▲ {move}" if move > 0 else f"▼ {-move}" if move < 0 else "=" for move in moves]
    assert page.locator("#right .move").all_inner_texts() == signs
    kinds = page.locator("#moves path").evaluate_all("paths => paths.map(path => path.classList[0])")
    assert kinds == ["up" if move > 0 else "down" if move < 0 else "stay" for move in moves]


def test_shortcuts_do_not_fire_while_somebody_types(page, records):
    ask(page, "typed first")
    page.wait_for_selector("#found:not([hidden])")
    for field in ("#query", "#documents"):
        page.focus(field)
        page.keyboard.type("gsb")
    page.keyboard.press("Escape")
    assert page.is_hidden("#next")
    page.focus("#asked")
    page.keyboard.press("Control+b")
    assert page.is_hidden("#next")
    page.keyboard.press("s")
    page.wait_for_selector("#next:not([hidden])")
    assert [row["verdict"] for row in rows(records, "typed first")] == ["same"]


def test_who_looks_without_judging_sees_the_names_and_may_no_longer_judge(page):
    ask(page)
    page.click("#reveal")
    assert "the live model" in page.inner_text("#lists") and "the candidate" in page.inner_text("#lists")
    assert page.locator("[data-verdict]:disabled").count() == 3
    assert page.inner_text("#status") == "Shown without a judgment."


def test_what_is_missing_or_refused_is_said_in_words(page):
    ask(page, documents=[])
    assert page.inner_text("#error").startswith("Give two documents or more")
    assert page.evaluate("document.activeElement.id") == "documents"
    ask(page, query=" ")
    assert page.inner_text("#error") == "Type a query."
    ask(page, query="a" * 201)
    said(page, "error", "201 characters are too many")
    assert page.is_hidden("#found")
    page.context.set_offline(True)
    ask(page)
    said(page, "error", "does not answer")
    page.context.set_offline(False)
    ask(page)
    page.wait_for_selector("#found:not([hidden])")
    assert page.inner_text("#error") == ""


def test_a_judgment_that_is_not_saved_says_so_and_may_be_pressed_again(page, reranker, records, monkeypatch):
    ask(page, "pressed twice")
    page.wait_for_selector("#found:not([hidden])")
    with monkeypatch.context() as broken:
        broken.setattr(reranker, "_judgments", None)
        page.keyboard.press("s")
        said(page, "status", "Not saved")
    assert "the setting records is empty" in page.inner_text("#status") and page.is_hidden("#next")
    page.keyboard.press("s")
    page.wait_for_selector("#next:not([hidden])")
    assert len(rows(records, "pressed twice")) == 1


def test_where_there_are_keys_a_token_is_asked_for_and_kept_by_the_tab_alone(page, reranker, monkeypatch):
    key = Key(name="anna", sha256=hashlib.sha256(TOKEN.encode()).hexdigest())
    monkeypatch.setattr(reranker, "keys", Keys([key]))
    ask(page)
    said(page, "error", "asks for a key")
    assert page.evaluate("document.activeElement.id") == "token"
    page.keyboard.type(TOKEN)
    page.click("#run")
    page.wait_for_selector("#found:not([hidden])")
    assert TOKEN not in page.url
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.reload()
    assert page.input_value("#token") == TOKEN


def test_without_a_candidate_the_page_says_so_and_shows_the_order_given(page, reranker, monkeypatch):
    monkeypatch.setattr(reranker, "_trial", None)
    given = ["sale", "red shoe", "warm rain jacket", "blue kids size"]
    ask(page, documents=given)
    page.wait_for_selector("#note:not([hidden])")
    assert "No candidate is tried" in page.inner_text("#note")
    page.click("#reveal")
    side = "left" if "order given" in page.inner_text("#left-name") else "right"
    assert page.locator(f"#{side} .title").all_inner_texts() == given
    assert page.locator(f"#{side} .score").count() == 0


def test_markup_in_a_document_or_query_is_shown_as_text_and_does_nothing(page):
    hostile = [
        "<img src=x onerror=\"document.title='owned'\">\t<script>document.title='owned'</script>",
        "<b>plain</b>",
    ]
    ask(page, query="<svg onload=\"document.title='owned'\">", documents=hostile)
    page.wait_for_selector("#found:not([hidden])")
    assert hostile[0].split("\t")[0] in page.locator("#left .title").all_inner_texts()
    assert page.inner_text("#asked").startswith("<svg onload")
    assert page.locator("#found img, #found script, #found b, #asked svg").count() == 0
    assert "owned" not in page.title()


def test_on_a_narrow_screen_nothing_is_wider_than_it(page):
    page.set_viewport_size({"width": 400, "height": 800})
    ask(page, query="w" * 100, documents=["unbroken" * 20, "rain jacket\t" + "x" * 300])
    page.wait_for_selector("#found:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
