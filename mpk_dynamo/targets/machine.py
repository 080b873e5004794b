"""Machine: what the simulator must know of a GPU beyond its Target."""

from __future__ import annotations

from dataclasses import dataclass

from .target import Target


@dataclass(frozen=True)
class Machine:
    """Seconds and bytes per second of one GPU running the persistent kernel, whatever the model.

    bandwidth: device memory, all workers streaming; they share it equally on average. spread: variance of the time at
    which a worker's weights have come, in seconds per second of stream. ring: bytes of weights that a worker's loader
    can be ahead; waiting: bytes per second at which it runs ahead while its worker waits. fma, mma: bytes per second at
    which one worker's body takes weights that are in its ring, with one token and with several.
    task: from the end of a task until the next one's events can be looked at and its warps have met. event, poll: from
    the last producer's end until a waiter on another worker has seen it, by a counter and by flagged data.
    prologue: from then until the inputs of a linear are in registers; normed, plain: bytes per second at which a worker
    fetches x of several tokens besides, with a norm and as it is; finish: from its last weights to its results.
    signal: from the results until events are signalled. small: a task without weights, from inputs to results.
    query: the prologue of an attention, and what its combination takes to read all parts; attend: from there, or from
    when its keys and values have come, to its results. One worker reads these at `gather` bytes per second, the first
    `fetched` bytes before it has a query.
    """

    bandwidth: float
    spread: float
    ring: float
    waiting: float
    fma: float
    mma: float
    task: float
    event: float
    poll: float
    prologue: float
    normed: float
    plain: float
    finish: float
    signal: float
    small: float
    query: float
    attend: float
    gather: float
    fetched: float


_US = 1e-6
_STREAM = 0.95
"""Share of the datasheet's bandwidth that a stream of weights reaches: 4.55 of 4.8 TB/s on an H200."""


def machine_of(target: Target) -> Machine:
    """The machine of a target. Latencies and rates of one SM are as measured on an H200 (docs/timeline.md); only
    bandwidth and ring follow the target."""
    return Machine(
        bandwidth=_STREAM * target.bandwidth,
        spread=0.03 * _US,
        ring=min(256 * 1024, max(target.shared_bytes_per_block - 16 * 1024, 32 * 1024)),
        waiting=15e9,
        fma=53e9,
        mma=36e9,
        task=0.6 * _US,
        event=0.85 * _US,
        poll=0.6 * _US,
        prologue=0.4 * _US,
        normed=14e9,
        plain=40e9,
        finish=0.4 * _US,
        signal=0.6 * _US,
        small=0.30 * _US,
        query=0.6 * _US,
        attend=1.5 * _US,
        gather=22e9,
        fetched=96 * 1024,
    )
