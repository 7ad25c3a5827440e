"""Lookups into exact JSON, on every SQL database."""

import json

import pytest
from django.core.management import call_command
from django.db import NotSupportedError, connections
from django.db.models import Count, Exists, F, JSONField, OuterRef, Subquery, Value
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import WorkflowRun
from workflow_storage.fields import KT, JSONDocument
from workflow_storage.testing import against_the_store, any_text, nested, stored_run

AWKWARD = [
    {"customer": "\0", "\0": 1},
    {"customer": "\ud800 \udfff", "\udfff": "\\\0"},
    {"customer": 1e23, "n": 10**40},
    nested(500),
    nested(900),
    "text",
    3,
    None,
    [],
]


@pytest.fixture
def runs(sql_backend):
    """The runs of a store that also holds everything that databases refuse to parse."""
    for number, inputs in enumerate(AWKWARD):
        stored_run(sql_backend, id=f"awkward-{number}", inputs=inputs)
    stored_run(
        sql_backend,
        id="wanted",
        inputs={
            "customer": 42,
            "name": "Zoë \N{SNOWMAN}",
            "nested": {"list": [1, {"deep": True}]},
            "nul": "a\0b",
            "null": None,
        },
    )
    stored_run(sql_backend, id="other", inputs={"customer": "c-42", "name": "x", "z": -1.5})
    stored_run(sql_backend, id="lone", inputs={"lone": "x", "other": "\ud800\\ud800"})
    return WorkflowRun.objects.using(sql_backend.runs.alias)


def found(runs, **lookups):
    return [run.id for run in runs.filter(**lookups).order_by("id")]


@pytest.mark.parametrize(
    ("lookups", "expected"),
    [
        ({"inputs__customer": 42}, ["wanted"]),
        ({"inputs__customer": "c-42"}, ["other"]),
        ({"inputs__customer__gt": 41, "inputs__customer__lt": 43}, ["wanted"]),
        ({"inputs__name": "Zoë \N{SNOWMAN}"}, ["wanted"]),
        ({"inputs__name__icontains": "ZO"}, ["wanted"]),
        ({"inputs__name__startswith": "Zo"}, ["wanted"]),
        ({"inputs__name__in": ["x", "y"]}, ["other"]),
        ({"inputs__nested__list__0": 1}, ["wanted"]),
        ({"inputs__nested__list__1__deep": True}, ["wanted"]),
        ({"inputs__nested": {"list": [1, {"deep": True}]}}, ["wanted"]),
        ({"inputs__nested__list__isnull": False}, ["wanted"]),
        ({"inputs__has_key": "nul"}, ["wanted"]),
        ({"inputs__has_keys": ["customer", "name"]}, ["other", "wanted"]),
        ({"inputs__has_any_keys": ["null", "z"]}, ["other", "wanted"]),
        ({"inputs": {"customer": "c-42", "name": "x", "z": -1.5}}, ["other"]),
        ({"inputs": "text"}, ["awkward-5"]),
        ({"inputs": 3}, ["awkward-6"]),
        ({"inputs__isnull": True}, ["awkward-7"]),
        ({"inputs__lone": "x"}, ["lone"]),
        ({"inputs__nul": "a\0b"}, ["wanted"]),
    ],
    ids=str,
)
def test_lookups_find_what_they_name(runs, lookups, expected):
    assert found(runs, **lookups) == expected


def test_contains_works_where_the_database_has_it(runs):
    if connections[runs.db].features.supports_json_field_contains:
        assert found(runs, inputs__contains={"customer": 42}) == ["wanted"]
    else:
        with pytest.raises(NotSupportedError):
            found(runs, inputs__contains={"customer": 42})


def test_values_of_keys_can_be_selected(runs):
    values = runs.filter(id__in=["wanted", "other"]).order_by("id")
    assert list(values.values_list("inputs__name", "inputs__z")) == [
        ("x", -1.5),
        ("Zoë \N{SNOWMAN}", None),
    ]


def test_texts_of_keys_can_be_selected_compared_and_sorted(runs):
    named = runs.annotate(name=KT("inputs__name"), deep=KT("inputs__nested__list__0"))

    assert dict(named.exclude(name=None).values_list("id", "name")) == {
        "wanted": "Zoë \N{SNOWMAN}",
        "other": "x",
    }
    assert [str(deep) for deep in named.exclude(deep=None).values_list("deep", flat=True)] == ["1"]
    assert [run.id for run in named.filter(name__gte="Y", name__lt="x")] == ["wanted"]
    ids = ["wanted", "other"]
    assert [run.id for run in named.filter(id__in=ids).order_by("name")] == ids
    with pytest.raises(ValueError, match="must contain key"):
        KT("inputs")


def test_documents_are_compared_with_documents(runs):
    runs.filter(id__in=["wanted", "lone", "awkward-4", "awkward-5"]).update(outputs=F("inputs"))
    equal = {"wanted", "lone", "awkward-5"}
    if connections[runs.db].vendor == "postgresql":
        equal.add("awkward-4")  # it alone reads one that is as deep

    assert {*found(runs, inputs=F("outputs"))} - {"awkward-4"} == equal - {"awkward-4"}
    assert {*found(runs, inputs__in=runs.values("outputs"))} - {"awkward-4"} == equal - {
        "awkward-4"
    }
    assert {run.id for run in runs.filter(id__in=equal).exclude(inputs=F("outputs"))} == set()
    same = runs.filter(inputs=OuterRef("outputs"), id=OuterRef("id"))
    assert equal - {"awkward-4"} <= {run.id for run in runs.filter(Exists(same))}
    wanted = runs.filter(id="wanted").values("outputs")[:1]
    assert found(runs, inputs=Subquery(wanted)) == ["wanted"]
    assert found(runs, inputs__nested=F("outputs__nested")) == ["wanted"]


