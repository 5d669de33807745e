import pytest

from serve import front


def ids(*given):
    headers = front.plain([*((front.REQUEST_ID, value) for value in given), (b"accept", b"*/*")])
    assert headers[0] == (b"accept", b"*/*")
    return [value for name, value in headers if name == front.REQUEST_ID]


def test_a_plain_id_stays():
    assert ids(b"r-7") == [b"r-7"]


@pytest.mark.parametrize("given", [(), (b"",), (b"\xff",), (b"a" * 65,), (b"a\tb",), (b"r-7", b"r-8")])
def test_each_other_request_gets_one_new_id_of_36_characters(given):
    (found,) = ids(*given)
    assert len(found) == 36 and found not in given


@pytest.mark.parametrize("name", [b"x-session-id", b"serve_multiplexed_model_id", b"x_request-timeout_seconds"])
def test_what_would_steer_ray_is_gone_with_dashes_as_with_underscores(name):
    for spelt in (name, name.replace(b"-", b"_"), name.replace(b"_", b"-")):
        assert spelt not in dict(front.plain([(spelt, b"1")]))
