"""LangGraph's own conformance suite, all of it, on every database."""

import asyncio

from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import ALL_CAPABILITIES

from workflow_storage.contrib.langgraph import DjangoSaver


def test_all_of_the_suite_passes(graph_store):
    @checkpointer_test(name=graph_store.name)
    async def saver():
        yield DjangoSaver(graph_store)

    report = asyncio.run(validate(saver))

    assert [failure for result in report.results.values() for failure in result.failures] == []
    assert {name for name, result in report.results.items() if result.passed} == {
        capability.value for capability in ALL_CAPABILITIES
    }
    assert sum(result.tests_passed for result in report.results.values()) >= 58
