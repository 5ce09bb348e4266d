"""Train with TRL's GRPOTrainer and write a line of figures a rollout: the peer in peers.py.

    python benchmarks/peer_trl.py work.json

It needs torch, transformers, datasets and TRL 1.16, and nothing of ours: peers.py may start it with
another interpreter. `work.json` holds the fields of Work. A line of the figures has `time/step`,
seconds from the end of the rollout before to the end of this one's last optimiser step; `time/cpu`,
the seconds that this process had of the processor meanwhile, all threads together; and `reward` and
`length`, means over the rollout's responses.

Settings are those that make TRL fast on a CPU and its work the same as ours: no checkpointing, no
KL, no logging, AdamW fused, float32, the whole mini-batch in one forward unless `micro_batch` says
otherwise (then gradients add up over several), and old log-probs only where a rollout has more than
one optimiser step, which is how TRL decides.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


@dataclass(frozen=True)
class Work:
    """What to train on, and how."""

    model: str  # folder in Hugging Face format
    rows: list[dict]  # prompt, prompt_ids, problem, answer; in the order of the rollouts
    reward: str  # Python file with `reward(problem, response, answer) -> float`
    end_tokens: list[int]  # what ends a response
    prompts: int  # N, prompts a rollout
    group_size: int  # G, samples a prompt
    mini_batches: int  # optimiser steps a rollout
    micro_batch: int  # episodes a forward and backward
    max_tokens: int  # longest response
    lr: float  # learning rate of the first step
    threads: int  # of torch
    seed: int  # of sampling
    folder: str  # for what TRL writes
    figures: str  # file for the figures, a JSON object a line


def load_reward(path: str) -> Callable[[str, str, str], float]:
    """Return the function `reward` of a Python file."""
    spec = importlib.util.spec_from_file_location("reward_of_peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward


class Recorder(TrainerCallback):
    """Grades responses for the trainer, and writes a line when a rollout's last step has ended."""

    __name__ = "outcome"  # TRL names a reward by its function's name

    def __init__(self, work: Work):
        self.work = work
        self.grade = load_reward(work.reward)
        self.began = 0.0  # of the rollout
        self.cpu_began = 0.0
        self.of_rollout: dict[str, float] = {}

    def __call__(self, completions, completion_ids, problem, answer, **_) -> list[float]:
        """Return the reward of each response; of one that was cut it is 0, as in train_rl.py."""
        rewards = []
        graded = zip(problem, completions, answer, completion_ids, strict=True)
        for text, response, gold, ids in graded:
            is_whole = ids[-1] in self.work.end_tokens
            rewards.append(self.grade(text, response, gold) if is_whole else 0.0)
        self.of_rollout = {
            "reward": sum(rewards) / len(rewards),
            "length": sum(len(ids) for ids in completion_ids) / len(rewards),
        }
        return rewards

    def on_train_begin(self, args, state, control, **_):
        self.begin_rollout()

    def begin_rollout(self) -> None:
        """Note the time."""
        self.began = time.perf_counter()
        self.cpu_began = time.process_time()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.work.mini_batches:
            return
        line = {
            "time/step": time.perf_counter() - self.began,
            "time/cpu": time.process_time() - self.cpu_began,
            **self.of_rollout,
        }
        with open(self.work.figures, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.begin_rollout()


def check_prompts(rows: list[dict], tokenizer) -> None:
    """Raise ValueError unless TRL's tokens of each prompt are ours."""
    tokens = tokenizer([row["prompt"] for row in rows])["input_ids"]
    for row, ids in zip(rows, tokens, strict=True):
        if ids != row["prompt_ids"]:
            raise ValueError(
                f"prompt {row['prompt']!r}: TRL makes {ids} of it, expected {row['prompt_ids']}; "
                "choose a template whose tokens do not depend on who adds special ones"
            )


def make_arguments(work: Work) -> GRPOConfig:
    """Return TRL's settings of the work."""
    mini_batch = work.prompts * work.group_size // work.mini_batches
    n_micro_batches = mini_batch // work.micro_batch  # of a mini-batch
    n_rollouts = len(work.rows) // work.prompts
    return GRPOConfig(
        output_dir=work.folder,
        # the batch: N * G responses at a time, then an optimiser step for each mini-batch
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=n_micro_batches,
        steps_per_generation=n_micro_batches * work.mini_batches,
        num_iterations=1,
        num_generations=work.group_size,
        max_steps=n_rollouts * work.mini_batches,
        shuffle_dataset=False,
        # sampling
        max_completion_length=work.max_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # loss and optimiser, as in train_rl.py
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=work.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        # speed
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
    )


def main(work: Work) -> None:
    """Train, and write the figures."""
    torch.set_num_threads(work.threads)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    check_prompts(work.rows, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    model.generation_config.eos_token_id = work.end_tokens
    columns = ("prompt", "problem", "answer")
    recorder = Recorder(work)
    trainer = GRPOTrainer(
        model,
        reward_funcs=recorder,
        args=make_arguments(work),
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in columns} for row in work.rows]
        ),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train()


if __name__ == "__main__":
    main(Work(**json.loads(Path(sys.argv[1]).read_text())))
