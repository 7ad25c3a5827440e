"""Which keys are those of secrets, and what is left of a value without them."""

import copy

import pytest
from django.contrib.auth.models import AnonymousUser
from django.core.exceptions import ImproperlyConfigured
from hypothesis import given

from workflow_storage.admin.masking import MASKED, NO_MASK, SECRETS, Mask, mask_for
from workflow_storage.testing.values import AWKWARD_VALUES, any_text, json_values, nested

STANDARD = Mask(SECRETS)


class User:
    def __init__(self, *permissions):
        self.permissions = permissions

    def has_perm(self, permission):
        return permission in self.permissions


@pytest.fixture
def request_of(rf):
    def request_of(user):
        request = rf.get("/")
        request.user = user
        return request

    return request_of


@pytest.mark.parametrize("key", ["password", "passphrase", "secret", "authorization", "cookie"])
def test_a_key_that_ends_in_the_word_of_a_secret_is_hidden(key):
    assert STANDARD.hides(key)
    assert STANDARD.hides(f"my_{key}")
    assert STANDARD.hides(f"my{key.title()}")
    assert STANDARD.hides(f"X-{key.upper()}")


@pytest.mark.parametrize(
    "key",
    ["api-key", "api_key", "apiKey", "ApiKey", "APIKey", "APIkey", "APIKEY", "apikey", "X-API-Key"],
)
def test_an_api_key_is_hidden_however_it_is_written(key):
    assert STANDARD.hides(key)


@pytest.mark.parametrize(
    "key",
    ["token", "access_token", "accessToken", "ACCESS_TOKEN", "ACCESStoken", "übergangsToken"],
)
def test_a_token_is_hidden(key):
    assert STANDARD.hides(key)


@pytest.mark.parametrize(
    "key", ["total_tokens", "max_tokens", "maxTokens", "tokens", "token_count", "tokenizer"]
)
def test_a_number_of_tokens_is_shown(key):
    assert not STANDARD.hides(key)


@pytest.mark.parametrize("key", ["password2", "api_key_2", "token-1", "secret1"])
def test_a_number_behind_the_word_does_not_uncover_a_secret(key):
    assert STANDARD.hides(key)


@pytest.mark.parametrize("key", ["pass\u200bword", "\0token\0", "auth token:", "set cookie "])
def test_separators_of_any_kind_do_not_uncover_a_secret(key):
    assert STANDARD.hides(key)


@pytest.mark.parametrize(
    "key", ["", "_", "2", "key", "api", "secretary", "passwordless", "cookie_policy", "broken"]
)
def test_a_key_that_ends_in_another_word_is_shown(key):
    assert not STANDARD.hides(key)


def test_an_ending_of_several_words_is_one_however_it_is_written():
    for ending in ("session id", "session_id", "sessionId"):
        mask = Mask([ending])

        assert mask.hides("session id")
        assert mask.hides("session_id")
        assert mask.hides("userSessionID")
        assert mask.hides("sessionid")
        assert not mask.hides("session")
        assert not mask.hides("id")


def test_an_ending_is_whole_words_only():
    assert not Mask(["iban"]).hides("taliban")


def test_an_ending_may_end_in_a_number():
    mask = Mask(["sha256"])

    assert mask.hides("body_sha256")
    assert not mask.hides("body_sha")


def test_an_empty_ending_hides_nothing():
    mask = Mask(["", " "])

    assert not mask.hides("")
    assert not mask.hides("name")


def test_a_path_is_hidden_by_any_of_its_keys():
    assert STANDARD.hides_path(["headers", "cookie", 0, "value"])
    assert not STANDARD.hides_path(["messages", 3, "content"])
    assert not STANDARD.hides_path([])


def test_masked_hides_what_is_under_a_secret_at_any_depth():
    value = {
        "headers": [{"Authorization": "Bearer x", "Accept": "*/*"}, [[{"apiKey": {"a": 1}}]]],
        "token": None,
        "total_tokens": 12,
    }

    assert STANDARD.masked(value) == {
        "headers": [{"Authorization": MASKED, "Accept": "*/*"}, [[{"apiKey": MASKED}]]],
        "token": MASKED,
        "total_tokens": 12,
    }


def test_masked_keeps_the_order_of_keys():
    assert list(STANDARD.masked({"b": 1, "token": 2, "a": 3})) == ["b", "token", "a"]


def test_masked_leaves_the_value_as_it_was():
    value = {"list": [{"token": "x"}], "other": [{}]}
    before = copy.deepcopy(value)

    STANDARD.masked(value)

    assert value == before


@pytest.mark.parametrize("value", AWKWARD_VALUES, ids=repr)
def test_masked_returns_the_value_itself_where_nothing_is_hidden(value):
    assert STANDARD.masked(value) is value


def test_masked_goes_down_any_number_of_levels():
    deep = nested(5_000)

    masked = STANDARD.masked({"deep": deep, "token": "x"})

    assert masked["token"] == MASKED
    assert STANDARD.masked(deep) is deep


def test_masked_reaches_a_secret_below_many_levels():
    value = {"token": "x"}
    for _ in range(5_000):
        value = [value]

    masked = STANDARD.masked(value)
    for _ in range(5_000):
        (masked,) = masked

    assert masked == {"token": MASKED}


@given(json_values)
def test_no_mask_hides_nothing(value):
    assert NO_MASK.masked(value) is value


@given(any_text)
def test_any_key_is_either_hidden_or_shown(key):
    assert STANDARD.hides(key) is STANDARD.hides(key)
    assert STANDARD.hides(f"{key}_token")
    assert not NO_MASK.hides(f"{key}_token")


def test_who_may_view_secrets_has_no_mask(request_of):
    assert mask_for(request_of(User("workflow_storage.view_secrets"))) is NO_MASK


@pytest.mark.parametrize(
    "user",
    [User(), User("workflow_storage.view_workflowrun"), AnonymousUser()],
    ids=["staff", "viewer", "anonymous"],
)
def test_who_may_not_view_secrets_has_a_mask(request_of, user):
    assert mask_for(request_of(user)).hides("token")


def test_the_setting_adds_endings(request_of, settings):
    settings.WORKFLOW_STORAGE_SECRETS = ["iban", "session id"]

    mask = mask_for(request_of(User()))

    assert mask.hides("customer_iban")
    assert mask.hides("sessionId")
    assert mask.hides("token")
    assert not mask.hides("name")


def test_a_caller_adds_endings(request_of):
    mask = mask_for(request_of(User()), extra=["prompt"])

    assert mask.hides("system_prompt")
    assert mask.hides("token")


@pytest.mark.parametrize("setting", ["iban", None, [1]], ids=repr)
def test_a_setting_that_is_no_list_of_texts_is_refused(request_of, settings, setting):
    settings.WORKFLOW_STORAGE_SECRETS = setting

    with pytest.raises(ImproperlyConfigured, match="WORKFLOW_STORAGE_SECRETS is"):
        mask_for(request_of(User()))
