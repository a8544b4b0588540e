"""A YAML file -> given values, each with its line. Scalars stay text: the key's type decides, not YAML's guess."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_slm.config.keys import all_keys, sections, unknown_key
from megatron_slm.config.values import Given
from megatron_slm.errors import ConfigError


def read(path: Path) -> tuple[list[Given], list[str]]:
    """The values in a configuration file, and what is wrong with its keys.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it is no YAML mapping.
    """
    root = _compose(path)
    given: list[Given] = []
    problems: list[str] = []
    if root is None:
        return given, problems
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: a configuration is a mapping of sections (model:, train:, ...); this file is not.")
    _walk(root, "", path, given, problems)
    first: dict[str, Given] = {}
    for value in given:
        earlier = first.setdefault(value.key, value)
        if earlier is not value:
            problems.append(f"{value.key} is given twice, in {earlier.source} and in {value.source}; keep one.")
    return given, problems


def _compose(path: Path) -> yaml.Node | None:
    """The file's node tree, with a mark at every node."""
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        way_out = "Check the path, or start from a preset: --preset tiny."
        raise ConfigError(f"There is no configuration file {path}. {way_out}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line} is no valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}.") from error


def _walk(node: yaml.MappingNode, prefix: str, path: Path, given: list[Given], problems: list[str]) -> None:
    """Collect the keys of one mapping, sections inside it included."""
    for key_node, value_node in node.value:
        source = f"file {path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            within = f" in {prefix[:-1]}" if prefix else ""
            problems.append(f"A key{within} ({source}) is {_kind(key_node)}; a key is a name, such as num_layers.")
            continue
        name = f"{prefix}{key_node.value}"
        if name in sections():
            if isinstance(value_node, yaml.MappingNode):
                _walk(value_node, f"{name}.", path, given, problems)
            elif value_node.value != "":
                problems.append(f"{name} ({source}) is a section: its keys go below it, indented.")
        elif name not in all_keys():
            problems.append(unknown_key(name, source))
        elif isinstance(value_node, yaml.MappingNode) and all_keys()[name].kind is not tuple:
            problems.append(f"{name} ({source}) is a single value, not a section.")
        elif (item := _nested(value_node)) is not None:
            place = f"file {path}:{item.start_mark.line + 1}"
            problems.append(f"{name} ({place}) holds {_kind(item)} inside its list; every item is a single value.")
        else:
            given.append(_given(name, value_node, source))


def _nested(node: yaml.Node) -> yaml.Node | None:
    """The first item of a list, or value of a mapping, that is itself a list or a mapping."""
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        items = [part for pair in node.value for part in pair]
    return next((item for item in items if not isinstance(item, yaml.ScalarNode)), None)


def _kind(node: yaml.Node) -> str:
    """What a node that is no scalar is called."""
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _given(name: str, node: yaml.Node, source: str) -> Given:
    """One scalar, list of scalars, or mapping of scalars, which stands for the list of its NAME=VALUE."""
    if isinstance(node, yaml.MappingNode):
        return Given(name, tuple(f"{key.value}={value.value}" for key, value in node.value), source)
    if isinstance(node, yaml.SequenceNode):
        return Given(name, tuple(str(item.value) for item in node.value), source)
    assert isinstance(node, yaml.ScalarNode), f"{name} ({source}) is neither a list nor a mapping, so it is a scalar."
    return Given(name, node.value, source, quoted=node.style in ("'", '"'))
