"""How a step says with its exit code why it ended."""

USER_ERROR = 2
"""Exit code of a step that ended with a `UserError`: nothing that a retry would mend."""

WORTH_A_RETRY = 1
"""Exit code of a step that ended with what may go away by itself."""

STOPPED = 143
"""Exit code of a step that was asked to stop."""

LESS_MEMORY = (
    "A smaller batch_size or data.image_size takes less, and the steps that see it begin anew; with the settings as they "
    "are it goes on from its last checkpoint."
)
"""What to do where there is not enough of it."""

NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "_alloc_failed")
"""How the system, torch and CUDA's libraries say it, in small letters; torch raises a bare RuntimeError on a processor."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory, of the machine or of its GPU."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)
