"""Detection of splits, classes and masks in the folder layouts of public data sets."""

import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from unfreeze.data.folders import SPLITS, exclusion, split_of
from unfreeze.data.sources import read_source
from unfreeze.errors import UserError


def layout(root: Path, *names: str, count: int = 2) -> str:
    """Create folders with empty files, which are never opened. A name with a suffix is a single such file."""
    for name in names:
        files = [root / name] if Path(name).suffix else [root / name / f"{i}.jpg" for i in range(count)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return str(root)


def found(source: str, exclude: str | None = None) -> dict[tuple[str, str], int]:
    table = read_source(source, exclude)
    return dict(Counter(zip(table["label"], table["split"], strict=True)))


def notes(source: str, exclude: str | None = None) -> str:
    return "\n".join(read_source(source, exclude).attrs["notes"])


def refused(source: str, exclude: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_source(source, exclude)
    return str(caught.value)


@pytest.mark.parametrize(
    "form",
    ["{}", "{}_set", "{}ing_set", "seg_{}", "{}set", "{}Set", "{}-images", "{} data", "{}2017", "images_{}", "{}_1"],
)
@pytest.mark.parametrize("word", ["train", "Train", "test", "TEST"])
def test_spellings_of_splits(form: str, word: str) -> None:
    assert split_of(form.format(word)) == word.lower()


@pytest.mark.parametrize(
    "name", ["", "cats", "data", "set", "seg_pred", "train_test", "test tube", "training shoes", "freight train", "contest", "2017"]
)  # fmt: skip
def test_what_is_no_split(name: str) -> None:
    assert split_of(name) == ""


def test_every_spelling_is_in_the_docs() -> None:
    table = (Path(__file__).parents[3] / "docs/data-reference.md").read_text(encoding="utf-8")
    assert all(f"`{word}`" in table for word in SPLITS)


def test_a_folder_of_the_same_name_within_each_split(tmp_path: Path) -> None:
    source = layout(
        tmp_path, *(f"seg_{split}/seg_{split}/{label}" for split in ("train", "test") for label in ("sea", "forest")),
        "seg_pred/seg_pred",
    )  # fmt: skip
    assert found(source) == {(label, split): 2 for split in ("train", "test") for label in ("sea", "forest")}
    assert notes(source).splitlines() == [
        "Splits: seg_test/seg_test is test, seg_train/seg_train is train.",
        "Not read, as they lie beside the folders of splits: 'seg_pred'.",
    ]


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ("training_set/training_set", "test_set/test_set"),
        ("training/training", "validation/validation"),
        ("train/images", "val/images"),
        ("Train/trn/data", "Valid"),
        ("train/train", "train/train"),
    ],
)
def test_wrapped_splits(tmp_path: Path, train: str, valid: str) -> None:
    source = layout(tmp_path, *(f"{split}/{label}" for split in (train, valid) for label in ("n0", "n1")))
    assert {label for label, _ in found(source)} == {"n0", "n1"} and ("n0", "train") in found(source)


def test_plain_splits_need_no_words(tmp_path: Path) -> None:
    assert notes(layout(tmp_path, "train/a", "train/b", "test/a", "test/b")) == ""


def test_splits_in_a_split(tmp_path: Path) -> None:
    source = layout(tmp_path, "train/train/a", "train/train/b", "train/val/a", "train/val/b")
    assert "Then set data.source to it" in refused(source) and f"{tmp_path}/train" in refused(source)


def test_names_that_may_be_splits_are_refused(tmp_path: Path) -> None:
    source = layout(tmp_path, "my_trainers/cat", "my_trainers/dog", "my_tests/cat", "my_tests/dog")
    said = refused(source)
    assert (
        "are the folders 'my_tests', 'my_trainers' splits? Each has 'cat', 'dog' in it" in said
        and "data.exclude" in said
    )


