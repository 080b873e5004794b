"""A program small enough to check by eye, with the real launch parameter: y = 2 x + w, and a step counter.

The device kernel below and `run_on_host` do the same from the same bytes, so that packing, tables, arena, control
block, fault record and calling convention are tested with and without a GPU.
"""

from __future__ import annotations

import ctypes

import numpy as np

from mpk_dynamo import abi
from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Graph, Output, RowMap
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ir.region import Access, whole
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.tasks import Event, Task, TaskGraph
from mpk_dynamo.ir.types import BufferKind, DType, buffer

SIZE = 64
WORKERS = 2
FAULT_TASK = 1
BINDINGS = ("y", "w", "n", "x")  # not the order of the arguments

SOURCE = """
#include "mpk/abi.h"
namespace mpk {
struct Launch { LaunchFixed fixed; u64 pointers[4]; };
static_assert(sizeof(Launch) == sizeof(LaunchFixed) + 4 * 8, "Launch");
}  // namespace mpk

// Worker 0 computes into the arena, worker 1 waits for it through the control block and copies to the output.
extern "C" __global__ void __launch_bounds__(64, 1) mpk_main(const __grid_constant__ mpk::Launch launch) {
  using namespace mpk;
  extern __shared__ float staged[];
  const float* w = reinterpret_cast<const float*>(launch.pointers[1]);
  long long* n = reinterpret_cast<long long*>(launch.pointers[2]);
  const float* x = reinterpret_cast<const float*>(launch.pointers[3]);
  float* y = reinterpret_cast<float*>(launch.pointers[0]);
  volatile float* arena = reinterpret_cast<float*>(launch.fixed.arena);
  volatile u32* control = reinterpret_cast<volatile u32*>(launch.fixed.control);
  const Queue queue = reinterpret_cast<const Queue*>(launch.fixed.tables[TABLE_QUEUES])[blockIdx.x];
  const Task task = reinterpret_cast<const Task*>(launch.fixed.tables[TABLE_TASKS])[queue.task];
  const u32 i = threadIdx.x, epoch = control[CONTROL_EPOCH];
  if (task.op == 0) {
    staged[i] = 2.0f * x[i];
    __syncthreads();
    arena[i] = staged[i] + w[i];
    __threadfence();
    __syncthreads();
    if (i == 0) {
      *n += 1;
      atomicAdd(const_cast<u32*>(&control[CONTROL_EVENTS]), 1);
    }
  } else {
    if (i == 0)
      while (static_cast<i32>(control[CONTROL_EVENTS] - (epoch + 1)) < 0) {}
    __syncthreads();
    __threadfence();
    y[i] = arena[i];
    if (i == 0 && x[0] < 0) {  // asked to fail
      Fault* record = reinterpret_cast<Fault*>(launch.fixed.fault);
      record->kind = 0;
      record->worker = blockIdx.x;
      record->task = task.id;
      record->slot = 0;
      record->needed = epoch + 5;
      record->seen = epoch + 1;
      record->epoch = epoch;
      __threadfence_system();
      *const_cast<volatile u32*>(&record->state) = 2;
    }
    __syncthreads();
    if (i == 0) control[CONTROL_EPOCH] = epoch + 1;
  }
}
"""


def graph() -> Graph:
    i = ex.var("i0", SIZE)
    x, w = ex.load("x", (i,), DType.F32), ex.load("w", (i,), DType.F32)
    n = ex.load("n", (), DType.I64)
    body = ex.op("add", ex.op("mul", x, ex.const(2.0, DType.F32)), w)
    buffers = [
        buffer("x", DType.F32, (SIZE,), BufferKind.INPUT),
        buffer("w", DType.F32, (SIZE,), BufferKind.PARAM, origin="model.w"),
        buffer("n", DType.I64, (), BufferKind.STATE),
        buffer("n@1", DType.I64, (), BufferKind.STATE, storage="n"),
        buffer("t", DType.F32, (SIZE,), BufferKind.SCRATCH),
        buffer("y", DType.F32, (SIZE,), BufferKind.OUTPUT),
    ]
    nodes = (
        RowMap("add", (i,), body, "t", (i,), origin="model.add"),
        RowMap("count", (), ex.op("add", n, ex.index(1)), "n@1", ()),
        RowMap("copy", (i,), ex.load("t", (i,), DType.F32), "y", (i,), origin="model.copy"),
    )
    outputs = (Output("y"), Output(constant=7), Output("n@1"))
    return Graph(nodes, {b.name: b for b in buffers}, outputs)


