"""Set up an environment from a lock: PyTorch first and by itself, the locked packages, then metakern from this folder.

    python3 requirements/install.py .venv dev "torch==2.13.0"

installs `requirements/dev.txt`: exact versions, each file checked against its hash, nothing resolved anew. PyTorch is
not in the locks, since its build depends on the machine; what it needs beside its own libraries is. Nothing is printed
but the title of a step, how far it is where a person looks on, and the whole output of one that fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(title: str, command: list[str | Path], total: int = 0) -> None:
    """Run one step; `total` is the number of packages that pip is going to name."""
    shown, began, named, output = sys.stderr.isatty(), time.monotonic(), 0, []
    print(title, end="" if shown else "\n", file=sys.stderr, flush=True)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            output.append(line)
            named += line.startswith(("Collecting ", "Requirement already satisfied: "))
            seconds = time.monotonic() - began
            if shown:
                left = f", about {seconds / named * (total - named):.0f} s left" if 0 < named < total else ""
                count = f"{named} of {total} packages, " if total else ""
                width = shutil.get_terminal_size().columns - 1
                print(
                    f"\r{f'{title}: {count}{seconds:.0f} s{left}':{width}.{width}}", end="", file=sys.stderr, flush=True
                )
    if shown:
        print(f"\r{title}: {time.monotonic() - began:.0f} s\033[K", file=sys.stderr)
    if process.returncode:
        sys.exit(f"{''.join(output)}\n{title}: failed with exit code {process.returncode}")


def kernels(python: Path) -> Path:
    """Return where a build puts the C++ kernels for this Python."""
    script = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    suffix = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    return ROOT / "metakern" / f"_C{suffix}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path, help="folder of the virtual environment, made where it is missing")
    parser.add_argument("lock", help="name of a lock in requirements/")
    parser.add_argument("torch", help='what pip is asked for, such as "torch==2.13.0"')
    parser.add_argument("--wheel", type=Path, help="a wheel to install instead of this folder")
    options = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (an older one reads this file too)
        sys.exit(f"metakern needs Python 3.10 or newer, got {sys.version.split()[0]}: make PYTHON=python3.12 ...")
    lock = ROOT / "requirements" / f"{options.lock}.txt"
    environment = Path(os.path.abspath(options.environment))
    if not (environment / "pyvenv.cfg").exists():
        venv.create(environment, with_pip=True)
    pip = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
    packages = sum("==" in line for line in lock.read_text("utf-8").splitlines())
    run(f"PyTorch ({options.torch})", [*pip, options.torch])
    run(f"locked packages ({lock.relative_to(ROOT)})", [*pip, "--no-deps", "--require-hashes", "-r", lock], packages)
    if options.wheel:
        run(f"metakern ({options.wheel.name})", [*pip, "--no-deps", options.wheel])
    else:
        built = kernels(environment / "bin" / "python")
        built.unlink(missing_ok=True)  # one of an earlier commit would hide that this build fails
        run("metakern, with its kernels", [*pip, "--no-deps", "--no-build-isolation", "-e", "."])
        if (
            not built.exists() and shutil.which("c++") and "METAKERN_NATIVE" not in os.environ
        ):  # a warning that pip hides
            sys.exit(
                "metakern: the C++ kernels were not built: METAKERN_NATIVE=cpu"
                f" {environment / 'bin' / 'python'} setup.py build_ext --inplace says why;"
                " set METAKERN_NATIVE=none to do without them"
            )


if __name__ == "__main__":
    main()
