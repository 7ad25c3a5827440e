"""The vocabulary of all commands: what has one name means one thing, everywhere."""

import re
from pathlib import Path

import pytest
from django.core.management import load_command_class

import workflow_storage.management.commands as package

NAMES = sorted(path.stem for path in Path(package.__file__).parent.glob("[!_]*.py"))
SELECTION = {"--workflow", "--status", "--label", "--since", "--until", "--parent"}
SELECTION |= {"--waiting", "--error", "--limit", "--before"}
NARROW = {"--workflow", "--status", "--label", "--parent", "--limit"}
SELECTING = {
    "list_runs": SELECTION,
    "run_stats": SELECTION,
    "update_runs": SELECTION,
    "fail_stalled_runs": SELECTION,
    "copy_runs": SELECTION,
    "export_runs": SELECTION,
    "check_runs": SELECTION,
    "prune_runs": NARROW,
}


def actions_of(name):
    parser = load_command_class("workflow_storage", name).create_parser("manage.py", name)
    return parser._actions  # noqa: SLF001 - argparse has no other way to ask


def options_of(name):
    return {option: action for action in actions_of(name) for option in action.option_strings}


def test_there_are_the_twelve_commands():
    assert len(NAMES) == 12


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_the_vocabulary(name):
    options = options_of(name).keys()

    assert ({"--from", "--to"} <= options) == (name == "copy_runs")
    assert ("--backend" in options) == (name != "copy_runs")
    assert ("--format" in options) == (name != "record_command")
    wanted = SELECTING.get(name, set())
    assert wanted <= options
    if name not in {"fork_run", "record_command"}:  # whose --label is of the new run
        assert options & SELECTION == wanted


def test_the_readme_says_which_command_takes_what():
    text = (Path(package.__file__).parents[1] / "README.md").read_text()
    said = {}
    for options, commands in re.findall(r"(?m)^\| (`--.*?) \| .* \| (.*) \|$", text):
        names = set(re.findall(r"`(\w+)`", commands))
        if commands.startswith("all"):
            names = SELECTING.keys() - names
        said |= dict.fromkeys(re.findall(r"`(--\w+)", options), names)

    assert said.keys() == SELECTION
    for option, commands in said.items():
        takers = {name for name in NAMES if option in options_of(name)}
        assert commands == takers - (
            {"fork_run", "record_command"} if option == "--label" else set()
        )


def test_what_has_one_name_reads_one_thing():
    meanings = {}
    for name in NAMES:
        for option, action in options_of(name).items():
            own = {"fork_run", "record_command"} if option == "--label" else set()
            if name not in own:
                meanings.setdefault(option, set()).add((action.type, action.metavar))

    assert {option for option, several in meanings.items() if len(several) > 1} == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_says_what_it_is_for(name):
    parser = load_command_class("workflow_storage", name).create_parser("manage.py", name)

    assert len(parser.description) > 20
    assert all(action.help for action in actions_of(name))
    assert name in parser.format_help()