def test_the_same_folders_in_every_class_are_said(tmp_path: Path) -> None:
    source = layout(tmp_path, "cat/indoor", "cat/outdoor", "dog/indoor", "dog/outdoor")
    assert found(source) == {("cat", ""): 4, ("dog", ""): 4}
    assert "Each of the classes 'cat', 'dog' has the folders 'indoor', 'outdoor' in it" in notes(source)


def test_splits_below_every_class(tmp_path: Path) -> None:
    labels = ("bottle", "cable")
    source = layout(
        tmp_path,
        *(f"{label}/{rest}" for label in labels for rest in ("train/good", "test/good", "test/scratch", "ground_truth/scratch")),
    )  # fmt: skip
    assert found(source) == {(label, split): n for label in labels for split, n in (("train", 2), ("test", 4))}
    assert notes(source).splitlines() == [
        "Splits, in the folder of each class: test is test, train is train.",
        "Not read, as they lie beside the folders of splits: 'bottle/ground_truth', 'cable/ground_truth'.",
    ]


@pytest.mark.parametrize("other", ["dog", "dog/test", "dog/1.jpg", "dog/more"])
def test_splits_below_some_classes_are_refused(tmp_path: Path, other: str) -> None:
    source = layout(tmp_path, "cat/train", "cat/test", other)
    assert "the class 'cat' has folders for splits in it, but in 'dog'" in refused(source)
    assert found(source, "test") if other != "dog/test" else "two classes" in refused(source, "test")


def test_a_folder_called_train_below_a_class_is_no_split(tmp_path: Path) -> None:
    assert set(found(layout(tmp_path, "vehicles/bus", "vehicles/train", "animals/cat"))) == {
        ("vehicles", ""),
        ("animals", ""),
    }


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("{}/Imgs/{}.jpg", "{}/Imgs/{}.png"),
        ("{}/{}.png", "{}/{}_mask.png"),
        ("{}/{}.png", "{}/{}_mask_1.png"),
        ("{}/images/{}.png", "{}/masks/{}.png"),
        ("{}/images/{}.png", "{}/Ground_Truth/{}_gt.bmp"),
        ("{}/{}.png", "{}/segmentation/deep/{}.png"),
    ],
)
def test_masks_are_left_out(tmp_path: Path, images: str, masks: str) -> None:
    source = layout(
        tmp_path, *(form.format(label, i) for form in (images, masks) for label in ("crack", "free") for i in range(3))
    )
    assert found(source) == {("crack", ""): 3, ("free", ""): 3}
    assert read_source(source)["path"][0] == images.format("crack", 0)
    assert "6 files are named as masks of other images, such as crack/" in notes(source)


@pytest.mark.parametrize(
    "names",
    [
        ("mask/1.jpg", "no_mask/1.jpg"),  # these are classes
        ("a/1_mask.png", "b/2.png"),  # a mask without an image
        ("a/1.jpg", "a/1.png", "a/2.png", "b/1.png"),  # some are separate images
        ("a/masks/7.png", "a/8.png", "b/1.png"),
        ("a/1.jpg", "a/1.png", "a/2.jpg", "a/3.jpg", "b/1.png"),  # for one of three images
    ],
)
def test_what_is_named_alike_but_no_mask(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = layout(tmp_path, *names)
    assert sum(found(source).values()) == len(names) and notes(source) == ""


def test_images_and_masks_are_no_classes(tmp_path: Path) -> None:
    assert "the folders 'images', 'masks' look like images and their masks" in refused(
        layout(tmp_path, "images", "masks")
    )


def test_two_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    both = layout(tmp_path / "flat", composed, apart, "plain")
    splits = layout(tmp_path / "splits", f"train/{composed}", "train/plain", f"valid/{apart}", "valid/plain")
    for source, expected in (
        (both, {(composed, ""): 4, ("plain", ""): 2}),
        (splits, {(label, split): 2 for label in (composed, "plain") for split in ("train", "valid")}),
    ):
        assert found(source) == expected
        assert notes(source) == f"Written in two Unicode normalizations, taken as one class: '{composed}'."
    table = read_source(both)
    assert len(set(table["path"])) == 6 and all(Path(file).exists() for file in table["file"])


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (None, {"cat", "dog", "test"}),
        ("test", {"cat", "dog"}),
        (" test , *_x.jpg,", {"cat", "dog"}),
        ("t?st", {"cat", "dog"}),
        ("test/deep", {"cat", "dog"}),
        ("t*/*.jpg", {"cat", "dog"}),
    ],
)
def test_exclude(tmp_path: Path, exclude: str | None, left: set[str]) -> None:
    source = layout(tmp_path, "cat/1.jpg", "cat/1_x.jpg", "dog/1.jpg", "test/deep/1.jpg")
    assert {label for label, _ in found(source, exclude)} == left
    assert sum(found(source, exclude).values()) == len(left) + (not exclude or "_x" not in exclude)
    assert notes(source, exclude) == ""


