"""Episodes with tokens that the policy did not sample: they are read, and nothing else."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import (
    FAMILIES,
    ROOT,
    copy_with_edits,
    flow_reward_of,
    plain_model,
    problems_in,
    read_lines,
    small_run,
    tiny_model,
    tiny_vlm,
)

import dense
import flow as fl
import rlfr
import rollout
import train_rl
from engines.probes import check_log_probs
from infra import batching, record, vision
from infra.settings import change
from policy import Policy, tap_layers
from rewards import Verdict
from worlds import toy

# A group with one prompt, with a tool's tokens amid, at the beginning and at the end of responses,
# and two rows with nothing of a tool; the tool's tokens are 40 to 43
ROWS = [
    batching.Row([5, 6, 7], [8, 9, 40, 41, 10], sampled=[True, True, False, False, True]),
    batching.Row([5, 6, 7], [40, 11, 12], sampled=[False, True, True]),
    batching.Row([5, 6, 7], [13, 14]),
    batching.Row([5, 6, 7], [15, 42, 16, 43], sampled=[True, False, True, False]),
    batching.Row([10], [11, 12, 13]),
]
SAMPLED = [[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]


# ---- Batches and the policy
def test_a_batch_tells_the_response_from_what_was_sampled():
    batch = batching.collate(ROWS)
    assert batch.response_mask.int().tolist() == SAMPLED
    assert batch.in_response.sum(dim=1).tolist() == [5, 3, 2, 4, 3]
    assert batch.targets.sum(dim=1).tolist() == [3, 2, 2, 2, 3]
    sampled = [8, 9, 10, 11, 12, 13, 14, 15, 16, 11, 12, 13]
    assert batch.input_ids[batch.targets].tolist() == sampled
    spread = batch.unflatten(batch.input_ids[batch.targets])
    assert spread[0].tolist() == [8, 9, 0, 0, 10] and spread[3].tolist() == [15, 0, 16, 0, 0]


def test_an_ordinary_batch_is_what_it_was():
    """All tokens sampled, said or not."""
    said = [row._replace(sampled=[True] * len(row.response_ids)) for row in ROWS]
    unsaid = [row._replace(sampled=None) for row in ROWS]
    one, other = batching.collate(said), batching.collate(unsaid)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.response_mask, other.response_mask)
    assert torch.equal(other.targets, other.in_response)


@pytest.mark.parametrize(
    ("sampled", "words"),
    [
        ([False, False], "needs a response token that the policy sampled"),
        ([True], "sampled: 1 for 2 tokens"),
    ],
)
def test_a_response_that_nobody_sampled_is_refused(sampled, words):
    with pytest.raises(AssertionError, match=words):
        batching.collate([batching.Row([1], [2, 3], sampled=sampled)])


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_each_row_alone(family):
    """Hugging Face's own forward of single rows; the rows of a prompt do not take each other's tokens."""
    policy = Policy(tiny_model(family))
    plain = plain_model(family)
    scored = policy(batching.collate(ROWS), temperature=0.7, taps=[1])
    for row, (prompt, response, *_) in enumerate(ROWS):
        ids = torch.tensor([prompt + response])
        output = plain(ids, output_hidden_states=True)
        log_p = (output.logits[0, len(prompt) - 1 : -1].float() / 0.7).log_softmax(dim=-1)
        logp = log_p.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        is_sampled = torch.tensor(SAMPLED[row]).bool()
        n = len(response)
        for got, expected in ((scored.logp[row], logp), (scored.entropy[row], entropy)):
            kept = is_sampled[:n]
            torch.testing.assert_close(got[:n][kept], expected[kept], rtol=1e-4, atol=1e-5)
            assert (got[~is_sampled] == 0).all()
        latent = scored.latents[0][row, : ids.shape[1]]  # also those of the tool's tokens
        torch.testing.assert_close(latent, output.hidden_states[2][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalisation", ["sequence", "token", "constant"])
def test_the_gradient_is_that_of_the_sampled_tokens_of_each_row(normalisation):
    policy = Policy(tiny_model("qwen2"))
    plain = plain_model("qwen2")
    batch = batching.collate(ROWS)
    n_tokens = int(batch.response_mask.sum())
    weights = rlfr.token_weights(batch.response_mask, normalisation, 5, n_tokens, 8)
    assert (weights[~torch.tensor(SAMPLED).bool()] == 0).all()
    (policy(batch).logp * weights).sum().backward()
    for row, sampled in zip(ROWS, SAMPLED, strict=True):
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        logits = plain(ids).logits[0, len(row.prompt_ids) - 1 : -1]
        logp = logits.log_softmax(dim=-1).gather(1, torch.tensor(row.response_ids)[:, None])
        is_sampled = torch.tensor(sampled[: len(row.response_ids)])
        n = {"sequence": 5 * is_sampled.sum(), "token": n_tokens, "constant": 5 * 8}[normalisation]
        (logp.squeeze(1) * is_sampled / n).sum().backward()
    for got, expected in zip(policy.model.parameters(), plain.parameters(), strict=True):
        assert (got.grad - expected.grad).abs().max() <= 1e-4 * expected.grad.abs().max()


def test_a_placeholder_in_a_result_is_a_word():
    """It stands for no image, whoever wrote it."""
    policy = Policy(tiny_vlm("qwen2_5_vl"))
    placeholder = toy.make_tokenizer(images=True).convert_tokens_to_ids(vision.PAD)
    row = batching.Row([5, 6], [11, placeholder, 14])
    of_a_tool = row._replace(sampled=[True, False, True])
    expected = policy(batching.collate([row])).logp[0, [0, 2]]
    got = policy(batching.collate([of_a_tool])).logp[0, [0, 2]]
    torch.testing.assert_close(got, expected)


# ---- The flow
def test_rows_of_the_flow_are_of_sampled_tokens_and_see_the_tools():
    """The context of the token after a result is the latent of the result."""
    batch = batching.collate(ROWS)
    latent = torch.arange(batch.input_ids.numel() * 4.0).view(*batch.input_ids.shape, 4)
    config = fl.FlowConfig(dim=4, percentiles=(0.5,))
    rows = fl.make_rows(config, [latent], [0.5], batch.attention_mask, batch.targets)
    assert len(rows.x_1) == 12
    torch.testing.assert_close(rows.x_1, latent[batch.targets])
    last_of_first_row = 2  # of three sampled tokens; a tool's stands before it
    torch.testing.assert_close(rows.context[last_of_first_row], latent[0, 3 + 3])
    assert batch.input_ids[0, 3 + 3] == 41


def a_flow(dim: int) -> fl.Flow:
    torch.manual_seed(1)
    flow = fl.Flow(fl.FlowConfig(dim=dim, n_blocks=1))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow


@torch.no_grad()
def score_rows(rows) -> dense.Scores:
    """Score rows with a tiny policy and a flow, which learns from the first row alone."""
    policy = Policy(tiny_model("qwen2"))
    settings = (dense.FlowRewardSettings(), dense.FlowUpdateSettings())
    reward = dense.FlowReward(a_flow(32), policy.n_layers, *settings, seed=0, group_size=1)
    episodes = []
    for row in rows:
        verdict = Verdict(0.0, not episodes, {}, None, "answer")
        episode = rollout.Episode(row.prompt_ids, row.response_ids, [], "stop", "", verdict=verdict)
        episodes.append(replace(episode, sampled=row.sampled))
    reward.begin(0, episodes)
    batch = batching.collate(rows)
    output = policy(batch, taps=tap_layers(policy.n_layers, reward.taps))
    part = dense.MicroBatch(batch, episodes, range(len(rows)), output, reward.taps)
    with torch.enable_grad():
        scores = dense.checked_scores(reward, part)
    weight = reward.loss_weights(part)
    torch.testing.assert_close(weight, torch.tensor([1 / 3] * 3 + [0.0] * 9))
    return scores


def test_a_tool_s_tokens_have_no_score_and_count_for_the_next_token():
    before = score_rows(ROWS)
    is_sampled = torch.tensor(SAMPLED).bool()
    assert torch.equal(before.mask, is_sampled)
    assert (before.values[:, ~is_sampled] == 0).all()
    changed = ROWS[0]._replace(response_ids=[8, 9, 40, 50, 10])  # another result
    after = score_rows([changed, *ROWS[1:]])
    difference = (after.values - before.values).abs().amax(dim=0)
    assert difference[0, 4] > 1e-3, "the token after it"
    difference[0, 4] = 0
    assert difference.max() < 1e-5, "no token before it, and no other row"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flow_scope": "group", "dense_centre": True},
        {"flow_scope": "expert", "dense_centre": True},
        {"flow_scope": "expert", "dense_on": "response"},
        {"flow_bilateral": True, "gamma": 0.9},
    ],
)
def test_a_tool_s_tokens_have_no_reward(settings):
    """Scores outside the mask, whatever they are, count for nothing."""
    mask = torch.tensor(SAMPLED[:4]).bool()
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(mask.shape, generator=generator) * mask
    config = change(train_rl.Config(), group_size=4, **settings)
    shaping = config.dense_reward
    reward = dense.token_rewards(flow_reward_of(config), score, mask, shaping, group_size=4)
    added = dense.credit(reward, mask, mask, shaping, group_size=4, baseline="grpo")
    assert reward[mask].any() and added[mask].any()
    assert (reward[~mask] == 0).all() and (added[~mask] == 0).all()


class Everywhere(dense.DenseReward):
    """Scores every position, and says so."""

    name = "everywhere"

    def score(self, part):
        ones = torch.ones(part.batch.response_mask.shape)
        return dense.Scores(ones, ones.bool())


def test_a_reward_cannot_score_a_tool_s_tokens():
    batch = batching.collate(ROWS)
    scores = dense.checked_scores(
        Everywhere(None, None), dense.MicroBatch(batch, ROWS, range(5), None, ())
    )
    assert scores.mask.int().tolist() == scores.values[0].int().tolist() == SAMPLED


def test_a_tool_s_tokens_discount_nothing():
    mask = torch.tensor([[1, 0, 0, 1, 1]]).bool()
    reward = torch.tensor([[1.0, 50.0, 50.0, 2.0, 4.0]])
    assert rlfr.token_returns(reward, mask, 1.0).tolist() == [[7, 0, 0, 6, 4]]
    assert rlfr.token_returns(reward, mask, 0.5).tolist() == [[3, 0, 0, 4, 4]]


# ---- A step
def episodes_of(world, logp_of_tools: float) -> list[rollout.Episode]:
    """Two groups of four graded responses, with a tool's tokens in most of them."""
    problems = problems_in(world.path("train.jsonl"))[:2]
    episodes = []
    for problem in problems:
        for k, row in enumerate(ROWS[:4]):
            flags = batching.sampled_flags(row)
            logp = [-2.0 if flag else logp_of_tools for flag in flags]
            verdict = Verdict(float(k % 2), k % 2 == 1, {}, None, "answer")
            episode = rollout.Episode(
                problem.prompt_ids, row.response_ids, logp, "stop", "", (), problem, verdict
            )
            episodes.append(replace(episode, sampled=row.sampled))
    return episodes


