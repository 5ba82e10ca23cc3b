"""The site is built strictly: what leads nowhere is an error, and no argument of a command is missing."""

import re

import pytest

from hf_unigd.cli.main import COMMANDS, main


INDEX = "# Start\n\n[Other](other.md), [part](other.md#a-part), [folder](../code)\n\n```{toctree}\nother\n```\n"
OTHER = "# Other\n\n## A part\n\nText.\n"


def test_a_site_without_a_fault_is_built(build, tmp_path):
    assert build(index=INDEX, other=OTHER) == ""
    assert 'href="other.html#a-part"' in (tmp_path / "site" / "index.html").read_text()
    link = 'href="https://github.com/hf-unigd/hf-unigd/tree/main/code"'
    assert link in (tmp_path / "site" / "index.html").read_text()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](index.md#gone)", "gone"),
        ("[gone](../gone.py)", "the repository has no ../gone.py"),
        ("![gone](images/gone.png)", "gone.png"),
        ("```{eval-rst}\n.. autofunction:: hf_unigd.gone\n```", "gone"),
        ("```{eval-rst}\n:py:obj:`hf_unigd.data.gone`\n```", "py:obj reference target not found: hf_unigd.data.gone"),
    ],
)
def test_what_leads_nowhere_is_an_error(build, text, fault):
    assert fault in build(index=INDEX, other=f"{OTHER}\n{text}\n")


def test_a_reference_of_a_docstring_that_leads_nowhere_is_an_error(build, tmp_path, monkeypatch):
    (tmp_path / "described.py").write_text(
        'def right():\n    """As [`wrong`] and [`~hf_unigd.data.load_rows`]."""\n\n\n'
        'def wrong():\n    """As [`right`] and [`gone`]."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    page = "\n```{eval-rst}\n.. automodule:: described\n   :members:\n```\n"
    faults = build(index=INDEX, other=OTHER + page)
    assert re.findall("reference target not found: (.*?) ", faults) == ["gone"]


def test_the_command_reference_has_every_argument(build, tmp_path, capfd):
    assert build(index="# Commands\n\n```{commands}\n```\n") == ""
    site = (tmp_path / "site" / "index.html").read_text()
    described = dict(re.findall(r'<section id="hf-unigd-([a-z-]+)">(.*?)</section>', site, re.DOTALL))
    assert list(described) == list(COMMANDS)
    for command, text in described.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        helped = re.findall(r"^  (?:-\w, )?(--\w+)", capfd.readouterr().out, re.MULTILINE)
        terms = re.findall(r"<dt id=.*?</dt>", text, re.DOTALL)
        listed = re.findall(r">(--\w+)<", " ".join(terms))
        assert sorted(listed) == sorted(set(helped) - {"--help"}), command
    assert "Folder that image paths start from and must not leave." in described["index"]
    assert "Inherited from" in described["train"] and ">--learning_rate<" in described["train"]
