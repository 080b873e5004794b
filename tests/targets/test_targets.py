"""Targets: the table, architectures and detection, without torch and without a GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from mpk_dynamo.errors import LaunchError
from mpk_dynamo.targets import FEATURES, KNOWN, arch_of, features_of, from_properties, known, reference_target

H200 = {
    "name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132,
    "shared_memory_per_block_optin": 232448, "shared_memory_per_multiprocessor": 233472,
    "regs_per_multiprocessor": 65536, "L2_cache_size": 60 << 20,
}  # fmt: skip


def properties(**changes):
    return SimpleNamespace(**{**H200, **changes})


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_the_table_is_consistent(target):
    assert target.features == features_of(target.arch) <= set(FEATURES)
    assert arch_of(target.compute_capability) == target.arch
    assert target.shared_bytes_per_block < target.shared_bytes_per_sm
    assert target.is_gpu and 0.5e12 < target.bandwidth < 10e12


def test_features_follow_the_architecture():
    assert "wgmma" in features_of("sm_90a") and "wgmma" not in features_of("sm_90")
    assert "wgmma" not in features_of("sm_100a") and "tcgen05" in features_of("sm_100a")
    assert features_of("sm_80") == {"async_copy", "bf16_mma"}
    assert {"bulk_copy", "mbarrier_tx"} <= features_of("sm_120") and "setmaxnreg" not in features_of("sm_120")


def test_known_by_gpu_and_by_architecture():
    assert known("H200").sm_count == 132 and known("RTX 4090") is KNOWN["rtx4090"]
    generic = known("sm_90a")
    assert (generic.name, generic.arch, generic.compute_capability) == ("sm_90a", "sm_90a", (9, 0))
    assert known("sm_86").compute_capability == (8, 6)
    with pytest.raises(LaunchError, match="did you mean 'h200'.*sm_90a"):
        known("h20O")


def test_a_device_of_the_table():
    found = from_properties(properties())
    assert found == known("h200")


def test_a_variant_keeps_its_own_sizes():
    found = from_properties(properties(multi_processor_count=114, memory_clock_rate=1593000, memory_bus_width=5120))
    assert found.sm_count == 114 and found.arch == "sm_90a"
    assert found.bandwidth == pytest.approx(2.039e12, rel=0.01)


def test_a_device_nobody_listed():
    found = from_properties(properties(name="NVIDIA Thing 9", major=12, minor=1))
    assert (found.name, found.arch, found.bandwidth) == ("nvidia-thing-9", "sm_121", 0.0)


def test_old_gpus_are_refused_with_a_remedy():
    with pytest.raises(LaunchError, match="Tesla V100 has compute capability 7.0 -> .*8.0"):
        from_properties(properties(name="Tesla V100", major=7))


def test_the_reference_target():
    target = reference_target()
    assert (target.name, target.sm_count, target.is_gpu) == ("cpu-reference", 8, False)
    assert reference_target(3).sm_count == 3


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def test_importing_targets_needs_neither_torch_nor_cuda():
    assert python("import sys, mpk_dynamo.targets; print({'torch', 'cuda', 'numpy'} & set(sys.modules))") == "set()"


def test_importing_the_runtime_needs_neither_torch_nor_cuda():
    assert python("import sys, mpk_dynamo.runtime; print({'torch', 'cuda'} & set(sys.modules))") == "set()"


def test_without_cuda_packages_the_error_says_what_to_install():
    code = """
import sys
sys.modules["cuda"] = sys.modules["cuda.bindings"] = None
from mpk_dynamo.errors import CompileError
from mpk_dynamo.runtime import nvrtc
from mpk_dynamo.targets import known
try:
    nvrtc.compile_source("", known("sm_90a"))
except CompileError as why:
    print(why)
"""
    assert "pip install nvidia-cuda-nvrtc cuda-bindings" in python(code)
