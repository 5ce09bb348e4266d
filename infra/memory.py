"""The memory of an update, by arithmetic: of how many layers a GPU has room for the activations."""

from infra import logprobs
from infra.defaults import published_settings
from infra.models import Model

PLAIN_DECODERS = ("llama", "mistral", "qwen2")  # model types whose layers layer_bytes() describes


def layer_bytes(text_config) -> int:
    """Return what a decoder layer keeps of each token for its backward, in bytes, not compiled.

    In bfloat16, for hidden size D, q numbers of queries, kv of keys, and a feed-forward width I:
        two norms, each its input in float32 and it normalised, before and after the weight   16 D
        attention: queries and output, keys and values                                 4 q + 4 kv
        feed-forward: gate, silu(gate), up, and the product of the last two                   8 I
    """
    dim = text_config.hidden_size
    n_heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or dim // n_heads
    q = n_heads * head_dim
    kv = text_config.num_key_value_heads * head_dim
    return 16 * dim + 4 * q + 4 * kv + 8 * text_config.intermediate_size


def update_bytes(
    text_config, n_parameters: int, n_tokens: int, n_ranks: int, n_recomputed: int
) -> float:
    """Return the most that an update holds of a GPU's memory, in bytes, of a plain decoder.

    That is when the backward of the head begins: all activations are there.

    n_parameters: of all that learns, the flow included
    n_tokens: of a micro-batch
    n_recomputed: of the layers, how many keep their inputs alone
    """
    states = 16 * n_parameters / n_ranks  # float32: weights, gradients and two moments
    # the last chunk's logits and their gradient (4 + 2), this one's before and after scaling (4 + 4)
    logits = 14 * logprobs.CHUNK_LOGITS
    head = 4 * text_config.vocab_size * text_config.hidden_size  # gathered (2), its gradient (2)
    n_kept = text_config.num_hidden_layers - n_recomputed
    of_token = n_recomputed * 2 * text_config.hidden_size + n_kept * layer_bytes(text_config)
    return states + logits + head + n_tokens * of_token


def layers_to_recompute(config, model: Model, n_ranks: int, room: int) -> int:
    """Return of how many layers the backward computes the activations again: as few as fit.

    room is the size of a GPU's memory, in bytes, of which a fifth is left to the sleeping engine, to
    what is gathered and to fragments. Without a GPU, and where the arithmetic does not hold, models
    above 1B parameters recompute all.
    """
    text_config = model.text_config
    n_layers = text_config.num_hidden_layers
    is_plain = text_config.model_type in PLAIN_DECODERS and not config.optimisation.lora_rank
    if room == 0 or not is_plain:
        return n_layers if model.n_parameters > 1e9 else 0
    dim = text_config.hidden_size
    n_parameters = model.n_parameters
    if not text_config.tie_word_embeddings:
        n_parameters += text_config.vocab_size * dim
    if config.shaping == "flow" or "of=flow" in config.dense_reward.dense:
        flow_blocks = published_settings(model)["flow_blocks"]
        n_parameters += (5 * flow_blocks + 7) * dim**2
    if config.compute.always_offloads:
        n_parameters = 0  # they are in host memory
    longest = config.problems.max_prompt_tokens + config.sampling.max_tokens
    n_tokens = max(config.compute.tokens_per_gpu, longest)  # a single row may exceed the budget
    for n_recomputed in range(n_layers):
        taken = update_bytes(text_config, n_parameters, n_tokens, n_ranks, n_recomputed)
        if taken <= 0.8 * room:
            return n_recomputed
    return n_layers
