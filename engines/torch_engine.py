"""PyTorch as an engine: a plain decoding loop, for CPUs and for comparisons."""

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from engines.common import check_all_given, end_tokens, not_finite
from infra import families, vision
from infra.models import Model, StopTokens
from infra.parallel import is_first
from rollout import Episode, Request, Sampling, in_groups


class TorchEngine:
    """A Hugging Face model in a plain decoding loop on a KV cache.

    What it samples for a request does not depend on the batch.
    """

    n_ranks = 1
    held_memory = 0

    def __init__(
        self,
        model: Model,
        max_sequences: int,
        device: torch.device,
        dtype: torch.dtype,
        stop_tokens: StopTokens = "turn-ends",
    ):
        self.path = model.path
        self.model = vision.load_model(model.path, dtype, model.trust_remote_code).eval()
        self.model.to(device)
        attention = families.faithful_attention(self.model, device)
        families.set_attention(self.model.get_decoder(), attention)
        self.device = device
        self.tokenizer = model.tokenizer
        self.max_sequences = max_sequences
        self.end_tokens = torch.tensor(end_tokens(model, stop_tokens), device=device)
        self.check_cache(model.path)

    @torch.inference_mode()
    def check_cache(self, path: str) -> None:
        """Raise ValueError if the model keeps what it has read elsewhere than in a given cache."""
        cache = DynamicCache(config=self.model.config)
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        output = self.model(token, past_key_values=cache)
        if getattr(output, "past_key_values", None) is not cache:
            raise ValueError(
                f"{path}: --engine torch cannot sample from {type(self.model).__name__}, "
                "which keeps its state elsewhere than in a KV cache; take --engine vllm"
            )

    def sleep(self) -> None:
        self.model.to("cpu")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        state = self.model.to(self.device).state_dict()
        given = set()
        for name, tensor in weights:
            if name not in state:
                raise ValueError(
                    f"weight {name!r} is not one of the engine's model; "
                    f"expected Hugging Face parameter names"
                )
            state[name].copy_(tensor)
            given.add(name)
        check_all_given(state.keys() - given)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        # prompts of like lengths go together: little padding
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        batch_size = max(1, self.max_sequences // sampling.n)
        bar = tqdm(
            total=len(requests) * sampling.n,
            desc="roll out",
            unit="seq",
            leave=False,
            delay=3,
            disable=not is_first(),
        )
        n_tokens = 0
        began = time.perf_counter()
        by_request: dict[int, list[Episode]] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            sampled = self.sample([requests[i] for i in chosen], sampling)
            by_request.update(zip(chosen, in_groups(sampled, sampling.n), strict=True))
            n_tokens += sum(len(episode.response_ids) for episode in sampled)
            bar.update(len(sampled))
            bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - began):.0f} tokens/s")
        bar.close()
        episodes = []
        for i in range(len(requests)):
            episodes += by_request[i]
        return episodes

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        """Sample one batch: one prefill a prompt; rows leave the cache when they have finished."""
        prompts = torch.arange(len(requests), device=self.device).repeat_interleave(sampling.n)
        n_rows = len(prompts)
        limits = torch.tensor([sampling.room(request) for request in requests], device=self.device)
        limits = limits[prompts]  # (rows,)
        longest = int(limits.max())
        uniform = self.draw_uniform(requests, sampling.n, longest)  # (rows, longest)
        cache = DynamicCache(config=self.model.config)
        prefilled = self.prefill(requests, cache)
        cache.reorder_cache(prompts)
        # (rows, V), (rows, S), (rows, 1)
        logits, mask, position = (part[prompts] for part in prefilled)

        tokens = torch.zeros(n_rows, longest, dtype=torch.long, device=self.device)
        logp = torch.zeros(n_rows, longest, device=self.device)
        stopped = torch.zeros(n_rows, dtype=torch.bool, device=self.device)
        rows = torch.arange(n_rows, device=self.device)  # those that are still in the cache
        for k in range(longest):
            token, token_logp = choose(logits.float(), uniform[rows, k], sampling)
            if token_logp.isnan().any():
                raise not_finite(self.path)
            tokens[rows, k] = token
            logp[rows, k] = token_logp
            has_room = k < limits[rows]  # a row without room may still be in the cache
            stopped[rows] |= torch.isin(token, self.end_tokens) & has_room
            running = (~stopped[rows] & (k + 1 < limits[rows])).nonzero().squeeze(1)
            if not len(running):
                break
            # each token copies the cache, as it grows: a tenth fewer rows are worth one copy more
            if len(running) <= 0.9 * len(rows):
                cache.reorder_cache(running)
                rows = rows[running]
                token = token[running]
                mask = mask[running]
                position = position[running]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            position = position + 1
            output = self.model(
                token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache
            )
            logits = output.logits[:, -1]
        first_end = torch.isin(tokens, self.end_tokens).int().argmax(dim=1)
        lengths = torch.where(stopped, first_end + 1, limits).tolist()
        return self.to_episodes(requests, tokens, logp, stopped, lengths)

    def draw_uniform(self, requests: Sequence[Request], n: int, n_tokens: int) -> Tensor:
        """Return a uniform number for each of n rows a request and token, from the row's seed."""
        rows = []
        for request in requests:
            for i in range(n):
                generator = torch.Generator().manual_seed((request.seed + i) % 2**63)
                rows.append(torch.rand(n_tokens, generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(self.device)

    def prefill(
        self, requests: Sequence[Request], cache: DynamicCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run left-padded prompts; return last logits (N, V), mask (N, S), last position (N, 1)."""
        width = max(len(request.prompt_ids) for request in requests)
        padded = []
        masked = []
        for request in requests:
            n_padding = width - len(request.prompt_ids)
            padded.append([0] * n_padding + request.prompt_ids)
            masked.append([0] * n_padding + [1] * len(request.prompt_ids))
        ids = torch.tensor(padded, device=self.device)
        mask = torch.tensor(masked, device=self.device)
        position = mask.cumsum(dim=1) - 1
        position_ids = position.clamp(min=0)
        images = [image for request in requests for image in request.images]
        inputs = {}
        if images:
            # an image's positions are its rows and columns: text goes on from the larger of the two
            pixel_values, grid = vision.stack(images, self.device)
            inputs = {"pixel_values": pixel_values, "image_grid_thw": grid}
            token_types = (ids == self.model.config.image_token_id).int()
            position_ids, shift = self.model.base_model.get_rope_index(
                ids, token_types, image_grid_thw=grid, attention_mask=mask
            )
            position = position + shift
        output = self.model(
            ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
            **inputs,
        )
        return output.logits[:, -1], mask, position[:, -1:]

    def to_episodes(
        self,
        requests: Sequence[Request],
        tokens: Tensor,
        logp: Tensor,
        stopped: Tensor,
        lengths: Sequence[int],
    ) -> list[Episode]:
        """Cut the sampled rows to their lengths, and make episodes of them."""
        n = len(tokens) // len(requests)
        responses = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        token_logp = logp.tolist()
        episodes = []
        for i, response in enumerate(responses):
            episode = Episode(
                prompt_ids=requests[i // n].prompt_ids,
                response_ids=response,
                logp=token_logp[i][: lengths[i]],
                finish_reason="stop" if stopped[i] else "length",
                text=texts[i],
            )
            episodes.append(episode)
        return episodes


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Choose a token for each row of logits (B, V) by inverting the CDF at uniform (B,).

    Returns tokens and their log-probs, (B,) each.
    """
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
        logp = logits.log_softmax(dim=-1)
        return token, logp.gather(1, token[:, None]).squeeze(1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = keep_nucleus(logits, sampling.top_p)
    logp = logits.log_softmax(dim=-1)
    cdf = logp.double().exp().cumsum(dim=-1)
    level = uniform[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, level, right=True).clamp(max=logits.shape[1] - 1)
    return token.squeeze(1), logp.gather(1, token).squeeze(1)


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Mask all tokens but the likeliest ones that reach a mass of top_p together, logits (B, V)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    mass_before = probability.cumsum(dim=-1) - probability  # of the likelier tokens
    outside = (mass_before >= top_p).gather(1, order.argsort(dim=-1))
    return logits.masked_fill(outside, -torch.inf)
