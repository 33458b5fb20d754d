"""The steps of the recipe, one file each; `tasks.step` says what makes a function a step."""

STAGES = (
    "ingest",
    "explore",
    "precompute",
    "lr_find",
    "train_head",
    "train_augmented",
    "unfreeze_lr_find",
    "train_full",
    "evaluate",
    "retrain",
    "register",
)
"""Names of the steps, in the order of the recipe: of Prefect's tasks, DVC's stages and MLflow's child runs alike."""
