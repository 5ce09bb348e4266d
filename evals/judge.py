"""Judges: language models that find the answer in a response where the rules of vlm.py cannot.

ServerJudge asks a model behind any OpenAI-compatible endpoint, e.g. one that was started with
`vllm serve MODEL`. Each prompt gets a reply: a text, or the reason why there is none. A judge that
fails is never taken for a verdict. Replies that are understood are kept in a file, so that a second
run asks only for the others.
"""

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from evals.question import Question
from grading.latex import boxes
from grading.options import option_letter, option_letters, stated, value

MAX_REPLY = 128  # tokens
MAX_BODY = 2**20  # bytes of an HTTP response
MAX_RETRY_AFTER = 60.0  # seconds that a server may ask to wait


# ---- Who answers
class Reply(NamedTuple):
    """What a judge said, or why it said nothing."""

    text: str | None
    error: str | None = None


IsUnderstood = Callable[[str, str], bool]  # is_understood(prompt, reply)


class Judge(Protocol):
    """Whoever replies to prompts."""

    def ask(self, prompts: Sequence[str], is_understood: IsUnderstood) -> list[Reply]:
        """Return a reply for each prompt, in order, and keep those that are understood."""
        ...


class Cache:
    """Replies in a file, one JSON object a line, by model and prompt; only in memory without one.

    A line that is torn, because the run that wrote it was killed, or is no reply counts as missing.
    """

    def __init__(self, file: Path | None, model: str):
        self.file = file
        self.model = model
        self.lock = threading.Lock()
        self.replies: dict[str, str] = {}  # by key
        if file is not None and file.exists():
            self.load()

    def load(self) -> None:
        """Read the replies of earlier runs, and end a torn last line."""
        text = self.file.read_text(encoding="utf-8", errors="replace")
        if text and not text.endswith("\n"):
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                key, reply = entry["key"], entry["reply"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(reply, str):
                self.replies[key] = reply

    def key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()

    def get(self, prompt: str) -> str | None:
        """Return the reply to a prompt, None if there is none yet."""
        return self.replies.get(self.key(prompt))

    def put(self, prompt: str, reply: str) -> None:
        """Keep the reply to a prompt; threads may do so at the same time."""
        entry = {"key": self.key(prompt), "model": self.model, "reply": reply}
        with self.lock:
            self.replies[entry["key"]] = reply
            if self.file is None:
                return
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")


class RequestError(Exception):
    """A request that brought no reply.

    Attributes:
        may_retry: Whether another try may help.
        wait: Seconds to wait before it at least, as the server asked.
    """

    def __init__(self, reason: str, may_retry: bool, wait: float = 0.0):
        super().__init__(reason)
        self.may_retry = may_retry
        self.wait = wait


class ServerJudge:
    """A model behind an OpenAI-compatible endpoint; OPENAI_API_KEY is sent along where it is set.

    Timeouts, broken connections, malformed or empty replies and the statuses 408, 429 and 5xx are
    tried again after `wait`, 2 `wait`, 4 `wait` … seconds, or later where Retry-After says so.
    Redirects are not followed: another host would get the key and give the verdict.

    Args:
        url: Base of the endpoint, e.g. http://127.0.0.1:8000/v1, or its chat/completions.
        model: The name under which the server knows the model.
        cache: File that keeps the replies.
        concurrency: Requests that run at the same time.
        attempts: How often a prompt is tried in all.
        timeout: Seconds for one request.
        wait: Seconds before the second try.
        give_up: Prompts in a row that may fail before the rest is not asked.

    Raises:
        ValueError: The URL is none, there is no model, or the key cannot be sent.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path | None = None,
        concurrency: int = 8,
        attempts: int = 5,
        timeout: float = 60.0,
        wait: float = 1.0,
        give_up: int = 8,
    ):
        if not is_http_url(url):
            raise ValueError(
                f"judge url {url!r}: expected http:// or https://, e.g. http://127.0.0.1:8000/v1"
            )
        if not model:
            raise ValueError(
                f"no judge model given for {url}; name the one that it serves with --judge-model"
            )
        self.url = url.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        self.model = model
        self.key = read_key()
        self.opener = urllib.request.build_opener(NoRedirects)
        self.cache = Cache(cache, model)
        self.concurrency = concurrency
        self.attempts = attempts
        self.timeout = timeout
        self.wait = wait
        self.give_up = give_up
        self.failed_in_a_row = 0  # prompts

    def ask(self, prompts: Sequence[str], is_understood: IsUnderstood) -> list[Reply]:
        """Return a reply for each prompt, in order; equal prompts are asked once.

        Args:
            is_understood: Called in several threads. A reply that is not understood is returned,
                but not kept: the next run asks again.
        """
        self.failed_in_a_row = 0
        distinct = list(dict.fromkeys(prompts))
        with ThreadPoolExecutor(self.concurrency) as threads:
            asked = threads.map(partial(self.reply, is_understood=is_understood), distinct)
            replies = dict(zip(distinct, asked, strict=True))
        return [replies[prompt] for prompt in prompts]

    def reply(self, prompt: str, is_understood: IsUnderstood) -> Reply:
        """Return the reply from the cache, or from the server after as many tries as it takes."""
        known = self.cache.get(prompt)
        if known is not None and is_understood(prompt, known):  # an earlier version kept all
            return Reply(known)
        for attempt in range(self.attempts):
            if self.failed_in_a_row >= self.give_up:
                return Reply(
                    None, f"not asked: {self.url} failed on {self.give_up} prompts in a row"
                )
            try:
                text = self.request(prompt)
            except RequestError as error:
                if not error.may_retry or attempt + 1 == self.attempts:
                    self.failed_in_a_row += 1
                    tries = f"try {attempt + 1} of {self.attempts}"
                    return Reply(None, f"{self.url}: {error} ({tries})")
                pause = self.wait * 2**attempt * random.uniform(0.8, 1.2)  # not all at once
                time.sleep(max(error.wait, pause))
            else:
                self.failed_in_a_row = 0
                if is_understood(prompt, text):
                    self.cache.put(prompt, text)
                return Reply(text)
        raise AssertionError(f"attempts={self.attempts}; expected at least 1")

    def request(self, prompt: str) -> str:
        """Send one request and return the text of its reply.

        Raises:
            RequestError: If there is no reply, or none that may be used.
        """
        try:
            with self.opener.open(self.pack(prompt), timeout=self.timeout) as response:
                body = self.read(response)
        except urllib.error.HTTPError as error:
            raise describe_http_error(error) from error
        except (OSError, http.client.HTTPException) as error:
            # The connection was refused, timed out, reset or cut short.
            raise RequestError(f"{type(error).__name__}: {error}", may_retry=True) from error
        return read_completion(body)

    def pack(self, prompt: str) -> urllib.request.Request:
        """Return the HTTP request for a prompt."""
        content = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_REPLY,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return urllib.request.Request(self.url, json.dumps(content).encode(), headers)

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """Read a response to its end.

        The timeout of a socket starts anew with each byte: this one is for the whole.

        Raises:
            TimeoutError: If that takes longer than `timeout`.
            RequestError: If the response is longer than MAX_BODY.
        """
        body = b""
        deadline = time.monotonic() + self.timeout
        while chunk := response.read1(2**16):
            body += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end after {self.timeout:g} s")
            if len(body) > MAX_BODY:
                raise RequestError(f"a reply of more than {MAX_BODY} bytes", may_retry=False)
        return body


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an HTTPError like any other status that is no reply."""

    def redirect_request(self, *_):
        return None


def read_key() -> str:
    """Return OPENAI_API_KEY, empty if it is not set; ValueError if no header can hold it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "OPENAI_API_KEY holds a line break or a character that is not ASCII; "
            "expected a key as it is sent in a header"
        )
    return key


def is_http_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # e.g. a port that is no number
        return False


def describe_http_error(error: urllib.error.HTTPError) -> RequestError:
    """Return what a redirect, or a status of 400 or more, means for the request."""
    if 300 <= error.code < 400:
        target = error.headers.get("Location", "")
        reason = f"HTTP {error.code}, a redirect to {target!r}, which is not followed"
        return RequestError(f"{reason}; give the judge's own URL", may_retry=False)
    retry_after = error.headers.get("Retry-After", "")
    wait = 0.0
    if retry_after.isdigit():  # it may also be a date
        wait = min(float(retry_after), MAX_RETRY_AFTER)
    body = b""
    with contextlib.suppress(OSError, http.client.HTTPException):
        body = error.read(200)
    reason = f"HTTP {error.code}: {body.decode(errors='replace')}"
    return RequestError(reason, error.code in (408, 429) or error.code >= 500, wait)


def read_completion(body: bytes) -> str:
    """Return the text of a chat completion; RequestError if there is none, or it was cut off."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
        finish_reason = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestError(f"not a chat completion: {body[:200]!r}", may_retry=True) from error
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"an empty reply: {body[:200]!r}", may_retry=True)
    if finish_reason == "length":
        reason = f"a reply of more than {MAX_REPLY} tokens: {text[:100]!r}"
        raise RequestError(reason, may_retry=False)
    return text


