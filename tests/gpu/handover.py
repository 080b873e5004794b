"""What racecheck makes of each way to hand over shared memory (kernels_cuda/tests/handover.cuh).

    compute-sanitizer --tool racecheck python3 tests/gpu/handover.py bulk

Without a name, all of them run. Exits with 1 when a value was wrong although its hand-over is ordered.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import plain_kernels  # noqa: E402
import torch  # noqa: E402

TEXT = (HERE.parents[1] / "kernels_cuda/tests/handover.cuh").read_text().replace("#pragma once", "")
WAYS = {
    "named": "kNamedBarrier",
    "each": "kEachLaneArrives",
    "one": "kOneLaneArrives",
    "bulk": "kBulkCopy",
    "bulk-each": "kBulkEachLane",
    "stores-unordered": "kStoresUnordered",
    "bulk-unordered": "kBulkUnordered",
}
ROUNDS, WORDS = 50, 128


def source(how: str) -> str:
    signature = "const mpk::u32* from, mpk::u32* wrong, mpk::u64 rounds"
    body = f"mpk::hand_over<mpk::{how}>(from, wrong, rounds);"
    return f'{TEXT}\nextern "C" __global__ void way({signature}) {{ {body} }}\n'


def wrong_values(name: str) -> int:
    given = torch.arange(ROUNDS * WORDS, dtype=torch.int32, device="cuda")
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    plain_kernels.launch(source(WAYS[name]), "way", 1, 64, given.data_ptr(), count.data_ptr(), ROUNDS)
    return int(count.item())


def main(names: list[str]) -> int:
    counts = {name: wrong_values(name) for name in names or WAYS}
    for name, count in counts.items():
        print(f"{name}: {count} wrong values")
    return 1 if any(count for name, count in counts.items() if "unordered" not in name) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
