"""The flow environment: a velocity field of good latents, and how far a latent deviates from it.

Notation (the same in every file):
    N prompts, G samples a prompt, B episodes: N*G of a step, or those of a micro-batch
    S prompt+response positions, T response positions
    L tapped layers, D hidden size, V vocabulary
    x_1 (…, D)      a latent: what a tapped decoder layer outputs at one position (data, t = 1)
    x_0 (…, D)      Gaussian noise (t = 0)
    t (…)           time in [0, 1]
    context (…, D)  latent of a neighbouring position at the same layer, the condition
    depth (…)       tapped layer index / number of layers, in [0, 1)

And in this file:
    C context modes, M target positions of a batch: those to score or to learn from
    P rows of the flow's input, one for each tap, context mode and target that has such a context

Equations, each with its function:
    x_t = t*x_1 + (1-t)*x_0,  u = x_1 - x_0                              interpolate
    v(x_t, t, context, depth)                                            VelocityNet
    delta(t) = mean_D (v(x_t, t, context, depth) - u)^2                  velocity_error
    offline loss = mean of delta(t) over tokens, taps, draws of t        matching_loss, draw_times
    score = mean over T_r of t/(1-t) * delta(t), then over taps          deviation_score,
                                                                         score_and_learn
Ours, not the paper's; see docs/evidence.md for what they are worth:
    excess = mean over T_r of (delta(t) - mean)/spread, of expert tokens  excess_score
    x_1 = (latent - mean)/spread, for each tap and dimension              Flow.standardise

Departures from the official code: each time has its own weight (there the last one's serves all);
the context mode is stored with the flow; noise is keyed by (seed, step, episode), so that scores
repeat and do not depend on how episodes are batched.
"""

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import localtime, strftime
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from infra import kinds
from infra.batching import keyed_seed
from infra.errors import first_line
from infra.files import folder_written_whole
from infra.kinds import check_kinds
from infra.parallel import full_weights, gather_weights, is_first, on_first

FLOW_FILE = "flow.safetensors"
OFFICIAL_FILE = "flow_model.bin"
Times = Literal["random", "uniform"]
ROWS_PER_CALL = 8192  # bounds the activations of one forward and backward of the flow


