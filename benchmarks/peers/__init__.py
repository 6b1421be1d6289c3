"""The methods that are compared, a file for each library, and the environments that they run in.

A peer's file defines

    requirements    a tuple of arguments of `pip install`, each installed by itself; if empty, the peer runs in the
                    present environment
    shares_torch    whether it uses PyTorch; if not, it gets a `Problem` of arrays instead of a `Workload`
    methods         {name: prepare}; prepare(workload) returns a function without arguments that computes one
                    meta-gradient, {name of a parameter: array}. It is exact, unless the method's name ends with
                    "first order" or with "bfloat16"

It may also define

    calls_until_steady    {name: calls} for methods that need more than one call to reach their final speed

It imports its library only inside functions, so that these three can be read without the library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import site
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PEERS = (
    "plain",
    "metakern",
    "learn2learn",
    "higher",
    "torchopt",
    "torch_func",
    "parallel_metalearn",
    "torch_compile",
    "jax",
)


def cache() -> Path:
    """Return the folder of the peers' environments and of the meta-gradients in float64."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metakern" / "benchmarks"


def order(method: str) -> int:
    """Return 2 for a method whose meta-gradient is exact, 1 for a first-order method."""
    return 1 if method.endswith("first order") else 2


def precision(method: str) -> str:
    """Return the dtype of a method's matrix products: bfloat16 if its name says so, else float32."""
    return "bfloat16" if "bfloat16" in method else "float32"


def load(peer: str) -> ModuleType:
    return import_module(f"benchmarks.peers.{peer}")


def environment(peer: str) -> Path:
    """Return the interpreter of a peer's environment, made at the first use; raise RuntimeError if it can't be made.

    PyTorch is not installed twice: an environment that needs it also finds the packages of the present one, after its
    own.
    """
    module = load(peer)
    if not module.requirements:
        return Path(sys.executable)
    shared = constraints = ""
    if module.shares_torch:
        from torch import __version__

        shared = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages())
        constraints = f"torch=={__version__.split('+')[0]}\n"
    recipe = "\n".join((sys.version, shared, constraints, *module.requirements))
    home = cache() / peer
    python, done, log = home / "bin" / "python", home / "recipe.txt", home / "pip.log"
    if done.exists() and done.read_text() == recipe:
        return python
    shutil.rmtree(home, ignore_errors=True)
    print(f"{peer}: pip installs {' '.join(module.requirements)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    (home / "constraints.txt").write_text(constraints)
    if module.shares_torch:
        (next((home / "lib").glob("python*")) / "site-packages" / "shared.pth").write_text(shared)
    for arguments in module.requirements:
        command = [python, "-m", "pip", "install", "-q", "-c", home / "constraints.txt", *shlex.split(arguments)]
        with log.open("a") as out:
            failed = subprocess.run(command, stdout=out, stderr=out, check=False).returncode
        if failed:
            said = [line.strip() for line in log.read_text().splitlines() if "error:" in line.lower()]
            raise RuntimeError(f"pip install {arguments}: {said[0] if said else 'failed'} ({log})")
    done.write_text(recipe)
    return python
