"""Splits, compared with counts by hand and connected components found by a flood fill."""

from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfreeze.data.splits import assign_splits
from unfreeze.errors import UserError


def frame(rows: list[tuple[str, str, str, str]]) -> pd.DataFrame:
    """Table with label, split, group and digest. An empty digest stands for a unique one."""
    table = pd.DataFrame(rows, columns=["label", "split", "group", "digest"], dtype=object)
    table["digest"] = [digest or f"own {i}" for i, digest in enumerate(table["digest"])]
    return table


def plain(**counts: int) -> pd.DataFrame:
    return frame([(label, "", "", "") for label, count in counts.items() for _ in range(count)])


def floods(table: pd.DataFrame) -> list[set[int]]:
    """Sets of images that must stay together, found by a walk from neighbour to neighbour."""
    digest, group = table["digest"].tolist(), table["group"].tolist()
    left, components = set(table.index), []
    while left:
        component, edge = set(), [left.pop()]
        while edge:
            here = edge.pop()
            component.add(here)
            tied = {i for i in left if digest[i] == digest[here] or (group[i] and group[i] == group[here])}
            left -= tied
            edge += tied
        components.append(component)
    return components


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(3, 90), min_size=1, max_size=4),
    st.floats(0.01, 0.5),
    st.floats(0, 0.4),
    st.integers(0, 2**31 - 1),
)
def test_every_class_has_its_share_to_the_image(counts: list[int], valid: float, test: float, seed: int) -> None:
    table = plain(**{f"c{i}": count for i, count in enumerate(counts)})
    split = assign_splits(table, valid, test, seed)
    assert split.index.equals(table.index)
    for i, count in enumerate(counts):
        found = Counter(split[table["label"] == f"c{i}"])
        wanted_test = max(1, round(test * count)) if test else 0
        left = count - 1 - (1 if test else 0)  # keep one for training, and one for testing
        assert found["valid"] == min(max(1, round(valid * count)), left)
        assert found["test"] == min(wanted_test, count - found["valid"] - 1)
        assert found["train"] == count - found["valid"] - found["test"] >= 1


@pytest.mark.parametrize("seed", range(5))
def test_pairs_stay_together_and_follow_a_given_split(seed: int) -> None:
    table = plain(a=30, b=30)
    pairs = [(i, i + 1) for i in range(0, 60, 2)]
    split = assign_splits(table, 0.2, 0.2, seed, pairs)
    assert all(split.iloc[a] == split.iloc[b] for a, b in pairs)
    assert Counter(split) == {"train": 36, "valid": 12, "test": 12}
    table.loc[0, "split"] = "test"
    split = assign_splits(table, 0.2, 0.2, seed, [(0, 1), (1, 2)])
    assert split[0] == split[1] == split[2] == "test"


def test_the_seed_decides() -> None:
    table = plain(a=60, b=40)
    splits = [assign_splits(table, 0.2, 0.2, seed) for seed in (1, 1, 2)]
    assert splits[0].equals(splits[1]) and not splits[0].equals(splits[2])


def test_which_images_are_chosen_does_not_depend_on_where_they_stand() -> None:
    table, counts = plain(a=50), Counter[int]()
    for seed in range(400):
        split = assign_splits(table, 0.2, 0.2, seed)
        counts.update(table.index[split == "test"])
    # The expected count is 80 each; six standard deviations of the binomial distribution are 48.
    assert len(counts) == 50 and all(32 < count < 128 for count in counts.values())


ROWS = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.sampled_from(["", "", "", "train", "valid", "test"]),
        st.sampled_from([""] * 8 + list("pqrs")),
        st.sampled_from([""] * 8 + list("wxyz")),
    ),
    min_size=12,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 100))
