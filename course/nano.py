"""RLFR in one file: the whole method on the embedded world, to read from top to bottom.

    python -m course.nano      from nothing to about 93 % right answers, sampled at temperature 1

It does what `python train_rl.py` does, with its settings, but for constant learning rates, PyTorch's
settings of AdamW and first weights of the flow, and no expert solutions kept for a calibration.

G responses a group, T tokens of one, L tapped layers, D hidden size. docs/algorithm.md has the maths.
"""

from worlds import find_world  # first: it says how threads wait, before torch is imported

# isort: split
import json
import random

import torch
from torch import nn
from torch.distributions import Categorical
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

SEED = 0
STEPS = 100
PROMPTS = 32  # problems a step
GROUP_SIZE = 4  # responses a problem
MAX_TOKENS = 96  # of a response
LR = 1.5e-4  # of the policy
CLIP = 0.2  # how far below and above 1 a ratio counts
CLIP_NORM = 1.0  # largest norm of a gradient
N_LAYERS = 4  # of the policy
TAPS = (1, 2, 3)  # layers that are tapped, at a quarter, a half and three quarters of the depth
REWARD_TIME = 0.8  # at which the flow's error is taken
THRESHOLD = 0.6  # of the normalised score: tokens above it are penalised
TOP_K = 15  # tokens of a response that are penalised, at most
COEF = 0.01  # scale of the penalty
FLOW_STEPS = 750  # of the offline start
FLOW_BATCH = 32  # expert solutions a step
FLOW_LR = 1e-3  # of the flow, in the offline start and later


# ---- 1. The flow: the velocity of latents on their way from noise to data
def two_layers(n_inputs, width):
    return nn.Sequential(
        nn.Linear(n_inputs, width),
        nn.SiLU(),
        nn.Linear(width, width),
    )


def features(scalar):
    """Return cosines and sines of times or depths (..., 1) at 128 frequencies, (..., 256)."""
    frequencies = 10_000 ** (-torch.arange(128) / 128)
    angle = scalar * frequencies
    waves = [angle.cos(), angle.sin()]
    return torch.cat(waves, -1)


class VelocityNet(nn.Module):
    """v(x_t, t, context, depth): one residual block, modulated by the condition y."""

    def __init__(self, width):
        super().__init__()
        self.input = nn.Linear(width, width)
        self.context = nn.Linear(width, width)
        self.time = two_layers(256, width)
        self.depth = two_layers(256, width)
        self.modulation = nn.Linear(width, 5 * width)
        self.block_norm = nn.RMSNorm(width)
        self.block = two_layers(width, width)
        self.output_norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, width)

    def forward(self, x_t, t, context, depth):
        y = self.context(context)
        y += self.time(features(t))
        y += self.depth(features(depth))
        modulation = self.modulation(nn.functional.silu(y))
        shift, scale, gate, last_shift, last_scale = modulation.chunk(5, -1)
        h = self.input(x_t)
        inner = self.block_norm(h) * (1 + scale) + shift
        h = h + gate * self.block(inner)
        h = self.output_norm(h) * (1 + last_scale) + last_shift
        return self.output(h)


def velocity_error(flow, latents, t):
    """Return delta(t) = mean_D (v - u)^2 of latents (2, L, T, D), (L, T); t: (L, T, 1) or one."""
    x_1, context = latents
    x_0 = torch.randn_like(x_1)
    x_t = t * x_1 + (1 - t) * x_0
    u = x_1 - x_0
    depth = torch.tensor(TAPS)[:, None, None] / N_LAYERS
    v = flow(x_t, t, context, depth)
    error = v - u
    return error.square().mean(-1)


# ---- 2. Offline start: read expert solutions, and fit the flow to their latents
def keep_states(layer, _inputs, output):
    """Keep what a tapped layer outputs, (1, length, D): a hook of its forward."""
    layer.states = output.detach()


def read(policy, prompt, response):
    """Return log-probs (T,) of a response, and latents (2, L, T, D) at and before its tokens."""
    tokens = torch.tensor(prompt + response)
    start = len(prompt)
    before = slice(start - 1, -1)  # where a token is predicted; its context, too
    logits = policy(tokens[None]).logits[0]
    distribution = Categorical(logits=logits[before])
    logp = distribution.log_prob(tokens[start:])
    layers = policy.model.layers
    states = torch.cat([layers[tap].states for tap in TAPS])
    x_1 = states[:, start:]
    context = states[:, before]
    return logp, torch.stack([x_1, context])


