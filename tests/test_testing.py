"""The contract explains its failures, and notices an async twin that differs."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from workflow_storage import Checkpoint
from workflow_storage.testing.twins import flaws_of_twins

BROKEN_STORE = """
import pytest
from workflow_storage.testing import StatesContract, new_run


class Broken:
    def add(self, run):
        pass

    def save_state(self, run_id, state_data, node_id):
        return 7


class TestBroken(StatesContract):
    @pytest.fixture
    def backend(self):
        class Backend:
            runs = states = Broken()

        return Backend()
"""


def test_a_failing_assert_of_the_contract_shows_its_values(tmp_path):
    (tmp_path / "test_broken.py").write_text(BROKEN_STORE)
    options = ["-p", "no:cacheprovider", "-k", "test_save_state_numbers_the_steps"]

    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "DJANGO" not in name},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert "assert [7, 7, 7] == [0, 1, 2]" in result.stdout
    assert "1 failed" in result.stdout
    assert "PytestAssertRewriteWarning" not in result.stdout


class Twins:
    def get(self, run_id: str, *, limit: int = 1) -> Checkpoint | None: ...

    async def aget(self, run_id: str, *, limit: int = 1) -> Checkpoint | None: ...

    def iter_all(self) -> Iterator[Checkpoint]: ...

    async def aiter_all(self) -> AsyncIterator[Checkpoint]:
        yield

    def writer(self): ...

    @property
    def alias(self): ...


class Unannotated(Twins):
    def get(self, run_id, *, limit=1): ...

    def iter_all(self):
        yield


class AnnotatedInText(Twins):
    async def aget(self, run_id: "str", *, limit: "int" = 1) -> "Checkpoint | None": ...

    async def aiter_all(self) -> "AsyncIterator[Checkpoint]":
        yield


class ExtraWithoutTwin(Twins):
    def servers(self): ...


@pytest.mark.parametrize("fitting", [Twins, Unannotated, AnnotatedInText, ExtraWithoutTwin])
def test_twins_that_fit_have_no_flaw(fitting):
    assert list(flaws_of_twins("runs", fitting(), Twins)) == []


class AnotherName(Twins):
    async def aget(self, key: str, *, limit: int = 1) -> Checkpoint | None: ...


class AnotherDefault(Twins):
    async def aget(self, run_id: str, *, limit: int = 2) -> Checkpoint | None: ...


class AnotherKind(Twins):
    async def aget(self, run_id: str, limit: int = 1) -> Checkpoint | None: ...


class AnotherAnnotation(Twins):
    async def aget(self, run_id: int, *, limit: int = 1) -> Checkpoint | None: ...


class OneMore(Twins):
    async def aget(self, run_id: str, *, limit: int = 1, x: int = 0) -> Checkpoint | None: ...


class AnotherResult(Twins):
    async def aget(self, run_id: str, *, limit: int = 1) -> Checkpoint: ...


class AnotherIterator(Twins):
    async def aiter_all(self) -> AsyncIterator[dict]:
        yield


class NoCoroutine(Twins):
    def aget(self, run_id: str, *, limit: int = 1) -> Checkpoint | None: ...


class NoAsyncGenerator(Twins):
    async def aiter_all(self) -> AsyncIterator[Checkpoint]: ...


class Missing(Twins):
    aget = None


class ExtraThatDiffers(Twins):
    def servers(self): ...

    async def aservers(self, name): ...


@pytest.mark.parametrize(
    ("differing", "flaw"),
    [
        (AnotherName, "runs.aget takes (key: str"),
        (AnotherDefault, "limit: int = 2)"),
        (AnotherKind, "runs.aget takes (run_id: str, limit:"),
        (AnotherAnnotation, "runs.aget takes (run_id: int,"),
        (OneMore, "x: int = 0)"),
        (AnotherResult, "runs.aget returns Checkpoint, and not Checkpoint | None"),
        (
            AnotherIterator,
            "runs.aiter_all returns AsyncIterator[dict], and not AsyncIterator[Checkpoint]",
        ),
        (NoCoroutine, "runs.aget is no coroutine function"),
        (NoAsyncGenerator, "runs.aiter_all is no async generator function"),
        (Missing, "runs.aget is missing, the async twin of runs.get"),
        (ExtraThatDiffers, "runs.aservers takes (name), and its method takes ()"),
    ],
)
def test_a_twin_that_differs_is_named(differing, flaw):
    (found,) = flaws_of_twins("runs", differing(), Twins)

    assert flaw in found.replace("'", "")
