"""From files to packed pixels: sources, splits, decoding, packing, duplicates."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from unfreeze.decoding import BrokenImage, decode, resize_shorter
from unfreeze.duplicates import find_duplicates
from unfreeze.errors import UserError
from unfreeze.packed import open_packed
from unfreeze.packing import pack
from unfreeze.settings import Data, load_settings
from unfreeze.sources import read_source
from unfreeze.splits import assign_splits

DATA = load_settings(Path(__file__).parent.parent / "params.yaml").data


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def settings(folder: Path, **changes: object) -> Data:
    return dataclasses.replace(DATA, source=str(folder), image_size=32, valid=0.2, test=0.2, **changes)  # type: ignore[arg-type]


def test_a_folder_of_classes_is_walked_and_litter_is_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png")
    picture(tmp_path / "cat/deep/er/b c.PNG")
    picture(tmp_path / "dog/ü\n.jpg")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", ".hidden.png"):
        (tmp_path / "cat" / name).write_text("x")
    (tmp_path / "cat/loop").symlink_to(tmp_path / "cat")
    table = read_source(str(tmp_path))
    assert table["path"].tolist() == ["cat/a.png", "cat/deep/er/b c.PNG", "dog/ü\n.jpg"]
    assert table["label"].tolist() == ["cat", "cat", "dog"] and set(table["split"]) == {""}


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Training", "val", "testing"), ("TRAIN", "dev", "tst")])
def test_the_usual_names_of_splits_are_understood(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        for label in "ab":
            picture(tmp_path / name / label / "x.png")
    table = read_source(str(tmp_path))
    assert sorted(set(table["split"])) == ["test", "train", "valid"] and set(table["label"]) == {"a", "b"}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_is_read_with_any_separator_and_bom(tmp_path: Path, separator: str) -> None:
    for name in ("a.png", "b, c.png", "d.png"):
        picture(tmp_path / name)
    rows = [
        ("path", "label", "split"),
        ("a.png", "x", "train"),
        ('"b, c.png"', "y", "val"),
        ("d.png", "y", "Train"),
        ("d.png", "y", "Train"),
    ]
    (tmp_path / "labels.csv").write_text("\n".join(separator.join(r) for r in rows), encoding="utf-8-sig")
    for source in (tmp_path, tmp_path / "labels.csv"):
        table = read_source(str(source))
        assert table["path"].tolist() == ["a.png", "b, c.png", "d.png"]
        assert table["split"].tolist() == ["train", "valid", "train"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.png,x", "path"),
        ("path,label\ngone.png,x\na.png,y", "gone.png"),
        ("path,label\n../out.png,x\na.png,y", "out"),
        ("path,label\na.png,x\na.png,y", "twice"),
        ("path,label\na.png,\na.png,y", "no label"),
        ("path,label,split\na.png,x,holdout", "split"),
        ("path,label\na.png,x", "two classes"),
    ],
)
def test_a_wrong_csv_is_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "out.png")
    (tmp_path / "in/labels.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_source(str(tmp_path / "in/labels.csv"))


def test_missing_empty_and_strange_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "single/cat/a.png")
    for source, words in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "empty", "no images"),
        (tmp_path / "single", "two classes"),
        (tmp_path / "single/cat/a.png", "neither"),
        ("sample:elpw", "sample:elpv"),
    ):
        with pytest.raises(UserError, match=words):
            read_source(str(source))


def test_the_sample_has_the_published_numbers() -> None:
    counts = read_source("sample:elpv")["label"].value_counts()
    assert counts.to_dict() == {"functional": 1803, "defective": 821}


def frame(labels: list[str], digests: list[str], groups: list[str], split: str = "") -> pd.DataFrame:
    return pd.DataFrame({"label": labels, "digest": digests, "group": groups, "split": split})


def test_splits_are_stratified_and_seeded() -> None:
    labels = ["a"] * 200 + ["b"] * 50
    table = frame(labels, [str(i) for i in range(250)], [""] * 250)
    split = assign_splits(table, 0.1, 0.2, 3)
    counts = pd.crosstab(table["label"], split)
    assert counts.loc["a"].to_dict() == {"test": 40, "train": 140, "valid": 20}
    assert counts.loc["b"].to_dict() == {"test": 10, "train": 35, "valid": 5}
    assert split.equals(assign_splits(table, 0.1, 0.2, 3))
    assert not split.equals(assign_splits(table, 0.1, 0.2, 4))


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(-20, 12)), min_size=60, max_size=120))
def test_duplicates_and_groups_never_part(rows: list[tuple[str, int, int]]) -> None:
    table = frame([r[0] for r in rows], [str(r[1]) for r in rows], [str(r[2]) if r[2] >= 0 else "" for r in rows])
    try:
        split = assign_splits(table, 0.2, 0.2, 0)
    except UserError:
        return
    assert set(split) <= {"train", "valid", "test"}
    for column in ("digest", "group"):
        named = table[column] != ""
        assert (split[named].groupby(table.loc[named, column]).nunique() == 1).all()


def test_given_splits_stand_and_only_what_is_missing_is_made() -> None:
    table = frame(["a", "b"] * 20, [str(i) for i in range(40)], [""] * 40, "train")
    table.loc[:9, "split"] = "test"
    split = assign_splits(table, 0.2, 0.2, 0)
    assert (split[:10] == "test").all() and set(split[10:]) == {"train", "valid"}
    table.loc[10:19, "split"] = "valid"
    assert assign_splits(table, 0.2, 0.2, 0).tolist() == table["split"].tolist()


def test_a_class_with_too_few_images_is_named() -> None:
    table = frame(["a"] * 20 + ["rare"] * 2, [str(i) for i in range(22)], [""] * 22)
    with pytest.raises(UserError, match="rare"):
        assign_splits(table, 0.2, 0.2, 0)


def test_modes_are_read_as_people_see_them(tmp_path: Path) -> None:
    rgb = Image.open(picture(tmp_path / "a.png"))
    ramp = np.linspace(0, 65535, 40 * 32).reshape(32, 40).astype(np.uint16)
    cases = {
        "cmyk.jpg": (
            rgb.convert("CMYK"),
            np.asarray(Image.merge("CMYK", rgb.convert("CMYK").split()).convert("RGB")),
            40,
        ),
        "grey.png": (rgb.convert("L"), np.asarray(rgb.convert("L").convert("RGB")), 0),
        "sixteen.png": (Image.fromarray(ramp), np.repeat((ramp / 257).round()[..., None], 3, 2), 1),
        "palette.gif": (rgb.quantize(64), np.asarray(rgb.quantize(64).convert("RGB")), 0),
    }
    for name, (image, expected, tolerance) in cases.items():
        image.save(tmp_path / name)
        found = np.asarray(decode(tmp_path / name, 100)[1]).astype(int)
        assert np.abs(found - expected).mean() <= tolerance, name


def test_transparency_is_white_and_exif_turns(tmp_path: Path) -> None:
    Image.new("RGBA", (30, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(decode(tmp_path / "clear.png", 100)[1]).min() == 255
    image = Image.open(picture(tmp_path / "a.png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    expected = image.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "turned.png", 100)[1]), np.asarray(expected))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif"])
def test_every_truncation_is_read_or_refused_with_a_reason(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    Image.open(picture(tmp_path / "b.png")).save(path)
    whole = path.read_bytes()
    reference = np.asarray(decode(path, 100)[1])
    refused = 0
    for length in [0, 1, 8, *np.linspace(16, len(whole) - 1, 12).astype(int)]:
        path.write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(np.asarray(decode(path, 100)[1]), reference)
        except BrokenImage as error:
            refused += len(str(error)) >= 5
    assert refused >= 11  # only where the very end is missing can all pixels be there


def test_bombs_and_slivers_are_refused_by_their_header(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(BrokenImage, match="max_megapixels"):
        decode(tmp_path / "bomb.png", 100)
    Image.new("L", (10_000, 1)).save(tmp_path / "sliver.png")
    with pytest.raises(BrokenImage, match="narrow"):
        decode(tmp_path / "sliver.png", 100)


@pytest.mark.parametrize("size", [(40, 32), (20, 10), (301, 77), (33, 32)])
def test_the_shorter_side_is_exactly_as_asked(size: tuple[int, int]) -> None:
    small = resize_shorter(Image.new("RGB", size), 32)
    assert min(small.size) == 32
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_packed_images_come_back_and_broken_ones_are_set_aside(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / "in" / "ab"[i % 2] / f"{i}.png", i, (50, 32))
    (tmp_path / "in/a/broken.png").write_bytes(b"")
    picture(tmp_path / "in/a/copy.png", 0, (50, 32))
    table = read_source(str(tmp_path / "in"))
    metrics = pack(table, tmp_path / "out", settings(tmp_path / "in"), 0)
    packed = open_packed(tmp_path / "out")
    assert metrics["images"] == len(packed) == 21 and metrics["broken"] == 1
    for i, path in enumerate(packed.table["path"]):
        np.testing.assert_array_equal(packed[i], np.asarray(Image.open(tmp_path / "in" / path)))
        assert packed.classes[packed.labels[i]] == path[0]
    assert sum(len(packed.rows(s)) for s in ("train", "valid", "test")) == 21
    pairs = find_duplicates(packed)
    exact = pairs[pairs["kind"] == "exact"]
    assert len(exact) == 1 and not exact["leak"].any()
    assert {packed.table["path"][exact.row_a[0]], packed.table["path"][exact.row_b[0]]} == {"a/0.png", "a/copy.png"}
    assert not list((tmp_path / "out").glob("*.partial"))


def test_too_many_broken_images_stop_and_leave_nothing_behind(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / "in" / "ab"[i % 2] / f"{i}.png", i)
    for i in range(4):
        (tmp_path / f"in/a/broken{i}.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"max_broken.*[\s\S]*broken"):
        pack(read_source(str(tmp_path / "in")), tmp_path / "out", settings(tmp_path / "in", max_broken=0.1), 0)
    with pytest.raises(UserError, match="ingest"):
        open_packed(tmp_path / "out")


def test_a_near_duplicate_is_found_and_another_picture_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for i in range(12):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        smooth.save(tmp_path / "in" / "ab"[i % 2] / f"{i}.png")
    Image.open(tmp_path / "in/a/0.png").resize((96, 96)).save(tmp_path / "in/b/again.jpg", quality=90)
    pack(read_source(str(tmp_path / "in")), tmp_path / "out", settings(tmp_path / "in"), 0)
    pairs = find_duplicates(open_packed(tmp_path / "out"))
    assert pairs[["kind", "conflict"]].to_dict("records") == [{"kind": "near", "conflict": True}]
