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
import json
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
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, set_seed

from pages.rollouts import write_rollouts_page
from worlds import find_world

# %% tags=["parameters"]
STEPS = 36  # of reinforcement learning
FLOW_EPOCHS = 12  # of the offline start
HELD_OUT = 64  # problems to evaluate on
FOLDER = None  # of an embedded world; None: the default one, which is made in runs/toy


# %%
def show_source(*functions):
    """Show functions of nano.py as they stand there."""
    text = "\n\n".join(inspect.getsource(function) for function in functions)
    display(Markdown(f"```python\n{text}```"))


nano.STEPS = STEPS
nano.FLOW_EPOCHS = FLOW_EPOCHS
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
data = {}
for name in ("expert", "train", "test"):
    lines = Path(folder, f"{name}.jsonl").read_text().splitlines()
    data[name] = [json.loads(line) for line in lines]
held_out = data["test"][:HELD_OUT]
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
policy = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
print(f"{policy.num_parameters():,} parameters, {len(policy.model.layers)} layers")
for row in data["expert"][:3]:
    print(f"{row['problem']:28} {row['solution']}")
nano.evaluate(policy, tokenizer, held_out)

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
# The frozen policy reads expert solutions. `read` gives the log-prob of every response token,
# which the update needs later, and its latents. The flow is fitted to the latents.

# %%
show_source(nano.read, nano.fit_flow)


# %%
def read_solutions(rows):
    """Return the latents (2, L, M, D) of solutions."""
    prompts, _ = nano.pad(tokenizer, [row["problem"] for row in rows], "left")
    solutions = [row["solution"] + tokenizer.eos_token for row in rows]
    solutions, mask = nano.pad(tokenizer, solutions, "right")
    with torch.no_grad():
        _, latents = nano.read(policy, torch.cat([prompts, solutions], dim=1), mask)
    return latents


def error_by_time(flow, latents):
    """Return the error of the velocity at some times, for each tap, (n_times, L)."""
    rows = []
    for t in TIMES:
        x_0 = torch.randn_like(latents[0])
        with torch.no_grad():
            error = nano.velocity_error(flow, latents, x_0, torch.tensor([[t]]))
        rows.append(error.mean(dim=1))
    return torch.stack(rows)


TIMES = torch.linspace(0.05, 0.95, 10).tolist()
latents = read_solutions(held_out)
flow = nano.VelocityNet(policy.config.hidden_size)
before = error_by_time(flow, latents)
nano.fit_flow(flow, policy, tokenizer, data["expert"])
after = error_by_time(flow, latents)

# %% [markdown]
# On the left: noise becomes latents of the middle tap, seen along the two directions in which
# latents vary most. On the right: the error of the velocity on solutions that the flow has not
# seen. Before training `v` is 0, and the error is the mean square of `u`. Near `t = 1` the latent
# is all but known, and what is left of the error is the noise.

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
for tap, depth in enumerate(nano.DEPTHS):
    (line,) = right.plot(TIMES, after[:, tap], label=f"depth {depth}, fitted")
    right.plot(TIMES, before[:, tap], ":", color=line.get_color())
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
show_source(nano.roll_out)

# %%
problem = max(data["train"][:50], key=lambda row: len(row["problem"]))
group = [problem] * 4 * nano.GROUP_SIZE
tokens, mask, reward = nano.roll_out(policy, tokenizer, group)
texts = tokenizer.batch_decode(tokens[:, -mask.shape[1] :], skip_special_tokens=True)
print(problem["problem"], "answer", problem["answer"])
for text, right in zip(texts[: nano.GROUP_SIZE], reward.tolist(), strict=False):
    print(f"  reward {right:.0f}  {text}")

# %% [markdown]
# ## 5. Score every token, and 6. shape the scores
#
# One forward of the policy gives the latents of all response tokens. The score of a token is the
# error of the flow's velocity there, at the time 0.8, times `t / (1 - t)`. Scores of a response
# are brought to [0, 1]; those above 0.6, and 15 of them at most, become penalties. A token's
# advantage is the outcome's, compared with the group's, plus the penalties of this token and of
# all that follow it: it led to them.

# %%
show_source(nano.shape, nano.advantages)


# %%
def score_tokens(tokens, mask):
    """Return the score of each response token, (B, T)."""
    with torch.no_grad():
        _, latents = nano.read(policy, tokens, mask)
        x_0 = torch.randn_like(latents[0])
        t = torch.tensor([[nano.REWARD_TIME]])
        error = nano.velocity_error(flow, latents, x_0, t).mean(dim=0)
    score = nano.REWARD_TIME / (1 - nano.REWARD_TIME) * error
    return torch.zeros(mask.shape).masked_scatter(mask, score)


score = score_tokens(tokens, mask)
flow_reward = nano.shape(score, mask)
advantage = nano.advantages(reward, flow_reward)
longest = int(mask.sum(dim=1).argmax())
length = int(mask[longest].sum())
labels = [tokenizer.decode([token]) for token in tokens[longest, -mask.shape[1] :][:length]]
labels[-1] = labels[-1].replace(tokenizer.eos_token, "EOS").replace("$", r"\$")
figure, axes = plt.subplots(3, 1, figsize=(11, 6), sharex=True)
panels = {"score": score, "flow reward": flow_reward, "advantage": advantage}
for axis, (name, values) in zip(axes, panels.items(), strict=True):
    axis.bar(range(length), values[longest, :length], color="tab:orange")
    axis.set_ylabel(name)