def run_step(config: train_rl.Config, world, logp_of_tools: float):
    """Return the experience of a step, its shaped tensors, its figures and its records."""
    model = train_rl.find_model(config.model, config.loading)
    config = train_rl.fill_in(config, model)
    models = train_rl.with_learners(train_rl.make_models(config, model, is_flow_named=True), 0.0)
    experience = train_rl.score(models, episodes_of(world, logp_of_tools), 0, 1.0, 1000)
    advantage, reward, metrics = train_rl.shape_advantage(experience, models.dense, config, 0)
    metrics |= train_rl.update_policy(models, experience, advantage, config, step=0, lr=1e-3)
    metrics |= train_rl.step_metrics(experience, config)
    shaped = {"advantage": advantage, "dense_reward": reward}
    records = train_rl.describe_rollouts(models, experience, shaped, config, model.tokenizer, 2)
    return experience, shaped, metrics, records


def test_a_step_skips_what_was_not_sampled(world, flow_folder, tmp_path):
    """What an engine says of a tool's tokens changes nothing; their records are empty."""
    config = small_run(
        world, flow_folder, tmp_path / "run", kl_coef=0.1, entropy_coef=0.01, prompts=2
    )
    mask = torch.tensor(SAMPLED[:4] * 2).bool()
    experience, shaped, metrics, records = run_step(config, world, logp_of_tools=0.0)
    assert torch.equal(experience.mask, mask) and torch.equal(experience.scored, mask)
    for name in ("old_logp", "entropy", "ref_logp", "score", "sampled_logp"):
        assert (getattr(experience, name)[~mask] == 0).all(), name
        assert (getattr(experience, name)[mask] != 0).any(), name
    assert (shaped["advantage"][~mask] == 0).all() and (shaped["dense_reward"][~mask] == 0).all()
    assert metrics["length"] == mask.sum() / 8
    assert metrics["entropy"] == pytest.approx(experience.entropy[mask].mean().item())
    assert all(math.isfinite(value) for value in metrics.values())

    for other in (-50.0, math.nan):
        _, _, same, _ = run_step(config, world, logp_of_tools=other)
        assert same == metrics

    first = records[0]
    assert len(first["tokens"]) == len(first["token_ids"]) == 5
    for name in ("logp", "entropy", "dense_reward", "advantage", "ratio"):
        assert [value is None for value in first[name]] == [False, False, True, True, False], name
    for of_tap in first["dense_score"]:
        assert [value is None for value in of_tap] == [False, False, True, True, False]
    _, rows = record.summary_rows([{"problem": "", "step": 1, **one} for one in records])
    assert rows[0][-2] == pytest.approx(shaped["dense_reward"][0].sum().item(), rel=1e-4)


