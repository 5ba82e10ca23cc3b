"""
Docstrings in Hugging Face's style, for Sphinx.

They are Markdown with Google's sections. `to_rst` turns what is Markdown into what Sphinx reads, and napoleon turns
the sections. A reference means what its name means to Python where it stands: an attribute of the class, a global of
the module, or what a package of ours exports. After a `~` stands a name of which the last part alone is shown. What
the site does not describe is linked to its file, what belongs to another package is shown without a link, and what
does not exist is left to Sphinx, which reports it.
"""

import inspect
import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from textwrap import indent
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring

import hf_unigd


# A list of names with their types in each section, several of which may share a description.
SECTIONS = Config(
    napoleon_use_param=False, napoleon_use_rtype=False, napoleon_custom_sections=[("Attributes", "params_style")]
)
# A fenced block; or a block that stands further to the right than the sentence before, which ends with a colon.
VERBATIM = re.compile(
    r"^(?P<margin> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$"
    r"|^(?P<before> *)(?P<lead>\S[^\n]*:)\n\n(?P<block>(?:(?P=before) {4}[^\n]*(?:\n|\Z)|\n)+)",
    re.MULTILINE | re.DOTALL,
)
REFERENCE = re.compile(r"\[`(?P<name>[^`\]]+)`\](?!\()")
INLINE = re.compile(
    REFERENCE.pattern + r"|(?P<word>\w?)`(?P<literal>[^`]+)`(?P<ending>\w?)"
    r"|\[(?P<text>[^\]]+)\]\((?P<url>https?://[^)\s]+)\)"
    r"|(?P<emphasis>(?P<stars>\*{1,2})\w(?:[^*\n]*\w)?(?P=stars))(?!\w)"
    r"|(?P<special>[*|\\]|(?<=\w)_(?!\w))"
)
BEFORE_LIST = re.compile(r"^( *)(?!- )(\S.*)\n(?=\1 *- )", re.MULTILINE)
TITLE = re.compile(r"^( +)> ", re.MULTILINE)  # of a group of arguments
HAS_FIELDS = re.compile(r"^ *(Args|Attributes):$", re.MULTILINE)
ANNOTATED = re.compile(r"(?:typing\.)?Annotated\[(\w+), [^\]]*\]")


def to_rst(text: str) -> str:
    """The reStructuredText of a docstring in Markdown, whose sections and references are left as they are."""
    parts, end = [], 0
    for block in VERBATIM.finditer(text):
        parts.append(_prose(text[end : block.start()]))
        if block["block"]:
            parts.append(f"{block['before']}{_prose(block['lead'])}:\n\n{block['block']}")
        else:
            parts.append(f"{block['margin']}.. code-block:: {block['language'] or 'text'}\n\n")
            parts.append(indent(block["code"], "    "))
        end = block.end()
    return "".join([*parts, _prose(text[end:])])


def _prose(text: str) -> str:
    return INLINE.sub(_inline, TITLE.sub(r"\1", BEFORE_LIST.sub(r"\1\2\n\n", text)))


def _inline(found: re.Match[str]) -> str:
    if found["name"]:
        return f":py:obj:`{found['name']}`"
    if found["literal"]:
        before, after = found["word"] and f"{found['word']}\\ ", found["ending"] and f"\\ {found['ending']}"
        return f"{before}``{found['literal']}``{after}"
    if found["url"]:
        return f"`{found['text']} <{found['url']}>`__"
    return found["emphasis"] or f"\\{found['special']}"


def packages() -> list[ModuleType]:
    """Ours that export names."""
    names = [each.name for each in iter_modules(hf_unigd.__path__) if each.ispkg]
    found = [import_module(f"{hf_unigd.__name__}.{name}") for name in names]
    return [hf_unigd, *(each for each in found if hasattr(each, "__all__"))]


def has(scope: Any, names: list[str]) -> bool:
    """Whether a module or class has an attribute, which has the next one, and so on. Annotations count."""
    if not names:
        return True
    first, *others = names
    if hasattr(scope, first):
        return has(getattr(scope, first), others)
    return not others and any(first in inspect.get_annotations(each) for each in getattr(scope, "__mro__", ()))