axes[-1].set_xticks(range(length), labels, family="monospace")
axes[0].set_title(f"the longest response to {problem['problem']} reward {reward[longest]:.0f}")
plt.show()

# %% [markdown]
# ## 7. Update the policy, and 8. the flow
#
# The policy learns by PPO's loss. The flow learns, too: from the right responses, so that it
# keeps up with a policy that changes.

# %%
show_source(nano.ppo_loss, nano.mean_of_responses, nano.update)

# %% [markdown]
# Now all of it, in a loop, as in `nano.main`. Some rollouts are kept for a page.

# %%
kept = {}  # of some steps: problems, and what was computed of their responses
history = []
policy_optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
flow_optimizer = torch.optim.AdamW(flow.parameters())
for step in range(STEPS):
    chosen = random.sample(data["train"], nano.PROMPTS)
    problems = [problem for problem in chosen for _ in range(nano.GROUP_SIZE)]
    tokens, mask, reward = nano.roll_out(policy, tokenizer, problems)
    with torch.no_grad():
        old_logp, latents = nano.read(policy, tokens, mask)
    x_0 = torch.randn_like(latents[0])
    t = torch.tensor([[nano.REWARD_TIME]])
    error = nano.velocity_error(flow, latents, x_0, t)  # (L, M)
    by_tap = nano.REWARD_TIME / (1 - nano.REWARD_TIME) * error.detach()
    score = torch.zeros(mask.shape).masked_scatter(mask, by_tap.mean(dim=0))
    error = torch.zeros(mask.shape).masked_scatter(mask, error.mean(dim=0))
    flow_reward = nano.shape(score, mask)
    advantage = nano.advantages(reward, flow_reward)
    logp, _ = nano.read(policy, tokens, mask)
    loss = nano.mean_of_responses(nano.ppo_loss(logp, old_logp, advantage), mask)
    lr = nano.learning_rate(nano.LR, step, STEPS, warmup=0.03, floor=0.1)
    nano.update(policy_optimizer, loss, lr)
    right = reward == 1
    if right.any():
        flow_loss = nano.mean_of_responses(error[right], mask[right])
        nano.update(flow_optimizer, flow_loss, nano.ONLINE_LR)
    figures = {
        "reward": reward.mean().item(),
        "response tokens": mask.sum(dim=1).float().mean().item(),
        "score": score[mask].mean().item(),
        "flow reward of a response": flow_reward.sum(dim=1).mean().item(),
    }
    history.append(figures)
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step + 1:3d} ", "  ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        numbers = {"logp": old_logp, "dense_reward": flow_reward, "advantage": advantage}
        kept[step + 1] = (problems, tokens, mask, reward, numbers, by_tap)
nano.evaluate(policy, tokenizer, held_out)

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3))
for axis, name in zip(axes, history[0], strict=True):
    axis.plot(range(1, STEPS + 1), [figures[name] for figures in history])
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
def records_of(step, n_groups=2):
    """Return records of a step's first groups, as infra/record.py describes them."""
    problems, tokens, mask, reward, numbers, by_tap = kept[step]
    taps = [round(depth * len(policy.model.layers)) for depth in nano.DEPTHS]
    scores = [torch.zeros(mask.shape).masked_scatter(mask, of_tap) for of_tap in by_tap]
    outcome = nano.advantages(reward, torch.zeros(mask.shape))[:, 0]
    records = []
    for i in range(n_groups * nano.GROUP_SIZE):
        length = int(mask[i].sum())
        ids = tokens[i, -mask.shape[1] :][:length].tolist()
        is_right = bool(reward[i])
        record = {
            "step": step,
            "group": i // nano.GROUP_SIZE,
            "sample": i % nano.GROUP_SIZE,
            "problem": problems[i]["id"],
            "question": problems[i]["problem"],
            "answer": problems[i]["answer"],
            "prompt": problems[i]["problem"],
            "images": [],
            "response": tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": "stop" if ids[-1] == tokenizer.eos_token_id else "length",
            "reward": reward[i].item(),
            "outcome": outcome[i].item(),
            "parts": {"binary": reward[i].item()},
            "correct": is_right,
            "verdict": "right" if is_right else "wrong",
            "extracted": None,
            "text": "",
            "dense": "flow",
            "taps": taps,
            "token_ids": ids,
            "tokens": [tokenizer.decode([token]) for token in ids],
            "entropy": [None] * length,
            "ratio": [1.0] * length,
            "dense_score": [shorten(values[i, :length]) for values in scores],
        }
        for name, values in numbers.items():
            record[name] = shorten(values[i, :length])
        records.append(record)
    return records


def shorten(values):
    """Return numbers with four significant digits."""
    return [float(f"{value:.4g}") for value in values.tolist()]


page = Path(folder).parent / "nano-rollouts.html"
write_rollouts_page(page, "Rollouts of nano.py", {step: records_of(step) for step in kept})
frame = f'<iframe srcdoc="{escape(page.read_text())}" width="100%" height="700"></iframe>'
display(HTML(f"<div>{frame}</div>"))

# %% [markdown]
# ## Where to go from here
#
# [`docs/walkthrough.md`](../docs/walkthrough.md) has the numbers of one step of `train_rl.py`,
# which does the same at scale. The files `dense.py`, `flow.py` and `rlfr.py` have the variants of
# everything that was shown here.
