"""The methods that are compared, a file for each library, and the environments that they live in.

A peer's file says

    requirements    what pip installs for it, a tuple of argument lists; empty: it runs in the present environment
    shares_torch    False where it needs no PyTorch: it then gets a `Problem` of arrays instead of a `Workload`
    methods         name -> step(workload), which prepares and gives a function of nothing: one meta-gradient, by name,
                    of what learns; exact, unless the method's name ends with "first order"

and imports its library inside its functions only, so that anybody can read the first three.
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
    """Where environments and exact answers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metakern" / "benchmarks"


def order(method: str) -> int:
    """2 for an exact meta-gradient, 1 for one without second derivatives: a row of its own kind, no peer."""
    return 1 if method.endswith("first order") else 2


def load(peer: str) -> ModuleType:
    return import_module(f"benchmarks.peers.{peer}")


def environment(peer: str) -> Path:
    """The interpreter of a peer's own environment, made at the first use; RuntimeError says why there is none.

    PyTorch is not installed twice: an environment that needs it sees the present one's packages behind its own.
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
