"""Rollouts of TRL, verl and prime-rl: rows as they write them, the records, and the page."""

import json
import math
import sys

import pandas
import pytest

import inspector
from pages.other_trainers import read_files

# TRL 1.16, grpo_trainer.py: a data frame of these columns; of messages where prompts are messages
TRL = {
    "step": [5, 5, 5],
    "prompt": ["1 +1", "1 +1", "2 +2"],
    "completion": ["It is 2", "3", "4 \n"],
    "accuracy_reward": [1.0, 0.0, float("nan")],
    "format_reward": [0.2, 0.0, 0.2],
    "solver": ["a", "b", "c"],
    "advantage": [0.7, -0.7, 0.0],
}
# verl, ray_trainer.py, _dump_generations: with what a reward function adds, or without
VERL = [
    {"input": "user\n1 +1", "output": "2", "gts": "2", "score": 1.0, "step": 3, "acc": True},
    {"input": "user\n1 +1", "output": "3 or 2", "gts": "2", "score": -1.0, "step": 3, "pred": "3"},
    {"input": "user\n2 +2", "output": "4", "gts": None, "score": 0.4, "step": 3, "acc": 1.0},
]


def prime_rl(reply: str, ids: list[int], score: float, group: str = "g1") -> dict:
    """An episode of verifiers 0.3.1, as prime-rl's file monitor writes it, without what is null."""
    n = len(ids)
    nodes = [
        {"message": {"role": "user", "content": "1 +1"}, "token_ids": [1], "mask": [False]},
        {
            "parent": 0,
            "message": {"role": "assistant", "content": reply},
            "sampled": True,
            "token_ids": [2, *ids],
            "mask": [False, *[True] * n],
            "logprobs": [-0.25 * k for k in range(n)],
            "advantages": [score - 0.5] * n,
        },
    ]
    trace = {
        "version": 1,
        "task": {"type": "Sum", "data": {"prompt": "1 +1", "answer": "2"}},
        "nodes": nodes,
        "rewards": {
            "solved": {"score": score, "weight": 1.0},
            "short": {"score": 1, "weight": 0.1},
        },
    }
    run = {"type": "train", "id": "r", "work": {"type": "train", "step": 7}}
    return {
        "id": "e",
        "env": {"id": "sum"},
        "task": trace["task"],
        "group": {"id": group},
        "run": run,
        "ok": True,
        "traces": [trace],
    }


