"""Build the compiled kernels of metakern, which neither include nor link PyTorch.

METAKERN_NATIVE says what is built: `cpu` the C++ kernels, failing without a compiler; `none` pure Python;
`auto` (the default) `cpu` where a compiler works, else `none`.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

FLAGS = ["-std=c++17", "-O3", "-g0", "-pthread", "-fvisibility=hidden"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# Every file of csrc/cpu is compiled once for each instruction set; csrc/bindings.cpp picks one at load.
X86 = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
ISAS = X86 if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


class BuildKernels(build_ext):
    """Compile `csrc`, the files of `csrc/cpu` once for each instruction set, all in parallel."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            if self.compiler.compiler_type == "msvc":
                raise PlatformError("they need GCC or Clang")
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [pool.submit(self.compile_one, ext, source, isa) for source, isa in self.units(ext)]
            objects = [job.result() for job in jobs]
            target = self.get_ext_fullpath(ext.name)
            flags = [*ext.extra_link_args, "-pthread"]
            self.compiler.link_shared_object(objects, target, extra_postargs=flags, target_lang="c++")
        except (CompileError, LinkError, PlatformError) as error:
            raise CompileError(
                f"the C++ kernels were not built ({error}); METAKERN_NATIVE=none does without"
            ) from error

    def units(self, ext: Pybind11Extension) -> list[tuple[str, str]]:
        """The sources, each with the instruction set to compile it for ("" for those compiled once)."""
        many = [(source, isa) for source in ext.sources if "/cpu/" in source for isa in ISAS]
        return many + [(source, "") for source in ext.sources if "/cpu/" not in source]

    def compile_one(self, ext: Pybind11Extension, source: str, isa: str) -> str:
        macros = [("METAKERN_ISA", isa)] if isa else [(f"METAKERN_HAS_{name}", "1") for name in ISAS]
        (compiled,) = self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp, isa or "once")),
            macros=macros,
            include_dirs=ext.include_dirs,
            extra_postargs=FLAGS + ISAS.get(isa, []),
        )
        return compiled


def extensions() -> list[Pybind11Extension]:
    native = os.environ.get("METAKERN_NATIVE", "auto")
    if native == "cuda":
        raise SystemExit("METAKERN_NATIVE=cuda: this version of metakern has no CUDA kernels; use auto, cpu or none")
    if native not in ("auto", "cpu", "none"):
        raise SystemExit(f"METAKERN_NATIVE must be auto, cuda, cpu or none, got {native!r}")
    if native == "none":
        return []
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    return [Pybind11Extension("metakern._C", sources, depends=headers, optional=native == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
