"""What the device alone needs for a decode step, to compare two states of the code (`PYTHONPATH` chooses one).

    PYTHONPATH=CHECKOUT python tests/gpu/step_times.py MODEL [--batch 1] [--layers 0] [--prompt 512] [--name before]

Processes may run at once: they compile together, and take turns at the GPU, by a lock. The printed number of the logits
is the same where the bits are; `bench` says whether they are right, and prints the ceiling.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mpk_dynamo.tools.decoder import Decoder
from mpk_dynamo.tools.models import load
from mpk_dynamo.tools.timing import run

STEPS, REPEATS, CHECKED = 24, 7, 4


@contextmanager
def turn() -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / "step_times.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--name", default="")
    a = parser.parse_args()
    with turn():
        model = load(a.model, device="cuda", layers=a.layers)
        decoder = Decoder(model, batch=a.batch, prompt=a.prompt, max_cache=a.prompt + 512, steps=STEPS)
        torch.cuda.synchronize()
    step = torch.compile(model, backend="mpk", dynamic=False, fullgraph=True, options={"fallback": "error"})
    with torch.no_grad():
        decoder.rewind()
        step(**decoder.steps[0])
        torch.cuda.synchronize()
        with turn():
            for _ in range(2):
                run(decoder, step)
            found = [run(decoder, step, ahead=True) for _ in range(REPEATS)]
            decoder.steps = decoder.steps[:CHECKED]
            bits = hashlib.sha1(decoder.logits(step).numpy().tobytes()).hexdigest()[:8]
    times = [ms for ms, ahead in found if ahead]
    if not times:
        raise SystemExit("the host was never ahead of the device: nothing was measured")
    what = f"{a.model}, {a.layers or 'all'} layers, batch {a.batch}, prompt {a.prompt} {a.name}".rstrip()
    print(f"{what}: {statistics.median(times):.4f} ms ({min(times):.4f}..{max(times):.4f}), logits {bits}", flush=True)


if __name__ == "__main__":
    main()
