"""The policy: a Hugging Face decoder that gives log-probs, entropies and latents of episodes.

One forward gives all three:
    taps: layers round(p*n), latent = the layer's output                 tap_layers, Policy.forward
    log pi(y_k), H_k from the last hidden states                         infra/logprobs.py

Rows are packed without padding where a family's layers allow it; find_attention() tries that out at
load, and a model that a policy would not score as Hugging Face does is refused. Shapes as in flow.py;
M is the number of sampled tokens of a batch. Vision-language models are tapped in their text layers,
and a batch holds the images of its episodes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from infra import batching, families, fingerprints, lora, parallel, vision
from infra.attention import PACKED
from infra.logprobs import CHUNK_WORK, Scaling, TokenLogProbs
from infra.parallel import DEVICE, is_first

Freeze = Literal["none", "vision"]


def tap_layers(n_layers: int, percentiles: Sequence[float]) -> list[int]:
    """Return indices of layers, round(p * n_layers), n_layers - 1 at most (paper: .25, .5, .75).

    They count from 0: the latent of layer i is what Hugging Face calls hidden_states[i + 1], but
    for the last layer, whose entry there has passed the final norm.
    """
    return [min(round(p * n_layers), n_layers - 1) for p in percentiles]


class PolicyOutput(NamedTuple):
    """What one forward of the policy gives."""

    logp: Tensor | None  # (B, T) log-prob of each sampled token at the temperature
    entropy: Tensor | None  # (B, T) of the distribution that it was drawn from
    latents: list[Tensor]  # one (B, S, D) a tap


class LastTap(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass whose layers above the last tap nobody needs."""


