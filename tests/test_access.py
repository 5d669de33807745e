import hashlib
import hmac
import traceback
from datetime import date

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker.recipe import Refused
from serve import access
from serve.access import Forbidden, Key, Keys, Limiter, Unauthorised, check_host

TOKEN = "hF1mjVab8Sb2vV45Odm3PXIbRq9ukIMi1f6yd7PryPQ"
NEW_YEAR = 1798761600.0  # 2027-01-01 00:00:00 UTC
ANY = st.characters(exclude_categories=[])  # lone surrogates too
VALUES = st.none() | st.booleans() | st.integers() | st.dates() | st.sampled_from(["rerank", "a", TOKEN, ""])
SETTINGS = st.sampled_from(["keys", "name", "sha256", "rights", "requests_per_minute", "expires", TOKEN])


def sha256(token):
    return hashlib.sha256(token.encode()).hexdigest()


def key(name="shop", token=TOKEN, **more):
    return Key(name=name, sha256=sha256(token), **more)


def entry(name="shop", token=TOKEN, **more):
    """A key as a file has it."""
    return {"name": name, "sha256": sha256(token)} | more


def loaded(*entries):
    return Keys.load(None, {"DISRANKER_KEYS": yaml.safe_dump({"keys": list(entries)})})


def refusal(text):
    """What is said of the content of the variable, and after it the traceback."""
    with pytest.raises(Refused) as raised:
        Keys.load(None, {"DISRANKER_KEYS": text})
    assert "\n" not in str(raised.value)
    return str(raised.value), "".join(traceback.format_exception(raised.value))


def called(keys, authorization, right="rerank"):
    """The name of the caller, or the error."""
    try:
        return keys.caller(authorization, right).name
    except (Unauthorised, Forbidden) as error:
        assert TOKEN not in str(error) and len(str(error)) < 80
        return type(error)


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


# Loading


def test_a_file_and_the_variable_are_taken_together(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": [entry()]}))
    assert [each.name for each in Keys.load(str(file), {}).keys] == ["shop"]
    both = Keys.load(str(file), {"DISRANKER_KEYS": yaml.safe_dump({"keys": [entry("web", "other")]})})
    assert [each.name for each in both.keys] == ["shop", "web"]
    assert called(both, f"Bearer {TOKEN}") == "shop" and called(both, "Bearer other") == "web"


def test_without_file_and_variable_everybody_may_call():
    keys = Keys.load(None, {"PATH": "/bin"})
    assert keys.open and keys.caller(None, "judge") is None and keys.caller("Bearer x", "rerank") is None


def test_a_key_alone_has_3_rights_no_limit_and_no_end():
    (found,) = loaded(entry()).keys
    assert set(found.rights) == {"rerank", "events", "judge"}
    assert found.requests_per_minute == 0 and found.expires is None


def test_all_5_settings_are_read():
    (found,) = loaded(entry(rights=["judge"], requests_per_minute=600, expires=date(2027, 1, 1))).keys
    assert found == key(rights=["judge"], requests_per_minute=600, expires=date(2027, 1, 1))


def test_a_hash_in_capitals_as_windows_writes_it_is_the_same_hash():
    keys = loaded({"name": "shop", "sha256": sha256(TOKEN).upper()})
    assert called(keys, TOKEN) == "shop"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": TOKEN}, "keys.0.sha256: String should match"),
        ({"sha256": "a" * 63}, "keys.0.sha256: String should match"),
        ({"sha256": "a" * 65}, "keys.0.sha256: String should match"),
        ({"sha256": "g" * 64}, "keys.0.sha256: String should match"),
        ({"name": ""}, "keys.0.name: String should match"),
        ({"name": "a b"}, "keys.0.name: String should match"),
        ({"name": "a" * 33}, "keys.0.name: String should match"),
        ({"name": 7}, "keys.0.name: Input should be a valid string"),
        ({"rights": ["rank"]}, "keys.0.rights.0: Input should be 'rerank', 'events' or 'judge'"),
        ({"rights": []}, "keys.0.rights: Value should have at least 1 item"),
        ({"rights": "rerank"}, "keys.0.rights: "),
        ({"requests_per_minute": -1}, "keys.0.requests_per_minute: Input should be greater than or equal to 0"),
        ({"requests_per_minute": "600"}, "keys.0.requests_per_minute: Input should be a valid integer"),
        ({"expires": "soon"}, "keys.0.expires: Input should be a valid date"),
        ({"token": 1}, "keys.0: an unknown setting; it has name, sha256, rights, requests_per_minute, expires"),
        ({7: 1}, "keys.0: an unknown setting; it has name, sha256, rights, requests_per_minute, expires"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place(change, said):
    message, _ = refusal(yaml.safe_dump({"keys": [entry() | change]}))
    assert message.startswith(f"keys in DISRANKER_KEYS: {said}") and message.count(";") == said.count(";")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Input should be a valid dictionary"),
        ("[]", "Input should be a valid dictionary"),
        ("{}", "keys: Field required"),
        ("keys:", "keys: Input should be a valid list"),
        ("keys: []", "keys: List should have at least 1 item"),
        ("keys: [3]", "keys.0: Input should be a valid dictionary"),
        ("keys: [{}]", "keys.0.name: Field required; keys.0.sha256: Field required"),
        (yaml.safe_dump({"keys": [entry()], "more": 1}), "an unknown setting; it has keys"),
    ],
)
def test_no_empty_or_other_content_opens_the_door(text, said):
    assert refusal(text)[0].startswith(f"keys in DISRANKER_KEYS: {said}")