def write_lines(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_trl(tmp_path):
    path = tmp_path / "completions_00005.parquet"
    pandas.DataFrame(TRL).to_parquet(path)
    (records,) = read_files([str(path)]).values()
    assert [(one["step"], one["group"], one["sample"]) for one in records] == [
        (5, 0, 0),
        (5, 0, 1),
        (5, 1, 0),
    ]
    assert [one["reward"] for one in records] == [1.2, 0.0, 0.2]
    assert records[2]["parts"] == {"format_reward": 0.2}, "a reward that does not apply is NaN"
    assert [one["correct"] for one in records] == [True, False, False]
    assert records[0]["tokens"] == ["It", " is", " 2"]
    assert records[2]["tokens"] == ["4", " \n"]
    assert records[0]["advantage"] == [0.7] * 3
    assert records[0]["question"] == "1 +1"


def test_trl_with_messages(tmp_path):
    messages = [[{"role": "user", "content": "1 +1"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in TRL["completion"]]
    path = tmp_path / "completions_00005.parquet"
    frame = pandas.DataFrame(TRL | {"prompt": messages, "completion": completions})
    frame.to_parquet(path)
    (records,) = read_files([str(path)]).values()
    assert [one["group"] for one in records] == [0, 0, 0]
    assert records[0]["response"] == "It is 2" and records[0]["question"] == "1 +1"


def test_verl(tmp_path):
    (records,) = read_files([write_lines(tmp_path / "3.jsonl", VERL)]).values()
    assert [(one["step"], one["group"]) for one in records] == [(3, 0), (3, 0), (3, 1)]
    assert [one["reward"] for one in records] == [1.0, -1.0, 0.4]
    assert [one["correct"] for one in records] == [True, False, True], "acc, or else the score"
    assert [one["answer"] for one in records] == ["2", "2", "not recorded"]
    assert [one["extracted"] for one in records] == ["", "3", ""]
    assert records[1]["tokens"] == ["3", " or", " 2"]
    assert records[0]["advantage"] == [None]


def test_prime_rl(tmp_path, merging_tokenizer):
    """Words without a tokenizer; with one tokens, their log-probs and advantages."""
    ids = merging_tokenizer.encode("the policy", add_special_tokens=False)
    rows = [prime_rl("the policy", ids, 1.0), prime_rl("3", ids[:1], 0.0)]
    rows.append(prime_rl("3", ids[:1], 0.0, group="g2"))
    rows.append({**rows[0], "traces": []})  # it failed before a trace was there
    path = write_lines(tmp_path / "traces.jsonl", rows)
    (records,) = read_files([path]).values()
    assert [(one["step"], one["group"]) for one in records] == [(7, 0), (7, 0), (7, 1)]
    assert records[0]["reward"] == pytest.approx(1.1)
    assert (records[0]["answer"], records[0]["question"]) == ("2", "1 +1")
    assert records[0]["tokens"] == ["the", " policy"]
    assert records[0]["advantage"] == [0.5, 0.5] and records[0]["logp"] == [None, None]

    (records,) = read_files([path], merging_tokenizer).values()
    assert "".join(records[0]["tokens"]) == "the policy"
    assert records[0]["token_ids"] == ids
    assert records[0]["logp"] == [-0.25 * k for k in range(len(ids))]
    assert records[0]["advantage"] == [0.5] * len(ids)


def test_prime_rl_with_a_tool(tmp_path, merging_tokenizer):
    """What a tool says is in the response, and has no numbers; another branch is left out."""
    episode = prime_rl("the", merging_tokenizer.encode("the", add_special_tokens=False), 1.0)
    nodes = episode["traces"][0]["nodes"]
    nodes.append({"parent": 0, "message": {"role": "user", "content": "dead end"}})
    tool_ids = merging_tokenizer.encode(" policy", add_special_tokens=False)
    nodes.append(
        {
            "parent": 1,
            "message": {"role": "tool", "content": " policy"},
            "token_ids": tool_ids,
            "mask": [False] * len(tool_ids),
        }
    )
    path = write_lines(tmp_path / "traces.jsonl", [episode])
    ((one,),) = read_files([path], merging_tokenizer).values()
    assert one["response"] == "the\n policy"
    assert "".join(one["tokens"]) == "the policy"
    n_tool = len(tool_ids)
    for name in ("logp", "advantage", "dense_reward"):
        assert one[name][-n_tool:] == [None] * n_tool, name
        assert None not in one[name][:-n_tool], name


def with_node(**parts) -> dict:
    """An episode of prime-rl with one node."""
    return {"traces": [{"nodes": [{"message": {"content": "x"}, "sampled": True, **parts}]}]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": 1}, "row 1 has question; expected rollouts of TRL"),
        ({**VERL[0], "output": 5}, "row 1: TypeError.*expected rollouts of TRL"),
        ({"traces": [{"nodes": [{}]}]}, "no response; expected rollouts"),
        ({"traces": 5}, "row 1: TypeError.*expected rollouts"),
        ({**VERL[0], "score": math.nan}, "row 1: TypeError.*a finite number as reward"),
        ({**VERL[0], "step": -1}, "row 1: TypeError.*a whole number as step"),
        ({**VERL[0], "step": 10**30}, "row 1: TypeError.*a whole number as step"),
        (
            with_node(parent=0),
            "row 1: ValueError.*node 0 has the parent 0, which is none before it",
        ),
        (
            with_node(parent=3),
            "row 1: ValueError.*node 0 has the parent 3, which is none before it",
        ),
        (with_node(token_ids=["1"], mask=[True]), "row 1: TypeError.*whole numbers as ids of"),
        (with_node(token_ids=[1], mask=[True], logprobs=["x"]), "row 1: TypeError.*log-probs"),
    ],
)
def test_what_is_no_rollout_is_named(tmp_path, row, words):
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=words):
        read_files([path])


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" * 9])
def test_a_parquet_file_that_is_none(tmp_path, content):
    path = tmp_path / "completions_00005.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="00005.parquet is not Parquet .*; expected rollouts of"):
        read_files([str(path)])


def test_a_parquet_file_that_is_torn(tmp_path):
    path = tmp_path / "completions_00005.parquet"
    pandas.DataFrame(TRL).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="00005.parquet is not Parquet"):
        read_files([str(path)])


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="1.jsonl does not exist; expected rollouts of TRL"):
        read_files([str(tmp_path / "1.jsonl")])
    with pytest.raises(ValueError, match="no file; expected rollouts of TRL"):
        read_files([])


@pytest.mark.browser
def test_the_page_of_several_steps(browser, tmp_path, monkeypatch, capsys):
    """From the command line to what a reader sees; what no trainer says has no colour."""
    files = []
    for step in (3, 4):
        rows = [{**row, "step": step} for row in VERL]
        files.append(write_lines(tmp_path / f"{step}.jsonl", rows))
    monkeypatch.setattr(sys, "argv", ["inspector.py", "--jsonl", *files])
    inspector.main()
    page = tmp_path / "rollouts.html"
    assert capsys.readouterr().out == f"open {page}\n"
    browser.open(page, "document.querySelector('article .t')")
    titles = browser.js("[...document.querySelectorAll('article h2')].map(h => h.textContent)")
    assert (
        titles[1]
        == "sample 1wrong3reward −1 · 3 tokens · leaves the right ones at token 1: 3 for 2"
    )
    colours = browser.js("[...document.querySelectorAll('#colours input')].map(i => i.value)")
    assert colours == ["advantage"]
    assert browser.js("document.forms[0].step.max") == "1"
    assert browser.log("browser") == []
