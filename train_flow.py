"""Offline start: fit the flow to the latents of expert solutions under the frozen policy (paper: flow pre-training).

    python train_flow.py --model Qwen2.5-7B --data expert.jsonl      columns `problem` and `solution`
    python train_flow.py                                             the embedded world

Each step: latents of the tapped layers at response tokens (the policy runs up to the last tap, no further), pairs of
latent and context, `noise_repeats` draws of (t, x_0), flow-matching loss, AdamW. Writes `flow/flow.safetensors`.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PretrainedConfig

import flow as fl
import rlfr
import rollout
import toy
from run import Run, RunConfig, check_positive, parse_config, with_defaults


@dataclass(frozen=True)
class Config(RunConfig, rollout.Source):
    """Settings of the offline start."""

    solution_column: str = "solution"  # Column with the solution's text
    cutoff: int = 8192  # Longest prompt + solution, in tokens; longer ones are cut
    contexts: tuple[str, ...] = ("previous",)  # Context modes, keys of flow.CONTEXTS
    shift: int = 1  # Distance of the context's neighbour, in positions
    percentiles: tuple[float, ...] = (0.25, 0.5, 0.75)  # Tapped layers, as fractions of the depth
    flow_blocks: int | None = None  # Residual blocks of the flow; by default 4 below 5B parameters, 6 above
    noise_repeats: int | None = None  # Draws of (t, x_0) a token; by default 4 below 5B parameters, 2 above
    epochs: int = 2  # Passes over the data
    batch_size: int = 128  # Sequences a step
    lr: float = 1e-4  # Peak learning rate
    warmup: float = 0.1  # Fraction of the steps over which the rate rises
    weight_decay: float = 0.01  # AdamW weight decay
    clip_norm: float = 1.0  # Largest gradient norm
    tokens_per_micro_batch: int = 16384  # Padded tokens of one forward


def resolve(config: Config) -> tuple[Config, str, PretrainedConfig]:
    """Check the settings and fill in what follows from the model; return them, the model's path and configuration."""
    check_positive(config, "epochs", "batch_size", "tokens_per_micro_batch", "save_every", "keep", "lr", "clip_norm")
    check_positive(config, "noise_repeats", "flow_blocks")
    if config.model == "toy":
        config = with_defaults(config, data=toy.make().path("expert.jsonl"))
    path = toy.World().path("model") if config.model == "toy" else rollout.resolve_model(config.model, config.trust_remote_code)
    if config.data is None:
        raise ValueError("no data given; expected --data with expert solutions (columns problem and solution)")
    if config.cutoff <= config.max_prompt_tokens:
        raise ValueError(f"cutoff {config.cutoff} leaves no room behind prompts of {config.max_prompt_tokens} tokens; raise it")
    model_config, n_parameters = rlfr.model_facts(path, config.trust_remote_code)
    large = n_parameters > 5e9
    return with_defaults(config, flow_blocks=6 if large else 4, noise_repeats=2 if large else 4), path, model_config


def main(config: Config) -> None:
    """Fit a flow and write it to the run folder."""
    # ---- What there is: solutions, policy, flow
    config, path, model_config = resolve(config)
    dim, n_layers = (getattr(model_config.get_text_config(), name) for name in ("hidden_size", "num_hidden_layers"))
    run = Run(config, f"flow-{Path(config.model).name}")
    flow_config = fl.FlowConfig(dim, config.flow_blocks, None, config.contexts, config.shift, config.percentiles)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    rows = rollout.load_rows(config.data, (config.problem_column, config.solution_column), config.split)
    texts, solutions = ([row[column] for row in rows] for column in (config.problem_column, config.solution_column))
    prompts = rollout.make_prompts(texts, tokenizer, config, model_config.model_type)
    ids = tokenizer(solutions, add_special_tokens=False)["input_ids"]  # a whole solution ends with EOS, a cut one does not
    room = [config.cutoff - len(prompt) for prompt in prompts]
    solutions = [(p, (s + [tokenizer.eos_token_id])[:n]) for p, s, n in zip(prompts, ids, room, strict=True)]
    policy = rlfr.load_policy(path, config.trust_remote_code).requires_grad_(False)
    taps = rlfr.tap_layers(n_layers, config.percentiles)
    depths = [tap / n_layers for tap in taps]
    torch.manual_seed(config.seed)
    flow = fl.Flow(flow_config).to(rlfr.DEVICE)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps_per_epoch = math.ceil(len(solutions) / config.batch_size)
    total_steps, start = config.epochs * steps_per_epoch, 0
    if state := run.begin():
        start = state["step"]
        flow.load_state_dict(state.pop("flow"))
        optimizer.load_state_dict(state.pop("optimizer"))
    print(config)
    print(f"{len(solutions)} solutions, {total_steps} steps, taps {taps} of {n_layers}, run folder {run.folder}")

    for step in tqdm(range(start, total_steps), initial=start, total=total_steps, desc="flow", unit="step"):
        began = time.perf_counter()
        # ---- The step's solutions
        epoch, place = divmod(step, steps_per_epoch)
        order = rlfr.permutation(len(solutions), "flow order", config.seed, epoch)
        order = order[place * config.batch_size : (place + 1) * config.batch_size]

        # ---- Latents, draws of (t, x_0), matching loss: summed here, divided by the number of rows below
        loss_sum, n_rows = 0.0, 0
        chosen = [solutions[i] for i in order]
        for rows, batch in rlfr.micro_batches(chosen, config.tokens_per_micro_batch):
            with torch.no_grad():
                latents = policy(batch, taps=taps, latents_only=True).latents
            pairs = fl.pair(flow_config, latents, depths, batch.attention_mask, batch.targets)
            for repeat in range(config.noise_repeats):
                keys = [("flow noise", config.seed, epoch, order[i], repeat) for i in rows]
                noise, z = fl.draw(flow_config, keys, [len(chosen[i][1]) for i in rows], rlfr.DEVICE)
                loss = fl.matching_loss(flow, pairs, noise, z)
                loss_sum, n_rows = loss_sum + loss.sum().item(), n_rows + len(loss)

        # ---- Update
        lr = rlfr.learning_rate(config.lr, step, total_steps, config.warmup, floor=0.0)
        grad_norm = rlfr.optimizer_step(optimizer, lr, config.clip_norm, denominator=n_rows)

        # ---- Log and save
        metrics = {"loss": loss_sum / n_rows, "grad_norm": grad_norm, "lr": lr, "epoch": epoch, "rows": n_rows}
        metrics["time/step"] = time.perf_counter() - began
        run.log(step + 1, metrics)
        times = f"lr {lr:.2e}  {metrics['time/step']:.2f} s"
        tqdm.write(f"step {step + 1:5d}  loss {metrics['loss']:.4f}  grad {grad_norm:.3f}  {times}")
        if (step + 1) % config.save_every == 0 or step + 1 == total_steps:
            run.save(step + 1, {"flow": flow.state_dict(), "optimizer": optimizer.state_dict()})
    fl.save_flow(flow, run.folder / "flow")
    print(f"the flow is in {run.folder / 'flow'}")


if __name__ == "__main__":
    main(parse_config(Config, {"toy": toy.TRAIN_FLOW}))