@pytest.mark.parametrize("line", [f"name: '{TOKEN}", f"*{TOKEN}", f"!{TOKEN} x", f"{TOKEN}: {TOKEN}: {TOKEN}"])
def test_broken_yaml_is_refused_with_its_line_and_without_quoting_it(line):
    message, shown = refusal(f"keys:\n- {line}")
    assert message == "keys in DISRANKER_KEYS, line 2: not YAML, or a date that does not exist" and TOKEN not in shown


@pytest.mark.parametrize("text", ["keys: 2027-02-30", "keys: !!timestamp x", "keys: !!bool x", "[" * 1000, "\0"])
def test_what_yaml_fails_at_in_other_ways_is_refused_too(text):
    assert refusal(text)[0] == "keys in DISRANKER_KEYS: not YAML, or a date that does not exist"


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent.yaml", "No such file or directory"), ("", "Is a directory"), ("latin.yaml", "not YAML")],
)
def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path, name, said):
    (tmp_path / "latin.yaml").write_bytes(b"\xe9\xff")
    with pytest.raises(Refused, match=f"^keys in {tmp_path / name}: {said}"):
        Keys.load(str(tmp_path / name), {})
    with pytest.raises(Refused, match="Is a directory"):
        Keys.load("", {})  # named by a variable that is not set


@pytest.mark.parametrize(
    ("second", "names"), [(entry("shop", "other"), "shop and shop"), (entry("web"), "shop and web")]
)
def test_two_keys_of_one_name_or_one_hash_are_refused_also_across_the_sources(tmp_path, second, names):
    said = f"keys: {names} have the same name or the same sha256"
    assert refusal(yaml.safe_dump({"keys": [entry(), entry("app", "third"), second]}))[0] == said
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": [entry()]}))
    with pytest.raises(Refused, match=said):
        Keys.load(str(tmp_path / "keys.yaml"), {"DISRANKER_KEYS": yaml.safe_dump({"keys": [second]})})


def test_one_hash_in_both_cases_of_letters_is_one_hash():
    with pytest.raises(Refused, match="the same sha256"):
        loaded(entry(), entry("web") | {"sha256": sha256(TOKEN).upper()})


@settings(deadline=None)
@given(st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SETTINGS, inner, max_size=5)))
def test_no_refusal_repeats_a_token_wherever_it_stands(content):
    for whole in (content, {"keys": content}, {"keys": [content]}):
        message, shown = refusal(yaml.safe_dump(whole))
        assert TOKEN not in message and TOKEN not in shown


def test_no_refusal_and_no_printed_key_repeats_a_hash():
    twice = [entry(), entry("web")]
    for content in ({"keys": twice}, {"keys": [entry() | {"name": sha256(TOKEN)}]}, {sha256(TOKEN): "shop"}):
        assert not [text for text in refusal(yaml.safe_dump(content)) if sha256(TOKEN) in text]
    assert sha256(TOKEN) not in repr(loaded(entry()))


# Who calls


@pytest.mark.parametrize(
    "authorization",
    [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN} ", f"Bearer\t{TOKEN}", TOKEN, f"  {TOKEN}"],
)
def test_a_token_is_known_with_its_scheme_and_alone(authorization):
    assert called(loaded(entry("app", "other"), entry()), authorization) == "shop"


