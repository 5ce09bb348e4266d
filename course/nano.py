"""RLFR in one file: the whole method on the embedded world, to read from top to bottom.

    python -m course.nano      from nothing to about 94 % right answers, sampled at temperature 1

Settings are those of `python train_rl.py`. Three things are simpler: the flow is fitted to all expert
solutions, of which train_flow.py keeps 64 for a calibration; it starts from PyTorch's weights, not
from Xavier's; its biases and norms decay like its matrices.

B responses, a group in a row; S positions, the last T the response's; M response tokens, without
padding; L tapped layers; D hidden size.
"""

from worlds import find_world  # first: it says how threads wait, before torch is imported

# isort: split
import json
import math
import random

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

SEED = 0
STEPS = 100
PROMPTS = 32  # problems a step
GROUP_SIZE = 4  # responses a problem
MAX_TOKENS = 96  # of a response
LR = 1.5e-4  # of the policy
CLIP = 0.2  # how far below and above 1 a ratio counts
CLIP_NORM = 1.0  # largest norm of a gradient
DEPTHS = (0.25, 0.5, 0.75)  # where the policy is tapped, as fractions of its layers
REWARD_TIME = 0.8  # at which the flow's error is taken
THRESHOLD = 0.6  # of the normalised score: tokens above it are penalised
TOP_K = 15  # tokens of a response that are penalised, at most
COEF = 0.01  # scale of the penalty
FLOW_EPOCHS = 12  # of the offline start
FLOW_BATCH = 32  # expert solutions a step
FLOW_LR = 2e-3  # of the offline start
ONLINE_LR = 1e-3  # of the flow while the policy learns
EVAL_SAMPLES = 4  # responses to a held-out problem


# ---- 1. The flow: the velocity of latents on their way from noise to data
def two_layers(n_inputs, width):
    return nn.Sequential(nn.Linear(n_inputs, width), nn.SiLU(), nn.Linear(width, width))


def features(scalar):
    """Return cosines and sines of times or depths (...) at 128 frequencies, (..., 256)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angle = scalar[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class VelocityNet(nn.Module):
    """v(x_t, t, context, depth): one residual block, modulated by the condition y."""

    def __init__(self, width):
        super().__init__()
        self.input = nn.Linear(width, width)
        self.context = nn.Linear(width, width)
        self.time = two_layers(256, width)
        self.depth = two_layers(256, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 5 * width))
        self.block_norm = nn.RMSNorm(width, eps=1e-6)
        self.block = two_layers(width, width)
        self.output_norm = nn.RMSNorm(width, eps=1e-6)
        self.output = nn.Linear(width, width)
        for parameter in (*self.modulation.parameters(), *self.output.parameters()):
            nn.init.zeros_(parameter)  # the first velocity is 0

    def forward(self, x_t, t, context, depth):
        y = self.context(context) + self.time(features(t)) + self.depth(features(depth))
        shift, scale, gate, last_shift, last_scale = self.modulation(y).chunk(5, dim=-1)
        h = self.input(x_t)
        h = h + gate * self.block(self.block_norm(h) * (1 + scale) + shift)
        return self.output(self.output_norm(h) * (1 + last_scale) + last_shift)


def velocity_error(flow, latents, x_0, t):
    """Return mean_D (v - u)^2 at t (L, M) of the path from x_0 (L, M, D) to latents, (L, M)."""
    x_1, context = latents
    time = t[..., None]
    x_t = time * x_1 + (1 - time) * x_0
    u = x_1 - x_0
    v = flow(x_t, t, context, depth=torch.tensor(DEPTHS)[:, None])
    return (v - u).square().mean(dim=-1)


# ---- What both trainings do: read responses, and take steps of AdamW
def read(policy, tokens, mask):
    """Return log-probs (B, T) of responses, and latents (2, L, M, D) at and before each token."""
    states = []

    def keep(_layer, _inputs, output):
        states.append(output.detach())

    layers = policy.model.layers
    hooks = [layers[round(depth * len(layers))].register_forward_hook(keep) for depth in DEPTHS]
    is_token = tokens != policy.config.pad_token_id
    position = (is_token.cumsum(dim=1) - 1).clamp(min=0)
    logits = policy(tokens, is_token, position, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    states = torch.stack(states)  # (L, B, S, D)
    n_tokens = mask.shape[1]
    before = slice(-n_tokens - 1, -1)  # the position before a token predicts it, and is its context
    logp = logits[:, before].log_softmax(dim=-1)
    logp = logp.gather(2, tokens[:, -n_tokens:, None]).squeeze(2)
    latents = torch.stack([states[:, :, -n_tokens:], states[:, :, before]])
    return logp, latents[:, :, mask]


def pad(tokenizer, texts, side):
    """Return tokens of texts (B, length of the longest), and which are no padding."""
    rows = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"].bool()


def learning_rate(peak, step, total, warmup, floor):
    """Return a rate that rises linearly, then falls along a cosine to floor * peak."""
    n_warmup = math.ceil(warmup * total)
    cosine = math.cos(math.pi * max(0, step - n_warmup) / max(1, total - n_warmup))
    return peak * min((step + 1) / n_warmup, floor + (1 - floor) * (1 + cosine) / 2)


def update(optimizer, loss, lr):
    (group,) = optimizer.param_groups
    group["lr"] = lr
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()


# ---- 2. Offline start: the flow learns what latents of expert solutions are like
def fit_flow(flow, policy, tokenizer, experts):
    prompts, _ = pad(tokenizer, [row["problem"] for row in experts], "left")
    solutions = [row["solution"] + tokenizer.eos_token for row in experts]
    solutions, mask = pad(tokenizer, solutions, "right")
    with torch.no_grad():
        _, latents = read(policy, torch.cat([prompts, solutions], dim=1), mask)
    by_solution = latents.split(mask.sum(dim=1).tolist(), dim=2)
    optimizer = torch.optim.AdamW(flow.parameters())
    n_steps = FLOW_EPOCHS * len(experts) // FLOW_BATCH
    for step in range(n_steps):
        latents = torch.cat(random.sample(by_solution, FLOW_BATCH), dim=2)
        x_0 = torch.randn_like(latents[0])
        t = torch.randn(x_0.shape[:2]).sigmoid()
        loss = velocity_error(flow, latents, x_0, t).mean()
        update(optimizer, loss, learning_rate(FLOW_LR, step, n_steps, warmup=0.1, floor=0.0))
    print(f"offline start: {n_steps} steps, loss {loss.item():.3f}")


# ---- 3. Sample, and 4. verify
def roll_out(policy, tokenizer, problems, greedy=False):
    """Return prompts with responses (B, S), the responses' mask (B, T), and rewards (B,)."""
    prompts, is_token = pad(tokenizer, [row["problem"] for row in problems], "left")
    settings = {"max_new_tokens": MAX_TOKENS, "do_sample": True, "top_k": int(greedy)}  # 0: any
    tokens = policy.generate(prompts, attention_mask=is_token.long(), **settings)
    responses = tokens[:, prompts.shape[1] :]
    rewards = []
    for row, text in zip(problems, tokenizer.batch_decode(responses), strict=True):
        end = rf"\boxed{{{row['answer']}}}{tokenizer.eos_token}"
        rewards.append(float(end in text))
    return tokens, responses != tokenizer.pad_token_id, torch.tensor(rewards)


