"""The argument parser of every command."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import yaml
from trl import TrlParser

from ..settings import check_settings


class CommandParser(TrlParser):
    """
    [`~trl.TrlParser`] with positional arguments: a field without a default may be given by name or by position.

    Positional arguments fill the fields without a default that no flag names, in the order of their declaration. If
    the last of them is a list, it takes all that are left. A field's metadata are keyword arguments of
    `argparse.ArgumentParser.add_argument`; `metavar` names the field in the help.

    Args:
        command: Name of the sub-command.
        dataclass_types: The dataclasses to fill.
        description: What the command does, shown by `--help`.

    Example:

    ```python
    @dataclass
    class CopyArguments:
        source: str = field(metadata={"help": "Folder to copy."})
        target: str = field(metadata={"help": "Folder to write."})
        overwrite: bool = field(default=False, metadata={"help": "Replace the target."})


    parser = CommandParser("copy", CopyArguments, description="Copy a folder.")
    (args,) = parser.parse(["a", "b", "--overwrite"])  # or --target b --source a, or --config copy.yaml
    ```
    """

    def __init__(self, command: str, *dataclass_types: type, description: str):
        known = [field for cls in dataclass_types for field in fields(cls) if field.init]
        required = [field for field in known if field.default is MISSING and field.default_factory is MISSING]
        metavars = {field.name: field.metadata.get("metavar", field.name.upper()) for field in required}
        prog = f"hf-unigd {command}"
        epilog = (
            "`--config FILE.yaml` reads arguments from a YAML file, whose keys are their names. Arguments on the "
            "command line override it."
        )
        if required:
            by_name = " ".join(f"--{name} {metavar}" for name, metavar in metavars.items())
            epilog += f" The positional arguments may also be given by name: {by_name}"
        super().__init__(
            dataclass_types,
            prog=prog,
            usage=" ".join([prog, *metavars.values(), "[--config FILE.yaml] [--NAME VALUE ...] [--help]"]),
            description=description,
            epilog=epilog,
        )
        self._known = {field.name for field in known}
        self._positional = [action for action in self._actions if action.dest in metavars]
        for action in self._positional:
            action.default = argparse.SUPPRESS  # the help shows none, and what is not given is not in the namespace

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """
        One instance of each dataclass.

        Raises:
            SystemExit: an argument is missing, unknown or has no valid value. The usage and the reason are printed.
            ValueError: a dataclass refuses its values ([`check_settings`] included), or the YAML file is not valid.
            OSError: the YAML file cannot be read.
        """
        # TrlParser does not know `--config=FILE`, and fails with an IndexError if the file is missing.
        config_parser = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        config_parser.add_argument("--config")
        found, argv = config_parser.parse_known_args(argv)
        try:
            parsed = self.parse_args_and_config(["--config", found.config, *argv] if found.config else argv)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{found.config} is not valid YAML: {error}") from error
        for settings in parsed:
            check_settings(settings)
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        """As in `argparse`, but with the positional arguments assigned and without any argument left over."""
        # First the flags: what is left over are the positional arguments.
        saved = {action.dest: (action.required, action.default) for action in self._positional}
        for action in self._positional:
            action.required, action.default = False, argparse.SUPPRESS  # a default would be one from the YAML file
        namespace, values = super().parse_known_args(args, namespace)
        unnamed = [action for action in self._positional if not hasattr(namespace, action.dest)]
        first_flag = next((place for place, value in enumerate(values) if _is_flag(value)), len(values))
        takes_all = bool(unnamed) and unnamed[-1].nargs == "+"
        unknown = values[first_flag if takes_all else min(first_flag, len(unnamed)) :]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        # Then those as flags, so that argparse converts them and asks for the missing ones.
        for action in unnamed:
            action.required, action.default = saved[action.dest]
        single = unnamed[:-1] if takes_all else unnamed
        flags = [f"--{action.dest}={value}" for action, value in zip(single, values, strict=False)]
        if takes_all and values[len(single) :]:
            flags += [f"--{unnamed[-1].dest}", *values[len(single) :]]
        return super().parse_known_args(flags, namespace)

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        """As in [`~trl.TrlParser`], but an unknown key, or a value that is not among the choices, is an error."""
        unknown = kwargs.keys() - self._known
        if unknown:
            self.error(f"unknown keys in the YAML file: {', '.join(sorted(unknown))}")
        for action in self._actions:
            if kwargs.get(action.dest) is False and "off" in (action.choices or ()):
                kwargs[action.dest] = "off"  # which YAML reads as a boolean
            value = kwargs.get(action.dest)
            if action.choices is not None and value is not None and value not in action.choices:
                choices = ", ".join(map(repr, action.choices))
                self.error(f"argument --{action.dest}: invalid choice: {value!r} (choose from {choices})")
        return super().set_defaults_with_config(**kwargs)


def _is_flag(value: str) -> bool:
    if not value.startswith("-"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False
