"""Sources of labelled images: folders, CSV files and the sample; and mistakes that users make in them."""

import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unfreeze.data.folders import walk
from unfreeze.data.sources import COLUMNS, read_source
from unfreeze.errors import UserError

Touch = Callable[..., None]


@pytest.fixture
def touch(tmp_path: Path) -> Touch:
    """Function that creates files. They are never opened, so they need not be images."""

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return make


def rows(source: object) -> list[tuple[str, str, str]]:
    table = read_source(str(source))
    assert list(table.columns) == COLUMNS
    return list(table[["path", "label", "split"]].itertuples(index=False, name=None))


def refused(source: object) -> str:
    with pytest.raises(UserError) as caught:
        read_source(str(source))
    message = str(caught.value)
    assert message.startswith("data.source")
    return message


def test_a_folder_with_a_subfolder_per_class(tmp_path: Path, touch: Touch) -> None:
    touch("dog/b.PNG", "dog/a.jpg", "cat/deep/er/no ending", "cat/x.unknown", "loose.jpg")
    assert rows(tmp_path) == [
        ("cat/deep/er/no ending", "cat", ""),
        ("cat/x.unknown", "cat", ""),
        ("dog/a.jpg", "dog", ""),
        ("dog/b.PNG", "dog", ""),
    ]
    assert all(os.path.isabs(file) and os.path.exists(file) for file in read_source(str(tmp_path))["file"])


def test_what_lies_beside_images_is_left_out(tmp_path: Path, touch: Touch) -> None:
    litter = (
        ".DS_Store",
        "._a.jpg",
        "Thumbs.db",
        "desktop.ini",
        "notes.txt",
        "a.json",
        "b.XML",
        "c.html",
        "d.py",
        "Icon\r",
    )
    touch("cat/a.jpg", "dog/b.jpg", *(f"cat/{name}" for name in litter))
    touch("__MACOSX/cat/a.jpg", ".git/c.jpg", "dog/.cache/d.jpg", "cat/__MACOSX/e.jpg", "empty/readme.md")
    assert [path for path, _, _ in rows(tmp_path)] == ["cat/a.jpg", "dog/b.jpg"]


@pytest.mark.parametrize(
    "names",
    [
        ("train", "valid", "test"),
        ("Training", "VALIDATION", "Testing"),
        ("trn", "val", "tst"),
        ("TRAIN", "dev", "test"),
    ],
)
def test_folders_for_splits_in_the_usual_spellings(tmp_path: Path, touch: Touch, names: tuple[str, str, str]) -> None:
    for name in names:
        touch(f"{name}/a/1.jpg", f"{name}/b/deep/2.jpg")
    touch("models/c/3.jpg")
    expected = [(f"{n}/{f}", f[0], s) for n, s in zip(names, ("train", "valid", "test"), strict=True) for f in ("a/1.jpg", "b/deep/2.jpg")]  # fmt: skip
    assert rows(tmp_path) == sorted(expected)


def test_only_some_splits_are_given(tmp_path: Path, touch: Touch) -> None:
    touch("train/a/1.jpg", "train/b/2.jpg", "testing/a/3.jpg")
    assert {split for _, _, split in rows(tmp_path)} == {"train", "test"}


def test_a_class_may_be_called_train(tmp_path: Path, touch: Touch) -> None:
    touch("bus/1.jpg", "car/2.jpg", "train/3.jpg")
    assert rows(tmp_path) == [("bus/1.jpg", "bus", ""), ("car/2.jpg", "car", ""), ("train/3.jpg", "train", "")]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (("train/1.jpg", "valid/2.jpg"), "train"),
        (("train/a/1.jpg", "train/b/1.jpg", "valid/2.jpg"), "valid"),
        (("train/a/1.jpg", "train/b/1.jpg", "test/2.jpg"), "test"),
        (("valid/a/1.jpg", "test/b/1.jpg"), "none for training"),
    ],
)
def test_split_folders_without_classes_are_no_classes(
    tmp_path: Path, touch: Touch, files: tuple[str, ...], named: str
) -> None:
    touch(*files)
    message = refused(tmp_path)
    assert named in message and ("subfolder for each class" in message or "train" in message)