def test_what_is_tied_stays_together_and_what_is_given_stands(rows: list[tuple[str, str, str, str]], seed: int) -> None:
    table = frame(rows)
    try:
        split = assign_splits(table, 0.2, 0.2, seed)
    except UserError:
        return
    given_ = table["split"] != ""
    assert set(split) <= {"train", "valid", "test"}
    if not given_.all():
        assert (split[given_] == table["split"][given_]).all()
    assert (
        split[table["split"].isin(["valid", "test"])] == table["split"][table["split"].isin(["valid", "test"])]
    ).all()
    for component in floods(table):
        stated = {table["split"][i] for i in component} - {""}
        free = {split[i] for i in component if not given_[i]}
        assert len(free) <= 1
        if free and stated:
            assert free <= stated
    for label in set(table["label"]):
        assert (split[table["label"] == label] == "train").any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=8, max_size=60), st.integers(0, 100))
def test_shares_of_groups_are_right_to_a_group(sizes: list[int], seed: int) -> None:
    table = frame([("a", "", f"g{i}", "") for i, size in enumerate(sizes) for _ in range(size)])
    split = assign_splits(table, 0.2, 0.2, seed)
    assert (split.groupby(table["group"]).nunique() == 1).all()
    group = split.groupby(table["group"]).first()
    for name, other in (("valid", ""), ("test", "valid")):  # if no group fits, a split gets the smallest one left
        smallest = table["group"].value_counts()[group != other].min()
        assert 0 < (split == name).sum() <= max(0.2 * len(table) + 1 + max(sizes) / 2, smallest)


def test_a_giant_group_trains() -> None:
    table = frame([("a", "", "giant" if i < 60 else "", "") for i in range(100)])
    for seed in range(20):
        split = assign_splits(table, 0.1, 0.1, seed)
        assert set(split[:60]) == {"train"} and Counter(split)["valid"] == Counter(split)["test"] == 10


def test_patients_with_images_of_several_classes() -> None:
    rows = [(label, "", f"patient {p}", "") for p in range(100) for label in ("sick",) * (p % 10 == 0) + ("well",) * 4]
    table = frame(rows)
    for seed in range(10):
        split = assign_splits(table, 0.2, 0.2, seed)
        counts = Counter(zip(table["label"], split, strict=True))
        assert (split.groupby(table["group"]).nunique() == 1).all()
        assert [counts["sick", name] for name in ("valid", "test")] == [2, 2]
        assert [counts["well", name] for name in ("valid", "test")] == [80, 80]


def test_only_what_is_missing_is_made() -> None:
    def made(*stated: str) -> dict[str, int]:
        rows = [(label, split, "", "") for split in stated for label in "ab" for _ in range(20)]
        return dict(Counter(assign_splits(frame(rows), 0.1, 0.2, 0)))

    assert made("train", "valid", "test") == {"train": 40, "valid": 40, "test": 40}
    assert made("train", "valid") == {"train": 40, "valid": 40}
    assert made("train", "test") == {"train": 36, "valid": 4, "test": 40}
    assert made("train") == {"train": 28, "valid": 4, "test": 8}
    assert made("") == {"train": 28, "valid": 4, "test": 8}
    assert made("", "train") == {"train": 68, "valid": 4, "test": 8}
    assert made("", "valid") == {"train": 40, "valid": 40}


def test_test_zero_makes_no_test() -> None:
    assert Counter(assign_splits(plain(a=20, b=20), 0.1, 0.0, 0)) == {"train": 36, "valid": 4}


def test_free_images_follow_their_twins_into_given_splits() -> None:
    rows = [(label, "", "", "") for label in "ab" for _ in range(20)]
    rows += [("a", "test", "", "twin"), ("a", "", "", "twin"), ("b", "train", "scene", ""), ("b", "", "scene", "chain")]
    rows += [("b", "", "", "chain")]
    split = assign_splits(frame(rows), 0.2, 0.2, 0)
    assert split[41] == "test" and split[43] == split[44] == "train"


def test_a_leak_between_given_splits_is_left_for_explore_to_show() -> None:
    rows = [(label, split, "", "") for split in ("train", "valid") for label in "ab" for _ in range(5)]
    rows += [("a", "train", "", "twin"), ("a", "valid", "", "twin")]
    assert assign_splits(frame(rows), 0.2, 0.2, 0).tolist() == [row[1] for row in rows]


