"""Judges on servers that answer, fail, hang and die; what a judge is told, and what it means."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from benchmark_files import choice_row, integer_row, load_rows, mathvista_row, outcomes, score_rows
from conftest import free_port

from evals import judge as judges
from evals import vlm
from evals.judge import Reply, ServerJudge
from grading import Pool


@pytest.fixture(scope="module")
def pool():
    with Pool(n_workers=1) as pool:
        yield pool


# ---- A server that does as it is told
class Server(ThreadingHTTPServer):
    """An endpoint that does what stands behind DO in the prompt, e.g. `DO answer B`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []  # what it was told to do
        self.keys: list[str | None] = []  # the key that came with each request
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


def completion(text: str, finish_reason: str = "stop") -> bytes:
    choice = {"message": {"content": text}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]}).encode()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes, length: int | None = None, **headers):
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # what a redirected POST may become
        self.server.keys.append(self.headers["Authorization"])
        self.send(200, completion("B"))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        command = prompt.rpartition("DO ")[2].partition("\n")[0]
        action, _, text = command.partition(" ")
        self.server.asked.append(action)
        self.server.keys.append(self.headers["Authorization"])
        if action == "429" and self.server.asked.count("429") == 1:
            self.send(429, b"slow down", Retry_After="0")
        elif action in ("answer", "429"):
            self.send(200, completion(text))
        elif action == "redirect":
            status, target = text.split()
            self.send(int(status), b"over there", Location=target)
        elif action == "cut":
            self.send(200, completion(text, finish_reason="length"))
        elif action in ("500", "400"):
            self.send(int(action), b"it broke")
        elif action == "garbage":
            self.send(200, b"<html>a proxy's page</html>")
        elif action == "shape":
            self.send(200, b'{"choices": []}')
        elif action == "flood":
            self.send(200, b" " * (judges.MAX_BODY + 1))
        elif action == "hang":
            time.sleep(3)
        elif action == "drip":
            self.send(200, b"{", length=10**6)
            for _ in range(30):
                time.sleep(0.1)
                self.wfile.write(b" ")
        elif action == "die":
            body = completion(text)
            self.send(200, body[:20], length=len(body))
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def impatient(server: Server, **settings) -> ServerJudge:
    """A judge that soon tries again, but gives a machine under load time to answer."""
    defaults = {"attempts": 3, "timeout": 30, "wait": 0.01, "give_up": 99}
    return ServerJudge(server.url, "judge", **{**defaults, **settings})


def keep(prompt: str, reply: str) -> bool:
    """Every reply is understood."""
    return True


# ---- Replies become verdicts, failures do not
def test_a_judge_reads_what_rules_cannot(tmp_path, pool, server):
    rows = [
        choice_row(r"\boxed{B}"),
        choice_row("I waver. DO answer B"),
        choice_row("I waver. DO answer (C) 3/5"),
        choice_row("I waver. DO answer Z"),
        choice_row("I waver. DO 429 Output: B"),
        choice_row("I waver. DO answer A or B"),
        integer_row("some of them DO answer `14`"),
        integer_row("none DO answer null"),
    ]
    _, figures, records = score_rows(
        "MathVista_MINI", tmp_path / "m.tsv", rows, pool, impatient(server)
    )
    assert outcomes(records) == [
        ("B", "boxed", "correct"),
        ("B", "judge", "correct"),
        ("C", "judge", "wrong"),
        ("", "judge", "wrong"),
        ("B", "judge", "correct"),
        (None, "none", "unjudged"),
        ("14", "judge", "correct"),
        ("", "judge", "wrong"),
    ]
    assert server.asked.count("429") == 2, "asked again"
    assert "not understood: 'A or B'" in records[5]["error"]
    assert figures["unextracted"] == 7 / 8
    assert figures["judged"] == 6 / 8
    assert figures["unjudged"] == 1
    assert (figures["score"], figures["low"], figures["high"]) == (4 / 7, 4 / 8, 5 / 8)


