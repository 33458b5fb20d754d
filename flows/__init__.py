"""Prefect's flow, tasks and deployment, and the command line.

The only place that imports Prefect. It may import `pipeline` and `unfreeze`, not `tasks`: DVC starts the steps.
"""

from pipeline.process.environment import set_environment, set_prefect_home

# Here, because a worker imports this package before it imports anything that reads these variables.
set_environment()
set_prefect_home()
