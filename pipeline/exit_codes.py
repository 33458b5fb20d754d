"""Exit codes of a step."""

USER_ERROR = 2
"""Exit code of a step that ended with a `UserError`, which a retry would not fix."""

WORTH_A_RETRY = 1
"""Exit code of a step that ended with a transient or an unexpected error, or that ran out of memory."""

STOPPED = 143
"""Exit code of a step that was asked to stop."""

LESS_MEMORY = (
    "A smaller batch_size (such as 16) or data.image_size needs less, and restarts the steps that depend on it; "
    "with unchanged settings the step continues from its last checkpoint."
)
"""What to do when memory runs out."""

NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "_alloc_failed")
"""Out-of-memory messages of the system, torch and CUDA's libraries, in lower case.

On a CPU, torch raises a plain RuntimeError, which only its message identifies.
"""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or its GPU ran out of memory."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)
