"""What Prefect runs, and the command line in front of it."""

from tasks.environment import set_environment

# A worker imports this package first of all, before Prefect's flow can ask for any of it.
set_environment()
