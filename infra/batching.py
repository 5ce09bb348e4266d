"""Episodes as batches: rows, how they are packed, cut into micro-batches and dealt to ranks.

Right-padded rows of prompt + response. What is returned for each response token is (B, T), with
token k of the response in column k. A response may hold tokens that the policy did not sample, such
as a tool's result: the policy reads them, and nothing is returned for them.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from infra import vision
from infra.parallel import DEVICE, gather_rows, send


# ---- Batches
class Row(NamedTuple):
    """What the policy reads of one episode; any object with these attributes will do."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    images: Sequence[vision.Image] = ()
    sampled: Sequence[bool] | None = None  # which response tokens the policy sampled; None: all


def with_images(row: Row, images: Sequence[vision.Image]) -> Row:
    """Return a copy of a row, or of an episode, with other images."""
    if isinstance(row, Row):
        return row._replace(images=images)
    return replace(row, images=images)


@dataclass
class Batch:
    """Right-padded episodes. Example, prompt lengths 1 and 2, responses 2 and 3 (`.` is padding).

    The second response holds a token of a tool, `t`:

    input_ids    p r r . .      attention_mask  1 1 1 0 0      in_response    0 1 1 0 0
                 p p r t r                      1 1 1 1 1                     0 0 1 1 1

                                targets         0 1 1 0 0      response_mask  1 1 0
                                                0 0 1 0 1                     1 0 1
    """

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, S) bool
    in_response: Tensor  # (B, S) bool, positions of response tokens, whoever wrote them
    targets: Tensor  # (B, S) bool, positions of response tokens that the policy sampled
    response_mask: Tensor  # (B, T) bool, the same tokens by their place in the response
    before: Tensor  # (M,) of B*S, the position before each sampled token, which predicts it
    cells: Tensor  # (M,) of B*T, where response_mask is true
    packing: "Packing"
    images: Sequence[vision.Image] = ()  # of all rows, in order
    images_once: Sequence[vision.Image] = ()  # of first rows, see first_rows()

    @cached_property
    def image_inputs(self) -> vision.ImageInputs:
        """What the tower takes of the images of first rows, or what a frozen one has made."""
        return vision.stack_all(self.images_once, self.images, DEVICE)

    def unflatten(self, values: Tensor) -> Tensor:
        """Spread values of sampled tokens (M, …) into (B, T, …), zero elsewhere."""
        out = values.new_zeros(self.response_mask.numel(), *values.shape[1:])
        out = out.index_copy(0, self.cells, values)
        return out.unflatten(0, self.response_mask.shape)


class Packing(NamedTuple):
    """Where the n tokens of a batch are among its positions: between (n, …) and padded (B, S, …).

    In a causal decoder the tokens of a prompt have the same states whatever follows. So a prompt
    that several rows share is packed once, and all of these rows read it.
    Attention alone needs rows, and gets them padded.
    """

    places: Tensor  # (n,) of B*S, where a packed token comes from
    source: Tensor  # (B, S) of n, the packed token that a position reads; any, for padding

    def pack(self, padded: Tensor) -> Tensor:
        """Leave out padding and repeated prompts: (B, S, …) -> (n, …)."""
        return padded.flatten(0, 1)[self.places]

    def pad(self, packed: Tensor) -> Tensor:
        """Put tokens in their places: (n, …) -> (B, S, …). What padding gets means nothing."""
        return take(packed, self.source)

    def positions(self) -> Tensor:
        """Return each token's position in its row, (n,)."""
        return self.places % self.source.shape[1]


