"""`SimulatedLink`: a slow network between the ranks, for lessons on one machine.

Runs in workers, as DDP's communication hook. Lessons say where a link is simulated.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


class SimulatedLink:
    """A communication hook of DDP that makes buckets take as long as on a slow link.

    It averages gradients over the process group; then it holds each bucket back for `latency_ms` +
    bytes / `megabytes_per_second`, one bucket after the other, as on one cable.
    Use it as ``watch_ddp(model, SimulatedLink(100))``.

    Parameters
    ----------
    megabytes_per_second : float
        The bandwidth, in 10^6 bytes per second.
    latency_ms : float
        The cost of every bucket, however small, in milliseconds.
    """

    def __init__(self, megabytes_per_second: float, latency_ms: float = 0.0) -> None:
        if not megabytes_per_second > 0 or not latency_ms >= 0:
            raise ValueError(
                "a link needs megabytes_per_second above 0 and latency_ms of at least 0, got "
                f"{megabytes_per_second!r} and {latency_ms!r}"
            )
        self.bytes_per_second = megabytes_per_second * 1e6
        self.latency = latency_ms / 1e3
        self.__name__ = type(self).__name__  # DDP reads it from a hook
        self._cable: ThreadPoolExecutor | None = None

    def seconds(self, nbytes: int) -> float:
        """How long the link takes for so many bytes, in seconds."""
        return self.latency + nbytes / self.bytes_per_second

    def __call__(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start averaging the bucket; the Future completes when the link has carried it."""
        import torch
        import torch.distributed as dist

        if self._cable is None:  # made in the worker, because threads cannot be pickled
            self._cable = ThreadPoolExecutor(1, thread_name_prefix="simulated link")
        gradients = bucket.buffer().mul_(1.0 / dist.get_world_size())
        work = dist.all_reduce(gradients, async_op=True)
        arrived: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._cable.submit(self._carry, work, gradients, arrived)
        return arrived

    def _carry(
        self,
        work: dist.Work,
        gradients: torch.Tensor,
        arrived: torch.futures.Future[torch.Tensor],
    ) -> None:
        try:
            work.get_future().wait()
            time.sleep(self.seconds(gradients.nbytes))
        except Exception as error:  # backward raises whatever the backend raised
            arrived.set_exception(error)
        else:
            arrived.set_result(gradients)
