"""The German translation: nothing is missing in it, and what is compiled is what was translated."""

import ast
import re
import struct
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import django
import pytest
from django.template import engines
from django.templatetags.i18n import BlockTranslateNode, TranslateNode
from django.urls import reverse
from django.utils import timezone

import workflow_storage
from tests.admin.conftest import RUNS, page_of
from workflow_storage import create_storage_backend
from workflow_storage.testing import stored_run

PACKAGE = Path(workflow_storage.__file__).parent
GERMAN = PACKAGE / "locale" / "de" / "LC_MESSAGES"
TO_DO = (
    "Run in workflow_storage/: django-admin makemessages -l de --no-wrap --no-obsolete "
    "--add-location file; translate what is empty or fuzzy in locale/de/LC_MESSAGES/django.po; "
    "run django-admin compilemessages, and commit both files."
)
CONTEXT, PLURAL = "\4", "\0"
"""What stands behind a context, and before a plural, in the key of a message, as gettext has it."""

ARGUMENTS = {
    "gettext": (None, 0, None),
    "ngettext": (None, 0, 1),
    "pgettext": (0, 1, None),
    "npgettext": (0, 1, 2),
}
"""At which place each function takes its context, its message and its plural."""

PLACEHOLDER = re.compile(r"%\((\w+)\)[sd]|\{(\w+)\}")


class Entry(NamedTuple):
    """A message with its translation, as the file for translators has it."""

    key: str
    translations: tuple[str, ...]
    is_fuzzy: bool


def key_of(message, plural=None, context=None):
    return (
        (f"{context}{CONTEXT}" if context else "")
        + message
        + (f"{PLURAL}{plural}" if plural else "")
    )


def entries_of(path):
    """Return the messages of a file for translators by their keys, its head under nothing."""
    entries = {}
    for block in path.read_text().strip().split("\n\n"):
        fields, name = {}, ""
        flags = " ".join(line for line in block.splitlines() if line.startswith("#,"))
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if not line.startswith('"'):
                name, line = line.split(" ", 1)  # noqa: PLW2901
            fields[name] = fields.get(name, "") + ast.literal_eval(line)
        key = key_of(fields["msgid"], fields.get("msgid_plural"), fields.get("msgctxt"))
        assert key not in entries, f"{key!r} is there twice."
        texts = tuple(text for name, text in fields.items() if name.startswith("msgstr"))
        entries[key] = Entry(key, texts, "fuzzy" in flags)
    return entries


def compiled(path):
    """Return the translations of a compiled file by their keys."""
    data = path.read_bytes()
    _magic, _version, count, *tables = struct.unpack("<5I", data[:20])

    def text(table, place):
        length, start = struct.unpack_from("<2I", data, table + 8 * place)
        return data[start : start + length].decode()

    return {text(tables[0], place): text(tables[1], place) for place in range(count)}


