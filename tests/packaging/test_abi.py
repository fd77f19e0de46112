"""The built libraries keep to the stable ABI; and the check itself notices one that does not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import check_abi
import pytest
import torch

import lsm_cuda

PACKAGE = Path(lsm_cuda.__file__).parent

pytestmark = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None,
    reason="nm and readelf (binutils) not found",
)


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_library(name: str) -> None:
    library = PACKAGE / f"{name}.so"
    if not library.is_file():
        assert name != "_C"
        pytest.skip(f"{library.name} is not built")
    assert not check_abi.check(library), "\n".join(check_abi.check(library))
    used = {symbol for symbol, version, _ in check_abi.undefined_symbols(library) if not version}
    assert "torch_call_dispatcher" in used or "aoti_torch_library_init_impl" in used


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_this_torch_has_what_is_used(name: str) -> None:
    """Loading binds functions late: one that this torch lacks would end a call, not the import."""
    library, folder = PACKAGE / f"{name}.so", Path(torch.__path__[0]) / "lib"
    if not library.is_file():
        assert name != "_C"
        pytest.skip(f"{library.name} is not built")
    if name == "_C_cuda" and not torch.version.cuda:
        pytest.skip("this torch is built without CUDA")
    names = ["libtorch_cpu.so", *(["libtorch_cuda.so"] if torch.version.cuda else [])]
    exported = {
        line.split()[-1]
        for part in names
        for line in check_abi.output("nm", "-D", "--defined-only", folder / part)
    }
    symbols = check_abi.undefined_symbols(library)
    wanted = {symbol for symbol, version, letter in symbols if not version and letter == "U"}
    assert wanted <= exported, sorted(wanted - exported)


def test_the_check_notices(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "bad.cpp", tmp_path / "bad.so"
    source.write_text(
        'extern "C" { void PyErr_Clear(); void torch_exception_get_what_without_backtrace();\n'
        "void PyInit_bad() { PyErr_Clear(); torch_exception_get_what_without_backtrace(); } }\n"
        "namespace c10 { void warn(int); } void f() { c10::warn(1); }\n"
    )
    rpath = "-Wl,-rpath,/somewhere"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library, rpath], check=True)
    problems = "\n".join(check_abi.check(library))
    for text in (
        "PyErr_Clear is not on the list",
        "_ZN3c104warnEi is not on the list",
        "must be a weak reference",
        "PyInit_bad is exported",
        "/somewhere is left in",
        "libtorch.so is not NEEDED",
    ):
        assert text in problems
