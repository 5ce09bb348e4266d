"""The flow environment: a velocity field of good latents, and how far a latent deviates from it.

Notation (the same in every file):
    N prompts, G samples a prompt, B = N*G episodes; S prompt+response positions, T response positions
    L tapped layers, D hidden size, V vocabulary; C context modes, M target positions of a batch, P rows of the flow
    x_1 (…, D)      a latent: what a tapped decoder layer outputs at one position (data, t = 1)
    x_0 (…, D)      Gaussian noise (t = 0)
    t (…)           time in [0, 1]
    context (…, D)  latent of a neighbouring position at the same layer, the condition
    depth (…)       tapped layer index / number of layers, in [0, 1)

Equations, each with its function:
    x_t = t*x_1 + (1-t)*x_0,  u = x_1 - x_0                                  interpolate
    v(x_t, t, context, depth)                                                VelocityNet
    delta(t) = mean_D (v(x_t, t, context, depth) - u)^2                      velocity_error
    offline loss = mean of delta(sigmoid(z)) over tokens, taps and draws     matching_loss
    score = mean over T_r of t/(1-t) * delta(t), then over taps              deviation_score, score_and_learn

Departures from the official code: each time has its own weight (there the last one's serves all); the context mode is
stored with the flow; noise is keyed by (seed, step, episode), so that scores repeat and do not depend on the batch.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FLOW_FILE, OFFICIAL_FILE = "flow.safetensors", "flow_model.bin"
ROWS_PER_CALL = 8192  # bounds the activations of one forward and backward of the flow


# ---- Context: the latent that conditions the one at position p. A new mode is one entry of CONTEXTS, and nothing else.
def neighbour(latents: Tensor, mask: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Return the latent at position p + offset for each p (B, S, D), and where both positions hold tokens (B, S)."""
    size = mask.shape[1]
    source = torch.arange(size, device=mask.device) + offset
    inside = (source >= 0) & (source < size)
    source = source.clamp(0, size - 1)
    return latents[:, source], mask & mask[:, source] & inside


CONTEXTS = {  # name: (latents (B, S, D), mask (B, S) bool, shift) -> context (B, S, D), where it exists (B, S) bool
    "previous": lambda latents, mask, shift: neighbour(
        latents, mask, -shift
    ),  # official `token_post`
    "next": lambda latents, mask, shift: neighbour(latents, mask, shift),  # official `token_pre`
    "self": lambda latents, mask, shift: neighbour(latents, mask, 0),  # official `identity`
}


@dataclass(frozen=True)
class FlowConfig:
    """What a flow is and what it was trained on; saved inside its file."""

    dim: int  # D, hidden size of the policy
    n_blocks: int = 4
    width: int | None = None  # of the network; None: dim
    contexts: tuple[str, ...] = ("previous",)
    shift: int = 1  # distance of the neighbour, in positions
    percentiles: tuple[float, ...] = (
        0.25,
        0.5,
        0.75,
    )  # where the policy is tapped, as fractions of its depth

    def __post_init__(self):
        if not self.contexts or not set(self.contexts) <= CONTEXTS.keys():
            raise ValueError(
                f"contexts={self.contexts}: expected one or more of {', '.join(CONTEXTS)}"
            )
        if not self.percentiles or not all(0 <= p <= 1 for p in self.percentiles):
            raise ValueError(
                f"percentiles={self.percentiles}: expected fractions of the depth in [0, 1], as 0.25 0.5 0.75"
            )
        if self.n_blocks < 1 or self.shift < 1:
            raise ValueError(
                f"n_blocks={self.n_blocks}, shift={self.shift}: both must be at least 1"
            )


def check_times(times: Sequence[float]) -> None:
    """Raise ValueError unless all times are in (0, 1): at 1 the weight t/(1-t) is infinite, at 0 it is 0."""
    if not times or not all(0 < t < 1 for t in times):
        raise ValueError(
            f"reward times {times}: expected one or more in (0, 1), as 0.8; the weight t/(1-t) of 1 is infinite"
        )


