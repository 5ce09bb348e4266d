"""Seeds and orders that depend on a key alone, not on what was drawn before."""

import hashlib

import torch


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
