"""CSV files as written by spreadsheets and other systems."""

from pathlib import Path

import pytest

from unfreeze.data.sources import read_source
from unfreeze.errors import UserError


def listed(folder: Path, text: str, *files: str) -> list[tuple[str, str]]:
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "labels.csv").write_bytes(text.encode("utf-8-sig"))
    return list(read_source(str(folder))[["path", "label"]].itertuples(index=False, name=None))


def test_paths_as_windows_writes_them(tmp_path: Path) -> None:
    text = "path,label\r\na\\1.png,x\r\n.\\a\\2.png,y\r\nb\\3.png,y\r\n"
    found = listed(tmp_path, text, "a/1.png", "a/2.png", "b\\3.png")  # the last file name contains a backslash
    assert found == [("a/1.png", "x"), ("a/2.png", "y"), ("b\\3.png", "y")]


def test_paths_as_windows_writes_them_stay_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 lead out of the folder .*: '\.\./1\.png'"):
        listed(tmp_path / "in", "path,label\n..\\1.png,x\na.png,y\n", "a.png", "../1.png")


@pytest.mark.parametrize("first", ["sep=;", "SEP=; ", '"sep=;"', "sep=|"])
def test_a_line_for_excel_that_states_the_separator(tmp_path: Path, first: str) -> None:
    rows = [line.replace(";", first.strip('" ')[-1]) for line in ("path;label", "a,b,c.png;x", "2.png;y")]
    assert listed(tmp_path, "\r\n".join([first, *rows]), "a,b,c.png", "2.png") == [("2.png", "y"), ("a,b,c.png", "x")]