# ---- Velocity network. Module names are the official ones, so that a state dict is an official checkpoint.
class ScalarEmbedding(nn.Module):
    """Embed a scalar s: cosines, then sines, of s * 10000^(-k/128), k = 0 … 127, then a two-layer SiLU MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", torch.exp(-math.log(10_000) * torch.arange(128) / 128)[None])
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, scalar: Tensor) -> Tensor:
        angle = scalar.float()[:, None] * self.freqs.float()  # (P, 128)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, scalar: Tensor) -> Tensor:
        return self.mlp(self.features(scalar).to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """Residual block `h + gate * MLP(rms(h) * (1 + scale) + shift)`, modulated by y."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.RMSNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Adaptive RMS-norm and the linear map to a velocity."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)


class VelocityNet(nn.Module):
    """v(x_t, t, context, depth): x_t (P, dim), t (P,), context (P, context_dim), depth (P,) -> velocity (P, dim)."""

    def __init__(self, dim: int, context_dim: int, width: int, n_blocks: int):
        super().__init__()
        self.input_proj = nn.Linear(dim, width)
        self.cond_embed = nn.Linear(context_dim, width)
        self.time_embed = ScalarEmbedding(width)
        self.layer_embed = ScalarEmbedding(width)
        self.res_blocks = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.final_layer = FinalLayer(width, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (
            self.time_embed.mlp[0],
            self.time_embed.mlp[2],
            self.layer_embed.mlp[0],
            self.layer_embed.mlp[2],
        ):
            nn.init.normal_(linear.weight, std=0.02)
        for module in (*self.res_blocks, self.final_layer):  # modulations and output start at zero
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, depth: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        h = self.input_proj(x_t.to(dtype))
        y = self.cond_embed(context.to(dtype)) + self.time_embed(t) + self.layer_embed(depth)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)


class Flow(nn.Module):
    """A velocity network and the configuration it was trained with. Call it as `flow(x_t, t, context, depth)`."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.model = VelocityNet(
            config.dim, config.dim, config.width or config.dim, config.n_blocks
        )

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.model(*arguments)

    def example(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """Return arguments for one row."""
        row = torch.zeros(1, self.config.dim, device=device)
        return row, row[:, 0], row, row[:, 0]


# ---- From latents to rows of the flow, and back
@dataclass
class Pairs:
    """Rows of the flow: a latent and its context, for each tap, context mode and target position that has both."""

    x_1: Tensor  # (P, D)
    context: Tensor  # (P, D)
    depth: Tensor  # (P,)
    exists: Tensor  # (L, C, M) bool, P trues: which rows there are

    def per_target(self, values: Tensor) -> Tensor:
        """Average rows (P,) over taps and context modes, (M,); a mode without a neighbour counts 0 (as official)."""
        grid = torch.zeros(self.exists.shape, dtype=values.dtype, device=values.device)
        grid[self.exists] = values
        return grid.mean(dim=(0, 1))

    def per_row(self, values: Tensor) -> Tensor:
        """Broadcast values of targets (M,) to their rows (P,)."""
        return values.expand(self.exists.shape)[self.exists]


def pair(
    config: FlowConfig,
    latents: Sequence[Tensor],
    depths: Sequence[float],
    mask: Tensor,
    targets: Tensor,
) -> Pairs:
    """Pair target latents with their contexts.

    A latent (B, S, D) and a depth in [0, 1) for each tap; mask (B, S) bool is false for padding; targets (B, S) bool
    are the M positions to score or to learn from, in row-major order.
    """
    found = []
    for layer, depth in zip(latents, depths, strict=True):
        for name in config.contexts:
            neighbours, present = CONTEXTS[name](layer, mask, config.shift)
            rows = present & targets
            found.append((layer[rows], neighbours[rows], rows[rows] * depth, present[targets]))
    x_1, context, depth, exists = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Pairs(x_1, context, depth, exists.view(len(latents), len(config.contexts), -1))


def keyed_seed(*key: int | str) -> int:
    """Derive a 63-bit seed from a key, such as ("noise", seed, step, episode); distinct keys give independent seeds."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def draw(
    config: FlowConfig, keys: Sequence[tuple], lengths: Sequence[int], device="cpu"
) -> tuple[Tensor, Tensor]:
    """Draw x_0 (L, C, M, D) and standard normal z (L, C, M) for episodes with `lengths` targets, each from its own key."""
    grid, noise, z = (len(config.percentiles), len(config.contexts)), [], []
    for key, length in zip(keys, lengths, strict=True):
        generator = torch.Generator(device).manual_seed(keyed_seed(*key))
        noise.append(torch.randn(*grid, length, config.dim, generator=generator, device=device))
        z.append(torch.randn(*grid, length, generator=generator, device=device))
    return torch.cat(noise, dim=2), torch.cat(z, dim=2)


