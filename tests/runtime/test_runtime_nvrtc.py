"""NVRTC without a GPU: every architecture, resource reports, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import toy_program

from mpk_dynamo import abi
from mpk_dynamo.errors import CompileError
from mpk_dynamo.runtime import nvrtc
from mpk_dynamo.runtime.build import build
from mpk_dynamo.runtime.resources import parse_log
from mpk_dynamo.targets import known, reference_target

ARCHES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")

# every thread walks a local array that fits no register file of 32 per thread
SPILL = """
extern "C" __global__ void __launch_bounds__(1024, 2) mpk_main(float* p) {
  float a[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) a[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int i = 0; i < 96; ++i) a[i] = a[i] * a[(i + 7) % 96] + a[(i * 5 + r) % 96];
#pragma unroll
  for (int i = 0; i < 96; ++i) p[i * 1024 + threadIdx.x] = a[i];
}
"""


@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_the_launch_struct_for(arch):
    artifact = build(toy_program.program(), known(arch), cache=False)
    assert artifact.cubin[:4] == b"\x7fELF"
    assert b"mpk_main" in artifact.cubin
    assert 8 <= artifact.report.registers <= 64
    assert artifact.report.spill_store_bytes == artifact.report.spill_load_bytes == 0
    assert not artifact.report.spilling and not artifact.from_cache


def test_spills_are_reported():
    cubin, log = nvrtc.compile_source(SPILL, known("sm_90a"))
    report = parse_log(log)
    assert report.registers <= 32
    assert report.spill_store_bytes > 0 and report.spill_load_bytes > 0
    assert report.spilling == ("mpk_main",)
    assert "spilled" in str(report)


def test_static_shared_memory_and_stack_are_reported():
    source = """
    extern "C" __global__ void mpk_main(int* p, int n) {
      __shared__ int tile[128];
      int local[40];
      for (int i = 0; i < 40; ++i) local[i] = p[i];
      for (int i = 0; i < n; ++i) local[(i * n) % 40] += i;
      tile[threadIdx.x & 127] = local[n % 40];
      __syncthreads();
      p[threadIdx.x] = tile[(threadIdx.x + 1) & 127];
    }"""
    report = parse_log(nvrtc.compile_source(source, known("sm_90a"))[1])
    assert report.static_shared_bytes == 512
    assert report.stack_bytes == 160


def test_spills_of_called_functions_count():
    log = """
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    64 bytes stack frame, 640 bytes spill stores, 640 bytes spill loads
ptxas info    : Used 255 registers, 64 bytes cumulative stack size
ptxas info    : Compiling entry function 'mpk_main' for 'sm_90a'
ptxas info    : Function properties for mpk_main
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z4bodyv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 16 bytes cumulative stack size, 512 bytes smem, 368 bytes cmem[0]
"""
    report = parse_log(log)
    assert (report.registers, report.spill_store_bytes, report.spill_load_bytes) == (168, 8, 12)
    assert (report.stack_bytes, report.static_shared_bytes, report.constant_bytes) == (16, 512, 368)
    assert report.spilling == ("_Z4bodyv",)


def test_a_log_without_the_kernel_is_an_error():
    with pytest.raises(ValueError, match="mpk_main"):
        parse_log("ptxas info    : 0 bytes gmem\n")


def test_compile_error_names_line_and_dumped_source():
    source = '#include "mpk/abi.h"\nextern "C" __global__ void mpk_main() { mpk::Nonsense x; }\n'
    with pytest.raises(CompileError) as caught:
        nvrtc.compile_source(source, known("sm_90a"))
    assert "mpk_program.cu(2)" in caught.value.log and "Nonsense" in str(caught.value)
    dumped = Path(caught.value.source_path)
    assert dumped.read_text() == source
    assert (dumped.parent / "mpk/abi.h").read_text() == abi.header()
    assert "sm_90a" in (dumped.parent / "nvrtc.log").read_text()


def test_memory_headers_win_over_files(tmp_path):
    (tmp_path / "mpk").mkdir()
    (tmp_path / "mpk/abi.h").write_text("#error stale header on disk\n")
    (tmp_path / "mpk/user.cuh").write_text('#include "mpk/abi.h"\nstatic_assert(sizeof(mpk::Task) > 0, "");\n')
    source = '#include "mpk/user.cuh"\nextern "C" __global__ void mpk_main() {}\n'
    cubin, _ = nvrtc.compile_source(source, known("sm_90a"), folder=tmp_path)
    assert cubin[:4] == b"\x7fELF"


def test_the_reference_target_has_no_cubin():
    with pytest.raises(CompileError, match="cpu-reference"):
        nvrtc.compile_options(reference_target())


def test_an_architecture_nvrtc_does_not_know():
    target = dataclasses.replace(known("sm_90a"), arch="sm_199a")
    with pytest.raises(CompileError, match="cannot compile for sm_199a.*pip install"):
        nvrtc.compile_source("", target)


def test_a_kernel_that_does_not_fit_is_refused():
    target = known("rtx4090")
    program = dataclasses.replace(toy_program.program(), shared_bytes=target.shared_bytes_per_block + 16)
    with pytest.raises(CompileError, match="shared memory per block"):
        build(program, target, cache=False)


def test_dump_can_be_read_back(tmp_path):
    artifact = build(toy_program.program(), known("sm_90a"), cache=False, dump_dir=tmp_path / "dump", lineinfo=True)
    dump = tmp_path / "dump"
    assert (dump / "mpk_program.cu").read_text() == toy_program.SOURCE
    assert (dump / "mpk_program.cubin").read_bytes() == artifact.cubin
    assert f'"registers": {artifact.report.registers}' in (dump / "resources.json").read_text()
