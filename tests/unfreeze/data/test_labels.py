"""Labels that may be mistakes are reported."""

from pathlib import Path

import pytest

from unfreeze.data.labels import look_alikes, strange_labels
from unfreeze.data.sources import read_source


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        (["Cat", "cat", "CAT"], "capitals"),
        (["3", "3.0", "03"], "as text, not as numbers"),
        (["golden retriever", "golden\u00a0retriever", "golden  retriever"], "blanks, hyphens or characters that cannot be seen"),
        (["dog", "dog\u200b"], "blanks, hyphens or characters that cannot be seen"),
        (["T-shirt", "t_shirt"], "capitals and blanks, hyphens or characters that cannot be seen"),
        (["ｃａｔ", "cat"], "blanks, hyphens or characters that cannot be seen"),
    ],
)  # fmt: skip
def test_look_alikes(labels: list[str], how: str) -> None:
    [said] = look_alikes([*labels, "other", "1e5", "x1", *labels])
    assert f"their names differ only {'' if how.startswith('as') else 'in '}{how}: " in said
    assert all(repr(label) in said for label in labels) and "other" not in said


def test_labels_that_differ() -> None:
    assert look_alikes(["cat", "cats", "C", "C++", "1", "10", "100", "v1", "v1.0", "1.10.1", "naïve", "naive"]) == []


def test_missing_values_and_lists() -> None:
    missing = ["nan", "NaN", "None", "<NA>", "n/a"]
    several = ["cat dog", "dog cat", "cat|dog", "['cat']", "cat bird", "cat, dog"]
    first, second = strange_labels(["cat", "dog", "golden retriever", "n", *missing, *several])
    assert "missing values" in first and all(repr(label) in first for label in missing) and "'n'" not in first
    assert "several labels" in second and all(repr(label) in second for label in several) and "golden" not in second
    assert strange_labels(["cat", "golden retriever", "a+b", "rock & roll"]) == []


def test_a_table_says_so_and_keeps_them(tmp_path: Path) -> None:
    labels = ["3", "3.0", "dog", "dog\u200b", "nan", "dog cat"]
    for i in range(len(labels)):
        (tmp_path / f"{i}.png").touch()
    rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    (tmp_path / "x.csv").write_text(f"path,label\n{rows}", encoding="utf-8")
    table = read_source(str(tmp_path / "x.csv"))
    assert sorted(table["label"]) == sorted(labels) and len(table.attrs["notes"]) == 4


def test_folders_are_not_taken_for_missing_values(tmp_path: Path) -> None:
    for name in ("none", "rust"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    assert read_source(str(tmp_path)).attrs["notes"] == []
