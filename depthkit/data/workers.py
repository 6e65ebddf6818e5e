"""Worker processes for work that decodes and encodes images."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import cv2


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which end with this one however it ends.

    They are not forked: a child would wait forever for the locks of its parent's threads, OpenCV's above all.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_prepare)


def _prepare() -> None:
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
