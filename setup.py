"""Build the compiled kernels of metakern, which neither include nor link PyTorch.

METAKERN_NATIVE chooses what is built. `cuda`: the C++ and the CUDA kernels; the build fails without nvcc. `cpu`: the
C++ kernels; the build fails without a compiler. `none`: pure Python. `auto` (the default): whatever the compilers found
can build. The build does not look for a GPU. The CUDA kernels link CUDA's runtime statically, and are compiled for
sm_80, sm_90, and as PTX for later GPUs.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ninja import BIN_DIR
from ninja.ninja_syntax import Writer, escape
from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError, LinkError, PlatformError

FLAGS = ["-std=c++17", "-O3", "-g0", "-pthread", "-fvisibility=hidden"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# Every file of csrc/cpu is compiled once for each instruction set; csrc/isa.cpp picks one at load.
X86 = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
ARM = {"neon": []}  # a part of every 64-bit Arm CPU, fused multiply-add included
MACHINES = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
ISAS = MACHINES.get(platform.machine(), {"baseline": []})
SANITIZERS = []
if os.environ.get("METAKERN_SANITIZE") == "1":  # for tests: the kernels abort on a bad memory access
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    SANITIZERS += ["-fno-sanitize=null,object-size,pointer-overflow,vptr"]  # slow to compile; ASan finds the accesses
    FLAGS += ["-O1", "-g1", *SANITIZERS]
    ISAS.pop("avx2", None)
NVCC_FLAGS = ["-std=c++17", "-O3", "-Icsrc/cuda", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def nvcc() -> str | None:
    """The path of CUDA's compiler: on PATH, else in CUDA_HOME (/usr/local/cuda if not set); None without one."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return shutil.which("nvcc") or (str(home) if home.exists() else None)


class BuildPackages(build_py):
    """Leaves out the tests of the benchmarks, which need a clone."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if not module[1].startswith("test_")]


class EditableWheel(editable_wheel):
    """Installs a clone as one folder on the path, where `metakern bench` finds the benchmarks beside the package."""

    def finalize_options(self) -> None:
        distribution = self.distribution
        distribution.packages = [name for name in distribution.packages if not name.startswith("metakern._bench")]
        distribution.package_dir = {"": "."}
        super().finalize_options()


class BuildKernels(build_ext):
    """Compile `csrc` by Ninja: `csrc/cpu` once for each instruction set, and CUDA files by nvcc.

    Objects are kept in `build`, and compiled anew where a source, a header or a flag has changed.
    """

    def build_extension(self, ext: Pybind11Extension) -> None:
        cuda = ext.name == "metakern._cuda"
        kind, without = ("CUDA", "cpu") if cuda else ("C++", "none")
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if self.compiler.compiler_type == "msvc":
                raise PlatformError("they need GCC or Clang")
            objects = self.compile(ext)
            target.parent.mkdir(parents=True, exist_ok=True)
            if cuda:
                run(nvcc(), "-shared", "-cudart=static", *objects, "-o", target)
                return
            flags = [*ext.extra_link_args, *SANITIZERS, "-pthread"]
            self.compiler.link_shared_object(objects, str(target), extra_postargs=flags, target_lang="c++")
        except (CompileError, LinkError, PlatformError) as error:
            raise CompileError(
                f"the {kind} kernels were not built ({error}); set METAKERN_NATIVE={without} to do without them"
            ) from error

    def compile(self, ext: Pybind11Extension) -> list[str]:
        """Return the object files of an extension."""
        folder = Path("build", f"{ext.name}-{'sanitized' if SANITIZERS else sys.implementation.cache_tag}")
        if self.force:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        with (folder / "build.ninja").open("w", encoding="utf-8") as file:
            ninja = Writer(file, width=2**31)
            ninja.variable("builddir", str(folder))  # for its logs
            ninja.rule("compile", "$compiler -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            for source, isa in self.units(ext):
                objects.append(str(folder / (isa or "once") / f"{source}.o"))
                compiler = escape(shlex.join(self.compiler_of(ext, source, isa)))
                ninja.build(objects[-1], "compile", source, variables={"compiler": compiler})
        run(Path(BIN_DIR, "ninja"), "-f", folder / "build.ninja", *([] if self.verbose else ["--quiet"]))
        return objects

    def units(self, ext: Pybind11Extension) -> list[tuple[str, str]]:
        """Return each source with the instruction set to compile it for, or "" if it is compiled once."""
        many = [(source, isa) for source in ext.sources if "/cpu/" in source for isa in ISAS]
        return many + [(source, "") for source in ext.sources if "/cpu/" not in source]

    def compiler_of(self, ext: Pybind11Extension, source: str, isa: str) -> list[str]:
        if source.endswith(".cu"):
            return [nvcc(), *NVCC_FLAGS]
        macros = [f"-DMETAKERN_ISA={isa}"] if isa else [f"-DMETAKERN_HAS_{name}=1" for name in ISAS]
        include = [f"-I{folder}" for folder in (*ext.include_dirs, *self.compiler.include_dirs)]
        return [*self.compiler.compiler_so_cxx, *macros, *include, *FLAGS, *ISAS.get(isa, [])]


def run(program: str | Path, *arguments: str | Path) -> None:
    try:
        subprocess.run([program, *arguments], check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{Path(program).name} failed with status {error.returncode}") from error


def extensions() -> list[Pybind11Extension]:
    native = os.environ.get("METAKERN_NATIVE", "auto")
    if native not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"METAKERN_NATIVE must be auto, cuda, cpu or none, got {native!r}")
    if native == "none":
        return []
    if native == "cuda" and not nvcc():
        raise SystemExit("METAKERN_NATIVE=cuda: nvcc was not found; install it or set CUDA_HOME, or use auto")

    def extension(name: str, patterns: tuple[str, ...], required: bool) -> Pybind11Extension:
        sources = sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))
        headers = [str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh")]  # in source packages
        return Pybind11Extension(name, sources, depends=headers, optional=not required)

    found = [extension("metakern._C", ("*.cpp", "cpu/*.cpp"), native != "auto")]
    if nvcc() and native in ("auto", "cuda"):
        found.append(extension("metakern._cuda", ("cuda/*.cpp", "cuda/*.cu"), native == "cuda"))
    return found


CLONE = ["benchmarks.gpu", "benchmarks.dialogue", "benchmarks.scaling"]  # need a clone
benchmarks = find_packages(include=["benchmarks", "benchmarks.*"], exclude=CLONE)
setup(
    packages=find_packages(include=["metakern", "metakern.*"]) + [f"metakern._bench.{name}" for name in benchmarks],
    # In a folder of their own that `metakern bench` puts on the path, as the name is too common for site-packages.
    package_dir={"metakern._bench.benchmarks": "benchmarks"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackages, "editable_wheel": EditableWheel},
)
