"""The tests of a project: what it writes with Django's TestCases, and with pytest-django.

Run by test_own_connection.py in a process of its own, on each database, with and without an own
connection; no test sees what another one stored.
"""

import asyncio
import threading

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.db import connection, transaction
from django.test import AsyncClient, SimpleTestCase, TestCase, TransactionTestCase
from django.test.testcases import DatabaseOperationForbidden

from workflow_storage import WorkflowRun, create_storage_backend, record_run
from workflow_storage.testing import new_run, stored_run

OWN = settings.OWN_CONNECTION


def backend():
    return create_storage_backend()


def sees(run_id):
    """Whether the test itself sees a run, on its own connection."""
    return WorkflowRun.objects.filter(pk=run_id).exists()


class Failed(Exception):
    pass


def record_and_fail():
    with pytest.raises(Failed), transaction.atomic(), record_run("work", run_id="rolled back"):
        raise Failed


class TestWithTestCase(TestCase):
    @classmethod
    def setUpTestData(cls):
        stored_run(backend(), id="of the class")

    def test_it_sees_what_the_test_stored(self):
        WorkflowRun.objects.create(id="by the test", workflow_name="x")
        self.assertIsNotNone(backend().runs.get("by the test"))
        stored_run(backend(), id="by the store")
        self.assertTrue(sees("by the store"))
        self.assertTrue(sees("of the class"))

    def test_nothing_is_left_of_the_test_before(self):
        self.assertFalse(sees("by the test"))
        self.assertFalse(sees("by the store"))

    def test_no_transaction_is_open_but_that_of_the_test(self):
        self.assertFalse(backend().in_transaction())
        with transaction.atomic():
            self.assertEqual(backend().in_transaction(), not OWN)

    def test_an_exception_gets_no_note_of_the_transaction_of_the_test(self):
        with pytest.raises(Failed) as caught, record_run("work"):
            raise Failed
        self.assertEqual(getattr(caught.value, "__notes__", []), [])

    async def test_async_it_sees_what_the_test_stored(self):
        await WorkflowRun.objects.acreate(id="by the async test", workflow_name="x")
        self.assertIsNotNone(await backend().runs.aget("by the async test"))
        await asyncio.gather(*(backend().runs.aadd(new_run(id=f"{n}")) for n in range(20)))
        self.assertEqual(await WorkflowRun.objects.acount(), 22)

    async def test_async_nothing_is_left_of_the_test_before(self):
        self.assertEqual(await backend().runs.acount_runs(), 1)

    def test_a_request_sees_it_too(self):
        self.assertEqual(self.client.get("/complete").content, b"ok")
        self.assertTrue(sees("completing"))

    async def test_an_async_request_sees_it_too(self):
        response = await self.async_client.get("/async")
        self.assertEqual(response.content, b"ok")
        self.assertIsNotNone(await backend().runs.aget("async"))


class TestWithTransactionTestCase(TransactionTestCase):
    def test_a_view_that_fails(self):
        self.client.raise_request_exception = False
        self.assertEqual(self.client.get("/fail").status_code, 500)
        self.assertEqual(sees("failing"), OWN)
        if OWN:
            run = backend().runs.get("failing")
            self.assertEqual(run.status, "failed")
            self.assertIn("the view failed", run.error_message)

    def test_nothing_is_left_of_the_test_before(self):
        self.assertFalse(sees("failing"))
        self.assertFalse(sees("rolled back"))
        self.assertEqual(backend().runs.count_runs(), 0)

    def test_a_rollback(self):
        record_and_fail()
        self.assertEqual(sees("rolled back"), OWN)

    async def test_async(self):
        await asyncio.gather(*(backend().runs.aadd(new_run(id=f"{n}")) for n in range(20)))
        self.assertEqual(await WorkflowRun.objects.acount(), 20)


class TestOfNoDatabase(SimpleTestCase):
    def test_the_database_is_forbidden(self):
        for call in (backend().runs.count_runs, async_to_sync(backend().runs.acount_runs)):
            with self.assertRaises(DatabaseOperationForbidden):
                call()


@pytest.mark.django_db
class TestWithPytest:
    def test_it_sees_what_the_test_stored(self):
        WorkflowRun.objects.create(id="by pytest", workflow_name="x")
        assert backend().runs.get("by pytest") is not None
        stored_run(backend(), id="by the store")
        assert sees("by the store")

    def test_nothing_is_left_of_the_test_before(self):
        assert backend().runs.count_runs() == 0

    def test_a_loop_in_the_thread_of_the_test_sees_it(self):
        """As pytest-asyncio and anyio run a test."""
        stored_run(backend(), id="before the loop")

        async def use():
            runs, states = backend()
            assert await runs.aget("before the loop") is not None
            await asyncio.gather(*(runs.aadd(new_run(id=f"{n}")) for n in range(20)))
            async with record_run("work", run_id="in the loop") as run:
                await run.asave_state({"n": 1}, "node")
            assert await states.aget_latest_state("in the loop") == {"n": 1}

        asyncio.run(use())
        assert WorkflowRun.objects.count() == 22
        with pytest.raises(Failed), transaction.atomic():
            asyncio.run(backend().runs.aadd(new_run(id="rolled back with the block")))
            assert sees("rolled back with the block")
            raise Failed
        assert not sees("rolled back with the block")

    def test_nothing_is_left_of_the_loop_before(self):
        assert asyncio.run(backend().runs.acount_runs()) == 0


@pytest.mark.django_db(transaction=True)
class TestWithPytestAndTransactions:
    def test_a_rollback(self):
        record_and_fail()
        assert sees("rolled back") == OWN

    def test_a_loop_in_a_transaction(self):
        with pytest.raises(Failed), transaction.atomic():
            asyncio.run(backend().runs.aadd(new_run(id="in a transaction")))
            raise Failed
        assert sees("in a transaction") == OWN

    def test_nothing_is_left_of_the_test_before(self):
        assert backend().runs.count_runs() == 0

    def test_threads_and_loops(self):
        def use(number):
            try:
                stored_run(backend(), id=f"thread {number}")
            finally:
                connection.close()
            asyncio.run(backend().runs.aadd(new_run(id=f"loop {number}")))

        threads = [threading.Thread(target=use, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert WorkflowRun.objects.count() == 8

    def test_an_async_request(self):
        async def request():
            return await AsyncClient().get("/async")

        assert asyncio.run(request()).content == b"ok"
        assert sees("async")
