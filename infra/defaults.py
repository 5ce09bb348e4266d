"""Settings that follow from the model: those of the official runs, and the template of its family."""

from infra import vision
from infra.data import TEMPLATES
from infra.models import Model
from infra.parallel import is_first
from infra.settings import change, flatten, unset_among


def fill_in(config, model: Model):
    """Fill in what is None or `auto` in a script's settings from the model, and print it."""
    has_vision = vision.takes_images(model.config)
    published = published_settings(model)
    flat = flatten(config)
    if flat.get("freeze") == "vision" and not has_vision:
        raise ValueError(f"freeze='vision': {model.path} has no vision tower; leave --freeze out")
    heads = model.text_config.num_attention_heads
    if heads % flat.get("tensor_parallel", 1):
        raise ValueError(
            f"tensor_parallel={flat['tensor_parallel']} does not divide "
            f"the model's {heads} attention heads"
        )
    derived = unset_among(config, published)
    derived["template"] = choose_template(flat["template"], model)
    if is_first():
        settings = "  ".join(f"{name}={value}" for name, value in derived.items())
        size = f"{model.n_parameters / 1e9:.3g}B parameters"
        print(f"from the model {model.path} ({size}):  {settings}")
    return change(config, **derived)


def published_settings(model: Model) -> dict[str, object]:
    """Return the settings of the official runs that differ among models (official scripts).

    The reward of language models is that of the paper's page.
    """
    is_large = model.n_parameters > 5e9
    has_vision = vision.takes_images(model.config)
    return {
        "flow_blocks": 6 if is_large else 4,
        "noise_repeats": 2 if is_large and not has_vision else 4,
        "max_prompt_tokens": 3000,
        "max_tokens": 3072 if is_large and has_vision else 1024,
        "cutoff": 16384 if has_vision else 8192,
        "problem_column": "prompt" if has_vision else "problem",
        "reward": ("vlm", "tags=0.5") if has_vision else ("binary",),
        "freeze": "vision" if has_vision else "none",
    }


def choose_template(template: str, model: Model) -> str:
    """Return the template; `auto` becomes the family's, or else `chat` or `none`.

    Vision-language models get their chat template without an instruction of ours, as published:
    the prompts of the data set say how to answer.
    """
    if template in ("chat", "bare") and not model.tokenizer.chat_template:
        raise ValueError(
            f"template {template!r}: the tokenizer of {model.path} has no chat template; "
            f"expected one of {', '.join(TEMPLATES)}, or a file"
        )
    if template != "auto":
        return template
    if vision.takes_images(model.config):
        return "bare" if model.tokenizer.chat_template else "none"
    vocabulary = model.tokenizer.get_vocab()
    model_type = model.config.model_type
    for family, pattern in TEMPLATES.items():
        first_token = pattern.partition(">")[0] + ">"
        if first_token in vocabulary and model_type.startswith(family):
            return family
    return "chat" if model.tokenizer.chat_template else "none"