@pytest.mark.parametrize(
    ("rows", "test", "words"),
    [
        ([("rare", "", "", "")] * 2, 0.2, ["'rare'", "2 images", "train and valid and test", "data.test to 0"]),
        ([("rare", "", "", "")], 0.0, ["'rare'", "1 image ", "train and valid"]),
        ([("rare", "", "", "same")] * 9, 0.2, ["'rare'", "1 image ", "duplicates"]),
        ([("rare", "", "one", "")] * 9, 0.2, ["'rare'", "1 image ", "group"]),
        ([("rare", "train", "", "")] * 9, 0.2, ["'rare'", "0 images"]),
        ([("rare", "", "knot", ""), ("b", "", "knot", "")] * 3 + [("rare", "", "", "")], 0.2, ["'rare'", "2 images"]),
    ],
)
def test_a_class_with_too_few_images_is_named(
    rows: list[tuple[str, str, str, str]], test: float, words: list[str]
) -> None:
    table = frame([("a", "", "", "")] * 20 + [("b", "", "", "")] * 20 + rows)
    with pytest.raises(UserError) as caught:
        assign_splits(table, 0.2, test, 0)
    assert all(word in str(caught.value) for word in words), caught.value


def test_all_classes_with_too_few_images_are_named_and_how_to_leave_them_out() -> None:
    table = plain(a=50, b=50, **{f"one{i}": 1 for i in range(20)}, **{f"two{i}": 2 for i in range(5)})
    with pytest.raises(UserError) as caught:
        assign_splits(table, 0.1, 0.2, 0)
    said = str(caught.value)
    assert "25 classes have too few images (1 image each: 'one0'" in said and "2 images each: 'two0'" in said
    assert all(f"'{name}'" in said for name in table["label"].unique() if name not in "ab")
    assert (
        "set data.min_images to 3 to leave out" in said and "data.test" not in said
    )  # without data.test, 20 classes would still be too small
    left = table[table.groupby("label")["label"].transform("size") >= 3]
    assert set(assign_splits(left, 0.1, 0.2, 0)) == {"train", "valid", "test"}


def test_no_advice_that_leaves_one_class() -> None:
    with pytest.raises(UserError) as caught:
        assign_splits(plain(a=50, b=1), 0.1, 0.2, 0)
    assert "min_images" not in str(caught.value)


def test_as_many_images_as_splits_are_enough() -> None:
    for seed in range(10):
        split = assign_splits(plain(a=50, rare=3), 0.3, 0.3, seed)
        assert set(split[50:]) == {"train", "valid", "test"}
        assert set(assign_splits(plain(a=50, rare=2), 0.3, 0.0, seed)[50:]) == {"train", "valid"}


def test_with_given_training_images_the_others_need_not_train() -> None:
    rows = [(label, "train", "", "") for label in "ab"] + [(label, "", "", "") for label in "ab" for _ in range(2)]
    split = assign_splits(frame(rows), 0.2, 0.2, 0)
    assert split[:2].tolist() == ["train"] * 2 and set(split[2:4]) == set(split[4:]) == {"valid", "test"}


def test_a_class_that_nothing_trains_is_named() -> None:
    rows = [(label, split, "", "") for split in ("train", "valid", "test") for label in "ab"]
    with pytest.raises(UserError, match="no training images of the class 'A'"):
        assign_splits(frame([*rows, ("A", "test", "", "")]), 0.2, 0.2, 0)
    with pytest.raises(UserError, match="no training images of the classes 'A', 'B'"):
        assign_splits(frame([*rows, ("A", "test", "", ""), ("B", "valid", "", "")]), 0.2, 0.2, 0)


def test_a_class_may_be_missing_from_a_given_validation_split() -> None:
    rows = [("a", "train", "", ""), ("b", "train", "", ""), ("a", "valid", "", "")]
    assert assign_splits(frame(rows), 0.2, 0.2, 0).tolist() == ["train", "train", "valid"]
