"""The queue, what runs next, and the processes that run it."""