def make_judge(url: str | None, model: str | None, cache: Path | None = None) -> Judge | None:
    """Return the judge that the settings ask for, None if they ask for none.

    Raises:
        ValueError: For a model without a URL, a URL without a model, or a URL that is none.
    """
    if url:
        return ServerJudge(url, model or "", cache)
    if model:
        raise ValueError(
            f"judge model {model!r} has no server; "
            f"serve it with `vllm serve {model}` and give --judge-url"
        )
    return None


# ---- What a judge is asked. A backslash at the end of a line joins it with the next one.
CHOOSE = """\
You match the answer to a {kind} question with its options. \
Find what the answer chooses, by letter or by text.
Output {output} and nothing else; \
output Z if it chooses nothing, or nothing that means the same as an option.

Question: Which animal is in the picture? Options: A. bear B. rabbit C. cat
Answer: It is a brown bear, I think.
Output: A

Question: Which animal is in the picture? Options: A. bear B. rabbit C. cat
Answer: I cannot see the picture.
Output: Z
{example}
Question: {question}
Answer: {response}
Output:"""
SEVERAL = """
Question: Which of the figures A to E are rotations of the first?
Answer: Both D and the one on its left, labelled C, are rotations.
Output: CD
"""
EXTRACT = """\
Extract the final answer from a model's response to a question. \
Output the answer alone, as short as in the examples,
with no explanation; output null if the response gives none.

Question: Which number is missing? (an integer)
Response: The numbers grow by 4 each time, so the missing one is 14.
Extracted answer: 14

Question: What is the distance between the boats, to one decimal place?
Response: d = 17.6 / cos(38°), which is approximately 22.3 metres.
Extracted answer: 22.3

Question: Between which two years is the peak? (a list)
Response: The line is highest between 2007 and 2008.
Extracted answer: [2007, 2008]

Question: What is y?
Response: As it stands there is not enough information to solve for y.
Extracted answer: null

Question: {question}
Response: {response}
Extracted answer:"""


