"""Models of which nothing but the config.json is read."""

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from infra import families, vision
from infra.attention import PACKED
from infra.errors import in_short
from infra.models import Model, count_parameters, full_name
from policy import Freeze, Policy, as_policy


def find_model(name: str, trust_remote_code: bool) -> Model:
    """Find a model's configuration by path, hub id or short name; it gets no tokenizer.

    ValueError if there is none: it says what to do without a network.
    """
    path = full_name(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        n_parameters = count_parameters(config, trust_remote_code)
    except Exception as error:  # transformers passes on whatever its readers raise
        raise ValueError(
            f"model {name!r}: no configuration of {path!r} ({in_short(error)}); expected a folder, a "
            "hub id or a short name such as Qwen2.5-7B. Where the hub is out of reach, put the "
            "model's config.json into a folder and name that: a plan needs nothing else"
        ) from error
    return Model(path, config, n_parameters, tokenizer=None, trust_remote_code=trust_remote_code)


def empty_policy(
    path: str, trust_remote_code: bool = False, recompute: int = 0, freeze: Freeze = "none"
) -> Policy:
    """Make what load_policy() loads, of the configuration alone, in bfloat16.

    Whether rows are packed follows from the configuration; a run also tries it out.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    model = make_model(config, trust_remote_code)
    attention = model.get_decoder().config._attn_implementation
    if families.can_pack(model) or vision.takes_images(config):
        attention = PACKED
    return as_policy(model, recompute, freeze, attention)


def make_model(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    """Make a decoder with weights of its own initialisation."""
    options = {"dtype": "bfloat16", "trust_remote_code": trust_remote_code}
    return vision.auto_class(config).from_config(config, **options)
