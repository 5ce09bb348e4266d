"""Does the engine sample from the model that is trained? A few short texts show it."""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from infra.batching import collate, sampled_flags
from infra.parallel import fork_rng, gather_objects
from policy import Policy
from rollout import Engine, Episode, Request, Sampling

PROBES = ("1 + 1 =", "Let x be", "Find all n.")  # short texts that any model continues
LARGEST_DIFFERENCE = 0.1  # of log-probs; in bfloat16 the mean is about 0.01


def sample_probes(engine: Engine, max_prompt_tokens: int, max_tokens: int) -> list[Episode]:
    """Sample a few short texts greedily, for check_probes(); all ranks together."""
    requests = []
    for text in PROBES:
        ids = engine.tokenizer(text)["input_ids"][:max_prompt_tokens]
        requests.append(Request(ids, seed=0))
    with fork_rng():  # an engine may draw from the global generator
        return engine.generate(requests, Sampling(temperature=0.0, max_tokens=min(16, max_tokens)))


@torch.no_grad()
def check_probes(policy: Policy, probes: Sequence[Episode], model: str) -> None:
    """Raise ValueError if the policy's log-probs are not the engine's, see sample_probes()."""
    batch = collate(probes)
    check_log_probs(probes, policy(batch).logp[batch.response_mask], model)


def check_log_probs(probes: Sequence[Episode], logp: Tensor, model: str) -> None:
    """Raise ValueError if an engine's log-probs are not those of the trainer; all ranks together.

    Both have the same weights. They differ where the two do not compute the same model, where a
    weight did not arrive, or where the engine lost a part of its state while it slept.

    Args:
        probes: what sample_probes() returned.
        logp: the trainer's log-probs of the tokens that were sampled, one after the other, (M,).
        model: its name.
    """
    sampled_logp = []
    for episode in probes:
        sampled_logp += compress(episode.logp, sampled_flags(episode))
    difference = (torch.tensor(sampled_logp) - logp.cpu()).abs().mean().item()
    largest = torch.tensor(gather_objects(difference)).max().item()
    if not largest <= LARGEST_DIFFERENCE:  # or it is not a number
        raise ValueError(
            f"{model}: the engine's log-probs differ from the trainer's by {largest:.2f} in the "
            f"mean, more than {LARGEST_DIFFERENCE}: with the same weights it samples from another "
            "model than is trained; take another --engine, or another version of vLLM"
        )
