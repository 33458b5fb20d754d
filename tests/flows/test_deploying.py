"""The source of a deployment's code, with a real Git repository."""

import subprocess
from pathlib import Path

import pytest

from flows.deploying import source
from unfreeze.errors import UserError


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checkout/flows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkout")
    git("init", "-q", "-b", "fix/rate")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "a")
    return tmp_path / "checkout"


def git(*words: str) -> None:
    subprocess.run(["git", *words], check=True)


def test_without_a_remote_it_is_the_checkout(checkout: Path) -> None:
    assert source() == {"repository": str(checkout), "branch": "fix/rate"}


@pytest.mark.parametrize(
    ("origin", "repository"),
    [
        ("https://me:hunter22@host/team/unfreeze.git", "https://host/team/unfreeze.git"),
        ("ssh://git@host/team/unfreeze.git", "ssh://git@host/team/unfreeze.git"),
        ("git@host:team/unfreeze.git", "git@host:team/unfreeze.git"),
    ],
)
def test_with_one_it_is_its_address_without_what_is_secret(checkout: Path, origin: str, repository: str) -> None:
    git("remote", "add", "origin", origin)
    assert source()["repository"] == repository


def test_a_remote_that_is_a_folder_is_named_for_every_worker(checkout: Path) -> None:
    (checkout.parent / "served.git").mkdir()
    git("remote", "add", "origin", "../served.git")
    assert source()["repository"] == str(checkout.parent / "served.git")


def test_there_has_to_be_a_branch(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git("checkout", "-q", "--detach")
    with pytest.raises(UserError, match="check one out"):
        source()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a git repository"):
        source()
