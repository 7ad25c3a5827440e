"""What a `DeltaChannel` is rebuilt from, held to what LangGraph finds by itself."""

import asyncio

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint

from tests.contrib.langgraph.graphs import DeltaNumbers, Numbers, counting, thread


@pytest.mark.parametrize("state", [Numbers, DeltaNumbers])
def test_the_history_of_channels_is_what_langgraph_finds_by_itself(saver, state, monkeypatch):
    monkeypatch.setattr("workflow_storage.contrib.langgraph.history._PAGE", 3)
    graph = counting(saver, 11, state=state)
    graph.invoke({"numbers": ["a"]}, thread())
    middle = list(graph.get_state_history(thread()))[3]
    graph.update_state(middle.config, {"numbers": ["fork"]})
    graph.invoke({"numbers": ["b"]}, thread())
    configs = [thread(), *(found.config for found in saver.list(thread())), thread("none")]

    for config in configs:
        asked = {"config": config, "channels": ["numbers", "__start__", "absent"]}
        ours = saver.get_delta_channel_history(**asked)
        assert ours == BaseCheckpointSaver.get_delta_channel_history(saver, **asked)
        assert ours == asyncio.run(saver.aget_delta_channel_history(**asked))


def test_the_history_goes_through_parents_whose_clock_was_ahead(saver):
    config = None
    for checkpoint_id in ("b", "d", "c", "a"):
        values = {"numbers": [0]} if config is None else {}
        checkpoint = {**empty_checkpoint(), "id": checkpoint_id, "channel_values": values}
        versions = dict.fromkeys(values, "1")
        checkpoint["channel_versions"] = versions
        config = saver.put(config or thread("1", checkpoint_ns=""), checkpoint, {}, versions)
        saver.put_writes(config, [("numbers", [checkpoint_id])], "task")

    found = saver.get_delta_channel_history(config=config, channels=["numbers"])

    writes = [("task", "numbers", [checkpoint_id]) for checkpoint_id in ("b", "d", "c")]
    assert found == {"numbers": {"seed": [0], "writes": writes}}
