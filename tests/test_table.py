"""The matrix, the manifest, the generated table and the library's own rows say the same."""

import json
import re

import fa4_core
import pytest
from built import DIRECTORY, SUBSET, kernels, manifest, object_file

import fa4_ext
from kernels import limits, matrix, signature, table
from kernels.kernel import Op
from kernels.matrix import companions, subset

KERNELS = kernels()


def test_manifest_has_a_row_a_kernel():
    assert list(manifest()) == [kernel.name for kernel in KERNELS]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_manifest_row(kernel):
    row = manifest()[kernel.name]
    for field in (
        "arch",
        "dtype",
        "head_dim",
        "head_dim_v",
        "grouped",
        "deterministic",
        "two_cta",
        "tuned",
        "block_m",
        "block_n",
    ):
        assert row[field] == getattr(kernel, field)
    for field in ("op", "layout", "mask"):
        assert row[field] == getattr(kernel, field).value
    assert row["object_bytes"] == len(object_file(kernel))
    assert 0 < row["registers"] <= 255
    assert 0 <= row["shared_memory_bytes"] <= 227 * 1024
    assert row["spill_bytes"] <= limits.spill_bytes(kernel)


def test_table_has_the_matrix_in_order():
    source = (DIRECTORY / "kernel_table.cpp").read_text()
    rows = re.findall(r'^    \{"(\w+)",$', source, re.MULTILINE)
    assert rows == [kernel.name for kernel in KERNELS]
    assert f"kNumKernels = {len(KERNELS)};" in source


def test_library_has_the_matrix_in_order():
    assert [kernel.name for kernel in fa4_ext.kernels()] == [kernel.name for kernel in KERNELS]


def test_planner_of_the_tests_has_every_kernel_that_a_build_can_hold():
    rows = [(kernel.name, kernel.tuned) for kernel in fa4_core.kernels()]
    assert rows == [(kernel.name, kernel.tuned) for kernel in matrix.with_candidates()]


def test_object_list_is_complete():
    listed = (DIRECTORY / "objects.txt").read_text().split()
    assert listed == [str(DIRECTORY / "objects" / f"{kernel.name}.o") for kernel in KERNELS]
    assert sorted(listed) == sorted(str(path) for path in (DIRECTORY / "objects").iterdir())


def built_without_compiling(name):
    facts = dict(load="load", load_to_device="load_to_device", launch="launch")
    facts |= dict(registers=1, spill_bytes=0, shared_memory_bytes=0, object_bytes=1)
    return [table.Built(kernel, facts) for kernel in subset(name)]


def test_rows_of_companions():
    built = built_without_compiling("full")
    source = table.cpp(built, "{}", "[]")
    rows = re.findall(
        r'^    \{"(\w+)",\n.*\n     (?:\w+, ){8}((?:-?\d+, ){5}-?\d+),$',
        source,
        re.MULTILINE,
    )
    assert len(rows) == len(built)
    for row, (name, companion_rows) in zip(built, rows, strict=True):
        assert row.kernel.name == name
        indices = companion_rows.split(", ")
        launched = [built[int(index)].kernel if int(index) >= 0 else None for index in indices]
        assert launched == list(companions(row.kernel))


@pytest.mark.parametrize("fact", ("load", "load_to_device", "launch"))
@pytest.mark.parametrize("name", ['x"', "load(void**); int y; //", "a b", "1a", "", "\u00e9"])
def test_no_name_goes_into_the_table_that_is_not_an_identifier(fact, name):
    (row, *rest) = built_without_compiling("core")
    with pytest.raises(ValueError, match="is no identifier of C"):
        table.cpp([table.Built(row.kernel, row.facts | {fact: name}), *rest], "{}", "[]")


def test_json_cannot_end_the_literal_that_holds_it():
    info = {"commit": 'x)json"; int y; //', "version": ")json"}
    literal = re.search(
        r'kBuildInfo = R"json\((.*?)\)json";', table.cpp([], json.dumps(info), "[]"), re.DOTALL
    )
    assert json.loads(literal[1]) == info


def test_unchanged_files_keep_their_time_stamp(tmp_path):
    path = tmp_path / "file"
    table.write_if_different(path, "content")
    before = path.stat()
    table.write_if_different(path, "content")
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    table.write_if_different(path, "other")
    assert path.read_text() == "other"


def test_build_info_names_what_was_built():
    info = table.build_info(SUBSET, (90, 100), {"a": "1"}, "[]", "1.2.3", "abc")
    assert (info["version"], info["commit"]) == ("1.2.3", "abc")
    assert (info["subset"], info["archs"], info["versions"]) == (SUBSET, [90, 100], {"a": "1"})
    assert (
        info["manifest_sha256"]
        != table.build_info(SUBSET, (90, 100), {"a": "1"}, "[{}]", "1.2.3", "abc")[
            "manifest_sha256"
        ]
    )


def test_build_info_of_the_library_names_its_sources():
    info = fa4_ext.build_info()
    assert info["version"] == fa4_ext.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", info["commit"])


def test_signature_mismatch_names_the_kernel_and_both_orders():
    kernel = KERNELS[0]
    arguments = signature.expected(kernel)
    signature.check(kernel, arguments)
    with pytest.raises(ValueError, match=f"kernel {kernel.name}: (.|\n)*arguments.py") as error:
        signature.check(kernel, arguments[1:])
    assert arguments[0] in str(error.value)


def test_spills_beyond_the_limit_fail():
    with pytest.raises(
        ValueError, match=f"kernel {KERNELS[0].name} uses 1000 bytes a thread of local memory"
    ):
        limits.check(KERNELS[0], {"registers": 168, "spill_bytes": 1000})


def test_products_that_do_not_overlap_fail():
    with pytest.raises(
        ValueError, match=f"kernel {KERNELS[0].name} waits 60 times for 60 WGMMA instructions"
    ):
        limits.check(KERNELS[0], {"registers": 168, "spill_bytes": 0, "products": 60, "waits": 60})


def test_more_registers_than_a_cta_has_fail():
    """A CTA whose warpgroups ask for more would wait for them forever."""
    kernel = next(kernel for kernel in KERNELS if kernel.op is Op.BACKWARD_GROUPS)
    limits.check_registers(kernel, 168)
    with pytest.raises(ValueError, match=f"kernel {kernel.name} has 160 registers a thread for 3"):
        limits.check_registers(kernel, 160)