def update(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()


def fit_flow(flow, policy, tokenizer, experts):
    of_experts = []
    for row in experts:
        prompt = tokenizer.encode(row["problem"])
        solution = tokenizer.encode(row["solution"] + tokenizer.eos_token)
        with torch.no_grad():
            _, latents = read(policy, prompt, solution)
        of_experts.append(latents)
    optimizer = AdamW(flow.parameters(), FLOW_LR)
    for _ in range(FLOW_STEPS):
        batch = random.sample(of_experts, FLOW_BATCH)
        latents = torch.cat(batch, 2)
        z = torch.randn_like(latents[0, ..., :1])
        error = velocity_error(flow, latents, z.sigmoid())
        loss = error.mean()
        update(flow, optimizer, loss)
    print(f"offline start: {FLOW_STEPS} steps, loss {loss.item():.3f}")


# ---- 3. Sample, and 4. verify
def roll_out(policy, tokenizer, problems):
    """Return a group of responses to each problem, (G, length of the longest of all)."""
    prompts = tokenizer(
        [problem["problem"] for problem in problems],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    tokens = policy.generate(
        **prompts,
        max_new_tokens=MAX_TOKENS,
        num_return_sequences=GROUP_SIZE,
        do_sample=True,
        top_k=0,  # no limit: any token but padding
        suppress_tokens=[tokenizer.pad_token_id],
    )
    start = prompts.input_ids.shape[1]
    return tokens[:, start:].split(GROUP_SIZE)


def verify(tokenizer, group, answer):
    """Return the rewards of responses, (G,): 1 for one that ends with the answer in a box."""
    end = rf"\boxed{{{answer}}}{tokenizer.eos_token}"
    texts = tokenizer.batch_decode(group)
    return torch.tensor([float(end in text) for text in texts])


# ---- 6. Shape scores, and 7. the policy's loss
def shape(score):
    """Return the flow reward of a response's tokens, (T,): a penalty where the score is high."""
    low, high = score.aminmax()
    unit = (score - low) / (high - low + 1e-9)
    rank = unit.argsort(descending=True).argsort()
    is_penalised = (unit > THRESHOLD) & (rank < TOP_K)
    return -COEF * unit * is_penalised


def ppo_loss(logp, old_logp, advantage):
    """Return -min(rho A, clip(rho) A) of tokens, where rho is the ratio of probabilities."""
    rho = (logp - old_logp).exp()
    clipped = rho.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(rho * advantage, clipped * advantage)


# ---- The whole run
def load(file):
    with open(file) as lines:
        return [json.loads(line) for line in lines]


def main(folder):
    set_seed(SEED)
    problems = load(f"{folder}/train.jsonl")
    experts = load(f"{folder}/expert.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    policy = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    for tap in TAPS:
        layer = policy.model.layers[tap]
        layer.register_forward_hook(keep_states)
    flow = VelocityNet(policy.config.hidden_size)
    fit_flow(flow, policy, tokenizer, experts)
    policy_optimizer = AdamW(policy.parameters(), LR)
    flow_optimizer = AdamW(flow.parameters(), FLOW_LR)
    for step in range(STEPS):
        rewards = []
        losses = []
        flow_losses = []
        # 3. Sample a group of responses to each problem
        chosen = random.sample(problems, PROMPTS)
        groups = roll_out(policy, tokenizer, chosen)
        for problem, group in zip(chosen, groups, strict=True):
            prompt = tokenizer.encode(problem["problem"])
            # 4. Verify them; A_outcome = (r - mean) / std
            reward = verify(tokenizer, group, problem["answer"])
            rewards.append(reward)
            spread = reward.std() + 1e-9
            outcome = (reward - reward.mean()) / spread
            for i, row in enumerate(group):
                # 5. Score every token: t / (1 - t) delta(t), mean over taps
                response = row[row != tokenizer.pad_token_id]
                logp, latents = read(policy, prompt, response.tolist())
                error = velocity_error(flow, latents, REWARD_TIME)
                error = error.mean(0)
                score = REWARD_TIME / (1 - REWARD_TIME) * error.detach()
                # 6. Shape, and A_k = A_outcome + the sum of flow rewards from k on
                flow_reward = shape(score)
                returns = flow_reward.flip(0).cumsum(0).flip(0)
                advantage = outcome[i] + returns
                # 7. A step has one update, so the old policy is the policy itself
                loss = ppo_loss(logp, logp.detach(), advantage)
                losses.append(loss.mean())
                # 8. The flow learns from right responses
                if reward[i]:
                    flow_losses.append(error.mean())
        loss = torch.stack(losses).mean()
        update(policy, policy_optimizer, loss)
        if flow_losses:
            flow_loss = torch.stack(flow_losses).mean()
            update(flow, flow_optimizer, flow_loss)
        print(f"step {step + 1}  reward {torch.cat(rewards).mean():.3f}")


if __name__ == "__main__":
    main(find_world("toy").folder)