def judge_prompt(question: Question, response: str) -> str:
    """Return what a judge is asked: which options a response chooses, or what its answer is."""
    text = question.row.get("question_for_eval") or question.row["question"]
    if question.type not in ("choice", "letters"):
        return EXTRACT.format(question=text, response=response)
    options = [f"{letter}. {option}" for letter, option in question.choices.items() if option]
    if options:
        text += f" Options: {' '.join(options)}"
    if question.type == "choice":
        kind = "single-choice"
        output = "one capital letter"
        example = ""
    else:
        kind = "multiple-choice"
        output = "the letters of the options chosen"
        example = SEVERAL
    return CHOOSE.format(
        kind=kind, output=output, example=example, question=text, response=response
    )


# ---- What a judge means by its reply
LABEL = re.compile(
    r"^[\s*_`]*(?:(?:extracted\s+)?answer|(?:your\s+)?output)[\s*_`]*:[\s*_`]*", re.IGNORECASE
)
LONGEST_ANSWER = 200  # characters


def understand(question: Question, reply: str) -> str | None:
    """Return the answer in a reply, '' if it says that there is none, or None if it is neither."""
    text = reply.rpartition("</think>")[2]
    text = LABEL.sub("", text).strip(" \n\r\t`*\"'")
    boxed = boxes(text)
    if boxed:
        text = boxed[-1].strip()
    if question.type in ("choice", "letters"):
        if text.strip(" .()") == "Z":
            return ""
        if question.type == "letters":
            return option_letters(text)
        return option_letter(text, question.choices)
    if text.rstrip(".").casefold() == "null":
        return ""
    if "\n" in text or len(text) > LONGEST_ANSWER:
        return None  # an answer is one short line: more is talk
    if text.casefold() == question.gold.casefold():
        return text
    return value(stated(text) or text)