# ---- Losses and scores
def interpolate(x_1: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t = t*x_1 + (1-t)*x_0 and the target velocity u = x_1 - x_0, both (P, D), for times t (P,)."""
    t = t[:, None]
    return t * x_1 + (1 - t) * x_0, x_1 - x_0


def velocity_error(
    flow: nn.Module, x_1: Tensor, context: Tensor, depth: Tensor, x_0: Tensor, t: Tensor
) -> Tensor:
    """Return delta(t) = mean_D (v - u)^2 of each row, (P,) float32, for times t (P,)."""
    x_t, u = interpolate(x_1.float(), x_0, t)
    return (flow(x_t, t, context, depth).float() - u).square().mean(dim=-1)


def matching_loss(flow: nn.Module, pairs: Pairs, noise: Tensor, z: Tensor) -> Tensor:
    """Return each row's offline loss, delta at t = sigmoid(z), (P,), from draw(); leave the gradient of its sum on the flow."""
    noise, t, losses = noise[pairs.exists], z[pairs.exists].sigmoid(), []
    for rows in torch.arange(len(t), device=t.device).split(ROWS_PER_CALL):
        loss = velocity_error(
            flow, pairs.x_1[rows], pairs.context[rows], pairs.depth[rows], noise[rows], t[rows]
        )
        loss.sum().backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def deviation_score(errors: Tensor, times: Sequence[float]) -> Tensor:
    """Return the mean over times of t/(1-t) * delta(t), (P,), from errors (n_times, P): the score-function error."""
    weights = torch.tensor([t / (1 - t) for t in times], dtype=errors.dtype, device=errors.device)
    return (weights[:, None] * errors).mean(dim=0)


def score_and_learn(
    flow: nn.Module, pairs: Pairs, noise: Tensor, times: Sequence[float], weight: Tensor | None = None, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Score targets by velocity deviation and, in the same flow forward, add the online loss's gradient to the flow's.

    The noise x_0 (L, C, M, D) is shared by all times T_r. With a weight (M,), the gradient is that of sum(weight * loss).
    With z (L, C, M), the flow learns at t = sigmoid(z), as in the offline start, instead of at T_r.
    Returns score (M,) and loss (M,), detached: the deviation, and the error at the times that are learnt from.
    """
    noise, n_layers, n_contexts = noise[pairs.exists], *pairs.exists.shape[:2]
    score, loss, zeros = (torch.zeros(len(noise), device=noise.device) for _ in range(3))
    weight = (
        zeros if weight is None else pairs.per_row(weight) / (n_layers * n_contexts)
    )  # a target's loss is a mean
    random_t = None if z is None else z[pairs.exists].sigmoid()
    for learn in (True, False):  # only rows that are learnt from keep activations for a backward
        chosen = ((weight != 0) == learn).nonzero().squeeze(1)
        for rows in chosen.split(ROWS_PER_CALL) if len(chosen) else ():
            arguments = (flow, pairs.x_1[rows], pairs.context[rows], pairs.depth[rows], noise[rows])
            with torch.set_grad_enabled(learn and random_t is None):
                errors = torch.stack(
                    [velocity_error(*arguments, torch.full_like(weight[rows], t)) for t in times]
                )
            with torch.set_grad_enabled(learn):
                row_loss = (
                    errors.mean(dim=0)
                    if random_t is None
                    else velocity_error(*arguments, random_t[rows])
                )
            if learn:
                (weight[rows] * row_loss).sum().backward()
            score[rows] = deviation_score(errors.detach(), times)
            loss[rows] = row_loss.detach()
    return pairs.per_target(score), pairs.per_target(loss)


# ---- Files: safetensors with the configuration inside; official flow_model.bin is read
def save_flow(flow: Flow, folder: str | Path) -> None:
    """Write `flow.safetensors` into the folder, whole or not at all; of a sharded flow, every rank must call this."""
    folder, temporary = Path(folder), Path(folder) / f"{FLOW_FILE}.writing"
    whole = {
        name: t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in flow.state_dict().items()
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, metadata={"config": json.dumps(asdict(flow.config))})
        os.replace(temporary, folder / FLOW_FILE)


def as_tuple(value):
    """Return a list as the tuple that it was before JSON; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def load_flow(path: str | Path, dim: int, **expected) -> Flow:
    """Load a flow from a file or its folder, native or official, and check that it fits.

    `dim` is the hidden size of the policy; `expected` are fields of FlowConfig and the values they must have, None for
    any. An official file does not say its contexts, which must then be given, nor its taps. ValueError if it does not fit.
    """
    path = Path(path)
    found = [
        p
        for p in ([path / FLOW_FILE, path / OFFICIAL_FILE] if path.is_dir() else [path])
        if p.is_file()
    ]
    if not found:
        raise ValueError(
            f"no flow at {path}; expected {FLOW_FILE} or {OFFICIAL_FILE}: run `python train_flow.py` first"
        )
    where = f"the flow {found[0]}"
    expected = {"dim": dim} | {
        name: as_tuple(value) for name, value in expected.items() if value is not None
    }
    if found[0].suffix == ".bin":
        state, config = read_official(found[0], expected)
    else:
        with safe_open(found[0], "pt") as file:
            if not (saved := (file.metadata() or {}).get("config")):
                raise ValueError(
                    f"{where} holds no configuration; expected a file written by train_flow.py"
                )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        config = FlowConfig(**{name: as_tuple(value) for name, value in json.loads(saved).items()})
    for name, value in expected.items():
        if getattr(config, name) != value:
            shape, blocks = tuple(state["model.input_proj.weight"].shape), config.n_blocks
            raise ValueError(
                f"{where} has {name}={getattr(config, name)} (input {shape}, {blocks} blocks, contexts {config.contexts}), "
                f"expected {name}={value}: train one that fits with train_flow.py"
            )
    flow = Flow(config)
    try:
        flow.load_state_dict(state)
    except RuntimeError as error:  # names missing and extra keys, and both shapes where they differ
        raise ValueError(f"{where} is cut, or of another network: {error}") from error
    return flow


def read_official(path: Path, expected: dict) -> tuple[dict[str, Tensor], FlowConfig]:
    """Read a `flow_model.bin`: its tensors, and the configuration that their shapes tell."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "model.input_proj.weight" not in state:
        raise ValueError(
            f"{path} is no official flow: 'model.input_proj.weight' is missing; found {sorted(state)[:5]}"
        )
    if "contexts" not in expected:
        hint = "the official offline training conditions on the next token: --contexts next"
        raise ValueError(
            f"{path} does not say which context it was trained with; name it with --contexts ({hint})"
        )
    width, dim = state["model.input_proj.weight"].shape
    n_blocks = len({name.split(".")[2] for name in state if name.startswith("model.res_blocks.")})
    given = {k: expected[k] for k in ("contexts", "percentiles", "shift") if k in expected}
    return state, FlowConfig(dim=dim, n_blocks=n_blocks, width=width, **given)
