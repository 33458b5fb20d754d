"""Splits: who trains, who validates, who tests.

Stratified by class and seeded. Images that must not be separated (exact duplicates, one ``group``) form a cluster,
and clusters are dealt out whole.
"""

import numpy as np
import pandas as pd

from unfreeze.errors import UserError


def assign_splits(table: pd.DataFrame, valid: float, test: float, seed: int) -> pd.Series:
    """The split of every image.

    What the source says stands. Where it gives no validation images they are taken from the rest; test images too, where
    it gives neither. Rows without a split that are tied to an image of a given split go there.

    Args:
        table: columns ``label``, ``split`` (may be empty), ``group`` (may be empty) and ``digest`` of each image.
        valid, test: shares of the images of each class.
        seed: of the order in which clusters are dealt.

    Returns:
        Names of splits, with the table's index.

    Raises:
        UserError: a class has too few clusters of images for the splits.
    """
    given = set(table["split"]) - {"", "train"}
    wanted = {"valid": valid} if "valid" not in given else {}
    if not given and test > 0:
        wanted["test"] = test

    cluster = _clusters(table)
    kept = table["split"].isin(given)
    claimed = cluster.map(table["split"][kept].groupby(cluster[kept]).first())
    split = table["split"].where(table["split"].ne(""), claimed.fillna("train"))
    free = ~split.isin(given) & claimed.isna()

    rng = np.random.default_rng(seed)
    sizes = cluster[free].value_counts()
    dealt: dict[int, str] = {}
    # A cluster of images of several classes is dealt with the class of its first one.
    for label, rows in table[free].assign(cluster=cluster).drop_duplicates("cluster").groupby("label"):
        if len(rows) <= len(wanted):
            raise UserError(
                f"data.source: the class {label!r} has only {len(rows)} images to split (duplicates and groups counted "
                f"as one), too few for {len(wanted) + 1} splits: add images, or set data.test to 0."
            )
        order = list(rng.permutation(rows["cluster"].to_numpy()))
        total = sizes[order].sum()
        for name, share in wanted.items():
            taken = 0
            while taken < max(1, round(share * total)) and len(order) > 1:
                number = order.pop()
                dealt[number] = name
                taken += sizes[number]
    return split.where(~free, cluster.map(dealt).fillna("train"))


def _clusters(table: pd.DataFrame) -> pd.Series:
    """A number for each image, equal for images that must stay together: the connected components of sharing a digest or
    a group."""
    parent = np.arange(len(table))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in ("digest", "group"):
        first: dict[str, int] = {}
        for i, value in enumerate(table[column]):
            if value:
                parent[root(i)] = root(first.setdefault(value, i))
    return pd.Series([root(i) for i in range(len(table))], table.index)