@pytest.mark.parametrize("authorization", [None, "", "  ", "Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN} x"])
def test_a_caller_without_a_token_is_told_how_to_send_one(authorization):
    with pytest.raises(Unauthorised, match=r"^send a token, as Authorization: Bearer TOKEN$"):
        loaded(entry()).caller(authorization, "rerank")


@pytest.mark.parametrize("token", [TOKEN[:-1], TOKEN + "x", TOKEN.lower(), sha256(TOKEN), "é", "\ud800", "x" * 2**20])
def test_another_token_is_unknown(token):
    with pytest.raises(Unauthorised, match=r"^the token is not known here$"):
        loaded(entry()).caller(f"Bearer {token}", "rerank")


def test_a_token_beyond_ascii_is_hashed_as_utf_8():
    assert called(loaded(entry(token="ключ")), "Bearer ключ") == "shop"


@settings(deadline=None)
@given(
    st.none()
    | st.text(ANY)
    | st.builds("{}{}{}".format, st.sampled_from(["Bearer ", "bEARER\t", ""]), st.text(ANY), st.text(ANY))
)
def test_no_header_raises_anything_but_the_two_errors(authorization):
    assert called(loaded(entry(rights=["judge"])), authorization) is Unauthorised


def test_a_key_may_do_what_its_rights_say_and_nothing_else():
    keys = loaded(entry(rights=["rerank", "judge"]))
    assert [called(keys, TOKEN, right) for right in ("rerank", "events", "judge")] == ["shop", Forbidden, "shop"]
    with pytest.raises(Forbidden, match=r"^the key shop has not the right events$"):
        keys.caller(TOKEN, "events")


def test_an_unknown_right_is_nobodys():
    assert called(loaded(entry()), TOKEN, "reran") is Forbidden


@pytest.mark.parametrize(
    ("now", "expected"), [(NEW_YEAR - 0.5, "shop"), (NEW_YEAR, Unauthorised), (NEW_YEAR + 1e8, Unauthorised)]
)
def test_a_key_ends_when_its_day_begins_in_utc(now, expected):
    keys = Keys([key(expires=date(2027, 1, 1))], Clock(now))
    assert called(keys, TOKEN) == expected and not keys.open
    assert called(Keys([key()], Clock(now)), TOKEN) == "shop"


def test_an_expired_key_is_told_so_before_its_rights_are_looked_at():
    with pytest.raises(Unauthorised, match=r"^the token has expired$"):
        Keys([key(expires=date(2020, 1, 1), rights=["judge"])]).caller(TOKEN, "events")


@pytest.mark.parametrize("token", ["t0", "t2", "t4", "unknown"])
def test_a_token_is_compared_with_each_of_5_keys_wherever_it_matches(monkeypatch, token):
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, two: compared.append({one, two}) or compare(one, two))
    called(Keys([key(f"k{i}", f"t{i}") for i in range(5)]), token)
    assert compared == [{sha256(f"t{i}"), sha256(token)} for i in range(5)]


# How often


def test_600_a_minute_are_60_at_once_and_then_one_in_a_tenth_of_a_second():
    clock, caller = Clock(), key(requests_per_minute=600)
    limiter = Limiter(clock)
    assert [limiter.take(caller) for _ in range(60)] == [0.0] * 60
    assert limiter.take(caller) == pytest.approx(0.1)
    clock.now += 0.075
    assert limiter.take(caller) == pytest.approx(0.025)  # the refused one cost nothing
    clock.now += 0.03
    assert limiter.take(caller) == 0.0 and limiter.take(caller) == pytest.approx(0.095)


def test_a_bucket_fills_to_a_tenth_of_a_minute_and_no_further():
    clock, caller = Clock(), key(requests_per_minute=60)
    limiter = Limiter(clock)
    assert sum(limiter.take(caller) == 0.0 for _ in range(100)) == 6
    clock.now += 3600
    assert sum(limiter.take(caller) == 0.0 for _ in range(100)) == 6


@pytest.mark.parametrize("requests", [1, 2, 10])
def test_a_small_limit_lets_one_pass_at_a_time(requests):
    clock, caller = Clock(), key(requests_per_minute=requests)
    limiter = Limiter(clock)
    assert limiter.take(caller) == 0.0 and limiter.take(caller) == pytest.approx(60 / requests)
    clock.now += 60 / requests + 1e-6
    assert limiter.take(caller) == 0.0 and limiter.take(caller) > 0