def test_links_are_followed_but_never_in_circles(tmp_path: Path, touch: Touch) -> None:
    touch("data/cat/a.jpg", "data/dog/b.jpg", "store/c.jpg", "store/deep/d.jpg")
    cat = tmp_path / "data/cat"
    (cat / "store").symlink_to(tmp_path / "store")
    (cat / "again").symlink_to(tmp_path / "store/deep")
    (cat / "up").symlink_to(tmp_path / "data/cat")
    (cat / "one.jpg").symlink_to(tmp_path / "store/c.jpg")
    (cat / "itself").symlink_to("itself")
    (tmp_path / "store/deep/top").symlink_to(tmp_path / "store")
    (tmp_path / "data/bird").symlink_to(tmp_path / "store")
    found = rows(tmp_path / "data")
    assert [path for path, label, _ in found if label == "bird"] == ["bird/c.jpg", "bird/deep/d.jpg"]
    files = [os.path.realpath(tmp_path / "data" / path) for path, label, _ in found if label == "cat"]
    assert sorted(os.path.basename(f) for f in files) == ["a.jpg", "c.jpg", "c.jpg", "d.jpg", "itself"]


def test_many_links_to_each_other_take_no_time(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"a/{i}").mkdir(parents=True)
        (tmp_path / f"a/{i}/x.jpg").touch()
        for j in range(40):
            (tmp_path / f"a/{i}/to{j}").symlink_to(tmp_path / f"a/{j}")
    assert len(list(walk(str(tmp_path / "a")))) == 40


def test_folders_deeper_than_python_recurses(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a/x.jpg", "b/x.jpg")
    depth = sys.getrecursionlimit() + 100
    monkeypatch.chdir(tmp_path / "a")
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("y.jpg").touch()
    try:
        assert [label for _, label, _ in rows(tmp_path)] == ["a", "a", "b"]
    finally:
        os.remove("y.jpg")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")


def test_names_of_every_kind(tmp_path: Path) -> None:
    names = [
        "a b.jpg",
        "a,b;c\"d'.jpg",
        "ü🐈‍⬛.jpg",
        "x" * 251 + ".jpg",
        "%20 #&.jpg",
        "line\nfeed.jpg",
        "tab\x1b[31m\r.jpg",
    ]
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog/x.jpg").touch()
    for name in names:
        (tmp_path / "cat" / name).touch()
    raw = os.fsencode(tmp_path) + b"/cat/caf\xe9.jpg"
    open(raw, "w").close()
    table = read_source(str(tmp_path))
    assert len(table) == len(names) + 2 and all(os.path.exists(file) for file in table["file"])
    assert os.fsencode(table.set_index("path")["file"]["cat/caf\\udce9.jpg"]) == raw
    assert {f"cat/{name}" for name in names[:-1]} < set(table["path"]) and "cat/tab\\x1b[31m\\r.jpg" in set(
        table["path"]
    )
    table["path"].map(str.encode)  # the paths can be stored


def test_the_order_does_not_depend_on_the_file_system(
    tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(*(f"{label}/{i}.jpg" for label in "ab" for i in range(30)))
    expected = read_source(str(tmp_path))
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder: str) -> None:
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self) -> object:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    pd.testing.assert_frame_equal(read_source(str(tmp_path)), expected)