@pytest.mark.parametrize(
    ("action", "reason", "n_requests"),
    [
        ("500", "HTTP 500: it broke", 3),
        ("400", "HTTP 400: it broke", 1),
        ("garbage", "not a chat completion", 3),
        ("shape", "not a chat completion", 3),
        ("answer", "an empty reply", 3),
        ("cut B", "a reply of more than 128 tokens: 'B'", 1),
        ("flood", "a reply of more than 1048576 bytes", 1),
        ("hang", "timed out", 3),
        ("drip", "no end after", 3),
        ("die", "", 3),
    ],
)
def test_a_failing_judge_is_reported(tmp_path, pool, server, action, reason, n_requests):
    rows = [
        choice_row(r"\boxed{B}"),
        choice_row(f"I waver. DO {action}"),
        choice_row("I waver. DO answer B"),
    ]
    timeout = 1 if action in ("hang", "drip") else 30
    judge = impatient(server, cache=tmp_path / "cache", timeout=timeout)
    _, figures, records = score_rows("MathVista_MINI", tmp_path / "m.tsv", rows, pool, judge)
    assert [record["verdict"] for record in records] == ["correct", "unjudged", "correct"]
    error = records[1]["error"]
    assert reason in error
    assert server.url in error
    assert error in vlm.unjudged(records)
    n_others = 1 if action == "answer" else 0  # the last row's request is one of these
    assert server.asked.count(action.split()[0]) - n_others == n_requests
    assert (figures["score"], figures["low"], figures["high"]) == (1.0, 2 / 3, 1.0)
    assert figures["unjudged"] == 1
    assert len((tmp_path / "cache").read_text().splitlines()) == 1, "a failure is not kept"


