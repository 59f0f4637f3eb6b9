from __future__ import annotations

import pytest

from gym_bus.masking import MASK, Masking, redact, split_credentials

NONE = Masking({})


@pytest.mark.parametrize(
    "key", ["api_key", "hf_token", "mlflow_tracking_token", "password", "Authorization", "X-Api-Key", "client_secret"]
)
def test_what_stands_under_the_name_of_a_secret_is_masked(key: str) -> None:
    assert NONE.shown(["models", key], "text") == MASK


@pytest.mark.parametrize("key", ["max_output_tokens", "tokens", "return_tokens", "rollout_header", "keep_bus"])
def test_other_keys_are_shown(key: str) -> None:
    assert NONE.shown([key], "text") == "text"


def test_every_header_is_masked_and_what_is_empty_is_shown() -> None:
    assert NONE.shown(["models", "m", "headers", "X-Org"], "acme") == MASK
    assert NONE.shown(["api_key"], "") == ""


def test_a_variable_is_masked_wherever_its_value_appears_but_for_addresses_and_names() -> None:
    masking = Masking({"my_license": "abcdef-1", "policy_base_url": "http://h/v1", "nested": {"other": "ghijkl"}})

    assert masking.shown(["x"], "Bearer abcdef-1 ghijkl") == f"Bearer {MASK} {MASK}"
    assert masking.shown(["base_url"], "http://h/v1") == "http://h/v1"


def test_a_short_variable_is_masked_only_where_it_stands_alone() -> None:
    masking = Masking({"pin": "17"})

    assert masking.shown(["x"], "17") == MASK
    assert masking.shown(["x"], "port 1717") == "port 1717"


def test_the_password_in_an_address_is_masked_in_lists_too() -> None:
    assert NONE.shown(["bus", "urls"], ["nats://me:pw@h:1", 3]) == [f"nats://me:{MASK}@h:1", 3]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:p@ss/w,rd@host/v1", f"http://me:{MASK}@host/v1"),
        ("http://token123456@host", f"http://{MASK}@host"),
        ("http://token123456:@host", f"http://{MASK}@host"),
        ("http://me:hush/hush2@host", f"http://me:{MASK}@host"),
        ("nats://me:pw@a:1, nats://b,tls://pw@c", f"nats://me:{MASK}@a:1, nats://b,tls://{MASK}@c"),
        ("me:pw@h:4222", f"me:{MASK}@h:4222"),
        ("http://h:8000/v1/@org/model", "http://h:8000/v1/@org/model"),
    ],
)
def test_an_address_is_shown_without_its_password_or_token(address: str, shown: str) -> None:
    assert NONE.shown(["bus", "url"], address) == shown


def test_an_at_sign_makes_no_address_of_a_text_but_an_address_within_it_is_masked() -> None:
    assert NONE.shown(["model"], "org-model@v2") == "org-model@v2"
    assert NONE.shown(["note"], "see http://me:pw@h/v1") == f"see http://me:{MASK}@h/v1"


@pytest.mark.parametrize(
    ("address", "redacted"),
    [
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("http://me:pw@h:8000/v1", "http://h:8000/v1"),
        ("http://token@h/v1", "http://h/v1"),
        ("http://me:p@w,/:?#@[::1]:80/v1", "http://[::1]:80/v1"),
        ("me:pw@h/v1", "h/v1"),
        ("http://h:8000/v1/@org/model", "http://h:8000/v1/@org/model"),
        ("http://[::1]:80/@org", "http://[::1]:80/@org"),
        ("nats://me:pw@a:1, nats://b,tls://me:pw@c", "nats://a:1, nats://b,tls://c"),
    ],
)
def test_an_address_is_shown_without_user_and_password(address: str, redacted: str) -> None:
    assert redact(address) == redacted


def test_user_and_password_are_what_is_missing_of_the_address() -> None:
    assert split_credentials("http://me:p@w@h/v1") == ("http://h/v1", "me:p@w")
    assert split_credentials("http://h/v1") == ("http://h/v1", "")