def test_exclude_of_rows_of_a_csv_file(tmp_path: Path) -> None:
    layout(tmp_path, "in/a.jpg", "in/b.jpg", "out/a.jpg")
    (tmp_path / "x.csv").write_text("path,label\nin/a.jpg,a\n./in/b.jpg,b\nout/a.jpg,c\nout/gone.jpg,d\n")
    assert set(found(str(tmp_path / "x.csv"), "out")) == {("a", ""), ("b", "")}


def test_a_pattern_that_leaves_nothing_out_is_said(tmp_path: Path) -> None:
    said = notes(layout(tmp_path, "cat", "dog"), "0.jpg, masks, *.jgp")
    assert said == "data.exclude: nothing matches 'masks', '*.jgp'; patterns are names or paths of files and folders."


def test_patterns_may_be_in_brackets() -> None:
    excluded, unused = exclusion("[ab].jpg")
    assert excluded("x/a.jpg") and not excluded("x/c.jpg") and unused() == []


def test_a_legend_beside_class_folders_is_not_read(tmp_path: Path) -> None:
    layout(tmp_path, *(f"{label}/{i}.png" for label in range(3) for i in range(4)))
    (tmp_path / "labels.csv").write_text("ClassId,Name\n0,No entry\n1,Give way\n2,Give way\n")
    table = read_source(str(tmp_path))
    assert table["label"].value_counts().to_dict() == {"0": 4, "1": 4, "2": 4}
    assert "labels.csv is not read" in table.attrs["notes"][0]


@pytest.mark.parametrize("folders", [("train", "test"), ("images",), ("a", "b")])
def test_a_list_of_images_in_other_columns_is_no_legend(tmp_path: Path, folders: tuple[str, ...]) -> None:
    layout(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(4)))
    (tmp_path / "labels.csv").write_text("id,breed\n" + "".join(f"{i},husky\n" for i in range(4 * len(folders))))
    message = refused(str(tmp_path))
    assert "no column path" in message and "id, breed" in message and "remove it, or give it another name" in message


@pytest.mark.parametrize(("least", "left"), [(1, 10), (2, 9), (3, 7)])
def test_classes_with_fewer_images_are_left_out_and_listed(tmp_path: Path, least: int, left: int) -> None:
    layout(
        tmp_path,
        *(f"{label}/{i}.png" for label, count in (("a", 4), ("b", 3), ("two", 2), ("one", 1)) for i in range(count)),
    )
    table = read_source(str(tmp_path), min_images=least)
    assert len(table) == left
    expected = {1: [], 2: ["1, namely 'one'."], 3: ["2, namely 'one', 'two'."]}[least]
    assert [note.split("says: ")[1] for note in table.attrs["notes"]] == expected


def test_min_images_that_leaves_too_little(tmp_path: Path) -> None:
    layout(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    with pytest.raises(
        UserError, match=r"at least two classes are needed. Classes with fewer than 2 images, left out .*'b'"
    ):
        read_source(str(tmp_path), min_images=2)
    with pytest.raises(UserError, match=r"data.min_images: no class of .* has 3 images; the largest has 2"):
        read_source(str(tmp_path), min_images=3)
