"""The programs of the processes that do jobs."""