def find_packing(attention_mask: Tensor, in_response: Tensor, first_row: Tensor) -> Packing:
    """Find out where the tokens of a batch are; prompts that rows share are packed once.

    attention_mask, in_response: (B, S), as of a Batch; first_row: (B,), see first_rows()
    """
    rows = torch.arange(len(first_row), device=first_row.device)
    has_own_prompt = (first_row == rows)[:, None]  # (B, 1)
    is_packed = attention_mask & (has_own_prompt | in_response)
    place = is_packed.flatten().cumsum(0).view_as(is_packed) - 1  # among the packed tokens
    source = torch.where(is_packed, place, place[first_row])
    return Packing(places_of(is_packed), source.masked_fill(~attention_mask, 0))


def places_of(mask: Tensor) -> Tensor:
    """Return where a mask is true, among all of its values. On a GPU the host has to wait for it."""
    return mask.flatten().nonzero().squeeze(1)


def take(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return tensor[indices] for indices of any shape, by index_select, which is faster."""
    return tensor.index_select(0, indices.flatten()).unflatten(0, indices.shape)


def collate(rows: Sequence[Row]) -> Batch:
    """Make a batch of episodes; each must have a prompt token and a sampled response token.

    The host knows all lengths. So it finds all places, and no step of a micro-batch on a GPU has to
    wait for one.
    """
    prompt_lengths = [len(row.prompt_ids) for row in rows]
    response_lengths = [len(row.response_ids) for row in rows]
    assert min(prompt_lengths) > 0, "an episode needs a prompt token"
    assert min(response_lengths) > 0, "an episode needs a response token"
    # by way of numpy, which reads lists several times as fast
    token_ids = [np.array([*row.prompt_ids, *row.response_ids]) for row in rows]
    input_ids = pad_sequence(list(map(torch.from_numpy, token_ids)), batch_first=True)  # (B, S)

    start = torch.tensor(prompt_lengths)[:, None]  # (B, 1)
    n_response = torch.tensor(response_lengths)[:, None]  # (B, 1)
    position = torch.arange(input_ids.shape[1])  # (S,)
    attention_mask = position < start + n_response
    in_response = attention_mask & (position >= start)
    targets = only_sampled(in_response, rows)
    is_token = position[: max(response_lengths)] < n_response  # (B, T)
    response_mask = only_sampled(is_token, rows)
    first_row = first_rows(rows)
    masks = (attention_mask, in_response, targets, response_mask)
    batch = make_batch(input_ids, *masks, first_row=torch.tensor(first_row))
    batch.images = list(chain(*(row.images for row in rows)))
    images_once = (row.images for i, row in enumerate(rows) if first_row[i] == i)
    batch.images_once = list(chain(*images_once))
    return batch


def make_batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    in_response: Tensor,
    targets: Tensor,
    response_mask: Tensor,
    first_row: Tensor,
) -> Batch:
    """Make a batch of what its rows are, as in Batch, without images; first_row as of first_rows()."""
    packing = find_packing(attention_mask, in_response, first_row)
    return Batch(
        *map(send, (input_ids, attention_mask, in_response, targets, response_mask)),
        before=send(places_of(targets) - 1),
        cells=send(places_of(response_mask)),
        packing=Packing(*map(send, packing)),
    )


def first_rows(rows: Sequence[Row]) -> list[int]:
    """Return for each row the first one that has the same prompt."""
    first: dict[tuple, int] = {}
    return [first.setdefault(prompt_key(row), i) for i, row in enumerate(rows)]


def only_sampled(is_token: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return which response tokens the policy sampled, of a mask of all of them.

    is_token: (B, S) or (B, T) bool, as many trues in a row as its response has tokens
    """
    if all(row.sampled is None for row in rows):
        return is_token
    flags = [flag for row in rows for flag in sampled_flags(row)]
    return is_token.masked_scatter(is_token, torch.tensor(flags, device=is_token.device))


def sampled_flags(row: Row) -> Sequence[bool]:
    """Return for each response token whether the policy sampled it; it must have sampled one."""
    n_tokens = len(row.response_ids)
    if row.sampled is None:
        return [True] * n_tokens
    assert len(row.sampled) == n_tokens, f"sampled: {len(row.sampled)} for {n_tokens} tokens"
    assert any(row.sampled), "an episode needs a response token that the policy sampled"
    return row.sampled


def prompt_key(row: Row) -> tuple:
    """Return a key that two rows share if their prompts are the same."""
    return tuple(row.prompt_ids), tuple(row.images)


# ---- Micro-batches
def micro_batches(
    rows: Sequence[Row], token_budget: int, rank: int, n_ranks: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield micro-batches of this rank's share of the rows: their indices, and the batch of them.

    The rows of a batch have as many tokens together as the budget at most (a single row may exceed
    it). Every rank yields the same number of batches, because sharded modules run in step: as few as
    the budget allows, and of about the same work.
    """
    for indices in plan_batches(line_up(rows), token_budget, n_ranks)[rank]:
        yield indices, collate([rows[index] for index in indices])


class Place(NamedTuple):
    """A row in a line of rows."""

    index: int  # of the row
    n_tokens: int  # of the row, prompt and response
    n_new: int  # the same without a prompt that the row before it has, see Packing


def line_up(rows: Sequence[Row]) -> list[Place]:
    """Put rows of one prompt side by side, and else rows of like length, as attention pads them.

    Prompts stand in the order of their longest rows. The rows of one go from long to short, those of
    the next from short to long.
    """

    def n_tokens(index: int) -> int:
        return len(rows[index].prompt_ids) + len(rows[index].response_ids)

    by_prompt: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(prompt_key(row), []).append(index)
    groups = [sorted(group, key=n_tokens, reverse=True) for group in by_prompt.values()]
    groups.sort(key=lambda group: n_tokens(group[0]), reverse=True)
    line = []
    for number, group in enumerate(groups):
        in_turn = group[::-1] if number % 2 else group
        for index in in_turn:
            n_shared = 0 if index == in_turn[0] else len(rows[index].prompt_ids)
            line.append(Place(index, n_tokens(index), n_tokens(index) - n_shared))
    return line


def plan_batches(line: Sequence[Place], token_budget: int, n_ranks: int) -> list[list[list[int]]]:
    """Cut a line of rows into micro-batches; return those of every rank, as indices of rows.

    Work is evened out by the row, not by the prompt: one whose rows are cut apart is computed twice.
    Batches that the ranks run at the same time are of like work, the largest first.
    """
    assert len(line) % n_ranks == 0, f"{len(line)} rows for {n_ranks} ranks"
    n_parts = n_ranks * math.ceil(len(cut(line, token_budget)) / n_ranks)
    limits = range(1, sum(place.n_tokens for place in line) + 1)  # the larger, the fewer parts

    def is_enough(limit: int) -> bool:
        return len(cut(line, token_budget, limit)) <= n_parts

    limit = limits[bisect_left(limits, True, key=is_enough)]
    parts = split_to(cut(line, token_budget, limit), n_parts)
    parts.sort(key=work, reverse=True)
    batches = [[place.index for place in part] for part in parts]
    return [batches[rank::n_ranks] for rank in range(n_ranks)]


def cut(line: Sequence[Place], token_budget: int, limit: float = math.inf) -> list[list[Place]]:
    """Cut a line into parts that keep to a budget of tokens and to a limit of work."""
    parts: list[list[Place]] = []
    n_tokens = n_new = 0  # of the last part
    for place in line:
        n_tokens += place.n_tokens
        n_new += place.n_new
        if not parts or n_tokens > token_budget or n_new > limit:
            parts.append([])
            n_tokens = n_new = place.n_tokens
        parts[-1].append(place)
    return parts


def work(part: Sequence[Place]) -> int:
    """Return how many tokens a micro-batch computes."""
    first, *others = part
    return first.n_tokens + sum(place.n_new for place in others)


def split_to(parts: list[list[Place]], n_parts: int) -> list[list[Place]]:
    """Halve the part with the most rows, again and again, until there are n_parts."""
    parts = list(parts)
    while len(parts) < n_parts:
        largest = max(parts, key=len)
        parts.remove(largest)
        half = len(largest) // 2
        parts += [largest[:half], largest[half:]]
    return parts


def rows_to_run(has_gradient: Tensor, n_ranks: int) -> Tensor:
    """Return which rows (B,) bool, on the CPU, an optimiser step must run.

    They are those with a gradient at any token, has_gradient (B, T), and as many others as it takes
    for a multiple of the ranks, one row each at least: a step is taken whatever the gradient.
    """
    chosen = has_gradient.any(dim=1).cpu()
    n_wanted = max(1, math.ceil(int(chosen.sum()) / n_ranks)) * n_ranks
    others = (~chosen).nonzero().squeeze(1)
    chosen[others[: n_wanted - int(chosen.sum())]] = True
    return chosen


# ---- Images
def encode_images(
    encode: Callable[[Sequence[vision.Image]], Tensor] | None,
    episodes: Sequence[Row],
    token_budget: int,
) -> list[Row]:
    """Run a frozen vision tower over the episodes' images; return the episodes with its features.

    encode: Policy.image_encoder; without one the episodes stay as they are

    The tower sees each image once, however many episodes share it and however often they are
    scored and trained on. All ranks call this together: each runs the tower on a share, batches of
    at most token_budget vectors, and all get the features, which wait in host memory.
    """
    images = list(dict.fromkeys(image for episode in episodes for image in episode.images))
    if not images or encode is None:
        return list(episodes)
    n_ranks = dist.get_world_size()
    images += [images[-1]] * (-len(images) % n_ranks)  # every rank runs the tower as often
    sizes = [image.n_tokens for image in images]
    line = [Place(index, size, size) for index, size in enumerate(sizes)]
    plans = plan_batches(line, token_budget, n_ranks)
    seen = {}
    for batches in zip(*plans, strict=True):  # one of each rank
        mine = [images[index] for index in batches[dist.get_rank()]]
        counts = [sum(sizes[index] for index in batch) for batch in batches]
        gathered = gather_rows(encode(mine), counts)
        for batch, features in zip(batches, gathered, strict=True):
            parts = features.cpu().split([sizes[index] for index in batch])
            for index, part in zip(batch, parts, strict=True):
                seen[images[index]] = replace(images[index], features=part)
    shown = []
    for episode in episodes:
        features = tuple(seen[image] for image in episode.images)
        shown.append(with_images(episode, features))
    return shown


# ---- Seeds and orders that depend on a key alone, not on what was drawn before
def keyed_seed(*key: int | str) -> int:
    """Derive a 63-bit seed from a key, e.g. ("noise", seed, step, episode).

    Distinct keys give independent seeds: what is drawn for one episode does not depend on others.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(n: int, *key: int | str) -> list[int]:
    """Return a random order of range(n) that depends only on the key."""
    generator = torch.Generator().manual_seed(keyed_seed(*key))
    return torch.randperm(n, generator=generator).tolist()


def group_order(n: int, group_size: int, *key: int | str) -> list[int]:
    """Return range(n) with its consecutive groups in a random order that depends only on the key."""
    starts = range(0, n, group_size)
    order: list[int] = []
    for place in permutation(len(starts), *key):
        first = starts[place]
        order += range(first, min(first + group_size, n))
    return order


def passes(n: int, start: int, count: int, *key: int | str) -> list[tuple[int, int]]:
    """Return (epoch, index) of `count` places from `start` on, in endless passes over range(n).

    Each pass, or epoch, has an order of its own.
    """
    orders: dict[int, list[int]] = {}
    visits = []
    for place in range(start, start + count):
        epoch, position = divmod(place, n)
        if epoch not in orders:
            orders[epoch] = permutation(n, *key, epoch)
        visits.append((epoch, orders[epoch][position]))
    return visits