def test_relative_folders(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("home/photos/a/1.jpg", "home/photos/b/2.jpg", "here/x")
    expected = rows(tmp_path / "home/photos")
    monkeypatch.chdir(tmp_path / "here")
    assert rows("../home/photos") == rows("../home/photos/") == expected
    table = read_source("../home/photos")
    monkeypatch.chdir("/")
    assert all(os.path.isfile(file) for file in table["file"])


def test_missing_empty_and_strange_sources(tmp_path: Path, touch: Touch) -> None:
    touch(
        "single/cat/a.jpg", "wrapped/photos/cat/a.jpg", "wrapped/photos/dog/b.jpg", "a.jpg", "a.parquet", "loose/b.jpg"
    )
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/no" in refused(tmp_path / "no")
    assert "does not exist" in refused("~nobody-of-this-name/photos") and "does not exist" in refused("a\0b")
    assert "no images" in refused(tmp_path / "empty") and "no images" in refused(tmp_path / "loose")
    assert "two classes" in refused(tmp_path / "single") and "'cat'" in refused(tmp_path / "single")
    assert f"{tmp_path}/wrapped/photos" in refused(tmp_path / "wrapped")
    assert "neither" in refused(tmp_path / "a.jpg") and "neither" in refused(tmp_path / "a.parquet")
    assert "sample:elpv" in refused("sample:elpw")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if folder.endswith("/b"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refused(tmp_path) == f"data.source: {tmp_path}/b cannot be read: Permission denied."


def test_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_source("sample:elpv")
    assert table["label"].value_counts().to_dict() == {"functional": 1803, "defective": 821}
    assert table["path"][0] == "images/cell0001.png" and all(map(os.path.isfile, table["file"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "elpv-dataset" in refused("sample:elpv")


def write_csv(folder: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t", ", "])
@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
def test_csv_of_every_dialect(tmp_path: Path, touch: Touch, encoding: str, separator: str, line: str) -> None:
    touch("a.jpg", "in/b, c;d.jpg", 'q"q.jpg', "ü.jpg")
    lines = [
        ["Label", "PATH", "group", "other", "Split"],
        ["x", "a.jpg", "7", "?", "Training"],
        ["y", '"./in/b, c;d.jpg"', "007", "", "val"],
        ["y", '"q""q.jpg"', "", "", "TEST"],
        ["1", "ü.jpg", "", "", ""],
        ["", "", "", "", ""],
    ]
    file = write_csv(tmp_path, line.join(separator.join(cells) for cells in lines).encode(encoding))
    for source in (tmp_path, file):
        assert rows(source) == [
            ("a.jpg", "x", "train"),
            ("in/b, c;d.jpg", "y", "valid"),
            ('q"q.jpg', "y", "test"),
            ("ü.jpg", "1", ""),
        ]
        assert read_source(str(source))["group"].tolist() == ["7", "007", "", ""]


def test_csv_with_a_lone_return_in_a_cell(tmp_path: Path, touch: Touch) -> None:
    touch("a.jpg", "b.jpg")
    write_csv(tmp_path, b'path,label,group\na.jpg,x,"1\r2"\nb.jpg,y,\n')
    assert read_source(str(tmp_path))["group"].tolist() == [r"1\r2", ""]


def test_csv_with_only_the_columns_that_it_needs(tmp_path: Path, touch: Touch) -> None:
    touch("a.jpg", "b.jpg", "NA")
    file = write_csv(tmp_path, "path,label\nb.jpg,null\na.jpg,NA\n./b.jpg,null\nNA,1e5\n", "all.CSV")
    table = read_source(str(file))
    assert rows(file) == [("NA", "1e5", ""), ("a.jpg", "NA", ""), ("b.jpg", "null", "")]
    assert table["file"].tolist() == [str(tmp_path / name) for name in ("NA", "a.jpg", "b.jpg")]


def test_csv_may_name_its_files_in_full(tmp_path: Path, touch: Touch) -> None:
    touch("a.jpg", "in/b.jpg")
    assert rows(write_csv(tmp_path, f"path,label\n{tmp_path}/a.jpg,x\n{tmp_path}/in/../in/b.jpg,y\n")) == [
        ("a.jpg", "x", ""),
        ("in/b.jpg", "y", ""),
    ]


def test_csv_and_disk_in_two_forms_of_unicode(tmp_path: Path, touch: Touch) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    touch(f"{apart}.jpg", f"{composed}.png", "b.jpg")
    file = write_csv(
        tmp_path, f"path,label,group\n{composed}.jpg,{apart},{apart}\n{composed}.png,{composed},{composed}\nb.jpg,b,\n"
    )
    table = read_source(str(file))
    assert set(table["label"]) == {"b", composed} and set(table["group"]) == {"", composed}
    assert all(map(os.path.isfile, table["file"]))


def test_the_header_tells_the_separator_whatever_the_lines_below_hold(tmp_path: Path, touch: Touch) -> None:
    touch("a.jpg", "b.jpg")
    for line in ("\n", "\r\n", "\r"):
        file = write_csv(tmp_path, line.join(("path;label", "a.jpg;x, y, z, and more", "b.jpg;y,,,,,")))
        assert [label for _, label, _ in rows(file)] == ["x, y, z, and more", "y,,,,,"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no column path", "no column label"]),
        ("path,label\n", ["no images"]),
        ("path\na.jpg\n", ["no column label", "path"]),
        ("file,label\na.jpg,x\n", ["no column path", "file, label"]),
        ("path,label,label\na.jpg,x,y\n", ["more than one column label"]),
        ("path,label\na.jpg,x\nb.jpg,x\n", ["two classes"]),
        ("path,label\na.jpg,x\nb.jpg,\n", ["b.jpg", "no label"]),
        ("path,label\na.jpg,x\n,y\n", ["no path"]),
        ("path,label\na.jpg,x\nno1.jpg,y\nno2.jpg,y\nno3.jpg,y\nno4.jpg,y\n", ["of 5 rows", "4 name a file", "'no1.jpg', 'no2.jpg', 'no3.jpg'."]),
        ("path,label\na.jpg,x\nfolder,y\n", ["does not exist", "folder"]),
        ("path,label\na.jpg,x\na\0.jpg,y\n", ["does not exist"]),
        ("path,label\na.jpg,x\n../out.jpg,y\n", ["lead out of the folder", "'../out.jpg'"]),
        ("path,label\na.jpg,x\nfolder/../../out.jpg,y\n", ["lead out of the folder", "'../out.jpg'"]),
        ("path,label\na.jpg,x\n/etc/passwd,y\n", ["lead out of the folder"]),
        ("path,label\na.jpg,x\n../in2/a.jpg,y\n", ["lead out of the folder"]),
        ("path,label\na.jpg,x\nfolder\\..\\..\\out.jpg,y\n", ["lead out", "../out.jpg"]),
        ("path|label\na.jpg|x\n", ["no column path", "path|label"]),
        ("path,label\na.jpg,x\nb.jpg," + "y" * 200_000 + "\n", ["line 3", "not CSV", "field larger"]),
        ("path,label\na.jpg,x\nb.jpg,y\n./a.jpg,y\n", ["twice", "a.jpg"]),
        ("path,label,split\na.jpg,x,train\na.jpg,x,test\nb.jpg,y,test\n", ["twice", "a.jpg"]),
        ("path,label,split\na.jpg,x,train\nb.jpg,y,holdout\n", ["b.jpg", "train, valid or test"]),
        ("path,label\na.jpg,x\nb, c.jpg,y\n", ["line 3", "quotes"]),
        ('path,label\na.jpg,x\n"b.jpg,y\n', ["line", "not CSV"]),
        ("path,label\na.jpg,caf\xe9\nb.jpg,y\n".encode("latin-1"), ["UTF-8"]),
    ],
)  # fmt: skip
def test_csv_that_is_wrong_is_refused_in_a_sentence(
    tmp_path: Path, touch: Touch, text: str | bytes, words: list[str]
) -> None:
    touch("in/a.jpg", "in/b.jpg", "in/folder/c.jpg", "out.jpg")
    message = refused(write_csv(tmp_path / "in", text))
    assert all(word in message for word in words), message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=80), st.text('pathlbe,;\t"\n\r\0 ./', max_size=80).map(lambda t: f"path,label\n{t}".encode())
    )
)
def test_any_csv_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    try:
        table = read_source(str(write_csv(tmp_path, content)))
    except UserError as error:
        assert str(error).startswith("data.source")
    else:
        assert set(table["path"]) <= {"a", "b", "labels.csv"}


def test_files_are_listed_without_a_look_at_each(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(f"{label}/{i}.jpg" for label in "abc" for i in range(200)))
    looks: list[str] = []

    def spy(name: str) -> None:
        original = getattr(os, name)

        def look(path: object, *args: object, **kwargs: object) -> object:
            looks.append(str(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(os, name, look)

    spy("stat")
    spy("lstat")
    assert len(read_source(str(tmp_path))) == 600
    assert not [look for look in looks if look.endswith(".jpg")]  # files are not accessed before they are decoded


def test_walk_visits_files_before_the_folders_beside_them(tmp_path: Path, touch: Touch) -> None:
    touch("a/2.jpg", "a/1/x.jpg", "b/3.jpg", "a/notes.txt")
    assert [os.path.relpath(file, tmp_path) for file in walk(str(tmp_path))] == ["a/2.jpg", "a/1/x.jpg", "b/3.jpg"]