def program(source: str = SOURCE) -> Program:
    g = graph()
    vector, scalar = whole((SIZE,)), ()
    tasks = (
        Task(0, 0, "row_map", (0,), (Access("x", vector), Access("w", vector)), (Access("t", vector),), 0, 0),
        Task(1, 2, "row_map", (0,), (Access("t", vector),), (Access("y", vector),), 0, 0),
        Task(2, 1, "row_map", (0,), (Access("n", scalar),), (Access("n@1", scalar),), 0, 0),
    )
    tg = TaskGraph(g, g.buffers, tasks, (Event(0, (0,), (1,)),))
    schedule = Schedule(tg, ((0, 2), (1,)), {"t": 0}, 4 * SIZE, (0,))
    tables = {name: np.zeros(0, s.dtype).tobytes() for name, s in abi.TABLES}
    queues = np.zeros(WORKERS, abi.QUEUE.dtype)
    queues["task"] = [0, 1]
    queues["task_count"] = 1
    rows = np.zeros(2, abi.TASK.dtype)
    rows["op"] = rows["id"] = [0, 1]
    tables |= {"queues": queues.tobytes(), "tasks": rows.tobytes()}
    return Program(schedule, source, ("add", "copy"), tables, BINDINGS, SIZE, 4 * SIZE, "toy", profiled=True)


def read(address: int, dtype: np.dtype, count: int) -> np.ndarray:
    """Host memory at an address, writable, without a copy."""
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


def run_on_host(params: int) -> dict[str, int]:
    """What SOURCE does, on host memory, from the address of the kernel's parameter array. Returns the fixed part."""
    launch = ctypes.c_uint64.from_address(params).value
    fixed = read(launch, abi.LAUNCH_FIXED.dtype, 1)[0]
    y, w, n, x = (int(p) for p in read(launch + abi.LAUNCH_FIXED.dtype.itemsize, np.dtype("<u8"), 4))
    names = [name for name, _ in abi.TABLES]
    queues = read(int(fixed["tables"][names.index("queues")]), abi.QUEUE.dtype, WORKERS)
    tasks = read(int(fixed["tables"][names.index("tasks")]), abi.TASK.dtype, 2)
    assert [int(tasks[q["task"]]["op"]) for q in queues] == [0, 1]
    arena = read(int(fixed["arena"]), np.dtype("<f4"), SIZE)
    control = read(int(fixed["control"]), np.dtype("<u4"), abi.control_bytes(1) // 4)
    source, weight = read(x, np.dtype("<f4"), SIZE), read(w, np.dtype("<f4"), SIZE)
    epoch = int(control[abi.CONTROL_EPOCH])
    arena[:] = 2 * source + weight
    read(n, np.dtype("<i8"), 1)[0] += 1
    control[abi.CONTROL_EVENTS] += 1
    assert control[abi.CONTROL_EVENTS] == epoch + 1, "the control block was reset between launches, or shared"
    read(y, np.dtype("<f4"), SIZE)[:] = arena
    if source[0] < 0:
        record = read(int(fixed["fault"]), abi.FAULT.dtype, 1)
        record[0] = (2, 0, 1, FAULT_TASK, 0, epoch + 5, epoch + 1, epoch)
    control[abi.CONTROL_EPOCH] = epoch + 1
    return {name: int(fixed[name]) for name in abi.LAUNCH_FIXED.dtype.names if name != "tables"}
