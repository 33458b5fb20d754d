"""One GPU for each run. The names of the GPUs are invented, the locks are real."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.process import cards
from pipeline.process.cards import VISIBLE, one_card


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path))
    monkeypatch.setattr(cards, "PAUSE", 0.05)
    yield


def test_two_runs_have_two_cards_and_a_third_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "cards", lambda: ["4", "GPU-5"])
    monkeypatch.delenv(VISIBLE, raising=False)
    third: list[str] = []

    def run() -> None:
        with one_card():
            third.append(os.environ[VISIBLE])

    with one_card():
        assert os.environ[VISIBLE] == "4"
        with one_card():
            assert os.environ[VISIBLE] == "GPU-5"
            waiting = threading.Thread(target=run)
            waiting.start()
            waiting.join(0.3)
            assert waiting.is_alive() and not third
        waiting.join(5)
        assert third == ["GPU-5"]
        assert os.environ[VISIBLE] == "4"
    assert VISIBLE not in os.environ


def test_the_cards_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, names in (("", []), ("-1", []), ("1", ["1"]), ("0,MIG-7/1", ["0", "MIG-7/1"])):
        monkeypatch.setenv(VISIBLE, visible)
        assert cards.cards() == names


def test_without_a_card_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    with one_card():
        assert os.environ[VISIBLE] == ""
