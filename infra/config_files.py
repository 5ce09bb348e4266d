"""Files of settings, which --config names: JSON or YAML, by the flags' names with underscores.

    {"model": "Qwen2.5-7B", "prompts": 64}                     one list
    {"model": "Qwen2.5-7B", "sampling": {"prompts": 64}}       groups, as in a run's own config.json
    {"model": …, "train_flow": {…}, "train_rl": {…}}           parts, each for one script, as in recipes/

A setting's name says which it is, so that any name will do for a group.
"""

import re
from collections.abc import Iterator

import yaml

from infra.files import need_file, read_json, read_text, shown

KIND = "a JSON or YAML file of settings, such as the config.json of a run"
SCRIPTS = ("train_rl", "train_flow", "eval")
DEPTH = 2  # a group in a part; deeper ones are the values of settings, and of a wrong kind


def read_settings(path: str, script: str) -> dict[str, object]:
    """Return the settings that a file has for a script, by name; nothing is known of them yet.

    Raises ValueError for a file that cannot be read, has parts and none for the script, or names a
    setting in two places.
    """
    content = read_object(path)
    evaluated = content.get("config")
    if "versions" in content and isinstance(evaluated, dict):  # config.json of an evaluation
        content = evaluated
    others = [name for name in SCRIPTS if name in content and name != script]
    if others and script not in content:
        raise ValueError(
            f"{path} has settings of {' and '.join(others)}, and none of {script}; give a file of "
            f'{script}, or add a part "{script}" to it'
        )
    mine = {name: value for name, value in content.items() if name not in others}
    settings = {}
    for name, value in leaves(mine, DEPTH):
        if name in settings:
            raise ValueError(f"{path} has {shown(name)} twice; leave one of them")
        settings[name] = value
    return settings


def leaves(content: dict, depth: int) -> Iterator[tuple[str, object]]:
    """Yield name and value of what stands in an object, or in those inside it down to a depth."""
    for name, value in content.items():
        if isinstance(value, dict) and depth:
            yield from leaves(value, depth - 1)
        else:
            yield name, value


def read_object(path: str) -> dict:
    """Return the object that a JSON or a YAML file holds."""
    ending = need_file(path, KIND).suffix
    if ending == ".json":
        return read_json(path, KIND)
    if ending in (".yaml", ".yml"):
        return read_yaml(path)
    raise ValueError(f"{path}: expected a name that ends in .json, .yaml or .yml, for {KIND}")


# ---- YAML
class Loader(yaml.SafeLoader):
    """Reads plain words as YAML 1.2 does: 1e-6 is a number, and `on`, `off` and `no` are texts.

    YAML 1.1, which PyYAML reads, takes the one for a text and the others for true and false.
    """

    yaml_implicit_resolvers: dict = {}


PLAIN_WORDS = {  # tag -> pattern, characters that it may begin with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
for tag, (pattern, beginnings) in PLAIN_WORDS.items():
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), beginnings
    )


def read_yaml(path: str) -> dict:
    """Return the object that a YAML file holds; it can hold nothing but plain values."""
    text = read_text(path, KIND)
    try:
        content = yaml.load(text, Loader)  # noqa: S506, made from the safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML ({reason}); expected {KIND}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {shown(content)} is no object; expected {KIND}")
    return content
