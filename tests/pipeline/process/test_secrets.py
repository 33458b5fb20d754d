"""Secrets are masked everywhere; other text is unchanged."""

import logging

import pytest

from pipeline.process.secrets import mask, without_credentials
from pipeline.step import masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pass@host:5000/x", "https://***@host:5000/x"),
        ("at https://ann:p@ss@host, and ftp://token@other/", "at https://***@host, and ftp://***@other/"),
        ("postgresql+psycopg://ann:p%2Fs@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
        ("https://host/x?a=1&X-Amz-Signature=abc&token=def", "https://host/x?a=1&X-Amz-Signature=***&token=***"),
        ("ann@example.org, sqlite:///mlflow.db, ../photos", "ann@example.org, sqlite:///mlflow.db, ../photos"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_secrets_of_the_environment_are_found_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-long-token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:sw%40rdfish@host")
    monkeypatch.setenv("HARMLESS", "photographs")
    monkeypatch.setenv("KEYBOARD", "qwertzuiop")
    text = mask("a-long-token abc/def+ghi sw%40rdfish sw@rdfish photographs qwertzuiop")
    assert text == "*** *** *** *** photographs qwertzuiop"


@pytest.mark.parametrize("name", ["WANDB_KEY", "SSH_PRIVATE_KEY", "GITHUBTOKEN", "DBPASSWORD"])
def test_names_of_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "correct horse")
    assert mask("says correct horse") == "says ***"


def test_of_a_user_with_a_password_the_password_is_masked_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect has the user and the password in one variable."""
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ann:swordfish")
    assert mask("ann:swordfish and swordfish of ann") == "*** and *** of ann"


def test_an_address_to_be_opened_has_no_credentials() -> None:
    assert without_credentials("https://ann:pass@host/x") == "https://host/x"


def test_a_log_record_is_masked_with_its_arguments() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "at %s", ("https://ann:pass@host",), None)
    assert masked(record) and record.getMessage() == "at https://***@host"
