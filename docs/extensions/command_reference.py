"""The directive `commands`, which describes every command as its parser does."""

import argparse
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from importlib import import_module
from unittest.mock import patch

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hf_unigd.cli.main import COMMANDS
from hf_unigd.cli.parser import CommandParser


class _ParserFound(BaseException):
    """Stops a command that has made its parser."""


def parser_of(command: str) -> CommandParser:
    """The parser of a command, which makes it first of all."""
    found = []

    def stop(parser: CommandParser, argv: list[str]) -> None:
        found.append(parser)
        raise _ParserFound

    module = import_module(f"hf_unigd.cli.{command.replace('-', '_')}")
    with patch.object(CommandParser, "parse", stop), suppress(_ParserFound):
        module.main([])
    return found[0]


def sources(parser: CommandParser) -> dict[str, str]:
    """The package that declares each argument, by its name."""
    declared = {}
    for cls in parser.dataclass_types:
        for field in fields(cls):
            owner = next(each for each in cls.__mro__ if field.name in inspect.get_annotations(each))
            declared[field.name] = owner.__module__.partition(".")[0]
    return declared


def arguments(parser: CommandParser) -> dict[str, list[argparse.Action]]:
    """The actions of each argument, by its name. A boolean that is on by default has one more, which turns it off."""
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if action.dest != "help":
            actions.setdefault(action.dest, []).append(action)
    return actions


class Commands(SphinxDirective):
    """A section for each command: what it does, how it is called, and its arguments."""

    def run(self) -> list[nodes.Node]:
        return [self.section(command, parser_of(command)) for command in COMMANDS]

    def section(self, command: str, parser: CommandParser) -> nodes.section:
        title = f"hf-unigd {command}"
        section = nodes.section(
            "", nodes.title("", "", nodes.literal("", title)), ids=[f"hf-unigd-{command}"], names=[title]
        )
        self.state.document.note_explicit_target(section)
        section += nodes.paragraph("", "", *text(parser.description))
        section += nodes.literal_block("", parser.usage, language="text")
        declared = sources(parser)
        for package in dict.fromkeys(["hf_unigd", *declared.values()]):
            actions = {name: each for name, each in arguments(parser).items() if declared[name] == package}
            if actions and package != "hf_unigd":
                section += nodes.rubric("", "", *text(f"Inherited from `{package}`"))
            section += nodes.definition_list("", *(item(command, parser, each) for each in actions.values()))
        return section


def item(command: str, parser: CommandParser, actions: list[argparse.Action]) -> nodes.definition_list_item:
    """One argument: how it is written, what it may be, what it is for and its default."""
    first = actions[0]
    term = nodes.term("", ids=[f"hf-unigd-{command}-{first.dest}"])
    for action in actions:
        term += [*([nodes.Text(", ")] if len(term) else []), nodes.literal("", action.option_strings[0])]
    if first.choices:
        term += nodes.Text(": " + ", ".join(map(str, first.choices)))
    if first.required:
        term += nodes.Text(" (required)")
    help = (parser._get_formatter()._expand_help(first) if first.help else "").removesuffix("(default: None)")
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", "", *text(help))))


def text(words: str) -> Iterator[nodes.Node]:
    """Text with what stands between backticks as code."""
    for place, part in enumerate(re.split(r"`([^`]+)`", inspect.cleandoc(words))):
        yield nodes.literal("", part) if place % 2 else nodes.Text(part)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
