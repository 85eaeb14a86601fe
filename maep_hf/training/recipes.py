"""Arguments from YAML recipes and the command line, the latter stronger."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..memory import keep_freed_memory
from .loop import NonFiniteLossError
from .run_folder import RunFolderError


class _RecipeLoader(yaml.SafeLoader):
    """Leaves a word such as `no` as it is written: YAML takes it for a switch, `mixed_precision` does not."""


_RecipeLoader.add_constructor("tag:yaml.org,2002:bool", yaml.SafeLoader.construct_yaml_str)


def parse_arguments(
    *types: type, default_recipe: Path | None = None, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Parse `--config recipe.yaml` and `--name value` into instances of the dataclasses `types`.

    Exits with a message of the command line's usual kind when a name or a value is wrong.

    Args:
        types: argument dataclasses; their field names must not overlap.
        default_recipe: recipe used when `--config` is not given.
        argv: the words after the script's name; `sys.argv` when `None`.
    """
    parser = HfArgumentParser(types, allow_abbrev=False)
    parser.add_argument(
        "--config", default=None, help=f"YAML recipe (default: {default_recipe.name if default_recipe else 'none'})"
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    config = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"), None)
    config = config or next((word.split("=", 1)[1] for word in argv if word.startswith("--config=")), None)
    recipe = Path(config) if config else default_recipe
    if recipe is not None:
        _apply_recipe(parser, types, recipe)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    del rest  # holds --config alone
    return tuple(parsed)


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main` with its log on the screen; what a user can cause ends in one line and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    try:
        main()
    except (ValueError, OSError, ImportError, NonFiniteLossError, RunFolderError) as error:
        raise SystemExit(f"error: {error}") from None


def as_groups(**groups: Any) -> dict[str, dict[str, Any]]:
    """Argument dataclasses as nested dictionaries, for `run.json`."""
    return {name: asdict(group) for name, group in groups.items()}


def _apply_recipe(parser: HfArgumentParser, types: Sequence[type], recipe: Path) -> None:
    try:
        values = yaml.load(recipe.read_text(), _RecipeLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {recipe}: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"--config {recipe}: must hold `name: value` lines")
    known = {field.name: field for kind in types for field in fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        parser.error(f"--config {recipe}: unknown arguments {', '.join(unknown)}")
    for action in parser._actions:
        if action.dest in values:
            action.default = _recipe_value(parser, action, known[action.dest], values[action.dest], recipe)
            action.required = False


def _recipe_value(parser: HfArgumentParser, action: argparse.Action, field: Field, value: Any, recipe: Path) -> Any:
    """A recipe's value, checked and converted as the same words on the command line would be."""
    if value is None and field.default is None:
        return None
    words = value if isinstance(value, list) else [value]
    takes_many = action.nargs in ("+", "*")
    if value is None or value == [] or isinstance(value, dict) or (isinstance(value, list) and not takes_many):
        parser.error(f"--config {recipe}: {field.name} cannot be {value!r}")
    if action.nargs == 0:  # the --no_NAME twin of a switch; NAME itself holds the value
        return action.default
    if action.type is string_to_bool:
        words = [yaml.SafeLoader.bool_values.get(str(word).lower(), word) for word in words]  # on and off too
    try:
        return parser._get_values(action, [str(word) for word in words])
    except argparse.ArgumentError as error:
        parser.error(f"--config {recipe}: {error}")