@settings(deadline=None)
@given(st.integers(1, 10_000), st.lists(st.floats(0, 2), max_size=200))
def test_in_no_run_does_more_pass_than_the_burst_and_the_rate_allow(requests, pauses):
    clock, caller = Clock(0.0), key(requests_per_minute=requests)
    limiter, passed = Limiter(clock), 0
    for pause in pauses:
        clock.now += pause
        wait = limiter.take(caller)
        passed += wait == 0.0
        assert 0 <= wait <= 60 / requests
    assert passed <= max(1, requests / 10) + clock.now * requests / 60 + 1e-6


def test_each_key_has_a_bucket_of_its_own():
    limiter, shop, web = Limiter(Clock()), key(requests_per_minute=1), key("web", "other", requests_per_minute=1)
    assert [limiter.take(each) for each in (shop, web)] == [0.0, 0.0]
    assert limiter.take(shop) > 0 and limiter.take(web) > 0


def test_a_key_without_a_limit_and_a_caller_without_a_key_always_pass():
    limiter = Limiter(Clock())
    assert [limiter.take(each) for each in [key(), None] * 1000] == [0.0] * 2000


# Where to listen


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LocalHost"])
def test_without_keys_the_server_may_listen_on_this_machine(host):
    check_host(host, Keys())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.5", "fe80::1", "localhost.evil.com", "127.1", "a\nb"])
def test_with_keys_only_it_may_listen_elsewhere(host):
    with pytest.raises(Refused, match=r"no keys: `python -m serve\.access new NAME` makes one") as raised:
        check_host(host, Keys())
    assert "\n" not in str(raised.value) and repr(host) in str(raised.value)
    check_host(host, Keys([key()]))


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_of_all_addresses_of_4_bytes_only_those_from_127_are_this_machine(address):
    try:
        check_host(str(address), Keys())
        assert str(address).startswith("127.")
    except Refused:
        assert not str(address).startswith("127.")


# The command


def made(capsys, *argv):
    """The token and the lines that the command prints."""
    access.main(["new", *argv])
    said, token, told, lines = capsys.readouterr().out.split("\n\n")
    assert "once" in said and "keys:" in told
    return token, lines


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["shop"], {"rights": ["rerank", "events", "judge"]}),
        (
            ["店", "--rights", "rerank,events", "--requests-per-minute", "600", "--expires", "2027-01-01"],
            {"rights": ["rerank", "events"], "requests_per_minute": 600, "expires": date(2027, 1, 1)},
        ),
    ],
)
def test_what_the_command_prints_lets_its_token_in(capsys, tmp_path, argv, expected):
    token, lines = made(capsys, *argv)
    (tmp_path / "keys.yaml").write_text(f"keys:\n{lines}", encoding="utf-8")
    keys = Keys(Keys.load(str(tmp_path / "keys.yaml"), {}).keys, Clock(NEW_YEAR - 1))
    found = keys.caller(f"Bearer {token}", "rerank")
    assert found == key(argv[0], token, **expected)
    assert f"- name: {argv[0]}\n" in lines and "null" not in lines
    assert token not in lines and list(tmp_path.iterdir()) == [tmp_path / "keys.yaml"]


def test_the_lines_of_two_commands_make_one_file_and_the_tokens_are_of_32_bytes(capsys):
    (one, its), (other, others) = made(capsys, "shop"), made(capsys, "web")
    keys = Keys.load(None, {"DISRANKER_KEYS": f"keys:\n{its}{others}"})
    assert [called(keys, one), called(keys, other)] == ["shop", "web"] and len(one) == len(other) == 43


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a b"], "name: String should match"),
        (["shop", "--rights", "rerank,rank"], "rights.1: Input should be 'rerank', 'events' or 'judge'"),
        (["shop", "--requests-per-minute", "-1"], "requests_per_minute: Input should be greater"),
        (["shop", "--expires", "2027-02-30"], "--expires"),
        ([], "NAME"),
    ],
)
def test_a_wrong_command_prints_no_token_and_exits_2(capsys, argv, said):
    with pytest.raises(SystemExit) as end:
        access.main(["new", *argv])
    printed = capsys.readouterr()
    assert end.value.code == 2 and said in printed.err and not printed.out