# ---- 6. Shape scores into flow rewards; advantages
def shape(score, mask):
    """Return the flow reward of each token (B, T): a penalty where its score (B, T) is high."""
    low = score.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    high = score.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    unit = (score - low) / (high - low).clamp(min=1e-30)
    unit = torch.where(mask & (unit > THRESHOLD), unit, 0.0)
    least = unit.topk(min(TOP_K, unit.shape[1])).values[:, -1:]
    return -COEF * torch.where(unit >= least, unit, 0.0)


def advantages(reward, flow_reward):
    """Return the outcome's advantage in its group, plus flow rewards from a token on, (B, T)."""
    groups = reward.view(-1, GROUP_SIZE)
    spread = groups.std(dim=1, keepdim=True) + 1e-9
    outcome = (groups - groups.mean(dim=1, keepdim=True)) / spread
    returns = flow_reward.flip(1).cumsum(dim=1).flip(1)
    return outcome.view(-1, 1) + returns


# ---- 7. The policy's loss, and 8. the flow's
def ppo_loss(logp, old_logp, advantage):
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def mean_of_responses(values, mask):
    """Return the mean over responses of the means over their tokens, of values (B, T)."""
    return ((values * mask).sum(dim=1) / mask.sum(dim=1)).mean()


# ---- The whole run
def evaluate(policy, tokenizer, problems):
    _, _, sampled = roll_out(policy, tokenizer, problems * EVAL_SAMPLES)
    _, _, greedy = roll_out(policy, tokenizer, problems, greedy=True)
    print(f"held-out problems: {sampled.mean():.1%} sampled, {greedy.mean():.1%} greedy")


def main(folder):
    set_seed(SEED)
    data = {}
    for name in ("expert", "train", "test"):
        with open(f"{folder}/{name}.jsonl") as lines:
            data[name] = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    policy = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    policy_optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    flow = VelocityNet(policy.config.hidden_size)
    fit_flow(flow, policy, tokenizer, data["expert"])
    flow_optimizer = torch.optim.AdamW(flow.parameters())
    evaluate(policy, tokenizer, data["test"])
    for step in range(STEPS):
        # 3. Sample responses to each problem, and 4. verify them
        chosen = random.sample(data["train"], PROMPTS)
        problems = [problem for problem in chosen for _ in range(GROUP_SIZE)]
        tokens, mask, reward = roll_out(policy, tokenizer, problems)
        # 5. Score every token by how far its latents deviate from the flow
        with torch.no_grad():
            old_logp, latents = read(policy, tokens, mask)
        x_0 = torch.randn_like(latents[0])
        error = velocity_error(flow, latents, x_0, torch.tensor([[REWARD_TIME]])).mean(dim=0)
        error = torch.zeros(mask.shape).masked_scatter(mask, error)  # (M,) -> (B, T)
        score = REWARD_TIME / (1 - REWARD_TIME) * error.detach()
        # 6. Shape, and advantage
        advantage = advantages(reward, shape(score, mask))
        # 7. Update the policy
        logp, _ = read(policy, tokens, mask)
        loss = mean_of_responses(ppo_loss(logp, old_logp, advantage), mask)
        update(policy_optimizer, loss, learning_rate(LR, step, STEPS, warmup=0.03, floor=0.1))
        # 8. Update the flow: it learns from right responses
        right = reward == 1
        if right.any():
            flow_loss = mean_of_responses(error[right], mask[right])
            update(flow_optimizer, flow_loss, ONLINE_LR)
        print(f"step {step + 1}  reward {reward.mean():.3f}  score {score[mask].mean():.3f}")
    evaluate(policy, tokenizer, data["test"])


if __name__ == "__main__":
    main(find_world("toy").folder)