class Policy(nn.Module):
    """A Hugging Face decoder that returns log-probs, entropies and tapped latents of episodes."""

    def __init__(self, model: nn.Module, attention: str | None = None):
        """Take a model, and the name of its attention, by default the one that its family needs.

        Raises ValueError if the policy's log-probs would not be those of the model's own forward.
        """
        super().__init__()
        check_head(model)
        if attention is None:
            attention = find_attention(model)
        self.model = model
        self.packs = attention == PACKED
        families.set_attention(model.get_decoder(), attention)
        text_config = model.config.get_text_config()
        self.n_layers = text_config.num_hidden_layers
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        self.chunk_work = CHUNK_WORK
        self.takes_features = False  # images come as features: no forward runs the tower
        self.fingerprint: str | None = None  # of the weights that it was loaded with

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.model.get_decoder().layers

    @property
    def tower(self) -> nn.Module | None:
        """The vision tower, or None if the model takes no images."""
        if not vision.takes_images(self.model.config):
            return None
        return self.model.base_model.visual

    @property
    def image_encoder(self) -> Callable[[Sequence[vision.Image]], Tensor] | None:
        """tower_features() if the vision tower is frozen and sees images beforehand, else None."""
        return self.tower_features if self.takes_features else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts to shard one by one: decoder layers and the vision tower's blocks."""
        if self.tower is None:
            return list(self.layers)
        return [*self.layers, *self.tower.blocks]

    def layer_parts(self) -> list[nn.Module]:
        """Return attention, feed-forward and norms of all decoder layers: what can be compiled.

        Not the layers themselves, whose hooks return latents and end a forward.
        """
        return [part for layer in self.layers for part in layer.children()]

    def compile_parts(self, when: Literal["auto", "on", "off"]) -> None:
        """Compile the parts of the layers, and what is done with a chunk of logits."""
        parallel.compile_forward(self.layer_parts(), when)
        self.chunk_work = tuple(parallel.compiled(work, when) for work in CHUNK_WORK)

    def whole_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face's name and the whole tensor of each weight, adapters merged into them.

        One at a time; all ranks must take all of them together.
        """
        return lora.merged_weights(self, dtype, prefix="model.")

    def forward(
        self,
        batch: batching.Batch,
        temperature: float = 1.0,
        taps: Sequence[int] = (),
        latents_only: bool = False,
    ) -> PolicyOutput:
        """Score the response tokens of a batch that the policy sampled.

        temperature: of the distribution; the logits are divided by it
        taps: indices of the layers whose outputs are returned as latents, without a gradient
        latents_only: stop after the last tap, so that neither the layers above nor the head run
        """
        last_tap = max(taps) if latents_only else None
        tower_term = self.run_tower_without_images(batch)
        latents: dict[int, Tensor] = {}
        hooks = self.add_taps(batch, set(taps), last_tap, latents)
        try:
            states = self.run_decoder(batch, batch.before)  # (M, D)
        except LastTap:
            return PolicyOutput(None, None, [latents[index] for index in taps])
        finally:
            for hook in hooks:
                hook.remove()

        logp, entropy = self.score_tokens(states + tower_term, batch, temperature)
        return PolicyOutput(
            logp=batch.unflatten(logp),
            entropy=batch.unflatten(entropy),
            latents=[latents[index] for index in taps],
        )

    def score_tokens(
        self, hidden: Tensor, batch: batching.Batch, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return log-prob and entropy (M,) of sampled tokens from the states (M, D) before each."""
        weight = self.model.get_output_embeddings().weight
        tokens = batching.take(batch.input_ids.flatten(), batch.before + 1)  # (M,)
        scaling = Scaling(temperature, self.softcap)
        return TokenLogProbs.apply(hidden, weight, tokens, scaling, self.chunk_work)

    def add_taps(
        self,
        batch: batching.Batch,
        taps: set[int],
        last_tap: int | None,
        latents: dict[int, Tensor],
    ) -> list:
        """Let the tapped layers put their outputs into `latents`, and `last_tap` end the forward.

        Returns the hooks, which the caller must remove.
        """

        def tap(index: int):
            def keep(_module, _arguments, output):
                latent = output[0] if isinstance(output, tuple) else output
                latent = latent.detach()
                latents[index] = batch.packing.pad(latent[0]) if self.packs else latent
                if index == last_tap:
                    raise LastTap

            return self.layers[index].register_forward_hook(keep)

        return [tap(index) for index in taps]

    def run_decoder(self, batch: batching.Batch, wanted: Tensor) -> Tensor:
        """Return the last hidden states (M, D) at the M positions that are wanted, (M,) of B*S.

        The tokens of all rows are packed into one, so that padding costs nothing but in attention,
        where the family allows it, see find_attention; else the rows are padded on the right.
        No attention mask is passed: no token sees the padding behind it, and without a mask
        attention runs in its fast causal kernel.
        """
        body = self.model.get_decoder() if self.tower is None else self.model.base_model
        inputs = {"attention_mask": None, "use_cache": False}
        if not self.packs:
            output = body(input_ids=batch.input_ids, **inputs)
            return batching.take(output.last_hidden_state.flatten(0, 1), wanted)
        packing = batch.packing
        source = batching.take(packing.source.flatten(), wanted)
        inputs["packing"] = packing
        packed_ids = packing.pack(batch.input_ids)[None]  # (1, n)
        if self.tower is None:
            output = body(input_ids=packed_ids, position_ids=packing.positions()[None], **inputs)
            return batching.take(output.last_hidden_state[0], source)

        # A placeholder in a prompt stands for a part of an image; one in a response is a word like
        # others. Its embedding is that word's; as an id the body gets 0.
        is_placeholder = batch.input_ids == self.model.config.image_token_id
        input_ids = batch.input_ids.masked_fill(is_placeholder & batch.in_response, 0)
        inputs["input_ids"] = packing.pack(input_ids)[None]
        inputs["position_ids"] = packing.positions()[None]
        images = batch.image_inputs
        if images.grids is not None:
            # of an image: its rows and columns, which the body tells from the kinds of tokens
            is_image = is_placeholder & ~batch.in_response
            positions, _ = body.get_rope_index(  # (3, B, S)
                input_ids, is_image.int(), image_grid_thw=images.all_grids
            )
            inputs["position_ids"] = positions.flatten(1)[:, None, packing.places]  # (3, 1, n)
            inputs["pixel_values"] = images.pixel_values
            inputs["image_grid_thw"] = images.grids
        if images.features is not None:
            inputs["pixel_values"] = images.features  # the body hands them to its tower
        embedding = self.model.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(lambda *_: (packed_ids,))
        try:
            with tower_output(self.tower, images.features):
                output = body(**inputs)
        finally:
            hook.remove()
        return batching.take(output.last_hidden_state[0], source)

    @torch.no_grad()
    def tower_features(self, images: Sequence[vision.Image]) -> Tensor:
        """Return what the vision tower makes of images, (n_vectors, K, D), without a gradient.

        Of each vector there are K levels: the first stands in the place of the word's embedding;
        Qwen3-VL adds the others to the hidden states after as many layers (deepstack).
        """
        pixel_values, grids = vision.stack(images, DEVICE)
        return self.run_tower(pixel_values, grids)

    def run_tower(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        """Return all that the tower makes of patches (n_patches, dim): (n_vectors, K, D)."""
        output = self.tower(pixel_values, grid_thw=grids)
        deepstack = getattr(output, "deepstack_features", None) or []
        return torch.stack([output.pooler_output, *deepstack], dim=1)

    def run_tower_without_images(self, batch: batching.Batch) -> Tensor | float:
        """Run the vision tower on a blank image if the batch has none; return 0 times its output.

        Under FSDP each rank holds a part of the tower's weights, and all ranks must gather them at
        the same time, in the forward and again in the backward. A rank whose batch has no image
        would leave the others waiting, so it runs the tower, too. The term that is returned is 0:
        added to the hidden states it changes no number, but it makes the tower's parameters part
        of the graph, so that the backward reaches them, with gradients of 0.

        A frozen tower that has seen the images beforehand runs on no rank.
        """
        has_pixels = batch.image_inputs.pixel_values is not None
        if self.takes_features:
            assert not has_pixels, "the frozen tower has not seen these images"
            return 0.0
        if self.tower is None or has_pixels:
            return 0.0
        size = self.model.config.vision_config.spatial_merge_size  # the smallest image, in patches
        filters = self.tower.patch_embed.proj.weight
        blank = filters.new_zeros(size * size, filters[0].numel())  # (n_patches, dim)
        grid = torch.tensor([[1, size, size]], device=blank.device)  # time, height, width
        return self.run_tower(blank, grid).sum() * 0


@contextmanager
def tower_output(tower: nn.Module, features: Tensor | None) -> Iterator[None]:
    """Let a vision tower return features (n_vectors, K, D), as Policy.tower_features() gave them, unrun.

    Everything else of the model's own forward stays as it is: placeholders, positions, deepstack.
    Without features the tower runs.
    """
    if features is None:
        yield
        return
    first, *deepstack = features.unbind(dim=1)
    output = SimpleNamespace(pooler_output=first, deepstack_features=deepstack)
    tower.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del tower.forward  # the class's is there again


def check_head(model: nn.Module) -> None:
    """Raise ValueError if the model's logits are more than a linear map of its hidden states."""
    text_config = model.config.get_text_config()
    additions = []
    for name in ("logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1):
            additions.append(name)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        additions.append("a bias")
    if additions:
        raise ValueError(
            f"{families.model_name(model)}: {', '.join(additions)} on its logits; "
            "expected a plain linear head"
        )


LOGP_TOLERANCE = 1e-3  # what rounding in float32 may change of log-probs


def find_attention(model: nn.Module) -> str:
    """Return the attention with which a policy gives the log-probs of the model's own forward.

    That is PACKED, where nothing but plain attention passes between tokens, or else the model's own
    in padded rows. A few tokens through the first layers, one of every kind, show it.

    Raises ValueError if neither gives them, or the weights are not finite.
    """
    name = families.model_name(model)
    if not hasattr(model.get_decoder(), "layers"):
        raise ValueError(f"{name}: its decoder has no list `layers` to tap; take another family")
    small = families.in_small(model, DEVICE)
    faithful = families.faithful_attention(model, DEVICE)
    families.set_attention(small.get_decoder(), faithful)
    own = families.own_scores(small, DEVICE)
    if not own.states.isfinite().all():
        raise ValueError(
            f"{name}: its hidden states are not finite; expected a model with sound weights"
        )
    candidates = [faithful]
    if vision.takes_images(model.config):
        candidates = [PACKED]  # padded rows have no place for images
    elif families.can_pack(model):
        candidates.insert(0, PACKED)
    for attention in candidates:
        difference = find_difference(Policy(small, attention), own)
        if difference is None:
            return attention
    raise ValueError(f"{name}: a policy would not score as Hugging Face does: {difference}")


@torch.no_grad()
def find_difference(policy: "Policy", own: families.OwnScores) -> str | None:
    """Say in which way a policy differs from the model's own forward; None if it does not."""
    batch = batching.collate([batching.Row(*row) for row in families.example_rows(policy.model)])
    try:
        states = policy.run_decoder(batch, batching.places_of(batch.attention_mask))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a family's code may raise anything where it gets what it never got
        return f"its code ends in {type(error).__name__}, {error}"
    change = families.change_of_states(states, own.states)
    if not change <= families.TOLERANCE:  # also if it is NaN
        return f"its last hidden states differ by {change:.2g} of the largest"
    is_before = batch.targets.roll(-1, dims=1)[batch.attention_mask]  # (n,) what predicts a word
    logp, _ = policy.score_tokens(states[is_before], batch, temperature=1.0)
    change = (logp - own.logp).abs().max().item()
    if not change <= LOGP_TOLERANCE:
        return f"its log-probs differ by {change:.2g}; expected a plain linear head"
    return None


def load_policy(
    path: str, trust_remote_code: bool = False, recompute: int = 0, freeze: Freeze = "none"
) -> Policy:
    """Load a Hugging Face decoder to host memory, in the dtype that it is stored in.

    recompute: of how many layers, from the first on, the backward computes the activations again
    freeze: what does not learn; "vision" is the vision tower, which sees images beforehand then
    Raises ValueError as as_policy() does.
    """
    model = vision.load_model(path, "auto", trust_remote_code)
    policy = as_policy(model, recompute, freeze)
    policy.fingerprint = fingerprints.of_weights(model)
    return policy


def as_policy(
    model: nn.Module, recompute: int, freeze: Freeze, attention: str | None = None
) -> Policy:
    """Make a policy of a Hugging Face decoder; the arguments are those of load_policy() and Policy.

    Raises ValueError if the model has dropout, under which log-probs do not repeat, or is of a
    family that a policy does not score as Hugging Face does.
    """
    path = families.model_name(model)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if getattr(model.config.get_text_config(), name, 0):
            raise ValueError(
                f"{path} sets {name}; expected 0, as log-probs under dropout do not repeat: "
                "edit its config.json"
            )
    policy = Policy(model.train(), attention)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # the last layers keep theirs: they are gone when the first ones are computed again
        for layer in policy.layers[recompute:]:
            layer.gradient_checkpointing = False
    if not policy.packs and is_first():
        print(f"{path}: rows are padded, as its layers would differ if they were packed")
    if freeze == "vision" and policy.tower is not None:
        policy.tower.requires_grad_(False)
        policy.takes_features = True
    return policy
