"""`ml-backend`: the commands of an admin.

Exit status: 0 done; 1 something is wrong, and was said; 2 a setting or an option is wrong.
"""

from ml_backend.cli.app import main

__all__ = ["main"]
