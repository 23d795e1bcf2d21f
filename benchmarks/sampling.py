"""Taking samples fairly: every one begins in a quiet process, and what disturbed it is counted."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Between looks at the threads, of which two in a row must find them asleep.
LOOK_SECONDS = 1e-3
LONGEST_WAIT = 0.25
#: Waited where threads cannot be looked at: ONNX Runtime's were seen to spin for 35 ms.
BLIND_WAIT = 0.06


class Disturbances(NamedTuple):
    """Counted since the process began, all its threads together."""

    preemptions: int  # another process took a core from one of our threads, or one yielded: OpenVINO's do, in waiting
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
    cores as threads they would take the cores of what is measured next, and slow it down several times.
    """
    end, quiet_looks = time.perf_counter() + LONGEST_WAIT, 0
    while time.perf_counter() < end:
        running = _other_threads_running()
        if running is None:
            time.sleep(BLIND_WAIT)
            return True
        quiet_looks = 0 if running else quiet_looks + 1
        if quiet_looks == 2:
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _other_threads_running() -> bool | None:
    """By their states: their CPU time moves only with the ticks of the clock. None where there is no such list."""
    own = str(threading.get_native_id())
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return None
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended
            text = Path(f"/proc/self/task/{thread}/stat").read_text()
            if thread != own and text.rpartition(")")[2].split()[0] == "R":
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
