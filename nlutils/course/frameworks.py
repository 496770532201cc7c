"""Importing Keras without a word on standard error."""

import os
import sys
import tempfile
from contextlib import contextmanager

from nlutils.arguments import one_of

__all__ = ["import_keras"]

_BACKENDS = ("tensorflow", "torch", "jax")


@contextmanager
def _quiet_standard_error():
    """Send file descriptor 2 into a file while the block runs; an error carries what was written.

    TensorFlow's libraries write to the descriptor itself, past `sys.stderr`.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            except BaseException as error:
                file.seek(0)
                written = file.read().decode(errors="replace").strip()
                if written:
                    error.add_note(f"Written to standard error meanwhile:\n{written[-4000:]}")
                raise
            finally:
                sys.stderr.flush()
                os.dup2(kept, 2)
    finally:
        os.close(kept)


def import_keras(backend: str | None = None):
    """Import Keras and return it, on `backend` ("tensorflow", "torch", "jax") when one is named.

    Keras keeps its backend until the process ends: raises RuntimeError when it was imported with another one.
    The first operation runs here too, because TensorFlow reports on the machine at that moment.
    """
    if backend is not None:
        one_of("backend", backend, _BACKENDS)
        imported = sys.modules.get("keras")
        if imported is not None and imported.backend.backend() != backend:
            raise RuntimeError(
                f"Keras is already imported with the backend {imported.backend.backend()!r}, which stays "
                f"until Python ends; restart, and call import_keras({backend!r}) before Keras is imported"
            )
        os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_standard_error():
        import keras

        keras.ops.convert_to_numpy(keras.ops.ones(1) + 1)
    return keras
