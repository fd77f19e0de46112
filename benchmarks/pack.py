"""Prepares the folder that gpu_suite.py takes to a GPU machine without network or compiler.

    LSM_BUILD_CUDA=1 make build
    python benchmarks/pack.py --out build/gpu_pack

It holds the built libraries, their commit, the program of benchmarks/micro, and the wheels of peers
that are pure Python and of pytest; torch and triton are the machine's own. The whole must stay
small enough to travel: a wheel that does not fit any more is left out and named.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake"
LIBRARIES = ("_C.so", "_C_cuda.so", "build_info.json")
WHEELS = (
    "fla-core==0.6.0", "flash-linear-attention==0.6.0", "einops", "mlstm_kernels",
    "pytest", "pluggy", "iniconfig", "packaging", "pygments",
)  # fmt: skip
LIMIT = 60 * 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_pack")
    parser.add_argument("--wheels", nargs="*", default=list(WHEELS), help="what pip downloads")
    options = parser.parse_args()
    try:
        micro = build_micro()
        total, left_out = pack(options.out, options.wheels, micro=micro)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    for name in left_out:
        print(f"left out, with it there would be more than {LIMIT / 2**20:.0f} MB: {name}")
    print(f"{total / 2**20:.1f} MB in {options.out}")
    return 0


def build_micro() -> Path:
    """The program of benchmarks/micro, built where the libraries were."""
    subprocess.run(["cmake", "--build", str(BUILD), "--target", "micro"], check=True)
    return BUILD / "micro"


def pack(
    out: Path, wheels: list[str], package: Path = ROOT / "lsm_cuda", micro: Path | None = None
) -> tuple[int, list[str]]:
    """Fills ``out`` anew; returns its size in bytes, and the wheels, of the largest, that had to be
    left out.

    Raises:
        FileNotFoundError: a library is not built.
        ValueError: the libraries alone are larger than LIMIT.
    """
    missing = [name for name in LIBRARIES if not (package / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} not in {package}: build with nvcc (LSM_BUILD_CUDA=1 make build)"
        )
    shutil.rmtree(out, ignore_errors=True)
    (out / "lsm_cuda").mkdir(parents=True)
    (out / "wheels").mkdir()
    for name in LIBRARIES:
        shutil.copy2(package / name, out / "lsm_cuda")
    if micro is not None:
        shutil.copy2(micro, out)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    (out / "commit").write_text(commit.stdout)
    if wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--only-binary=:all:", "-d", str(out / "wheels")]
        subprocess.run([*command, *wheels], check=True)
    sizes = {file: file.stat().st_size for file in out.rglob("*") if file.is_file()}
    left_out = []
    for file in sorted((out / "wheels").iterdir(), key=lambda file: -sizes[file]):
        if sum(sizes.values()) > LIMIT:
            file.unlink()
            del sizes[file]
            left_out.append(file.name)
    total = sum(sizes.values())
    if total > LIMIT:
        largest = max(sizes, key=lambda file: sizes[file])
        raise ValueError(
            f"{out} is {total / 2**20:.1f} MB, more than {LIMIT / 2**20:.0f}; "
            f"the largest file is {largest.name}, {sizes[largest] / 2**20:.1f} MB"
        )
    return total, left_out


if __name__ == "__main__":
    sys.exit(main())