OTHER = {"customer": "c-42", "name": "x", "z": -1.5}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([OTHER, "text", 3], ["awkward-5", "awkward-6", "other"]),
        ([[], "nothing like it"], ["awkward-8"]),
        ([Value(OTHER, JSONField()), None], ["other"]),
        ([F("inputs")], None),
        ([], []),
    ],
    ids=str,
)
def test_documents_can_be_one_of_some(runs, values, expected):
    if expected is None:  # all that the database reads
        assert {"awkward-5", "awkward-8", "other", "wanted"} <= {*found(runs, inputs__in=values)}
    else:
        assert found(runs, inputs__in=values) == expected


def test_an_expression_can_be_the_value_of_a_lookup(runs):
    assert found(runs, inputs=Value(OTHER, JSONField())) == ["other"]
    assert found(runs, inputs__has_key=F("inputs__customer")) == [
        "awkward-0",
        "awkward-1",
        "awkward-2",
        "other",
        "wanted",
    ]


@pytest.mark.parametrize("depth", [99, 100, 101, 500])
def test_any_depth_is_stored_and_fails_no_lookup(runs, sql_backend, depth):
    deep = nested(depth - 1)
    stored_run(sql_backend, id="deep", inputs=deep, outputs=[{"[": deep}, '}"'])

    assert runs.get(id="deep").inputs == deep
    assert found(runs, inputs__customer=42) == ["wanted"]
    assert [run.id for run in runs.filter(inputs__a__isnull=True) if run.id == "wanted"]
    try:
        assert found(runs, inputs=deep) in ([], ["deep"])
    except NotSupportedError as exc:
        assert depth > 100
        assert "deeper than 100 levels" in str(exc)


def test_values_and_deferred_fields_are_exact(runs):
    assert json.dumps(runs.values_list("inputs", flat=True).get(id="awkward-2")) == json.dumps(
        AWKWARD[2]
    )
    assert runs.only("id").get(id="awkward-0").inputs == AWKWARD[0]


def test_bulk_update_keeps_what_is_exact(runs):
    objects = [runs.get(id="awkward-0"), runs.get(id="awkward-7")]
    for run in objects:
        run.outputs = {"\0": 1e23}

    runs.bulk_update(objects, ["outputs"])

    assert [run.outputs for run in runs.filter(pk__in=[run.pk for run in objects])] == [
        {"\0": 1e23}
    ] * 2


def test_runs_can_be_made_distinct_and_grouped(runs, sql_backend):
    for _ in range(2):
        sql_backend.states.save_state("wanted", {}, "node")

    assert found(runs.distinct(), states__node_id="node") == ["wanted"]
    assert runs.annotate(count=Count("states")).get(id="wanted").count == 2


def test_saving_what_is_not_json_names_the_field(runs):
    with pytest.raises(ValueError, match="outputs is not JSON: it is nan"):
        WorkflowRun(workflow_name="x", outputs=float("nan")).save(using=runs.db)


AS_TEXT = {"JSON text, for it holds a lone surrogate": '"\\ud800"'}


@pytest.mark.parametrize("file_format", ["json", "jsonl", "xml"])
@pytest.mark.parametrize(
    "value",
    [
        {"a": ["\ud800"], "\udfff": "\ud83d\ude00", "é": "\\ud800"},
        "\udc00",
        AS_TEXT,
        {"deep": AS_TEXT},
        {next(iter(AS_TEXT)): "no JSON"},
        json.dumps(AS_TEXT),
        "plain é",
    ],
    ids=ascii,
)
def test_dumpdata_and_loaddata_keep_lone_surrogates(sql_backend, tmp_path, file_format, value):
    alias = sql_backend.runs.alias
    run = stored_run(sql_backend, inputs=value, labels={"a": "b"})
    sql_backend.states.save_state(run.id, {"x": "\ud800"}, "node")
    path = tmp_path / f"runs.{file_format}"
    options = {"database": alias, "verbosity": 0}

    call_command("dumpdata", "workflow_storage", output=str(path), format=file_format, **options)
    sql_backend.runs.delete(run.id)
    call_command("loaddata", str(path), **options)

    assert json.dumps(sql_backend.runs.get(run.id).inputs) == json.dumps(value)
    assert sql_backend.states.get_latest_state(run.id) == {"x": "\ud800"}


@pytest.mark.parametrize("url_of", ["postgres_url", "mysql_url"])
@against_the_store
@given(
    value=st.recursive(
        any_text,
        lambda children: st.lists(children) | st.dictionaries(any_text, children),
        max_leaves=8,
    )
)
def test_a_database_with_a_json_of_its_own_reads_any_text(
    request, url_of, django_db_blocker, value
):
    """Lone surrogates, and on PostgreSQL NUL, become U+FFFD, and nothing else changes."""
    from workflow_storage import create_storage_backend

    nul = "\ufffd" if url_of == "postgres_url" else "\0"

    def readable(value):
        if isinstance(value, dict):
            return {readable(key): readable(item) for key, item in value.items()}
        if isinstance(value, list):
            return [readable(item) for item in value]
        return (
            json.loads(json.dumps(value))
            .replace("\0", nul)
            .encode("utf-16", "surrogatepass")
            .decode("utf-16", "replace")
        )

    with django_db_blocker.unblock():
        backend = create_storage_backend(request.getfixturevalue(url_of))
        run = stored_run(backend, inputs={"value": value})
        row = (
            WorkflowRun.objects.using(backend.runs.alias)
            .annotate(document=JSONDocument("inputs"))
            .get(pk=run.pk)
        )
        backend.runs.delete(run.id)

    assert row.document == {"value": readable(value)}