def test_probes_compare_what_was_sampled():
    probe = rollout.Episode([1], [2, 3, 4], [-1.0, 99.0, -2.0], "stop", "")
    probe = replace(probe, sampled=[True, False, True])
    check_log_probs([probe], torch.tensor([-1.0, -2.0]), "model")
    with pytest.raises(ValueError, match="the engine's log-probs differ"):
        check_log_probs([probe], torch.tensor([-1.0, -3.0]), "model")


# ---- The calculator of docs/turns.md
PAGE = (ROOT / "docs" / "turns.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
((FILE, CODE),) = re.findall(r"^```python (\S+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NAMES: dict = {}
exec(CODE, NAMES)
TOKENIZER = toy.make_tokenizer()
PROMPT = TOKENIZER.encode("7 +5 *3>")


class Scripted:
    """An engine that says the next of some texts, whatever it is asked."""

    n_ranks = 1
    tokenizer = TOKENIZER

    def __init__(self, *texts: str):
        self.texts = list(texts)
        self.asked: list[rollout.Request] = []

    def generate(self, requests, sampling):
        assert sampling.n == 1
        self.asked += requests
        episodes = []
        for request in requests:
            ids = TOKENIZER.encode(self.texts.pop(0))
            assert sampling.room(request) >= 1
            reason = "stop" if ids[-1] == TOKENIZER.eos_token_id else "length"
            logp = [-float(k) for k in range(len(ids))]
            episodes.append(rollout.Episode(request.prompt_ids, ids, logp, reason, "unread"))
        return episodes


def ask(*texts: str, n: int = 1, max_tokens: int = 50, seeds=(0,)):
    """Return the scripted engine, and what a calculator around it makes of its texts."""
    engine = Scripted(*texts)
    requests = [rollout.Request(PROMPT, seed) for seed in seeds]
    sampling = rollout.Sampling(n=n, max_tokens=max_tokens)
    return engine, NAMES["Calculator"](engine).generate(requests, sampling)


def test_the_calculator_answers_each_question():
    engine, (episode,) = ask("<7+5>9,<9*9>", ",<2*3>", rf". \boxed{{6}}{toy.EOS}")
    assert episode.text == r"<7+5>2,<2*3>6. \boxed{6}"
    assert TOKENIZER.decode(episode.response_ids) == episode.text + toy.EOS
    assert episode.finish_reason == "stop" and episode.prompt_ids == PROMPT
    marks = "".join("s" if flag else "t" for flag in episode.sampled)
    assert marks == "ssssst" + "sssssst" + "s" * 12
    assert episode.logp[:7] == [0.0, -1.0, -2.0, -3.0, -4.0, 0.0, 0.0]
    assert TOKENIZER.decode(engine.asked[1].prompt_ids) == "7 +5 *3><7+5>2"
    assert len({request.seed for request in engine.asked}) == 3
    assert NAMES["Calculator"](engine).n_ranks == 1, "all else is the engine's"


@pytest.mark.parametrize(
    ("max_tokens", "text", "n_answered"),
    [(3, "<7+", 0), (5, "<7+5>", 0), (6, "<7+5>2", 1), (8, "<7+5>2,<", 1)],
)
def test_a_response_keeps_to_its_room(max_tokens, text, n_answered):
    _, (episode,) = ask("<7+5>2,<", ",<2*3>", max_tokens=max_tokens)
    assert (episode.text, episode.finish_reason) == (text, "length")
    assert len(episode.logp) == len(episode.sampled) == len(episode.response_ids) == max_tokens
    assert episode.sampled.count(False) == n_answered


def test_what_is_no_question_gets_a_question_mark():
    _, (episode,) = ask("<7+>", "x" + toy.EOS)
    assert episode.text == "<7+>?x"


def test_responses_keep_their_order_and_their_seeds():
    """Two requests of two responses; the second and third ask, and are asked again together."""
    texts = ["a", "<1+1>", "<2+2>", "d", "b", "c"]
    engine, episodes = ask(*(text + toy.EOS for text in texts), n=2, seeds=(5, 90))
    assert [episode.text for episode in episodes] == ["a", "<1+1>2b", "<2+2>4c", "d"]
    assert len(engine.asked) == len({request.seed for request in engine.asked}) == 6
    assert NAMES["Calculator"](engine).generate([], rollout.Sampling()) == []


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vllm2", "--engine vllm2: expected auto, vllm, torch or a Python file"),
        ("nowhere.py", "--engine nowhere.py: expected auto, vllm, torch or a Python file"),
        ("{empty}", "defines no function make_engine"),
    ],
)
def test_bad_engines_are_refused(engine, words, world, tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("")
    config = small_run(world, None, tmp_path / "run", shaping="none")
    with pytest.raises(ValueError, match=words):
        train_rl.main(change(config, engine=engine.format(empty=empty)))


CHECK = """
import sys
from pathlib import Path

import train_rl
from infra.settings import change
from worlds import toy

folder = Path(sys.argv[1])
world = toy.make(toy.World(
    str(folder / "toy"), steps=60, batch_size=32, lr=1e-2, hidden_size=32, n_layers=3, n_train=64,
    n_test=16, n_expert=48,
))
train_rl.main(change(
    train_rl.Config(), model=world.path("model"), data=world.path("train.jsonl"), flow="new",
    template="none", prompts=4, group_size=4, train_batch=8, max_tokens=24, max_prompt_tokens=64,
    steps=2, lr=1e-3, save_every=0, log_rollouts=1, folder=str(folder / "run"),
    engine="engines/calculator.py",
))
"""


def test_the_edit_trains_with_the_calculator(tmp_path):
    """Each token without numbers is the answer to the question before it; some questions are asked."""
    assert sum(bool(line.strip()) for line in CODE.splitlines()) <= 60
    copy = copy_with_edits(tmp_path / "rlfr", DIFFS, {FILE: CODE})
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expert = json.loads((tmp_path / "toy" / "expert.jsonl").read_text().splitlines()[0])
    assert re.match(r"(<\d[-+*]\d>\d,)+<\d[-+*]\d>\d\. \\boxed\{\d\}$", expert["solution"])

    n_answered = 0
    for step in (1, 2):
        for one in read_lines(tmp_path / "run" / "rollouts" / f"step-{step}.jsonl"):
            before = ""
            for text, logp in zip(one["tokens"], one["logp"], strict=True):
                if before.endswith(">"):
                    assert logp is None and text == NAMES["answer"](before)
                    n_answered += text != "?"
                else:
                    assert logp is not None
                before += text
    assert n_answered >= 5
