"""Taking samples fairly: every one begins in a quiet process, and what disturbed it is counted."""

from __future__ import annotations

import contextlib
import gc
import resource
import time
from collections.abc import Iterator
from typing import NamedTuple

#: How long, and at which share of a core, other threads may run in a process that counts as quiet.
QUIET_SECONDS, QUIET_SHARE = 2e-3, 0.2
LONGEST_WAIT = 0.25


class Disturbances(NamedTuple):
    """Counted since the process began, all its threads together."""

    preemptions: int  # another process took a core from one of our threads
    page_faults: int  # pages that the kernel had to supply, such as of an output whose memory was given back

    @classmethod
    def now(cls) -> Disturbances:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_nivcsw, usage.ru_minflt)

    def since(self, before: Disturbances) -> Disturbances:
        return Disturbances(self.preemptions - before.preemptions, self.page_faults - before.page_faults)


def wait_until_quiet() -> bool:
    """Sleeps until no other thread of this process runs, and says whether it came to that.

    The threads of ONNX Runtime, OpenVINO and OpenMP spin for a while after each call, in wait of the next. On as many
    cores as threads they would take the cores of whoever is measured next, and slow it down several times.
    """
    end = time.perf_counter() + LONGEST_WAIT
    while time.perf_counter() < end:
        used, start = time.process_time(), time.perf_counter()
        time.sleep(QUIET_SECONDS)
        if time.process_time() - used < QUIET_SHARE * (time.perf_counter() - start):
            return True
    return False


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
