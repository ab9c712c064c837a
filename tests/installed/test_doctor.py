"""Checks python -m fa4_ext doctor: each check on made-up facts, and the whole on a machine without
a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packages import command, copy_package
from processes import run

import fa4_ext
from fa4_ext import _dispatcher, _doctor, _doctor_calls, _environment
from fa4_ext._doctor import NOTE, OK, WRONG
from fa4_ext._doctor_kernel import KernelRun

HERE, ELSEWHERE = Path("/a/fa4_ext"), Path("/b/fa4_ext")
FACTS = _environment.Facts(torch="2.13.0+cu130", torch_cuda="13.0", driver=13000, devices=((9, 0),))


def facts(**different) -> _environment.Facts:
    return _environment.Facts(**{**vars(FACTS), **different})


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ([("1.2.0", HERE)], OK, "1.2.0, the only one"),
        ([], NOTE, "no installed distribution owns"),
        ([("1.1.0", HERE)], WRONG, "the package says 1.2.0, its distribution 1.1.0"),
        ([("1.2.0", HERE), ("1.1.0", HERE)], WRONG, "several installed versions, 1.2.0, 1.1.0"),
        ([("1.2.0", HERE), ("1.1.9", ELSEWHERE)], NOTE, "1.1.9 is installed too, in /b/fa4_ext"),
        (
            [("1.2.0", HERE), ("1.10.0rc1", ELSEWHERE)],
            WRONG,
            "1.2.0 hides a newer one, 1.10.0rc1 in /b/fa4_ext",
        ),
    ],
)
def test_distributions(found, status, words):
    check = _doctor.distributions("1.2.0", HERE, found)[-1]
    assert check.status == status and words in check.sentence


@pytest.mark.parametrize(
    ("problem", "version", "status", "words"),
    [
        (None, fa4_ext.__version__, OK, f"commit {fa4_ext.build_info()['commit']}"),
        (None, "99.0", WRONG, "is not of this package, which is 99.0"),
        ("the loader says no", fa4_ext.__version__, WRONG, "the loader says no"),
    ],
)
def test_library(problem, version, status, words):
    check = _doctor.library(problem, version, {} if problem else fa4_ext.build_info())
    assert check.status == status and words in check.sentence


@pytest.mark.parametrize(
    ("different", "gpu", "statuses"),
    [
        ({}, True, {"torch": OK, "driver": OK}),
        ({"devices": None}, False, {"torch": OK, "driver": OK, "devices": NOTE}),
        ({"torch_cuda": "12.8"}, True, {"torch": NOTE, "driver": OK}),
        ({"devices": ()}, True, {"torch": OK, "driver": OK, "devices": WRONG}),
        ({"driver": 12080}, True, {"torch": OK, "driver": WRONG}),
        (
            {"torch_cuda": None, "driver": None, "devices": ()},
            True,
            {"torch": WRONG, "driver": WRONG, "devices": WRONG},
        ),
        (
            {"torch_cuda": None, "driver": None, "devices": None},
            False,
            {"torch": NOTE, "driver": NOTE, "devices": NOTE},
        ),
        (
            {"torch": "2.10.0", "devices": None},
            False,
            {"torch": WRONG, "driver": OK, "devices": NOTE},
        ),
    ],
)
def test_torch_driver_and_whether_there_is_a_gpu(different, gpu, statuses):
    assert {
        check.name: check.status for check in _doctor.platform(facts(**different), gpu)
    } == statuses


@pytest.mark.parametrize(
    ("capabilities", "archs", "statuses"),
    [
        (((9, 0), (10, 3)), [90, 100], [OK, OK]),
        (((9, 0), (8, 6)), [90, 100], [OK, NOTE]),  # a display's GPU
        (((8, 6), (12, 0)), [90, 100], [WRONG, WRONG]),
        (((10, 0),), [90], [WRONG]),
    ],
)
def test_devices(capabilities, archs, statuses):
    checks = _doctor.devices(["some GPU"] * len(capabilities), capabilities, archs)
    assert [check.status for check in checks] == statuses
    assert [check.name for check in checks] == [f"GPU {index}" for index in range(len(checks))]


def test_registration_below_another_provider_is_wrong():
    with fa4_ext.register() as handle:
        entries = {op: _dispatcher.entry(op) for op in _dispatcher.OPS}
        assert _doctor.registration(handle, entries).status == OK
        check = _doctor.registration(
            handle, entries | {"_flash_attention_forward": "nn/attention/_fa4.py:80"}
        )
    assert (
        check.status == WRONG
        and "aten::_flash_attention_forward goes to nn/attention/_fa4.py:80" in check.sentence
    )
    assert _doctor.registration(None, entries).status == NOTE


MATH, FLASH, EFFICIENT, CUDNN, OVERRIDEABLE = 0, 1, 2, 3, 4
CUDNN_FIRST = [CUDNN, FLASH, EFFICIENT, MATH, OVERRIDEABLE]
FLASH_FIRST = [FLASH, CUDNN, EFFICIENT, MATH, OVERRIDEABLE]
EFFICIENT_FIRST = [EFFICIENT, FLASH, CUDNN, MATH, OVERRIDEABLE]


@pytest.mark.parametrize(
    ("backends", "prefer", "flash_enabled", "status", "words"),
    [
        (CUDNN_FIRST, True, True, OK, "flash attention or cuDNN"),
        (FLASH_FIRST, True, True, OK, "flash attention or cuDNN"),
        ([*FLASH_FIRST, 77], True, True, OK, "cuDNN"),  # a backend of a torch to come
        (None, True, True, OK, "cuDNN"),
        (CUDNN_FIRST, False, True, NOTE, "prefer=False leaves cuDNN its calls"),
        (EFFICIENT_FIRST, True, True, WRONG, "tries efficient_attention, flash_attention, cudnn"),
        ([77, *FLASH_FIRST], True, True, WRONG, "tries 77, flash_attention"),
        (CUDNN_FIRST, True, False, WRONG, "enable_flash_sdp(True)"),
    ],
)
def test_who_gets_the_calls_of_sdpa(backends, prefer, flash_enabled, status, words):
    with fa4_ext.register(prefer=prefer) as handle:
        check = _doctor.sdpa(backends, handle, flash_enabled)
    assert check.status == status and words in check.sentence, check


def test_without_a_registration_pytorch_gets_the_calls_of_sdpa():
    check = _doctor.sdpa(CUDNN_FIRST, None, True)
    assert check.status == NOTE and "PyTorch's own kernels only" in check.sentence, check


def test_settings_that_decide_are_shown():
    environment = {
        "FA4_EXT_AUTOLOAD": "1",
        "FA4_EXT_AUTOREGISTER": "0",
        "FA4_EXT_PROVIDES": "FA3",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }
    assert [check.sentence for check in _doctor.settings({**environment, "HOME": "/"})] == [
        f"{name}={value}" for name, value in environment.items()
    ]


@pytest.mark.parametrize(("error", "status"), [(0.003, OK), (0.02, WRONG), (float("nan"), WRONG)])
def test_kernel_that_is_wrong_is_wrong(error, status):
    errors = {"out": 0.002, "dq": 0.003, "dk": error, "dv": 0.003}
    check = _doctor.kernel(
        KernelRun("a GPU", ("forward", "backward"), errors, 0.01, (1.0, 2.0), 3 * 2**20)
    )
    assert (
        check.status == status and "at most 0.01" in check.sentence and "3.0 MiB" in check.sentence
    )
    assert ("python -m fa4_ext selftest" in check.sentence) == (status == WRONG)


@pytest.mark.parametrize(("capability", "arch"), [((9, 0), 90), ((10, 0), 100), ((10, 3), 100)])
def test_calls_say_what_runs_and_what_falls_back(capability, arch):
    if arch not in fa4_ext.build_info()["archs"]:
        pytest.skip("not built")
    answers = {
        (row.call, row.direction): row.explanation for row in _doctor_calls.rows([capability])
    }
    assert len(_doctor_calls.CALLS) == 8 == len({call for call, _ in answers})
    runs = [name for (name, _), answer in answers.items() if answer.supported]
    for word in ("full", "causal", "grouped heads", "back to back"):
        assert any(word in name for name in runs)
    # D256 runs on some GPUs, in some builds.
    for word in ("dropout", "fp32"):
        assert not any(word in name for name in runs)
    assert all(answer.reason for answer in answers.values() if not answer.supported)


def test_archs_of_capabilities_are_the_planners():
    query = torch.empty(2, 16, 4096, 128, dtype=torch.bfloat16, device="meta")
    for major in range(7, 14):
        for minor in range(10):
            answer = fa4_ext.explain(query, query, query, device_capability=(major, minor))
            arch = _environment.ARCHS.get((major, minor))
            assert answer.supported == (arch in fa4_ext.build_info()["archs"])


def test_without_a_gpu_it_fails_and_says_so():
    result = command("doctor")
    assert result.returncode == 1 and result.stderr == ""
    assert "wrong  devices       this process sees no GPU" in result.stdout
    assert "devices" in result.stdout.splitlines()[-1]
    for arch in fa4_ext.build_info()["archs"]:
        assert f"runs sm{arch}_forward_" in result.stdout
    assert "left to PyTorch's own kernels: dropout_p must be 0" in result.stdout


def test_a_machine_that_needs_no_gpu_is_fine():
    result = command("doctor", "--no-gpu")
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "Nothing is wrong"
    assert torch.__version__ in result.stdout


def test_json_holds_the_same():
    result = command("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 1 and report["ok"] is False and report["kernel"] is None
    assert [check["status"] for check in report["checks"] if check["name"] == "devices"] == [WRONG]
    assert {"capability", "call", "direction", "explanation"} == set(report["calls"][0])


def test_unregistered_and_cudnn_deprioritised_are_notes():
    result = command(
        "doctor", "--no-gpu", FA4_EXT_AUTOREGISTER="0", TORCH_CUDNN_SDPA_DEPRIORITIZED="1"
    )
    assert result.returncode == 0
    for words in (
        "note   registration  none",
        "FA4_EXT_AUTOREGISTER=0",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED=1",
    ):
        assert words in result.stdout


def test_another_provider_on_top_fails(tmp_path):
    """A sitecustomize would put it there."""
    result = run(
        """
        import torch, fa4_ext
        library = torch.library.Library("aten", "IMPL")
        library.impl("_flash_attention_backward", lambda *args, **kwargs: None, "CUDA")
        from fa4_ext import _doctor
        checks = _doctor.examine(gpu=False).checks
        print([check.status for check in checks if check.name == "registration"])
        """
    )
    assert result.stdout == "['wrong']\n"


def test_library_of_an_older_version_fails(tmp_path):
    """The library is of a folder that was copied over another, or a build of before a change of
    version."""
    version = fa4_ext.__version__
    old = "0" * (len(version) - 2) + ".0"
    path = copy_package(tmp_path) / "libfa4_ext.so"
    path.write_bytes(
        path.read_bytes().replace(
            f'"version": "{version}"'.encode(), f'"version": "{old}"'.encode()
        )
    )
    result = command("doctor", "--no-gpu", folders=(tmp_path,))
    assert result.returncode == 1
    assert (
        f"version {old}, commit" in result.stdout
        and f"is not of this package, which is {version}" in result.stdout
    )


def test_the_import_brings_in_none_of_it():
    run(
        "import fa4_ext, sys\nassert not [name for name in sys.modules if "
        "name.startswith('fa4_ext._do')]"
    )