def messages_of_code(path):
    """Yield the keys of what a module has translated."""
    tree = ast.parse(path.read_text())
    names = {
        alias.asname or alias.name: alias.name.removesuffix("_lazy")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "django.utils.translation"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        places = ARGUMENTS.get(names.get(node.func.id, ""))
        if places is not None:
            where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            context, message, plural = (
                None if place is None else literal(node.args[place], where) for place in places
            )
            yield key_of(message, plural, context)


def literal(node, where):
    assert isinstance(node, ast.Constant), f"{where}: only a literal text can be translated."
    return node.value


def messages_of_template(path):
    """Yield the keys of what a template asks to be translated."""
    nodes = engines["django"].from_string(path.read_text()).template.nodelist
    for node in nodes.get_nodes_by_type(TranslateNode):
        yield key_of(node.filter_expression.var.literal, None, context_of(node))
    for node in nodes.get_nodes_by_type(BlockTranslateNode):
        singular, _names = node.render_token_list(node.singular)
        plural = node.render_token_list(node.plural)[0] if node.plural else None
        yield key_of(singular, plural, context_of(node))


def context_of(node):
    return node.message_context.resolve({}) if node.message_context else None


def messages_of_source():
    found = {key for path in PACKAGE.rglob("*.py") for key in messages_of_code(path)}
    return found.union(
        key for path in PACKAGE.rglob("*.html") for key in messages_of_template(path)
    )


@pytest.fixture(scope="module")
def entries():
    return entries_of(GERMAN / "django.po")


@pytest.fixture(scope="module")
def translated(entries):
    """All messages but the head of the file."""
    return [entry for key, entry in entries.items() if key]


def test_every_message_of_the_source_is_translated(entries):
    done = {
        key
        for key, entry in entries.items()
        if key and all(entry.translations) and not entry.is_fuzzy
    }
    source = messages_of_source()

    missing, unused = sorted(source - done), sorted(entries.keys() - source - {""})

    assert not missing, f"Not translated into German: {missing}. {TO_DO}"
    assert not unused, f"Translated into German, but nowhere in the source: {unused}. {TO_DO}"


def test_what_is_compiled_is_what_was_translated(entries):
    expected = {key: PLURAL.join(entry.translations) for key, entry in entries.items() if key}

    found = compiled(GERMAN / "django.mo")
    del found[""]
    assert found == expected, (
        f"Run django-admin compilemessages in workflow_storage/, and commit {GERMAN.name}/django.mo."
    )


def test_a_translation_has_the_placeholders_of_its_message(translated):
    for entry in translated:
        for original, text in zip(entry.key.split(PLURAL), entry.translations, strict=True):
            expected = {*PLACEHOLDER.findall(original)}
            assert {*PLACEHOLDER.findall(text)} == expected, text
            if names := [name for name, _brace in expected if name]:
                # What else looks like one would fail when the text is shown.
                text % dict.fromkeys(names, 1)


def test_a_plural_has_both_forms_of_german(translated):
    for entry in translated:
        expected = 2 if PLURAL in entry.key else 1
        assert len(entry.translations) == expected, entry.key


def test_words_that_django_has_translated_stay_as_they_are(entries):
    root = Path(django.__file__).parent
    # The first app that translates a message does so for the whole project.
    for path in (root / "conf", root / "contrib" / "admin", root / "contrib" / "auth"):
        theirs = compiled(path / "locale" / "de" / "LC_MESSAGES" / "django.mo")
        for key in (entries.keys() & theirs.keys()) - {"", "Duration"}:  # what Django calls a field
            assert entries[key].translations == (theirs[key],), key


@pytest.fixture
def german(settings, admin_client):
    settings.LANGUAGE_CODE = "de"
    return admin_client


@pytest.fixture
def failed_run(db):
    backend = create_storage_backend("default")
    start = timezone.now() - timedelta(days=2, hours=3)
    run = stored_run(
        backend,
        workflow_name="rechnungen",
        status="running",
        started_at=start,
        total_tokens=12345,
        total_cost_usd=1234.5,
    )
    backend.states.save_state(run.id, {"a": 1}, "ocr", duration_seconds=1.5)
    backend.runs.update_status(
        run.id, "failed", completed_at=start + timedelta(seconds=2.5), error_message="kaputt"
    )
    return backend.runs.get(run.id)


def text_of(client, address):
    return client.get(address).content.decode().replace("\N{NO-BREAK SPACE}", " ")


def test_the_list_is_german(german, failed_run):
    text = text_of(german, reverse(RUNS))

    for shown in (
        "Workflow-Läufe",
        "Heute fehlgeschlagen",
        ">fehlgeschlagen<",
        "vor 2 Tagen",
        "2,5 s",
        "12.345",
        "1.234,5000 $",
        "Diagramme und Ranglisten",
        "1 auf dieser Seite",
        "Letzte 24 Stunden",
    ):
        assert shown in text


def test_the_page_of_a_run_and_of_a_state_are_german(german, failed_run):
    page = text_of(german, page_of(failed_run))
    state = text_of(german, reverse("admin:workflow_storage_run_state", args=[failed_run.pk, 0]))

    for shown in (
        "Fehlgeschlagen",
        "Zeitachse",
        "Zustand nach Schritt 0, ocr",
        "1,5 s",
        "Eingaben",
    ):
        assert shown in page
    for shown in ("Schritt 0", "Vorheriger Schritt", "Der erste Zustand", "1,5 s", "hinzugefügt"):
        assert shown in state


def test_an_action_tells_in_german_how_many_runs_it_was_done_to(german, failed_run):
    chosen = {"action": "add_label", "_selected_action": [failed_run.pk]}

    text = german.post(reverse(RUNS), chosen).content.decode()

    for shown in ("Label hinzufügen", "1 ausgewählter Lauf", "Nein, bitte abbrechen"):
        assert shown in text
