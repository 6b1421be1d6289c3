"""Models for the tests of the doctor.

`lossy` has models that lose a part of the first or second derivative, each in another way. `LOSSY` holds them by name,
with the kind of problem and a part of the operation's name that the doctor must report. `honest` has models whose
gradient is exact although their code looks suspicious; `HONEST` holds them by name.
"""

from zoo.cases import Act, Case, SavesInput, case, squared
from zoo.honest import HONEST, ExactCube
from zoo.lossy import LOSSY, NativeGelu, NumpyCube, SignThrough

__all__ = [
    "HONEST",
    "LOSSY",
    "Act",
    "Case",
    "ExactCube",
    "NativeGelu",
    "NumpyCube",
    "SavesInput",
    "SignThrough",
    "case",
    "squared",
]
