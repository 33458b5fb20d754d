"""What makes a function a step of the recipe: settings, exit codes, checkpoints, and what steps have in common.

It may import `unfreeze`; `tasks` and `flows` import it. MLflow is imported in `pipeline.tracking` alone, Prefect nowhere.
"""
