"""JSON text in and out, exactly."""

import json

import pytest
from hypothesis import given
from pydantic import BaseModel

from workflow_storage.encoding import dump_json, load_json
from workflow_storage.testing import json_values, nested


@given(json_values)
def test_any_value_comes_back_as_from_the_json_module(value):
    assert json.dumps(load_json(dump_json(value))) == json.dumps(json.loads(json.dumps(value)))


@given(json_values)
def test_the_text_is_utf8_without_nul(value):
    assert b"\0" not in dump_json(value).encode()


def test_text_outside_ascii_stays_readable():
    assert dump_json({"ключ": "\N{GRINNING FACE}"}) == '{"ключ": "\N{GRINNING FACE}"}'


class Reading(BaseModel):
    value: float


def test_nan_in_a_model_is_refused_like_any_other():
    with pytest.raises(ValueError, match="Out of range float"):
        dump_json({"reading": Reading(value=float("nan"))})


def test_too_deep_a_value_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deeply"):
        dump_json(nested(500_000))
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 500_000 + "]" * 500_000)
