"""Keep passwords out of logs, MLflow and Prefect."""

import os
import re
from urllib.parse import unquote

_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]*@")
_SECRET = r"password|passwd|token|secret|api_?key|access_?key|auth_string|signature|credential"
_QUERY = re.compile(rf"(?i)([?&][^=&\s]*(?:{_SECRET})[^=&\s]*=)[^&\s'\"]+")
_NAME = re.compile(rf"(?i)(?:^|_)(?:{_SECRET})|(?:_key|token|secret|password)$")
_PASSWORD = re.compile(r"://[^/\s:]*:([^/\s]+)@")
SHORTEST = 6
"""Smallest length of a secret that is masked anywhere in a text: shorter ones would match parts of words."""


def mask(text: str) -> str:
    """Mask credentials in a text.

    In addresses, users, passwords, and values of query parameters that are named like a secret are masked. In the
    whole text, the values of environment variables that are named like a secret are masked, and the passwords of
    addresses in any environment variable.
    """
    text = _QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", text))
    for value in _secrets():
        text = text.replace(value, "***")
    return text


def without_credentials(address: str) -> str:
    """An address without user and password, which can be opened and shown to anyone."""
    return _CREDENTIALS.sub("", address)


def _secrets() -> list[str]:
    found = {value for name, value in os.environ.items() if _NAME.search(name) and not os.path.exists(value)}
    found |= {value.partition(":")[2] for value in found if ":" in value}  # user:password
    for value in os.environ.values():
        if "://" in value:
            found |= {form for password in _PASSWORD.findall(value) for form in (password, unquote(password))}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)
