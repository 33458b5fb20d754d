"""Train, validation and test splits, stratified by class and seeded.

Images that must not be separated (exact duplicates, near ones, one ``group``) form a cluster, and each cluster is
assigned to one split as a whole.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from unfreeze.data.folders import named
from unfreeze.errors import UserError


def assign_splits(
    table: pd.DataFrame, valid: float, test: float, seed: int, pairs: Iterable[tuple[int, int]] = ()
) -> pd.Series:
    """The split of every image.

    Splits given by the source are kept. If it gives no validation images, they are taken from the images without a
    split, or from the training images if every image has a split. If it gives neither validation nor test images, test
    images are taken as well. An image without a split gets the split of the images in its cluster, if they have one.

    Args:
        table: columns ``label``, ``split`` (may be empty), ``group`` (may be empty) and ``digest`` (empty: no
            duplicates) of each image.
        valid, test: shares of these splits in the images to be split, for each class.
        seed: of the order in which clusters are assigned.
        pairs: pairs of positions in the table. The images of a pair, such as near duplicates, stay together too.

    Returns:
        Names of splits, with the table's index.

    Raises:
        UserError: a class cannot be in every split that is made, or has no images in the training split.
    """
    stated = table["split"]
    given = set(stated) - {"", "train"}
    wanted = {} if "valid" in given else {"valid": valid}
    if not given and test > 0:
        wanted["test"] = test

    cluster = _clusters(table, pairs)
    pool = stated.eq("") if stated.eq("").any() else stated.eq("train")
    kept = stated.ne("") & ~pool
    claimed = cluster.map(stated[kept].groupby(cluster[kept]).first())
    free = pool & claimed.isna()
    trained = set(table["label"][kept & stated.eq("train")])
    dealt = cluster[free].map(_deal(table["label"][free], cluster[free], wanted, trained, seed))
    split = stated.where(stated.ne(""), claimed).where(~free, dealt)
    _check(table["label"], split, cluster[free], wanted)
    return split


def _deal(
    labels: pd.Series, cluster: pd.Series, wanted: dict[str, float], trained: set[str], seed: int
) -> dict[int, str]:
    """A split for each cluster, so that every class has its share in each split.

    Rare classes come first, as in Sechidis et al. (2011), "On the stratification of multi-label data": a cluster with
    images of several classes is assigned together with its rarest class.
    """
    sizes: dict[str, dict[int, int]] = {label: {} for label in labels.unique()}
    members: dict[int, list[str]] = {}
    for label, number in zip(labels, cluster, strict=True):
        sizes[label][number] = sizes[label].get(number, 0) + 1
        members.setdefault(number, []).append(label)

    filled = Counter({("train", label): 1 for label in trained})
    rng = np.random.default_rng(seed)
    dealt: dict[int, str] = {}
    for label in sorted(sizes, key=lambda name: (sum(sizes[name].values()), name)):
        total = sum(sizes[label].values())
        order = [int(number) for number in rng.permutation([number for number in sizes[label] if number not in dealt])]
        waiting = [*wanted, "train"]
        for name, share in wanted.items():
            waiting.remove(name)
            goal = max(1, round(share * total)) - filled[name, label]
            spare = sum(filled[other, label] == 0 for other in waiting)
            taken = _take(order, sizes[label], goal, spare)
            dealt |= dict.fromkeys(taken, name)
            filled.update((name, other) for number in taken for other in members[number])
            order = [number for number in order if number not in dealt]
        dealt |= dict.fromkeys(order, "train")
        filled.update(("train", other) for number in order for other in members[number])
    return dealt


def _take(order: list[int], sizes: dict[int, int], goal: int, spare: int) -> list[int]:
    """Take clusters from the end of ``order`` with about ``goal`` images in all; leave at least ``spare`` clusters.

    At least one cluster is taken, unless ``goal`` is not positive or there are only ``spare`` clusters.
    """
    most = len(order) - spare
    if goal <= 0 or most <= 0:
        return []
    taken: list[int] = []
    count = 0
    for number in reversed(order):
        if count >= goal or len(taken) == most:
            break
        if sizes[number] <= 2 * (goal - count):  # otherwise the count is nearer to the goal without it
            taken.append(number)
            count += sizes[number]
    return taken or [min(reversed(order), key=lambda number: sizes[number])]


def _check(labels: pd.Series, split: pd.Series, cluster: pd.Series, wanted: dict[str, float]) -> None:
    """Raise a UserError that names the classes that are missing from a split that needs them."""
    made = ["train", *wanted] if wanted else []
    present = set(zip(labels, split, strict=True))
    classes = sorted(labels.unique())
    short = [label for label in classes if any((label, name) not in present for name in made)]
    if short:
        counts = cluster.groupby(labels[cluster.index]).nunique().reindex(short, fill_value=0)
        tied = ", and some of them are in one group with images of other classes" if (counts >= len(made)).any() else ""
        ways = ["add images of " + ("this class" if len(short) == 1 else "these classes")]
        sizes = labels.value_counts()
        least = int(sizes[short].max()) + 1
        if (sizes >= least).sum() > 1:
            ways.append(f"set data.min_images to {least} to leave out classes with fewer images")
        if "test" in wanted and counts.min() == len(made) - 1:
            ways.append("set data.test to 0")
        raise UserError(
            f"data.source: {_too_small(counts)} to be split (duplicates, near ones unless data.near_duplicates is report, and "
            f"images of one group count as one), but {' and '.join(made)} each need one{tied}: {', or '.join(ways)}."
        )
    untrained = [label for label in classes if (label, "train") not in present]
    if untrained:
        raise UserError(
            f"data.source: there are no training images of the class{'es' * (len(untrained) > 1)} {named(untrained)}, only "
            "images of other splits: check the spelling of the class, or add training images of it."
        )


def _too_small(counts: pd.Series) -> str:
    """Classes and their numbers of images; classes with the same number are listed together."""
    if len(counts) == 1:
        return f"the class {counts.index[0]!r} has {_images(int(counts.iloc[0]))}"
    groups = (f"{_images(int(str(count)))} each: {named(same.index, 100)}" for count, same in counts.groupby(counts))
    return f"{len(counts)} classes have too few images ({'; '.join(groups)})"


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _clusters(table: pd.DataFrame, pairs: Iterable[tuple[int, int]]) -> pd.Series:
    """A cluster number for each image. Images of one cluster must stay together.

    The clusters are the connected components of a graph. Its edges join the images of each pair, and images with equal
    digest or group.
    """
    edges = list(pairs)
    for column in ("digest", "group"):
        first: dict[str, int] = {}
        edges += [(i, first.setdefault(value, i)) for i, value in enumerate(table[column]) if value]
    a, b = np.array(edges, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(table), len(table)))
    return pd.Series(connected_components(graph, directed=False)[1], table.index)
