"""What both engines need: the tokens that end a response, and errors of weights."""

from transformers import GenerationConfig

from infra.models import Model, StopTokens

# Tokens that end a response besides the model's own EOS, see --stop-tokens
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def end_tokens(model: Model, stop_tokens: StopTokens = "turn-ends") -> list[int]:
    """Return the tokens that end a response: the model's, the tokenizer's, maybe ends of turns."""
    try:
        ends = GenerationConfig.from_pretrained(model.path).eos_token_id
    except OSError:  # the model has no generation configuration
        ends = model.text_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    vocabulary = model.tokenizer.get_vocab()
    if stop_tokens == "turn-ends":
        ends.update(vocabulary[token] for token in TURN_ENDS if token in vocabulary)
    ends.add(model.tokenizer.eos_token_id)
    ends.discard(None)
    return sorted(ends)


def check_all_given(missing: set[str]) -> None:
    """Raise ValueError if an engine was not given all of its weights."""
    if missing:
        examples = sorted(missing)[:3]
        raise ValueError(
            f"{len(missing)} weights were not given, e.g. {examples}; expected the whole state dict"
        )


def not_finite(path: str) -> FloatingPointError:
    """Return the error for a model that gives every token the probability NaN."""
    return FloatingPointError(
        f"the model {path} gives tokens the probability NaN: its weights, or those that training "
        "gave it, are not finite or too large; look at them, or take an earlier export or "
        "checkpoint"
    )
