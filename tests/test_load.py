"""The load of the measurements, against a server of whose every answer the time is known."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from typing import ClassVar

import pytest

from bench.load import Load, Stream, bodies, main

LINES = [{"query": f"q{place}", "documents": [f"{place} {number}" for number in range(8)]} for place in range(10)]


class Answers(BaseHTTPRequestHandler):
    """Takes 50 ms for each request, one after the other, and answers with what `statuses` has next."""

    protocol_version = "HTTP/1.1"
    one = threading.Lock()
    statuses: ClassVar[list] = []
    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.one:
            type(self).asked.append((body, dict(self.headers)))
            time.sleep(0.05)
            status = self.statuses.pop(0) if self.statuses else 200
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.send_header("Retry-After", "0.1")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Answers.statuses, Answers.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def on(url, *streams, seconds=0.6, timeout_s=5.0, retry=False):
    load = Load(url, seconds, 0.0, timeout_s, retry, {"X-Timeout-Ms": "5000"})
    asyncio.run(load.on(streams, [cycle(bodies(LINES, stream.documents, "jina", "m")) for stream in streams]))
    return [stream.summary(seconds) for stream in streams]


def test_requests_of_another_size_take_the_documents_of_several_lines_and_none_comes_twice():
    found = [json.loads(body) for body in bodies(LINES, 20, "jina", "m")]
    texts = [text for body in found for text in body["documents"]]
    assert [len(body["documents"]) for body in found] == [20] * 4 and len(set(texts)) == 80
    assert found[0]["query"] == "q2" and found[0]["model"] == "m"
    assert len(bodies(LINES, 3, "jina", "m")) == 26
    assert json.loads(bodies(LINES, 3, "tei", "m")[0])["texts"] == ["0 0", "0 1", "0 2"]
    with pytest.raises(ValueError, match="80 documents in all are too few for a request of 81"):
        bodies(LINES, 81, "jina", "m")


def test_a_closed_client_waits_for_its_answer_so_that_no_more_than_20_come_in_a_second(server):
    (said,) = on(server, Stream(4, 1, closed=True))
    assert 0 < said["requests"] <= 13 and said["statuses"] == {"200": said["requests"]}
    assert said["p50_ms"] >= 50 and said["lost"] == said["late"] == 0
    # The last may be answered after the time is over.
    assert 4 * (said["requests"] - 1) <= 0.6 * said["docs_per_s"] + 1 <= 4 * said["requests"] + 1


def test_4_closed_clients_wait_for_each_other(server):
    (said,) = on(server, Stream(4, 4, closed=True))
    assert said["p50_ms"] >= 170


def test_open_load_comes_whatever_waits_and_its_latency_counts_from_when_a_request_was_due(server):
    (said,) = on(server, Stream(1, 40, closed=False))  # twice what the server does
    assert said["requests"] > 13 and said["lost"] == 0
    assert said["p99_ms"] > 250  # a closed client would say 50


def test_a_refusal_is_no_loss_a_500_and_a_broken_connection_are(server):
    Answers.statuses = [429, 503, 504, 500, 0, 200]
    (said,) = on(server, Stream(1, 1, closed=True), seconds=1)
    assert said["lost"] == 2 and said["retried"] == 0
    assert {"0", "429", "500", "503", "504"} <= said["statuses"].keys()
    assert said["faults"][0].startswith("500 ") and "Disconnected" in said["faults"][1]


def test_one_retry_after_429_503_or_a_broken_connection_and_none_after_500(server):
    Answers.statuses = [429, 200, 503, 200, 0, 200, 500, 200, 503, 503]
    (said,) = on(server, Stream(1, 1, closed=True), seconds=2, retry=True)
    assert said["retried"] == 4
    assert said["statuses"]["500"] == 1 and said["statuses"]["503"] == 1 and "429" not in said["statuses"]


def test_what_comes_after_its_deadline_is_late(server):
    (said,) = on(server, Stream(1, 16, closed=True), seconds=0.1, timeout_s=0.1)
    assert said["requests"] >= 16 and said["late"] >= 4  # of 0.8 s that the last takes, 0.6 are in time
    (said,) = on(server, Stream(1, 1, closed=True), seconds=0.1, timeout_s=30)
    assert said["late"] == 0


def test_streams_of_two_sizes_run_at_once(server):
    small, large = on(server, Stream(1, 1, closed=True), Stream(8, 1, closed=True))
    assert small["documents"] == 1 and large["documents"] == 8
    assert min(small["requests"], large["requests"]) > 0


def test_the_command_line_gives_one_json_line_and_sends_token_deadline_and_model(server, tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    options = ["--closed", "4x1", "--open", "2x5", "--seconds", "0.3", "--warmup", "0.1", "--timeout", "2"]
    assert main([server, str(path), *options, "--token", "t", "--start", "3", "--model", "x"]) == 0
    said = json.loads(capsys.readouterr().out)["streams"]
    assert [(each["documents"], each.get("clients"), each.get("rate")) for each in said] == [(4, 1, None), (2, None, 5)]
    body, headers = Answers.asked[0]
    assert body["model"] == "x" and body["query"] == "q3"
    assert headers["Authorization"] == "Bearer t" and headers["X-Timeout-Ms"] == "2000"
