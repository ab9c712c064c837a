"""The device code in the built objects is what its name says."""

import re
import struct
import subprocess

import pytest
from built import device_code, kernels, manifest, object_file

from kernels import cubin, worker
from kernels.kernel import TWO_PASS, Op

KERNELS = kernels()
ATTENTION = [k for k in KERNELS if k.op in (Op.FORWARD, Op.BACKWARD, *TWO_PASS)]
MATRIX_INSTRUCTION = {90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}


def names(kernel):
    return kernel.name


@pytest.mark.parametrize("kernel", KERNELS, ids=names)
def test_device_code_is_for_its_architecture(kernel):
    assert cubin.arch(device_code(kernel)) == kernel.arch


@pytest.mark.parametrize("kernel", KERNELS, ids=names)
def test_object_needs_only_the_runtime_shims(kernel):
    assert set(cubin.undefined(object_file(kernel))) <= worker.PROVIDED


@pytest.mark.parametrize("kernel", ATTENTION, ids=names)
def test_attention_uses_its_architecture_s_tensor_cores(kernel):
    assert re.search(MATRIX_INSTRUCTION[kernel.arch], cubin.disassemble(device_code(kernel)))


@pytest.mark.parametrize("kernel", ATTENTION[:4], ids=names)
def test_manifest_has_the_cubin_s_resources(kernel):
    found = cubin.resources(device_code(kernel))
    row = manifest()[kernel.name]
    assert (row["registers"], row["spill_bytes"]) == (found.registers, found.spill_bytes)


@pytest.mark.parametrize("kernel", [k for k in ATTENTION if k.arch == 90][:4], ids=names)
def test_products_and_waits_are_those_of_the_disassembly(kernel):
    code, found = cubin.disassemble(device_code(kernel)), cubin.resources(device_code(kernel))
    assert found.products == len(re.findall(r"\bHGMMA\b", code)) > 0
    assert found.waits == len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) > 0


@pytest.mark.parametrize("kernel", ATTENTION[:4], ids=names)
def test_host_code_runs_on_any_x86_64(kernel, tmp_path):
    path = tmp_path / "kernel.o"
    path.write_bytes(object_file(kernel))
    code = subprocess.run(
        ["objdump", "-d", path], capture_output=True, text=True, check=True
    ).stdout
    # The compiler's default would be the building machine's AVX.
    assert "%xmm" in code and not re.search(r"%[yz]mm", code)


def test_an_object_without_device_code_is_refused():
    with pytest.raises((ValueError, StopIteration, struct.error)):
        cubin.extract(b"\x7fELF" + bytes(60))
