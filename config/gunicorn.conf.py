"""gunicorn: threads, because requests wait for images and for the model far more than they compute.

Read by `ml-backend serve`; the values come from the settings.
"""

import os
import shutil
import socket
import struct
import sys

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker

from ml_backend.settings import SettingsError, load_settings

try:
    _settings = load_settings()
    _settings.check_exposure()
except SettingsError as error:
    print(f"wrong setting: {error}", file=sys.stderr)
    sys.exit(2)

bind = f"{_settings.host}:{_settings.port}"
workers = _settings.workers
worker_class = "gthread"
threads = _settings.threads
# Each worker loads its own models: what was loaded before a fork cannot be used on a GPU after it.
preload_app = False
# Label Studio waits 100 s for predictions; a thread that takes longer is not a dead worker.
timeout = 180
graceful_timeout = 30
keepalive = 5
# Seconds after which a client that falls silent in the middle of a request has hung up.
_SILENCE = 10
loglevel = _settings.log_level.lower()
accesslog = None
# It would lie in the home folder; `ml-backend` is the way to ask and to steer.
control_socket_disable = True


def when_ready(server: Arbiter) -> None:
    """Lets no client hold a thread by silence; connections inherit this of what they come to."""
    for listener in server.LISTENERS:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            listener.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _SILENCE, 0))


if workers > 1:
    # Prometheus' counters of several processes meet in files; they start at nought with us.
    _metrics = _settings.model_dir.absolute() / "metrics"
    _metrics.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_metrics)

    def on_starting(server: Arbiter) -> None:
        """Clears the counters of the last run."""
        shutil.rmtree(_metrics, ignore_errors=True)
        _metrics.mkdir(parents=True)

    def child_exit(server: Arbiter, worker: Worker) -> None:
        """Keeps what a worker that ended has counted."""
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(worker.pid)