# ---- Context: the latent that conditions the one at position p
def neighbour(latents: Tensor, mask: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Look up, for each position p, the latent at p + offset of the same sequence.

    latents (B, S, D); mask (B, S) bool is false for padding. Returns the neighbours (B, S, D) and
    where both p and p + offset hold tokens (B, S) bool; elsewhere the neighbour means nothing.
    """
    size = mask.shape[1]
    source = torch.arange(size, device=mask.device) + offset  # (S,)
    is_inside = (source >= 0) & (source < size)
    source = source.clamp(0, size - 1)
    exists = mask & mask[:, source] & is_inside
    return latents[:, source], exists


def previous_context(latents: Tensor, mask: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Condition position p on p - shift (official `token_post`)."""
    return neighbour(latents, mask, -shift)


def next_context(latents: Tensor, mask: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Condition position p on p + shift (official `token_pre`)."""
    return neighbour(latents, mask, shift)


def self_context(latents: Tensor, mask: Tensor, _shift: int) -> tuple[Tensor, Tensor]:
    """Condition position p on itself (official `identity`)."""
    return neighbour(latents, mask, 0)


# A new mode is one function like those above and one entry here, and nothing else.
CONTEXTS = {
    "previous": previous_context,
    "next": next_context,
    "self": self_context,
}


# ---- Settings
@dataclass(frozen=True)
class FlowConfig:
    """What a flow is and what it was trained on; saved inside its file."""

    dim: int  # D, hidden size of the policy
    n_blocks: int = 4
    width: int | None = None  # of the network; None: dim
    norm_eps: float = 1e-6  # of the network's RMS norms; that of the policy's
    contexts: tuple[str, ...] = ("previous",)
    shift: int = 1  # distance of the neighbour, in positions
    percentiles: tuple[float, ...] = (0.25, 0.5, 0.75)  # of the policy's depth: where it is tapped
    standardised: bool = False  # whether latents are standardised, see Flow.standardise
    calibrated_at: tuple[float, ...] = ()  # times with a scale of experts, see Flow.expert_scale
    fitted_to: str | None = None  # fingerprint of the policy that the latents are of, if known

    def __post_init__(self):
        check_kinds(self)
        check_contexts(self.contexts)
        check_percentiles(self.percentiles)
        if self.calibrated_at:
            check_times(self.calibrated_at)
        sizes = {"dim": self.dim, "n_blocks": self.n_blocks, "shift": self.shift}
        for name, size in {**sizes, "width": self.width or self.dim}.items():
            if not 1 <= size < 2**31:
                raise ValueError(f"{name}={size}: must be at least 1, and below {2**31}")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps}: expected a number from 0")


def check_contexts(contexts: Sequence[str]) -> None:
    """Raise ValueError unless all context modes are known, and there is one."""
    if not contexts or not set(contexts) <= CONTEXTS.keys():
        modes = ", ".join(CONTEXTS)
        raise ValueError(f"contexts={contexts}: expected one or more of {modes}")


def check_percentiles(percentiles: Sequence[float]) -> None:
    """Raise ValueError unless all taps are fractions of the depth, and there is one."""
    if not percentiles or not all(0 <= p <= 1 for p in percentiles):
        raise ValueError(
            f"percentiles={percentiles}: expected fractions of the depth in [0, 1], "
            "e.g. 0.25 0.5 0.75"
        )


def check_times(times: Sequence[float]) -> None:
    """Raise ValueError unless all times are in (0, 1): t/(1-t), the weight, is infinite at 1."""
    if not times or not all(0 < t < 1 for t in times):
        raise ValueError(
            f"reward times {times}: expected one or more in (0, 1), e.g. 0.8; "
            "the weight t/(1-t) of 1 is infinite"
        )


# ---- Velocity network. Modules bear the official names, so that official checkpoints load.
def two_layers(n_inputs: int, width: int) -> nn.Sequential:
    """Make a SiLU MLP."""
    return nn.Sequential(nn.Linear(n_inputs, width), nn.SiLU(), nn.Linear(width, width))


def modulation(width: int, n_outputs: int) -> nn.Sequential:
    """Make SiLU and a linear map from y, the condition, to shift, scale and perhaps gate."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, n_outputs * width))


class ScalarEmbedding(nn.Module):
    """Embed scalars s (P,) as vectors (P, width).

    The features are the cosines, then the sines, of s * 10000^(-k/128) for k = 0 … 127; a two-layer
    SiLU MLP follows.
    """

    def __init__(self, width: int):
        super().__init__()
        freqs = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        self.register_buffer("freqs", freqs[None])  # (1, 128)
        self.mlp = two_layers(256, width)

    def features(self, scalar: Tensor) -> Tensor:
        angle = scalar.float()[:, None] * self.freqs.float()  # (P, 128)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (P, 256)

    def forward(self, scalar: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype
        return self.mlp(self.features(scalar).to(dtype))


class Block(nn.Module):
    """Residual block `h + gate * MLP(rms(h) * (1 + scale) + shift)`, modulated by y."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.in_ln = nn.RMSNorm(width, eps=eps)
        self.mlp = two_layers(width, width)
        self.adaLN_modulation = modulation(width, 3)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        modulated = self.in_ln(h) * (1 + scale) + shift
        return h + gate * self.mlp(modulated)


class FinalLayer(nn.Module):
    """Adaptive RMS-norm, modulated by y, and the linear map to a velocity."""

    def __init__(self, width: int, dim: int, eps: float):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=eps)
        self.linear = nn.Linear(width, dim)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        modulated = self.norm_final(h) * (1 + scale) + shift
        return self.linear(modulated)


class VelocityNet(nn.Module):
    """v(x_t, t, context, depth), the velocity of latents on their way from noise to data.

    x_t (P, dim), t (P,), context (P, context_dim), depth (P,) -> velocity (P, dim). A time or depth
    that all rows share can be given once, (1,), and is embedded once. One network serves all tapped
    layers: depth tells it which one a row comes from.
    """

    def __init__(self, dim: int, context_dim: int, width: int, n_blocks: int, eps: float = 1e-6):
        super().__init__()
        self.input_proj = nn.Linear(dim, width)
        self.cond_embed = nn.Linear(context_dim, width)
        self.time_embed = ScalarEmbedding(width)
        self.layer_embed = ScalarEmbedding(width)
        self.res_blocks = nn.ModuleList(Block(width, eps) for _ in range(n_blocks))
        self.final_layer = FinalLayer(width, dim, eps)
        self.initialise()

    def initialise(self) -> None:
        """Draw the initial weights; modulations and output start at zero, hence so does v."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, depth: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        h = self.input_proj(x_t.to(dtype))  # (P, width)
        y = self.cond_embed(context.to(dtype))
        y = y + self.time_embed(t) + self.layer_embed(depth)  # (P, width)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)  # (P, dim)


class ExpertScale(NamedTuple):
    """What the velocity error is on expert tokens that the flow was not fitted to."""

    mean: Tensor  # (n_times, L)
    spread: Tensor  # (n_times, L) standard deviation


class Flow(nn.Module):
    """A velocity network together with the configuration that it was trained with.

    Statistics of expert solutions are buffers; they are 0 until they have been measured.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        width = config.width or config.dim
        sizes = (config.dim, config.dim, width, config.n_blocks)
        self.model = VelocityNet(*sizes, config.norm_eps)
        n_taps = len(config.percentiles)
        if config.standardised:
            self.add_statistics("latent", n_taps, config.dim)
        if config.calibrated_at:
            self.add_statistics("expert", len(config.calibrated_at), n_taps)

    def add_statistics(self, name: str, *shape: int) -> None:
        """Add the buffers NAME_mean and NAME_spread."""
        self.register_buffer(f"{name}_mean", torch.zeros(shape))
        self.register_buffer(f"{name}_spread", torch.zeros(shape))

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, depth: Tensor) -> Tensor:
        return self.model(x_t, t, context, depth)

    def standardise(self, rows: "FlowRows") -> "FlowRows":
        """Subtract the mean of each tap and dimension from latents, and divide by the spread.

        In a real model a few dimensions hold most of the mean square, and the error is then theirs
        alone. Does nothing unless the configuration asks for it.
        """
        if not self.config.standardised:
            return rows
        taps = rows.taps()
        mean = self.latent_mean[taps]  # (P, D)
        spread = self.latent_spread[taps]
        return replace(
            rows,
            x_1=(rows.x_1.float() - mean) / spread,
            context=(rows.context.float() - mean) / spread,
        )

    def expert_scale(self, times: Sequence[float]) -> ExpertScale:
        """Return the error's mean and spread on expert tokens at some times.

        Raises ValueError if they were not measured at one of them.
        """
        calibrated_at = self.config.calibrated_at
        missing = [time for time in times if time not in calibrated_at]
        if missing:
            raise ValueError(
                f"the flow was calibrated at the times {calibrated_at}, not at {missing}: "
                "choose --reward-times among them, or fit a flow with train_flow.py --calibrate-at"
            )
        if not self.expert_spread.all():
            raise ValueError(
                "the flow was not calibrated, as its offline start had not ended: "
                "resume that, and take its flow/"
            )
        indices = [calibrated_at.index(time) for time in times]
        return ExpertScale(self.expert_mean[indices], self.expert_spread[indices])


# ---- From latents to rows of the flow's input, and back to positions
@dataclass
class FlowRows:
    """Input of the flow: a latent with its context for each tap, context mode and target.

    A target without such a context has no row, e.g. the first position of a sequence, which has no
    previous one. The P rows are ordered by tap, then mode, then target.
    """

    x_1: Tensor  # (P, D)
    context: Tensor  # (P, D)
    depth: Tensor  # (L,)
    exists: Tensor  # (L, C, M) bool with P trues: which rows there are

    def calls(self, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Yield indices of rows that go through the flow together, with x_1, context and depth.

        They are of one tap, whose depth (1,) is so embedded once, and ROWS_PER_CALL at most.
        chosen: (P,) bool, the rows to take; None: all
        """
        taps = self.taps()
        if chosen is not None:
            taps = taps.where(chosen, -1)
        for tap in range(len(self.exists)):
            of_tap = (taps == tap).nonzero().squeeze(1)
            for rows in of_tap.split(ROWS_PER_CALL):
                if len(rows):  # an empty tensor is split into one empty part
                    yield rows, (self.x_1[rows], self.context[rows], self.depth[tap, None])

    def per_tap(self, values: Tensor) -> Tensor:
        """Average values of rows (P,) over modes, (L, M); a row that is missing counts 0.

        The official code counts a mode without a neighbour as 0, too.
        """
        grid = torch.zeros(self.exists.shape, dtype=values.dtype, device=values.device)
        grid[self.exists] = values
        return grid.mean(dim=1)

    def per_target(self, values: Tensor) -> Tensor:
        """Average values of rows (P,) over taps and modes, (M,); a row that is missing counts 0."""
        return self.per_tap(values).mean(dim=0)

    def per_row(self, values: Tensor) -> Tensor:
        """Copy values of targets (M,) to each of their rows, (P,)."""
        return values.expand(self.exists.shape)[self.exists]

    def taps(self) -> Tensor:
        """Return the place of each row's tap among the L taps, (P,)."""
        n_taps = len(self.exists)
        place = torch.arange(n_taps, device=self.exists.device)[:, None, None]  # (L, 1, 1)
        return place.expand(self.exists.shape)[self.exists]


def make_rows(
    config: FlowConfig,
    latents: Sequence[Tensor],
    depths: Sequence[float],
    mask: Tensor,
    targets: Tensor,
) -> FlowRows:
    """Put target latents together with their contexts.

    latents: (B, S, D) for each tap
    depths: in [0, 1), one for each tap
    mask: (B, S) bool, false for padding
    targets: (B, S) bool, the M positions to score or to learn from, counted row by row
    """
    x_1_parts = []
    context_parts = []
    exists_parts = []
    for layer in latents:
        for mode in config.contexts:
            context, has_context = CONTEXTS[mode](layer, mask, config.shift)
            is_row = targets & has_context  # (B, S)
            x_1_parts.append(layer[is_row])
            context_parts.append(context[is_row])
            exists_parts.append(has_context[targets])  # (M,)
    exists = torch.stack(exists_parts)  # (L * C, M)
    return FlowRows(
        x_1=torch.cat(x_1_parts),
        context=torch.cat(context_parts),
        depth=torch.as_tensor(depths, dtype=torch.float32, device=targets.device),
        exists=exists.view(len(latents), len(config.contexts), -1),
    )


# ---- Noise
def draw(
    config: FlowConfig, keys: Sequence[tuple], lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw noise for the targets of some episodes, each episode from its own key.

    lengths: number of targets of each episode, M in all
    Returns x_0 (L, C, M, D) and z (L, C, M), both standard normal; see draw_times for z.
    """
    n_taps = len(config.percentiles)
    n_modes = len(config.contexts)
    noise = []
    z = []
    for key, length in zip(keys, lengths, strict=True):
        generator = torch.Generator(device).manual_seed(keyed_seed(*key))
        shape = (n_taps, n_modes, length)
        noise.append(torch.randn(*shape, config.dim, generator=generator, device=device))
        z.append(torch.randn(*shape, generator=generator, device=device))
    return torch.cat(noise, dim=2), torch.cat(z, dim=2)


# ---- Losses and scores
def interpolate(x_1: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the path's point x_t = t*x_1 + (1-t)*x_0 and its velocity u = x_1 - x_0, both (P, D).

    x_1 and x_0 are (P, D), t is (P,) or (1,).
    """
    time = t[:, None]  # (P, 1)
    x_t = time * x_1 + (1 - time) * x_0
    u = x_1 - x_0
    return x_t, u


def velocity_error(
    flow: nn.Module, x_1: Tensor, context: Tensor, depth: Tensor, x_0: Tensor, t: Tensor
) -> Tensor:
    """Return delta(t) = mean_D (v - u)^2 of each row, (P,) float32, at t (P,) or (1,)."""
    x_t, u = interpolate(x_1.float(), x_0, t)
    v = flow(x_t, t, context, depth).float()
    return (v - u).square().mean(dim=-1)


def draw_times(z: Tensor, kind: Times) -> Tensor:
    """Return random times of the shape of z, which is standard normal.

    random: sigmoid(z), as in the official code; uniform: U[0, 1], as on the project's page, by the
    normal distribution function of z.
    """
    if kind == "uniform":
        return torch.special.ndtr(z)
    return z.sigmoid()


def matching_loss(flow: nn.Module, rows: FlowRows, noise: Tensor, times: Tensor) -> Tensor:
    """Return the offline loss of each row, delta at its time, (P,).

    noise (L, C, M, D) is from draw(), times (L, C, M) from draw_times(). The gradient of the sum
    over rows is added to the flow's parameters: the caller only has to divide it.
    """
    x_0 = noise[rows.exists]  # (P, D)
    t = times[rows.exists]  # (P,)
    losses = torch.zeros_like(t)
    for called, inputs in rows.calls():
        loss = velocity_error(flow, *inputs, x_0[called], t[called])
        loss.sum().backward()
        losses[called] = loss.detach()
    return losses


@torch.no_grad()
def errors_of_rows(
    flow: nn.Module, rows: FlowRows, noise: Tensor, times: Sequence[float]
) -> Tensor:
    """Return delta(t) of each row at fixed times, (n_times, P); noise (L, C, M, D) serves all."""
    x_0 = noise[rows.exists]  # (P, D)
    errors = torch.zeros(len(times), len(x_0), device=x_0.device)
    for called, inputs in rows.calls():
        errors[:, called] = errors_at(times, flow, *inputs, x_0[called])
    return errors


def deviation_score(errors: Tensor, times: Sequence[float]) -> Tensor:
    """Return the mean over times of t/(1-t) * delta(t), (P,), from errors (n_times, P).

    t/(1-t) is the weight of a squared velocity error in the likelihood bound of this path: half of
    d(log SNR)/dt is 1/(t(1-t)), and the error of the noise is t times that of the velocity, squared
    t^2. With a single time it is a constant, which the min-max of the shaping cancels. The bound, and
    what a few times and one draw of noise keep of it: docs/theory.md.
    """
    factors = [t / (1 - t) for t in times]
    weights = torch.tensor(factors, dtype=errors.dtype, device=errors.device)
    return (weights[:, None] * errors).mean(dim=0)


def excess_score(errors: Tensor, taps: Tensor, scale: ExpertScale) -> Tensor:
    """Return the mean over times of (delta(t) - mean)/spread, (P,), from errors (n_times, P).

    Mean and spread are those of expert tokens at the row's tap, `taps` (P,). The score of a token
    that looks like an expert's is about 0, whatever its response; that of others is positive.
    """
    excess = (errors - scale.mean[:, taps]) / scale.spread[:, taps]
    return excess.mean(dim=0)


def score_and_learn(
    flow: nn.Module,
    rows: FlowRows,
    noise: Tensor,
    times: Sequence[float],
    weight: Tensor | None = None,
    learn_at: Tensor | None = None,
    scale: ExpertScale | None = None,
) -> tuple[Tensor, Tensor]:
    """Score targets by velocity deviation and let the flow learn from them, in the same forwards.

    noise: x_0 (L, C, M, D), the same for all times
    times: T_r, at which the deviation is taken
    weight: (M,), adds the gradient of sum(weight * loss) to the flow's; None: learn nothing
    learn_at: (L, C, M), times to learn at, as in the offline start; None: learn at T_r
    scale: of expert tokens at T_r; the score is then the excess over them
    Returns the score at each tap (L, M) and the loss (M,), detached: the velocity deviation or the
    excess, and the mean error at the times that are learnt from.
    """
    x_0 = noise[rows.exists]  # (P, D)
    random_t = None if learn_at is None else learn_at[rows.exists]  # (P,)
    row_weight = torch.zeros(len(x_0), device=x_0.device)
    if weight is not None:
        n_taps, n_modes, _ = rows.exists.shape
        row_weight = rows.per_row(weight) / (n_taps * n_modes)  # a target's loss is a mean of rows
    taps = rows.taps()
    score = torch.zeros(len(x_0), device=x_0.device)
    loss = torch.zeros(len(x_0), device=x_0.device)

    # Rows of weight 0 come second, without a graph: only the others keep activations.
    for learn in (True, False):
        for called, inputs in rows.calls((row_weight != 0) == learn):
            arguments = (flow, *inputs, x_0[called])
            with torch.set_grad_enabled(learn and random_t is None):
                errors = errors_at(times, *arguments)  # (n_times, rows of the call)
            with torch.set_grad_enabled(learn):
                if random_t is None:
                    row_loss = errors.mean(dim=0)
                else:
                    row_loss = velocity_error(*arguments, random_t[called])
            if learn:
                (row_weight[called] * row_loss).sum().backward()
            if scale is None:
                score[called] = deviation_score(errors.detach(), times)
            else:
                score[called] = excess_score(errors.detach(), taps[called], scale)
            loss[called] = row_loss.detach()
    return rows.per_tap(score), rows.per_target(loss)


def errors_at(
    times: Sequence[float],
    flow: nn.Module,
    x_1: Tensor,
    context: Tensor,
    depth: Tensor,
    x_0: Tensor,
) -> Tensor:
    """Return delta(t) of each row at each of some fixed times, (n_times, P)."""
    errors = []
    for time in times:
        t = torch.full((1,), time, device=x_0.device)
        errors.append(velocity_error(flow, x_1, context, depth, x_0, t))
    return torch.stack(errors)


# ---- Files: safetensors with the configuration inside; the official flow_model.bin is read, too
def save_flow(config: FlowConfig, state: dict[str, Tensor], folder: str | Path) -> None:
    """Write `flow.safetensors` into an existing folder, from a Flow's whole state dict."""
    metadata = {"config": json.dumps(asdict(config))}
    save_file(state, Path(folder) / FLOW_FILE, metadata=metadata)


def export_flow(flow: Flow, folder: Path) -> None:
    """Write a sharded flow into its folder; all ranks together."""
    weights = gather_weights(full_weights(flow, torch.float32))

    def write() -> None:
        with folder_written_whole(folder, overwrite=True) as temporary:
            temporary.mkdir()
            save_flow(flow.config, weights, temporary)

    on_first(write)


def load_flow(
    path: str | Path,
    dim: int,
    norm_eps: float = 1e-6,
    contexts: Sequence[str] | None = None,
    **expected,
) -> Flow:
    """Load a flow, native or official, and check that it fits.

    path: the file, or the folder that it is in
    dim: hidden size of the policy
    norm_eps: eps of the policy's RMS norms, for an official file, which does not say its own
    contexts: those to score with; by default those that the flow was fitted with. An official file
        does not say its own. A calibration does not hold for others.
    expected: other fields of FlowConfig with the values that they must have; None: any. An official
        file does not say its percentiles and shift.
    Raises ValueError if there is no flow, or none that fits.
    """
    file = find_flow(Path(path))
    required = {"dim": dim}
    for name, value in expected.items():
        if value is not None:
            required[name] = kinds.as_tuple(value)
    if file.suffix == ".bin":
        state, config = read_official(file, contexts, required)
        config = replace(config, norm_eps=norm_eps)
    else:
        state, config = read_native(file)
    if contexts and tuple(contexts) != config.contexts:
        if is_first():
            print(f"the flow {file} was fitted with contexts {config.contexts}, not {contexts}")
        config = replace(config, contexts=tuple(contexts), calibrated_at=())
        state = {name: state[name] for name in state if not name.startswith("expert_")}
    for name, value in required.items():
        if getattr(config, name) != value:
            shape = tuple(state["model.input_proj.weight"].shape)
            raise ValueError(
                f"the flow {file} has {name}={getattr(config, name)} (input {shape}, "
                f"{config.n_blocks} blocks, contexts {config.contexts}), "
                f"expected {name}={value}: train one that fits with train_flow.py"
            )
    flow = Flow(config)
    flow.load_state_dict(state)
    return flow


def check_tensors(file: Path, config: FlowConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless the tensors of a file are those of a flow; nothing is allocated."""
    blocks = {name.split(".")[2] for name in shapes if name.startswith("model.res_blocks.")}
    if len(blocks) != config.n_blocks:
        raise ValueError(
            f"the flow {file} is cut, or of another network: it says n_blocks={config.n_blocks} "
            f"and holds {len(blocks)}"
        )
    try:
        with torch.device("meta"):
            skeleton = Flow(config)
            tensors = {name: torch.empty(*shape) for name, shape in shapes.items()}
        skeleton.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # it names keys and shapes that differ, or a size that overflows
        raise ValueError(f"the flow {file} is cut, or of another network: {error}") from error


def newest_flow(folder: str) -> str:
    """Return the newest flow among those of the offline start, `folder` and `folder-N`; say it."""
    name = Path(folder).name
    flows = []
    for run_folder in Path(folder).parent.glob(f"{name}*"):
        suffix = run_folder.name.removeprefix(name)
        file = run_folder / "flow" / FLOW_FILE
        if re.fullmatch(r"(-\d+)?", suffix) and file.exists():
            flows.append(file)
    if not flows:
        return f"{folder}/flow"  # it will be missed, with what to do about it, when it is loaded
    newest = max(flows, key=lambda file: file.stat().st_mtime)
    written = strftime("%Y-%m-%d %H:%M", localtime(newest.stat().st_mtime))
    print(f"no --flow given: taking the newest one, {newest.parent}, written {written}")
    return str(newest.parent)


def find_flow(path: Path) -> Path:
    """Return the file of the flow at a path, which may be its folder; native before official."""
    candidates = [path]
    if path.is_dir():
        candidates = [path / FLOW_FILE, path / OFFICIAL_FILE]
    for file in candidates:
        if file.is_file():
            return file
    raise ValueError(
        f"no flow at {path}; expected {FLOW_FILE} or {OFFICIAL_FILE}: "
        "run `python train_flow.py` first"
    )


def read_native(path: Path) -> tuple[dict[str, Tensor], FlowConfig]:
    """Read the tensors and the configuration of a `flow.safetensors`."""
    try:
        with safe_open(path, "pt") as file:
            config = read_config(path, (file.metadata() or {}).get("config"))
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            check_tensors(path, config, shapes)
            state = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"the flow {path} is cut or damaged: {error}") from error
    return state, config


def read_config(path: Path, text: str | None) -> FlowConfig:
    """Read the configuration inside a flow's file; ValueError if it is missing or absurd."""
    if text is None:
        raise ValueError(
            f"the flow {path} holds no configuration; expected a file written by train_flow.py"
        )
    try:
        settings = json.loads(text)
        known = {name: kinds.as_tuple(value) for name, value in settings.items()}
        return FlowConfig(**known)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # no JSON, a field that is unknown, missing or absurd, or no object at all
        raise ValueError(f"the flow {path} has a configuration that is none: {error}") from error


def read_official(
    path: Path, contexts: Sequence[str] | None, required: dict
) -> tuple[dict[str, Tensor], FlowConfig]:
    """Read the tensors of a `flow_model.bin`, and the configuration that their shapes tell."""
    state = load_official(path)
    if "model.input_proj.weight" not in state:
        raise ValueError(
            f"{path} is no official flow: it has no 'model.input_proj.weight', "
            f"but {sorted(state)[:5]}"
        )
    if not contexts:
        raise ValueError(
            f"{path} does not say which context it was trained with; name it with --contexts "
            "(officially fitted with the next token and used in training with the previous one: "
            "--contexts previous)"
        )
    shape = state["model.input_proj.weight"].shape
    if len(shape) != 2:
        raise ValueError(f"{path} is no official flow: 'model.input_proj.weight' is no matrix")
    width, dim = shape
    blocks = {name.split(".")[2] for name in state if name.startswith("model.res_blocks.")}
    unknown = ("percentiles", "shift")  # what no shape tells
    given = {name: required[name] for name in unknown if name in required}
    given["contexts"] = tuple(contexts)
    config = FlowConfig(dim=dim, n_blocks=len(blocks), width=width, **given)
    check_tensors(path, config, {name: tensor.shape for name, tensor in state.items()})
    return state, config


def load_official(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a `flow_model.bin`; ValueError if it is torn or holds something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no official flow, or damaged: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(part) for part in state.values()):
        raise ValueError(f"{path} is no official flow: expected tensors by name")
    return state
