"""Judges: language models that find the answer in a response where rules cannot.

ServerJudge asks any OpenAI-compatible endpoint, LocalJudge a model in this process. A reply is a text, or the reason why there
is none: a judge that fails is never taken for a verdict. Replies are kept in a file by (model, prompt), so that a second run
asks only for what is missing.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

import torch.distributed as dist

import parallel
import rollout
from grading.latex import boxes
from grading.options import option_letter, option_letters, stated, value

MAX_REPLY = 128  # tokens
MAX_BODY = 2**20  # bytes of an HTTP response


# ---- Who answers
class Reply(NamedTuple):
    """What a judge said, or why it did not."""

    text: str | None
    error: str | None = None


class Judge(Protocol):
    """Answers prompts, each with a reply, in order."""

    def ask(self, prompts: Sequence[str]) -> list[Reply]: ...


class Cache:
    """Replies on disk, one JSON object a line, by (model, prompt). A line that a killed run left torn is asked again."""

    def __init__(self, path: str | Path | None, model: str):
        self.path, self.model, self.lock, self.known = (
            Path(path) if path else None,
            model,
            threading.Lock(),
            {},
        )
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace")
        if lines and not lines.endswith("\n"):
            self.path.write_text(lines + "\n", encoding="utf-8")
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = entry["reply"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue

    def key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()

    def get(self, prompt: str) -> str | None:
        return self.known.get(self.key(prompt))

    def put(self, prompt: str, reply: str) -> None:
        with self.lock:
            self.known[self.key(prompt)] = reply
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(
                        json.dumps({"key": self.key(prompt), "model": self.model, "reply": reply})
                        + "\n"
                    )


class Failure(Exception):
    """A request that brought no reply. again: whether another try may help; wait: seconds that the server asked for."""

    def __init__(self, reason: str, again: bool, wait: float = 0.0):
        super().__init__(reason)
        self.again, self.wait = again, wait


class ServerJudge:
    """Any OpenAI-compatible endpoint: `url` is its base, as http://127.0.0.1:8000/v1, or that of chat/completions itself.

    Timeouts, broken connections, replies that are not what the protocol says, 408, 429 and 5xx are tried `attempts` times in
    all, after `wait`, 2 `wait`, 4 `wait` … seconds or what Retry-After says. At most `concurrency` requests run at once. Once
    `give_up` prompts in a row have failed the rest is not asked. The key is taken from OPENAI_API_KEY.
    """

    def __init__(
        self, url: str, model: str, cache: str | Path | None = None, concurrency: int = 8, attempts: int = 5,
        timeout: float = 60.0, wait: float = 1.0, give_up: int = 8,
    ):  # fmt: skip
        try:
            parts = urllib.parse.urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f"judge url {url!r}: expected http:// or https://, as http://127.0.0.1:8000/v1"
            )
        if not model:
            raise ValueError(
                f"no judge model given for {url}; name the one that it serves with --judge-model"
            )
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.model, self.cache = model, Cache(cache, model)
        self.concurrency, self.attempts, self.timeout, self.wait, self.give_up = (
            concurrency,
            attempts,
            timeout,
            wait,
            give_up,
        )
        self.failed_in_a_row = 0

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """Return a reply for each prompt, in order; equal prompts are asked once."""
        self.failed_in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            replies = dict(
                zip(
                    distinct := list(dict.fromkeys(prompts)),
                    pool.map(self.reply, distinct),
                    strict=True,
                )
            )
        return [replies[prompt] for prompt in prompts]

    def reply(self, prompt: str) -> Reply:
        if (known := self.cache.get(prompt)) is not None:
            return Reply(known)
        for attempt in range(self.attempts):
            if self.failed_in_a_row >= self.give_up:
                return Reply(
                    None, f"not asked: {self.url} failed on {self.give_up} prompts in a row"
                )
            try:
                text = self.request(prompt)
            except Failure as failure:
                reason = f"{self.url}: {failure} (try {attempt + 1} of {self.attempts})"
                if not failure.again or attempt + 1 == self.attempts:
                    self.failed_in_a_row += 1
                    return Reply(None, reason)
                time.sleep(
                    max(failure.wait, self.wait * 2**attempt * random.uniform(0.8, 1.2))
                )  # not all at once
            else:
                self.failed_in_a_row = 0
                self.cache.put(prompt, text)
                return Reply(text)
        raise AssertionError(f"attempts={self.attempts}; expected at least 1")

    def request(self, prompt: str) -> str:
        """Send one request and return the text of the reply; Failure if there is none."""
        asked = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        asked |= {"temperature": 0, "max_tokens": MAX_REPLY}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                body = self.read(response)
        except urllib.error.HTTPError as error:
            again, after = (
                error.code in (408, 429) or error.code >= 500,
                error.headers.get("Retry-After", ""),
            )
            said = b""
            with contextlib.suppress(OSError, http.client.HTTPException):
                said = error.read(200)
            raise Failure(
                f"HTTP {error.code}: {said.decode(errors='replace')}",
                again,
                min(float(after), 60.0) if after.isdigit() else 0.0,
            ) from error
        except (
            OSError,
            http.client.HTTPException,
        ) as error:  # refused, timed out, reset, cut short
            raise Failure(f"{type(error).__name__}: {error}", again=True) from error
        try:
            choice = json.loads(body)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Failure(f"not a chat completion: {body[:200]!r}", again=True) from error
        if not isinstance(text, str) or not text.strip():
            raise Failure(f"an empty reply: {body[:200]!r}", again=True)
        if reason == "length":
            raise Failure(f"a reply of more than {MAX_REPLY} tokens: {text[:100]!r}", again=False)
        return text

    def read(self, response) -> bytes:
        """Read a response whole, in `timeout` seconds: a socket's own timeout starts anew with each byte."""
        body, deadline = b"", time.monotonic() + self.timeout
        while chunk := response.read1(2**16):
            body += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end after {self.timeout:g} s")
            if len(body) > MAX_BODY:
                raise Failure(f"a reply of more than {MAX_BODY} bytes", again=False)
        return body