def locate(name: str) -> tuple[ModuleType, list[str]] | None:
    """The module and the attributes that a name in full stands for, or None if it stands for nothing."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return (module, parts[count:]) if has(module, parts[count:]) else None
    return None


def full_name(name: str, owner: type | None, module: ModuleType) -> str | None:
    """
    What a reference means.

    Args:
        name: The name between the backticks, without a tilde.
        owner: The class in whose docstring, or in that of one of whose attributes, it stands. None outside a class.
        module: The module in which it stands.

    Returns:
        The name in full, or None if it means nothing.
    """
    if "." in name and locate(name):
        return name
    scopes = [(f"{owner.__module__}.{owner.__qualname__}", owner)] if owner else []
    scopes += [(each.__name__, each) for each in (module, *packages())]
    return next((f"{where}.{name}" for where, scope in scopes if has(scope, name.split("."))), None)


def resolve_references(text: str, owner: type | None, module: ModuleType) -> str:
    """Names in full what references mean. Those that mean nothing stay as they are."""

    def resolved(found: re.Match[str]) -> str:
        name = found["name"].removeprefix("~")
        shown = name.rpartition(".")[2] if found["name"].startswith("~") else name
        full = full_name(name, owner, module)
        return found[0] if full is None else f"[`{shown} <{full}>`]"

    return REFERENCE.sub(resolved, text)


def turn_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns a docstring for Sphinx, in place."""
    place, names = locate(name)
    holder = attribute(place, names if what == "class" else names[:-1])
    defined = inspect.unwrap(obj.fget if isinstance(obj, property) else obj)
    module = import_module(getattr(defined, "__module__", None) or place.__name__)
    text = resolve_references("\n".join(lines), holder if inspect.isclass(holder) else None, module)
    lines[:] = GoogleDocstring(to_rst(text + help_texts(obj)), SECTIONS).lines()


def help_texts(obj: Any) -> str:
    """A section with the help texts of a dataclass, if its docstring does not say what its fields are."""
    if not inspect.isclass(obj) or not is_dataclass(obj) or HAS_FIELDS.search(obj.__doc__ or ""):
        return ""
    helps = [f"    {field.name}: {field.metadata['help']}" for field in fields(obj) if "help" in field.metadata]
    return "\n".join(["\n\nAttributes:", *helps]) if helps else ""


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """
    Leaves out the arguments of a dataclass that extends one of another package, which may be a hundred, and what
    `Annotated` says about the values of the others.
    """
    others = [each for each in getattr(obj, "__mro__", ()) if not is_ours(each.__module__)]
    if is_dataclass(obj) and any(map(is_dataclass, others)):
        return "(**kwargs)", returned
    return signature and ANNOTATED.sub(r"\1", signature), returned


def find_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, shown: nodes.Element
) -> nodes.Element | None:
    """
    Links a name in full that stands for something, but not under this name on the site: a class that the site
    describes under the name of a package, an attribute that it inherits, or what the site does not describe.
    """
    found = locate(node["reftarget"]) or locate(f"builtins.{node['reftarget']}")
    if node.get("refdomain") != "py" or found is None:
        return None
    module, names = found
    first = attribute(module, names[:1])
    site = env.get_domain("py")
    described = {defined_as(attribute(*locate(name))): name for name in site.objects}
    for origin in filter(None, map(defined_as, getattr(first, "__mro__", (first,)))):
        target = ".".join([described.get(origin, origin), *names[1:]])
        if target in site.objects:
            return site.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, shown)
    defined = import_module(getattr(first, "__module__", module.__name__))
    if not is_ours(defined.__name__):
        return shown
    file = Path(defined.__file__).relative_to(Path(hf_unigd.__file__).parents[1])
    return nodes.reference("", "", shown, refuri=f"{app.config.repository}/blob/main/{file.as_posix()}")


def is_ours(module: str) -> bool:
    """Whether a module belongs to the package."""
    return module.partition(".")[0] == hf_unigd.__name__


def attribute(module: ModuleType, names: list[str]) -> Any:
    """What [`locate`] has found. None for an attribute that is only annotated."""
    value: Any = module
    for name in names:
        value = getattr(value, name, None)
    return value


def defined_as(value: Any) -> str | None:
    """The name under which a class or function is defined. None for anything else."""
    known = inspect.isclass(value) or inspect.isfunction(value) or inspect.ismethod(value)
    return f"{value.__module__}.{value.__qualname__}" if known else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", turn_docstring)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("missing-reference", find_elsewhere)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
