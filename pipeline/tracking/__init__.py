"""MLflow: the journal of records, its sender, the tracker of a step, the registry and the served model.

The only place that imports mlflow. It may import `unfreeze`, `pipeline.process` and `pipeline.artifacts`, not
`pipeline.step`; `pipeline`, `tasks` and `flows` may import it.
"""
