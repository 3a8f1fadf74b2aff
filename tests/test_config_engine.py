"""What may be said of an engine on the command line."""

from __future__ import annotations

import pytest

from deepalign import AuditConfig, UserError
from deepalign.config_engine import engine_urls


def test_addresses() -> None:
    assert engine_urls("hf") == ()
    assert engine_urls("openai:http://127.0.0.1:8000/v1") == ("http://127.0.0.1:8000/v1",)
    assert engine_urls("openai:http://a:1/v1/, https://b/v1") == ("http://a:1/v1", "https://b/v1")


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ("vllm", "give hf, or openai:URL"),
        ("openai", "give hf, or openai:URL"),
        ("openai:", "the address, '', is none"),
        ("openai:localhost:8000", "the address, 'localhost:8000', is none"),
        ("openai:http://a:1/v1,htp://b:2/v1", "address 2 of 2, 'htp://b:2/v1', is none"),
        ("openai:http://a:1/v1,", "address 2 of 2, '', is none"),
        ("openai:http://a:port/v1", "is none"),
        ("openai:http://a:1 http://b:1", "is none"),
        ("openai:http://a/v1,http://a/v1/", "names 'http://a/v1' twice"),
    ],
)
def test_mistakes_in_addresses(engine: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        AuditConfig(model="m", engine=engine)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        engine_urls("openai:http://ann:secret@a:port/v1")
    assert "secret" not in str(caught.value)


def test_a_key_given_for_the_name_of_its_variable_is_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        AuditConfig(model="m", engine="openai:http://a/v1", engine_key_env="sk-secret")
    assert "secret" not in str(caught.value)


def test_too_few_requests() -> None:
    with pytest.raises(UserError, match="--engine-concurrency 0"):
        AuditConfig(model="m", engine_concurrency=0)