@pytest.fixture
def other_server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("key", ["secret", None])
def test_a_redirect_is_not_followed(server, other_server, monkeypatch, status, key):
    """The other host got the key, and its reply was the verdict."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    target = f"{other_server.url}/chat/completions"
    prompts = [f"DO redirect {status} {target}", "DO answer A"]
    redirected, answered = impatient(server).ask(prompts, keep)
    assert redirected.text is None
    assert f"HTTP {status}, a redirect to {target!r}, which is not followed" in redirected.error
    assert answered == Reply("A")
    assert other_server.keys == []
    assert server.asked.count("redirect") == 1, "another try would bring the same"
    assert set(server.keys) == {key and f"Bearer {key}"}


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel", "a\x00b"])
def test_a_key_that_no_header_can_hold_is_refused_unnamed(server, monkeypatch, key):
    monkeypatch.setattr("os.environ", {**os.environ, "OPENAI_API_KEY": key})
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a line break or") as caught:
        impatient(server)
    assert key not in str(caught.value)


def test_a_line_break_after_the_key_does_no_harm(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    assert impatient(server).ask(["DO answer A"], keep) == [Reply("A")]
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize("reply", ["null", "5", '["A"]', "[" * 5000])
def test_a_line_of_the_cache_that_is_no_reply_counts_as_missing(tmp_path, server, reply):
    cache = tmp_path / "replies.jsonl"
    key = judges.Cache(None, "judge").key("DO answer A")
    cache.write_text(f'{{"key": "{key}", "reply": {reply}}}\n')
    understood = []
    judge = impatient(server, cache=cache)
    replies = judge.ask(["DO answer A"], lambda _, reply: not understood.append(reply.strip()))
    assert (replies, understood) == ([Reply("A")], ["A"])


def test_a_dead_judge_is_given_up(tmp_path, pool):
    url = f"http://127.0.0.1:{free_port()}/v1"
    dead = ServerJudge(url, "judge", attempts=2, wait=0.01, give_up=3, concurrency=1)
    rows = [choice_row(f"I waver between A and B, {i}") for i in range(20)]
    _, figures, records = score_rows("MathVista_MINI", tmp_path / "m.tsv", rows, pool, dead)
    assert {record["verdict"] for record in records} == {"unjudged"}
    assert figures["unjudged"] == 20
    assert (figures["score"], figures["low"], figures["high"]) == (None, 0, 1)
    assert sum("Connection refused" in record["error"] for record in records) == 3
    assert sum("not asked" in record["error"] for record in records) == 17
    assert "–" in vlm.table({"MathVista_MINI": figures})
    assert "unjudged, 17 questions" in vlm.unjudged(records)


def test_the_cache_outlives_a_run_and_a_torn_line(tmp_path, server):
    cache = tmp_path / "deep" / "replies.jsonl"
    prompts = ["DO answer A", "DO answer B", "DO answer A"]
    replies = impatient(server, cache=cache).ask(prompts, keep)
    assert replies == [Reply("A"), Reply("B"), Reply("A")]
    assert len(server.asked) == 2, "equal prompts are asked once"

    whole = cache.read_text()
    cache.write_text(whole[:-5])  # killed while it wrote
    replies = impatient(server, cache=cache).ask(prompts, keep)
    assert replies == [Reply("A"), Reply("B"), Reply("A")]
    assert len(server.asked) == 3
    assert impatient(server, cache=cache).ask(["DO answer B"], keep) == [Reply("B")]
    assert len(server.asked) == 3


def test_a_reply_that_is_not_understood_is_asked_for_again(tmp_path, pool, server):
    cache = tmp_path / "replies.jsonl"
    rows = [choice_row("I waver. DO answer B"), choice_row("I waver. DO answer A or B")]

    def score() -> list[str]:
        judge = impatient(server, cache=cache)
        records = score_rows("MathVista_MINI", tmp_path / "m.tsv", rows, pool, judge)[2]
        return [record["verdict"] for record in records]

    assert score() == ["correct", "unjudged"]
    assert [json.loads(line)["reply"] for line in cache.read_text().splitlines()] == ["B"]
    assert len(server.asked) == 2, "it is not asked again at once"
    assert score() == ["correct", "unjudged"]
    assert len(server.asked) == 3, "the understood reply was kept"

    def answer_b(handler):
        handler.server.asked.append("B")
        handler.send(200, completion("B"))

    # An earlier version kept what it had not understood.
    (question,) = load_rows("MathVista_MINI", tmp_path / "m.tsv", rows[1:])
    prompt = judges.judge_prompt(question, rows[1]["response"])
    judges.Cache(cache, "judge").put(prompt, "A or B")
    server.RequestHandlerClass = type("AnswersB", (Handler,), {"do_POST": answer_b})
    assert score() == ["correct", "correct"]
    assert score() == ["correct", "correct"]
    assert server.asked[3:] == ["B"], "now it is understood, and kept"


def test_the_cache_keeps_models_apart(tmp_path, server):
    cache = tmp_path / "replies.jsonl"
    impatient(server, cache=cache).ask(["DO answer A"], keep)
    other = ServerJudge(server.url, "another", cache=cache, wait=0.01)
    assert other.ask(["DO answer A"], keep) == [Reply("A")]
    assert len(server.asked) == 2


def test_the_judge_bounds_its_requests(server):
    lock = threading.Lock()
    n_running = 0
    most_running = 0

    class Slow(Handler):
        def do_POST(self):
            nonlocal n_running, most_running
            with lock:
                n_running += 1
                most_running = max(most_running, n_running)
            time.sleep(0.05)
            super().do_POST()
            with lock:
                n_running -= 1

    server.RequestHandlerClass = Slow
    judge = impatient(server, concurrency=3)
    replies = judge.ask([f"{i} DO answer {i}" for i in range(12)], keep)
    assert [reply.text for reply in replies] == [str(i) for i in range(12)]
    assert 1 < most_running <= 4, "one more: a reply is read before its thread has ended"


# ---- Prompts, replies and settings
def test_what_a_judge_is_told(tmp_path):
    rows = [choice_row("x"), integer_row("x")]
    choice, number = load_rows("MathVista_MINI", tmp_path / "m.tsv", rows)
    prompt = judges.judge_prompt(choice, "It is {question}.")
    assert "What? Options: A. 3/11 B. 8/11 C. 3/5\nAnswer: It is {question}." in prompt
    assert "null" not in prompt
    prompt = judges.judge_prompt(number, "So 14.")
    assert prompt.endswith("Question: What?\nResponse: So 14.\nExtracted answer:")


def load_free_question(tmp_path):
    row = mathvista_row(question_type="free_form", answer="8/11")
    (question,) = load_rows("MathVista_MINI", tmp_path / "m.tsv", [row])
    return question


@pytest.mark.parametrize(
    "reply",
    [
        "Rate limit exceeded, please retry",
        "I cannot determine the answer.",
        "8/11\n\nQuestion: What is z?",
        "the answer " * 20,
    ],
)
def test_talk_of_a_judge_is_no_answer(tmp_path, reply):
    assert judges.understand(load_free_question(tmp_path), reply) is None


@pytest.mark.parametrize(
    "reply", ["8/11", "**Answer:** 8/11", "<think>\n\n</think>\n\n8/11", "Output: 8/11"]
)
def test_labels_and_thoughts_around_a_reply_do_no_harm(tmp_path, reply):
    assert judges.understand(load_free_question(tmp_path), reply) == "8/11"


def test_settings_of_a_judge():
    url = "http://127.0.0.1:8000/v1"
    assert judges.make_judge(None, None) is None
    assert judges.make_judge(f"{url}/", "big").url == f"{url}/chat/completions"
    assert judges.make_judge(f"{url}/chat/completions", "big").url == f"{url}/chat/completions"
    with pytest.raises(ValueError, match="--judge-model"):
        judges.make_judge(url, None)
    with pytest.raises(ValueError, match="`vllm serve big` and give --judge-url"):
        judges.make_judge(None, "big")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://here/v1", "http://", "http://here:port"])
def test_a_url_that_is_none(url):
    with pytest.raises(ValueError, match="expected http"):
        ServerJudge(url, "judge")


# ---- A model that vLLM serves
def start_vllm(model: str, port: int, folder) -> subprocess.Popen:
    """Start to serve a model; the server logs to folder/log."""
    template = folder / "template"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    flags = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--model": model,
        "--served-model-name": "toy",
        "--dtype": "float32",
        "--max-model-len": "4096",
        "--chat-template": str(template),
        "--generation-config": "vllm",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    for flag, setting in flags.items():
        command += [flag, setting]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def wait_until_healthy(process: subprocess.Popen, port: int, log, limit: float = 300) -> None:
    deadline = time.monotonic() + limit
    while True:
        in_time = process.poll() is None and time.monotonic() < deadline
        assert in_time, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
        except OSError:
            time.sleep(0.5)
        else:
            return


@pytest.fixture
def vllm_server(world, tmp_path):
    """The port at which vLLM serves the toy model, and its process."""
    port = free_port()
    process = start_vllm(world.path("model"), port, tmp_path)
    try:
        wait_until_healthy(process, port, tmp_path / "log")
        yield port, process
    finally:
        process.terminate()
        process.wait(120)


@pytest.mark.vllm
def test_a_model_that_vllm_serves(vllm_server, tmp_path, pool):
    """The toy does not understand its task, which must end in a report and not in a verdict."""
    port, process = vllm_server
    url = f"http://127.0.0.1:{port}/v1"
    judge = ServerJudge(url, "toy", attempts=2, timeout=300)
    for reply in judge.ask(["7+5*3=", "9-4+2=", "3*3*3="], keep):
        assert reply.text or "more than 128 tokens: " in reply.error, "it seldom comes to an end"

    rows = [choice_row(r"\boxed{B}"), choice_row("I waver between A and B.")]
    _, figures, records = score_rows("MathVista_MINI", tmp_path / "m.tsv", rows, pool, judge)
    assert records[0]["verdict"] == "correct"
    if records[1]["verdict"] == "unjudged":
        assert re.search("not understood|more than 128 tokens", records[1]["error"])
        assert figures["unjudged"] == 1
    else:
        assert records[1]["how"] == "judge"

    (unknown,) = ServerJudge(url, "another", attempts=3).ask(["7+5="], keep)
    assert unknown.text is None
    assert "HTTP 404" in unknown.error
    assert "try 1 of 3" in unknown.error

    process.terminate()
    process.wait(120)
    (dead,) = judge.ask(["1+1="], keep)
    assert dead.text is None
    assert "try 2 of 2" in dead.error
