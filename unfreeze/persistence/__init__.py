"""Files that survive a kill or a power loss: atomic writes, resumable files, and the stop-request flag.

It may import `errors`, `device` and `progress` alone; everything else may import it.
"""
