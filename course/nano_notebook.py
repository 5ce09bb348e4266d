# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # RLFR, step by step
#
# A small language model knows how to solve chains of arithmetic, but often answers at once, and
# wrong. Reinforcement learning with verifiable rewards gives it one bit a response. RLFR adds a
# signal for each token: a *flow* learns what the hidden states of good solutions look like, and
# tokens whose hidden states deviate from it are penalised.
#
# This notebook walks through [`nano.py`](nano.py), the whole method in 250 lines. It runs on two
# cores in a few minutes, as it trains for fewer steps than `python -m course.nano`, which trains
# for 100.

# %%
import inspect
import os
import random
import sys
from html import escape
from pathlib import Path

if not Path("worlds").is_dir():
    os.chdir("..")  # the repository, of which this notebook is in a folder
sys.path.insert(0, os.getcwd())

from course import nano  # noqa: E402 (first: it says how threads wait, before torch is imported)

# isort: split
import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Markdown, display
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, set_seed

from pages.rollouts import write_rollouts_page
from worlds import find_world

# %% tags=["parameters"]
STEPS = 36  # of reinforcement learning
PROMPTS = 32  # problems a step
FLOW_STEPS = 750  # of the offline start
HELD_OUT = 64  # problems to evaluate on
FOLDER = None  # of an embedded world; None: the default one, which is made in runs/toy


# %%
def show_source(*functions):
    """Show functions of nano.py as they stand there."""
    text = "\n\n".join(inspect.getsource(function) for function in functions)
    display(Markdown(f"```python\n{text}```"))


