"""The text of a configuration: YAML, read as people write it, and written so that it reads back equal.

It differs from PyYAML's own reading in three things. Times stay text. `1e-5` is a number, as in YAML 1.2; PyYAML takes
only `1.0e-5` for one. A key that stands twice in a mapping is refused: the last would win in silence. Called by
`config`.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from tracegrad.tracestore.errors import ConfigError

_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_FIRST = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """Looks for repeated keys before merges (`<<`) are resolved: a key may stand beside one that it overrides."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        first: dict[str, int] = {}
        for key in keys:
            line = key.start_mark.line + 1
            if key.value in first:
                raise _RepeatedKey(f"line {line}: {key.value!r} stands in line {first[key.value]} already: keep one")
            first[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


class _RepeatedKey(Exception):
    """The message tells the key and its lines."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(_FLOAT, _EXPONENT, _FIRST)


def read_yaml(path: Path) -> Any:
    """Return what a file holds, decoded.

    Raises:
        ConfigError: it cannot be read, is not YAML, or gives a key twice.
    """
    try:
        return yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name another file with --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except _RepeatedKey as error:
        raise ConfigError(f"{path}: {error}") from error


def yaml_text(value: Any) -> str:
    """Return builtin values as text that `read_yaml` reads back to equal ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
