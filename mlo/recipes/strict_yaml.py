"""YAML as recipes use it: PyYAML's safe loader without its surprises.

What it changes, and why:

- numbers, booleans and nulls are those of YAML 1.2. So `3e-4` and `1e3` are numbers (PyYAML reads strings), whereas
  `yes`, `no`, `on`, `off`, `010`, `1:30` and `2024-01-31` are strings (PyYAML reads booleans, 8, 90 and a date);
- two equal keys in one mapping are an error (PyYAML silently keeps the last one), and so is a key that is not a string;
- tags such as `!!set` are an error, and so is an anchor that contains itself. Hence what is read is always a tree that
  JSON could express too, which `mlo.recipes.loading` relies on.

Called by `mlo.recipes.files` for whole recipes and by `mlo.recipes.overrides` for the values of `--set`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from mlo.errors import RecipeError

_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(
        r"""(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?  # 3.  3.5  .5e-4
            |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+                                      # 3e-4
            |[-+]?\.(?:inf|Inf|INF)
            |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+.0123456789"),
)


_MERGE = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """The loader that the module's docstring describes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # build values before their parents: so PyYAML refuses an anchor inside itself

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse explicit tags, and keys that are equal or not strings.

        The check of keys is not in the constructor, since merging `<<` there rightfully repeats keys.
        """
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag is not None:
            raise _refusal(node, f"tags, such as {event.tag!r}, are not allowed")
        if isinstance(node, yaml.MappingNode):
            _check_keys([key for key, _ in node.value])
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what `<<` names: a mapping's own keys win, and an earlier source over a later one.

        That is the definition of https://yaml.org/type/merge.html. PyYAML 6.0.4 lets another one win.
        """
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        pairs, node.value = node.value, []  # a mapping merged into itself adds nothing
        for key, value in pairs:
            if key.tag != _MERGE:
                own[key.value] = key, value
                continue
            for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                if not isinstance(source, yaml.MappingNode):
                    raise _refusal(source, f"expected a mapping to merge, or a list of them; found a {source.id}")
                self.flatten_mapping(source)
                merged |= {k.value: (k, v) for k, v in source.value}
        node.value = list((merged | own).values())


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first_characters in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", ["t", "T", "f", "F"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("merge", r"<<$", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first_characters)
_StrictLoader.add_implicit_resolver(*_FLOAT)


class _QuotingDumper(yaml.SafeDumper):
    """Quotes every string that the loader above, or one of YAML 1.1, would take for something else."""


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these line breaks into spaces unless it is told to escape them.
    style = '"' if any(line_break in text for line_break in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_QuotingDumper.add_implicit_resolver(*_FLOAT)
_QuotingDumper.add_representer(str, _represent_string)


def parse_yaml(text: str, source: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        source: what to call the text in an error, such as the path of its file.

    Returns:
        Mappings with string keys, lists, strings, integers, floats, booleans and None.

    Raises:
        RecipeError: the text is not YAML, or not what a recipe may hold; names the source, line and column.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else _place(error.problem_mark)
        reasons = [reason for reason in (error.context, error.problem) if reason]
        raise RecipeError(f"{source}{place}: {': '.join(reasons)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A character that YAML forbids; more digits, or deeper nesting, than Python takes.
        raise RecipeError(f"{source}: {error}") from error


def format_yaml(data: Any) -> str:
    """Write `data` so that `parse_yaml` reads it back unchanged; mappings keep their order."""
    return yaml.dump(data, Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True, width=120)


def _place(mark: yaml.Mark) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}"


def _check_keys(keys: Sequence[yaml.Node]) -> None:
    lines: dict[str, int] = {}
    for key in keys:
        if key.tag not in ("tag:yaml.org,2002:str", _MERGE):
            raise _refusal(key, f"the key {key.value!r} is not a string; put it in quotes")
        if key.value in lines:
            raise _refusal(key, f"duplicate key {key.value!r}, first given on line {lines[key.value]}")
        lines[key.value] = key.start_mark.line + 1


def _refusal(node: yaml.Node | None, problem: str) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, problem, None if node is None else node.start_mark)
