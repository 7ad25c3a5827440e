"""The recipes of the README of the integrations, held against what the libraries bring themselves."""

import contextlib
import io
import random
from dataclasses import replace

import pytest
from agents import Agent, Runner
from agents.memory import Session, SQLiteSession
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import async_to_sync
from django.utils import timezone
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai import BinaryContent
from pydantic_ai.models.test import TestModel as TalkingModel
from pydantic_ai_harness.step_persistence import (
    InMemoryStepStore,
    StepPersistence,
    continue_run,
)

from tests.test_readme import ROOT, TESTED
from workflow_storage import (
    ExecutionState,
    NotResumableError,
    WorkflowRun,
    create_storage_backend,
    record_run,
    resume_run,
)
from workflow_storage.signals import checkpoint_saved, run_finished

SESSION, STEP_STORE, TRACING = TESTED.findall(
    (ROOT / "workflow_storage/contrib/README.md").read_text()
)


def defined(code):
    """Return what the code of a recipe defines; its example at the end runs, too."""
    names = {"__name__": "recipe"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture
def backend(transactional_db):
    return create_storage_backend()


@pytest.fixture
def chat(backend):
    """A conversation that nobody has said anything in yet."""
    run = WorkflowRun(workflow_name="chat")
    backend.runs.add(run)
    return run.id


def item(text):
    return {"role": "user", "content": text}


class TestSession:
    @pytest.fixture
    def recipe(self, backend):
        return defined(SESSION)

    def test_it_is_what_the_library_takes_for_a_session(self, recipe, chat):
        with resume_run(chat) as run:
            assert isinstance(recipe["RunSession"](run), Session)

    @pytest.mark.parametrize("seed", range(5))
    def test_it_does_what_the_session_of_the_library_does(self, recipe, chat, seed):
        theirs = SQLiteSession("theirs")
        choose = random.Random(seed)

        async def both(run, call, *args):
            ours = await getattr(recipe["RunSession"](run), call)(*args)
            assert ours == await getattr(theirs, call)(*args)

        async def talk():
            for turn in range(4):
                async with resume_run(chat) as run:
                    await both(run, "get_items")  # what the turns before have left
                    for number in range(6):
                        said = [item(f"{turn} {number} \0 é"), item("\N{PILE OF POO}")]
                        calls = [("add_items", said), ("add_items", []), ("pop_item",)]
                        calls += [("get_items", choose.randrange(4)), ("clear_session",)]
                        await both(run, *choose.choices(calls, [6, 1, 3, 2, 1])[0])
                        await both(run, "get_items")
                    run.suspend("the next message")

        async_to_sync(talk)()
        theirs.close()

    def test_a_turn_that_fails_keeps_what_was_said_and_the_next_one_goes_on(
        self, recipe, chat, backend
    ):
        model = ScriptedModel([OSError("no model"), [assistant_message("Now.")]])
        agent = Agent("assistant", model=model)
        with pytest.raises(OSError, match="no model"):
            async_to_sync(recipe["turn"])(chat, agent, "Hello?")
        assert backend.runs.get(chat).status == "failed"

        assert async_to_sync(recipe["turn"])(chat, agent, "And now?") == "Now."

        said = [one["content"] for one in backend.states.get_latest_state(chat)["items"]]
        assert said[0] == "Hello?"
        assert said[-2] == "And now?"

    def test_one_turn_at_a_time_changes_a_conversation(self, recipe, chat):
        agent = Agent("assistant", model=ScriptedModel([]))
        with resume_run(chat), pytest.raises(NotResumableError):
            async_to_sync(recipe["turn"])(chat, agent, "Me first!")

    def test_the_turn_after_one_that_was_killed_goes_on(self, recipe, chat, backend):
        with resume_run(chat) as run:
            async_to_sync(recipe["RunSession"](run).add_items)([item("Are you there?")])
            run.suspend("the next message")
        long_ago = timezone.now() - 2 * recipe["KILLED"]
        backend.runs.update_status(chat, "running", attempt_started_at=long_ago)
        ExecutionState.objects.update(created_at=long_ago)
        agent = Agent("assistant", model=ScriptedModel([[assistant_message("Yes.")]]))

        assert async_to_sync(recipe["turn"])(chat, agent, "Hello?") == "Yes."

        said = [one["content"] for one in backend.states.get_latest_state(chat)["items"]]
        assert said[:2] == ["Are you there?", "Hello?"]
        assert [one.status for one in backend.runs.list_attempts(chat)][1] == "failed"

    def test_it_can_be_cut_to_the_last_items(self, recipe, chat):
        async def first_turns():
            async with resume_run(chat) as run:
                session = recipe["RunSession"](run)
                model = ScriptedModel([[assistant_message("1")], [assistant_message("2")]])
                for word in ("a", "b"):
                    await Runner.run(Agent("assistant", model=model), word, session=session)
                return await session.get_items(limit=3), await session.get_items()

        cut, whole = async_to_sync(first_turns)()
        assert len(whole) == 4
        assert cut == whole[1:]


class Twice:
    """A step store that asks ours and theirs, and compares what they say."""

    def __init__(self, ours, theirs):
        self.ours, self.theirs = ours, theirs

    def __getattr__(self, name):
        async def ask(*args, **kwargs):
            ours = await getattr(self.ours, name)(*args, **kwargs)
            assert ours == await getattr(self.theirs, name)(*args, **kwargs)
            return ours

        return ask


class TestStepStore:
    @pytest.fixture
    def store(self, backend):
        return Twice(defined(STEP_STORE)["RunStepStore"](backend), InMemoryStepStore())

    @pytest.fixture
    def agent(self, store):
        agent = PydanticAgent(
            TalkingModel(), name="librarian", capabilities=[StepPersistence(store=store)]
        )

        @agent.tool_plain
        async def look_up(word: str) -> BinaryContent:
            return BinaryContent(b"\x00\xff page", media_type="application/octet-stream")

        @agent.tool_plain
        async def count(word: str) -> int:
            return len(word)

        return agent

    def test_it_says_what_theirs_says_of_runs_with_tools_beside_each_other(
        self, store, agent, backend
    ):
        async def talk():
            first = await agent.run("Where is it?", conversation_id="chat")
            history = await continue_run(store, run_id=first.run_id)
            second = await agent.run("And that?", message_history=history, conversation_id="chat")
            for run_id in (first.run_id, second.run_id, "none"):
                await store.get_run(run_id=run_id)
                await store.list_events(run_id=run_id)
                await store.latest_snapshot(run_id=run_id)
                await store.list_unresolved_tool_effects(run_id=run_id)
            assert len(await store.list_runs(conversation_id="chat")) == 2
            assert await store.list_runs(parent_run_id="none") == []
            return history, first.run_id

        history, run_id = async_to_sync(talk)()

        assert "page" in str(history)
        run = backend.runs.get(run_id)
        assert (run.status, run.labels["conversation"]) == ("completed", "chat")

    def test_a_run_that_fails_in_a_tool_is_a_failed_run_that_can_be_gone_on_with(
        self, store, agent, backend
    ):
        @agent.tool_plain
        async def burn(word: str) -> str:
            raise OSError("the library is on fire")

        async def fail():
            with pytest.raises(OSError, match="on fire"):
                await agent.run("Where is it?", conversation_id="chat")
            (record,) = await store.list_runs(conversation_id="chat")
            found = []
            for include in (False, True):
                found.append(
                    await store.latest_snapshot(run_id=record.run_id, include_interrupted=include)
                )
            return record.run_id, found

        run_id, (complete, newest) = async_to_sync(fail)()

        run = backend.runs.get(run_id)
        assert run.status == "failed"
        assert "on fire" in run.error_message
        assert newest.state == "interrupted"
        assert complete is None or complete.state == "complete"

    def test_the_newest_snapshot_counts_whichever_it_is(self, store, agent):
        async def save():
            run = await agent.run("Where is it?")
            last = await store.latest_snapshot(run_id=run.run_id)
            for step, state in enumerate(["interrupted", "complete", "interrupted"], start=10):
                await store.save_snapshot(
                    replace(last, step_index=step, state=state, idempotency_key=None)
                )
                for include in (False, True):
                    await store.latest_snapshot(run_id=run.run_id, include_interrupted=include)

        async_to_sync(save)()

    def test_an_operation_that_is_tried_again_is_stored_once(self, store, agent):
        async def again():
            run = await agent.run("Where is it?")
            events = await store.list_events(run_id=run.run_id)
            assert events[-1].idempotency_key
            await store.append_event(events[-1])
            snapshot = await store.latest_snapshot(run_id=run.run_id)
            await store.save_snapshot(snapshot)
            return events, await store.list_events(run_id=run.run_id)

        before, after = async_to_sync(again)()
        assert before == after


class TestTracing:
    @pytest.fixture
    def exporter(self, backend):
        """What spans go to, of all runs of the test."""
        recipe = defined(TRACING)
        recipe["exporter"].clear()
        recipe["trace_runs"](recipe["provider"].get_tracer("test"))
        yield recipe["exporter"]
        for signal in (checkpoint_saved, run_finished):
            signal.disconnect(dispatch_uid="trace_runs")

    def test_all_attempts_of_a_run_are_one_trace_under_one_span(self, exporter):
        with record_run("order") as run:
            run.save_state({"n": 1}, "check")
            run.suspend("approval")
        with pytest.raises(OSError, match="no"), resume_run(run.run_id) as again:
            with again.node("ship"):
                again.add_usage(tokens=5, cost_usd=0.5)
                again.save_state({"n": 2})
            raise OSError("no stock")

        check, ship, whole = exporter.get_finished_spans()
        assert [check.name, ship.name, whole.name] == ["check", "ship", "invoke_workflow order"]
        assert {span.context.trace_id for span in (check, ship, whole)} == {whole.context.trace_id}
        assert check.parent.span_id == ship.parent.span_id == whole.context.span_id
        assert whole.parent is None
        assert whole.start_time <= check.end_time <= ship.start_time <= ship.end_time
        assert ship.end_time <= whole.end_time
        assert ship.attributes["workflow_storage.attempt"] == 2
        assert ship.attributes["workflow_storage.cost_usd"] == 0.5

    def test_a_failure_is_the_status_of_the_span(self, exporter):
        with pytest.raises(ValueError, match="bad"), record_run("order", run_id="task-1"):
            raise ValueError("bad: worse")

        (whole,) = exporter.get_finished_spans()
        assert whole.attributes["error.type"] == "ValueError"
        assert whole.status.description == "bad: worse"
        assert whole.status.status_code.name == "ERROR"
        assert whole.attributes["gen_ai.operation.name"] == "invoke_workflow"
        assert whole.attributes["gen_ai.workflow.name"] == "order"
        assert whole.attributes["workflow_storage.run_id"] == "task-1"

    def test_a_run_that_is_resumed_after_it_has_ended_sends_its_span_again(self, exporter):
        with pytest.raises(OSError, match="no"), record_run("order") as run:
            raise OSError("no stock")
        with resume_run(run.run_id):
            pass

        failed, whole = exporter.get_finished_spans()
        assert failed.context.span_id == whole.context.span_id
        assert failed.start_time == whole.start_time
        assert failed.end_time <= whole.end_time

    def test_runs_of_async_code_are_traced(self, exporter):
        async def work():
            async with record_run("order") as run, run.node("only"):
                await run.asave_state({})

        async_to_sync(work)()

        only, whole = exporter.get_finished_spans()
        assert only.parent.span_id == whole.context.span_id
