"""The lists: pages that follow one another, in a fixed number of queries."""

import pytest
from django.urls import reverse

from tests.admin.conftest import RUNS, add_runs
from workflow_storage import create_storage_backend
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(
    ("count", "queries", "text"), [(1, 4, "1"), (350, 5, "350"), (1200, 5, "1,000+")]
)
def test_the_list_takes_a_fixed_number_of_queries_and_counts_to_a_bound(
    admin_client, django_assert_num_queries, count, queries, text
):
    add_runs(count)
    admin_client.get(reverse(RUNS))

    # session, user, the page, names of workflows, the count
    with django_assert_num_queries(queries) as captured:
        response = admin_client.get(reverse(RUNS))

    assert len(response.context["cl"].result_list) == min(count, 50)
    assert f"{text} in all" in response.content.decode()
    sql = " ".join(query["sql"] for query in captured.captured_queries)
    assert "inputs" not in sql
    assert "LIMIT 1001" in sql or queries == 4


def test_pages_follow_one_another_to_the_last_run(admin_client):
    runs = add_runs(250)
    seen, query = [], ""
    while query is not None:
        response = admin_client.get(reverse(RUNS) + query)
        changelist = response.context["cl"]
        seen.append([run.id for run in changelist.result_list])
        query = changelist.next_page

    assert [len(page) for page in seen] == [50] * 5
    assert [run_id for page in seen for run_id in page] == [run.id for run in runs]
    assert b"First page" in response.content
    assert b"Older" not in response.content

    back = []
    while (query := response.context["cl"].previous_page) is not None:
        response = admin_client.get(reverse(RUNS) + query)
        back.append([run.id for run in response.context["cl"].result_list])
    assert back == seen[-2::-1]


def test_the_pages_of_a_list_that_reads_payloads_are_bounded_by_bytes(admin_client, settings):
    settings.ROOT_URLCONF = "tests.admin.operations"
    store = create_storage_backend("default")
    for number in range(45):
        stored_run(store, inputs={"file": str(number), "text": "x" * 1_000_000})
    pages, query = [], ""
    while query is not None:
        url = reverse("operations:workflow_storage_workflowrun_changelist")
        changelist = admin_client.get(url + query).context["cl"]
        pages.append([run.inputs["file"] for run in changelist.result_list])
        query = changelist.next_page

    assert max(map(len, pages)) <= 20
    assert [int(file) for page in pages for file in page] == [*reversed(range(45))]


def test_a_page_keeps_its_filters(admin_client):
    add_runs(150, status="failed")
    stored_run(create_storage_backend("default"), status="running")

    response = admin_client.get(reverse(RUNS), {"status__exact": "failed"})
    response = admin_client.get(reverse(RUNS) + response.context["cl"].next_page)

    assert len(response.context["cl"].result_list) == 50
    assert {run.status for run in response.context["cl"].result_list} == {"failed"}


def test_filters_and_searches_begin_at_the_first_page(admin_client):
    add_runs(80, status="failed")
    first = admin_client.get(reverse(RUNS))

    later = admin_client.get(reverse(RUNS) + first.context["cl"].next_page).content.decode()

    assert "status__exact=failed" in later
    assert later.count("before=") == 0


def test_a_page_after_an_unknown_run_goes_to_the_error_page(admin_client):
    response = admin_client.get(reverse(RUNS), {"before": "gone"})
    assert response.status_code == 302
    assert "e=1" in response.url
