"""What Prefect runs, and the command line in front of it."""