class LocalJudge:
    """A model in this process, by vLLM; it starts when first asked. In a run of one rank only: serve it for more."""

    def __init__(
        self,
        model: str,
        cache: str | Path | None = None,
        max_length: int = 8192,
        trust_remote_code: bool = False,
    ):
        if find_spec("vllm") is None:
            raise ValueError(
                f"judge model {model!r}: a judge in this process needs vLLM; install it, or give --judge-url"
            )
        self.model, self.cache, self.engine = (
            rollout.find_model(model, trust_remote_code),
            Cache(cache, model),
            None,
        )
        positions = getattr(
            self.model.config.get_text_config(), "max_position_embeddings", max_length
        )
        self.max_length, self.trust_remote_code = min(max_length, positions), trust_remote_code
        if dist.get_world_size() > 1:
            raise ValueError(
                "a judge in this process needs a run of one rank; start it with `vllm serve` and give --judge-url"
            )

    def start(self) -> None:
        options = (
            self.max_length,
            parallel.DEVICE,
            parallel.compute_dtype("auto"),
            self.trust_remote_code,
        )
        self.engine = rollout.VllmEngine(
            self.model.path, self.model.tokenizer, *options, max_sequences=64
        )

    def ids(self, prompt: str) -> list[int]:
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            return tokenizer(prompt)["input_ids"]
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """Return a reply for each prompt, in order; equal prompts are asked once, too long ones not at all."""
        found, asked, room = {}, {}, self.max_length - MAX_REPLY
        for prompt in dict.fromkeys(prompts):
            if (known := self.cache.get(prompt)) is not None:
                found[prompt] = Reply(known)
            elif len(ids := self.ids(prompt)) > room:
                found[prompt] = Reply(None, f"not asked: {len(ids)} tokens, the judge takes {room}")
            else:
                asked[prompt] = ids
        if asked and self.engine is None:
            self.start()
        sampling = rollout.Sampling(n=1, temperature=0.0, max_tokens=MAX_REPLY)
        episodes = (
            self.engine.generate(list(asked.values()), sampling, list(range(len(asked))))
            if asked
            else []
        )
        for prompt, episode in zip(asked, episodes, strict=True):
            if episode.finish_reason == "length":
                found[prompt] = Reply(
                    None, f"a reply of more than {MAX_REPLY} tokens: {episode.text[:100]!r}"
                )
            elif not episode.text.strip():
                found[prompt] = Reply(None, "an empty reply")
            else:
                self.cache.put(prompt, episode.text)
                found[prompt] = Reply(episode.text)
        return [found[prompt] for prompt in prompts]


def make_judge(
    url: str | None, model: str | None, cache: str | Path | None = None, trust_remote_code=False
) -> Judge | None:
    """Return the judge that the settings ask for: a server's model, a model in this process, or None."""
    if url:
        return ServerJudge(url, model or "", cache)
    return LocalJudge(model, cache, trust_remote_code=trust_remote_code) if model else None


# ---- What a judge is asked, and what it means by its reply
CHOOSE = """You match the answer to a {kind} question with its options. Find what the answer chooses, by letter or by text.
Output {what} and nothing else; output Z if it chooses nothing, or nothing that means the same as an option.

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
EXTRACT = """Extract the final answer from a model's response to a question. Output the answer alone, as short as in the examples,
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


def judge_prompt(question, response: str) -> str:
    """Return what the judge is asked about a response: which options it chooses, or what its answer is. See vlm_eval.Question."""
    asked = question.row.get("question_for_eval") or question.row["question"]
    if question.type not in ("choice", "letters"):
        return EXTRACT.format(question=asked, response=response)
    options = " ".join(f"{letter}. {text}" for letter, text in question.choices.items() if text)
    asked, several = asked + (f" Options: {options}" if options else ""), question.type == "letters"
    what = "the letters of the options chosen" if several else "one capital letter"
    kind, example = ("multiple-choice", SEVERAL) if several else ("single-choice", "")
    return CHOOSE.format(kind=kind, what=what, example=example, question=asked, response=response)


def understand(question, reply: str) -> str | None:
    """Return the answer in a judge's reply, '' if it says that there is none, or None if the reply is neither."""
    reply = reply.rpartition("</think>")[2]
    text = re.sub(
        r"^[\s*_`]*(?:(?:extracted\s+)?answer|(?:your\s+)?output)[\s*_`]*:[\s*_`]*",
        "",
        reply,
        flags=re.IGNORECASE,
    ).strip(" \n\r\t`*\"'")
    text = found[-1].strip() if (found := boxes(text)) else text
    if question.type in ("choice", "letters"):
        if text.strip(" .()") == "Z":
            return ""
        return (
            option_letters(text)
            if question.type == "letters"
            else option_letter(text, question.choices)
        )
    if text.rstrip(".").casefold() == "null":
        return ""
    if "\n" in text or len(text) > 200:  # an answer is one line: more is talk, and nobody's verdict
        return None
    return text if text.casefold() == question.gold.casefold() else value(stated(text) or text)