nano.FLOW_STEPS = FLOW_STEPS
logging.disable_progress_bar()
set_seed(nano.SEED)
plt.rcParams.update({"figure.dpi": 70, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The world
#
# A problem is a chain of operations modulo 10, read from left to right. An expert writes out
# every step. The base model has seen demonstrations that are hasty on long chains.

# %%
folder = FOLDER or find_world("toy").folder
experts = nano.load(f"{folder}/expert.jsonl")
problems = nano.load(f"{folder}/train.jsonl")
held_out = nano.load(f"{folder}/test.jsonl")[:HELD_OUT]
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
policy = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
print(f"{policy.num_parameters():,} parameters, {len(policy.model.layers)} layers")
for row in experts[:3]:
    print(f"{row['problem']:28} {row['solution']}")


def print_accuracy():
    """Sample a group of responses to each held-out problem, and print how many are right."""
    groups = nano.roll_out(policy, tokenizer, held_out)
    rewards = [
        nano.verify(tokenizer, group, row["answer"])
        for row, group in zip(held_out, groups, strict=True)
    ]
    print(f"held-out problems: {torch.cat(rewards).mean():.1%} right")


print_accuracy()

# %% [markdown]
# ## 1. The flow
#
# A latent `x_1` is what a tapped layer of the policy outputs at a token. Noise `x_0` is Gaussian.
# Between them lies a straight path, `x_t = t x_1 + (1 - t) x_0`, with the velocity `u = x_1 -
# x_0`. A network `v` learns to tell this velocity from `x_t`, the time `t`, the latent at the
# token before (the *context*), and the depth of the layer. It cannot know `u`, for many paths
# lead through a point; what it learns is the mean of those that good latents lie on.

# %%
show_source(nano.VelocityNet, nano.velocity_error)

# %% [markdown]
# ## 2. The offline start
#
# The frozen policy reads expert solutions. A hook keeps what a tapped layer puts out, and `read`
# makes of it the latents of a response, and the log-prob of each of its tokens, which the update
# needs later. The flow is fitted to the latents.

# %%
show_source(nano.keep_states, nano.read, nano.update, nano.fit_flow)


# %%
def read_solutions(rows):
    """Return the latents (2, L, M, D) of solutions with M tokens in all."""
    latents = []
    for row in rows:
        prompt = tokenizer.encode(row["problem"])
        solution = tokenizer.encode(row["solution"] + tokenizer.eos_token)
        with torch.no_grad():
            latents.append(nano.read(policy, prompt, solution)[1])
    return torch.cat(latents, dim=2)


def error_by_time():
    """Return the error of the velocity at some times, for each tap, (n_times, L)."""
    with torch.no_grad():
        rows = [nano.velocity_error(flow, latents, t).mean(dim=1) for t in TIMES]
    return torch.stack(rows)


for tap in nano.TAPS:
    policy.model.layers[tap].register_forward_hook(nano.keep_states)
TIMES = torch.linspace(0.05, 0.95, 10).tolist()
latents = read_solutions(held_out)
flow = nano.VelocityNet(policy.config.hidden_size)
before = error_by_time()
nano.fit_flow(flow, policy, tokenizer, experts)
after = error_by_time()

# %% [markdown]
# On the left: noise becomes latents of the middle tap, seen along the two directions in which
# latents vary most. On the right: the error of the velocity on solutions that the flow has not
# seen. Before training `v` says nothing, and the error is little more than the mean square of `u`.
# Near `t = 1` the latent is all but known, and what is left of the error is the noise.

# %%
x_1 = latents[0, 1]  # (M, D)
x_0 = torch.randn_like(x_1)
_, _, directions = torch.pca_lowrank(x_1, q=2)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
chosen = torch.randperm(len(x_1))[:300]
for t, colour in ((0.0, "0.7"), (0.5, "tab:orange"), (0.8, "tab:red"), (1.0, "tab:blue")):
    points = (t * x_1[chosen] + (1 - t) * x_0[chosen] - x_1.mean(dim=0)) @ directions
    left.scatter(*points.T, s=6, color=colour, label=f"t = {t}")
left.legend(frameon=False)
left.set_title("from noise to latents")
for i, tap in enumerate(nano.TAPS):
    (line,) = right.plot(TIMES, after[:, i], label=f"layer {tap}, fitted")
    right.plot(TIMES, before[:, i], ":", color=line.get_color())
right.axvline(nano.REWARD_TIME, color="0.8")
right.set(xlabel="t", ylabel="error of the velocity", yscale="log", title="dotted: before training")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3. and 4. Sample, and verify
#
# The policy samples a group of responses to each problem. A response is right if it ends with the
# answer in a box.

# %%
show_source(nano.roll_out, nano.verify)

# %%
problem = max(problems[:50], key=lambda row: len(row["problem"]))
groups = nano.roll_out(policy, tokenizer, [problem] * 4)
group = max(groups, key=lambda rows: (rows != tokenizer.pad_token_id).sum())  # the longest of four
reward = nano.verify(tokenizer, group, problem["answer"])
print(problem["problem"], "answer", problem["answer"])
for row, r in zip(group, reward, strict=True):
    print(f"  reward {r:.0f}  {tokenizer.decode(row, skip_special_tokens=True)}")

# %% [markdown]
# ## 5. Score every token, and 6. shape the scores
#
# One forward of the policy gives the latents of a response. The score of a token is the error of
# the flow's velocity there, at the time 0.8, times `t / (1 - t)`. Scores of a response are brought
# to [0, 1]; those above 0.6, and 15 of them at most, become penalties. A token's advantage is the
# outcome's, compared with the group's, plus the penalties of this token and of all that follow it:
# it led to them.

# %%
show_source(nano.shape)


# %%
def score_by_tap(error):
    """Return scores (L, T) of errors (L, T) at the reward time; a token's is their mean."""
    return nano.REWARD_TIME / (1 - nano.REWARD_TIME) * error.detach()


def outcome_advantage(reward):
    """Return the advantages (G,) of a group's responses by the outcome alone."""
    return (reward - reward.mean()) / (reward.std() + 1e-9)


def returns_of(flow_reward):
    """Return the sum of flow rewards from each token on, (T,)."""
    return flow_reward.flip(0).cumsum(0).flip(0)


prompt = tokenizer.encode(problem["problem"])
longest = int((group != tokenizer.pad_token_id).sum(dim=1).argmax())
response = group[longest][group[longest] != tokenizer.pad_token_id].tolist()
_, latents = nano.read(policy, prompt, response)
score = score_by_tap(nano.velocity_error(flow, latents, nano.REWARD_TIME)).mean(0)
flow_reward = nano.shape(score)
advantage = outcome_advantage(reward)[longest] + returns_of(flow_reward)
labels = [tokenizer.decode([token]) for token in response]
labels[-1] = labels[-1].replace(tokenizer.eos_token, "EOS").replace("$", r"\$")
figure, axes = plt.subplots(3, 1, figsize=(11, 6), sharex=True)
panels = {"score": score, "flow reward": flow_reward, "advantage": advantage}
for axis, (name, values) in zip(axes, panels.items(), strict=True):
    axis.bar(range(len(response)), values.tolist(), color="tab:orange")
    axis.set_ylabel(name)
axes[-1].set_xticks(range(len(response)), labels, family="monospace")
axes[0].set_title(f"a response to {problem['problem']} reward {reward[longest]:.0f}")
plt.show()

# %% [markdown]
# ## 7. Update the policy, and 8. the flow
#
# The policy learns by PPO's loss. The flow learns, too: from the right responses, so that it
# keeps up with a policy that changes.

# %%
show_source(nano.ppo_loss)

# %% [markdown]
# Now all of it, in a loop.

# %%
show_source(nano.main)

# %% [markdown]
# Here is the same loop with figures of each step. It keeps some rollouts for a page, as
# `infra/record.py` describes them.


# %%
def record_of(problem, response, reward, outcome, numbers, by_tap):
    """Return what is kept of a response, for the page of rollouts."""
    is_right = bool(reward)
    return {
        "problem": problem["id"],
        "question": problem["problem"],
        "answer": problem["answer"],
        "prompt": problem["problem"],
        "images": [],
        "response": tokenizer.decode(response, skip_special_tokens=True),
        "finish_reason": "stop" if response[-1] == tokenizer.eos_token_id else "length",
        "reward": reward.item(),
        "outcome": outcome.item(),
        "parts": {"binary": reward.item()},
        "correct": is_right,
        "verdict": "right" if is_right else "wrong",
        "extracted": None,
        "text": "",
        "dense": "flow",
        "taps": list(nano.TAPS),
        "token_ids": response,
        "tokens": [tokenizer.decode([token]) for token in response],
        "entropy": [None] * len(response),
        "ratio": [1.0] * len(response),
        "dense_score": [shorten(values) for values in by_tap],
    } | {name: shorten(values) for name, values in numbers.items()}


def shorten(values):
    """Return numbers with four significant digits."""
    return [float(f"{value:.4g}") for value in values.tolist()]


NAMES = ("reward", "response tokens", "score", "flow reward of a response")
kept = {}  # of some steps: records of their first two groups
history = []  # of each step: a mean over responses for each name
policy_optimizer = AdamW(policy.parameters(), nano.LR)
flow_optimizer = AdamW(flow.parameters(), nano.FLOW_LR)
for step in range(STEPS):
    losses, flow_losses, figures = [], [], []
    is_kept = step % 10 == 0 or step == STEPS - 1
    if is_kept:
        kept[step + 1] = []
    chosen = random.sample(problems, PROMPTS)
    groups = nano.roll_out(policy, tokenizer, chosen)
    for n, (problem, group) in enumerate(zip(chosen, groups, strict=True)):
        prompt = tokenizer.encode(problem["problem"])
        reward = nano.verify(tokenizer, group, problem["answer"])
        outcome = outcome_advantage(reward)
        for i, row in enumerate(group):
            response = row[row != tokenizer.pad_token_id].tolist()
            logp, latents = nano.read(policy, prompt, response)
            error = nano.velocity_error(flow, latents, nano.REWARD_TIME)  # (L, T)
            score = score_by_tap(error)
            flow_reward = nano.shape(score.mean(0))
            advantage = outcome[i] + returns_of(flow_reward)
            losses.append(nano.ppo_loss(logp, logp.detach(), advantage).mean())
            if reward[i]:
                flow_losses.append(error.mean())
            figures.append((reward[i], len(response), score.mean(), flow_reward.sum()))
            if is_kept and n < 2:
                numbers = {"logp": logp, "dense_reward": flow_reward, "advantage": advantage}
                record = record_of(problem, response, reward[i], outcome[i], numbers, score)
                kept[step + 1].append({"step": step + 1, "group": n, "sample": i, **record})
    nano.update(policy, policy_optimizer, torch.stack(losses).mean())
    if flow_losses:
        nano.update(flow, flow_optimizer, torch.stack(flow_losses).mean())
    history.append(torch.tensor(figures).mean(0).tolist())
    if is_kept:
        means = zip(NAMES, history[-1], strict=True)
        print(f"step {step + 1:3d} ", "  ".join(f"{name} {mean:.3f}" for name, mean in means))
print_accuracy()

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3))
for axis, name, values in zip(axes, NAMES, zip(*history, strict=True), strict=True):
    axis.plot(range(1, STEPS + 1), values)
    axis.set(title=name, xlabel="step")
figure.tight_layout()
plt.show()

# %% [markdown]
# The reward rises as responses grow longer: the policy has found that steps pay. The score falls,
# as the flow learns from the policy's own right responses, too.
#
# ## The rollouts, token by token
#
# Choose a step, a problem and a colour. Orange is below the middle of a measure and blue above.

# %%
page = Path(folder).parent / "nano-rollouts.html"
write_rollouts_page(page, "Rollouts of nano.py", kept)
print(f"also in {page}, for viewers of notebooks that show no frame")
frame = f'<iframe srcdoc="{escape(page.read_text())}" width="100%" height="700"></iframe>'
display(HTML(f"<div>{frame}</div>"))

# %% [markdown]
# ## Where to go from here
#
# [`docs/walkthrough.md`](../docs/walkthrough.md) has the numbers of one step of `train_rl.py`,
# which does the same at scale. The files `dense.py`, `flow.py` and `rlfr.py` have the variants of
# everything that was shown here.
