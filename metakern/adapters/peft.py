"""LoRA adapters on disk, in the format of the PEFT library: each library reads what the other one writes.

A folder holds two files::

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight [rank, in] and .lora_B.weight [out, rank];
                                base_model.model.<layer>.base_layer.bias, if a bias of a LoRA layer learns;
                                base_model.model.<name>, parameters and buffers of other modules that learn
    adapter_config.json         peft_type "LORA", r, lora_alpha, target_modules, modules_to_save, ...

Both functions need safetensors, which comes with `pip install "metakern[dialogue]"`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metakern.adapters.lora import LoraLinear, Settings, adapt, adaptable, is_conv1d, join, lora_layers, matrix
from metakern.io import read, write

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
BIAS = "base_layer.bias"
# Settings with which a PEFT layer computes something other than `LoraLinear`, or which change the base model.
FOREIGN = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"),
)
# The pattern of a stranger must not keep the matcher busy for ever. These limits leave it few ways to match.
LONGEST, REPEATS, FORKS = 300, 2, 6  # characters; * + and { among them; | and ? among them
LARGEST = 1e30  # of alpha and the dropout
LARGEST_CONFIG = 2**24  # bytes
MOST = 10**4  # patterns
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that keep the base weights


def save_lora(model: nn.Module, directory: str | Path, parameters: Mapping[str, Tensor] | None = None) -> None:
    """Writes the LoRA layers of `model`, and all other modules that learn, in PEFT's format.

    Each of the two files is replaced as a whole or not at all. `load_lora` refuses files of two saves with different
    alphas.

    Args:
        model: A model with LoRA layers.
        directory: The folder to write to; it is created if there is none.
        parameters: Values to write in place of the model's own, by name. To save the parameters of task t, pass
            `{name: p[t] for name, p in maml.adapt(support).items()}`.

    Raises:
        TypeError: If `model` is no `nn.Module`.
        ValueError: If it has no LoRA layers, if one of `parameters` is not in the model or has another shape, or if
            PEFT's format has no place for a parameter that learns: one of the model itself, of a module with
            submodules, or of a LoRA layer beside A, B and the bias.
        CheckpointError: If a file can't be written.

    >>> import metakern as mk, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> _ = mk.lora(model, rank=2)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     mk.save_lora(model, directory)
    ...     _ = mk.remove_lora(model)
    ...     mk.load_lora(model, directory)
    ['0']
    """
    from safetensors.torch import save

    layers = lora_layers("save_lora", model)
    values = _values(model, parameters or {})
    learning = {name for name, p in model.named_parameters() if p.requires_grad} | set(parameters or ())
    biases = [path for path in layers if join(path, "bias") in learning]
    tensors: dict[str, Tensor] = {}
    for path in layers:
        keys = FACTORS | ({"bias": BIAS} if path in biases else {})
        tensors |= {join(path, key): values[join(path, name)] for name, key in keys.items()}
        learning -= {join(path, name) for name in keys}
    modules = {name.rpartition(".")[0]: name for name in learning}
    for path, name in modules.items():
        module = model.get_submodule(path)
        if not path or isinstance(module, LoraLinear) or next(module.children(), None) is not None:
            raise ValueError(
                f"save_lora: trainable parameters must have a place in PEFT's format, got {name!r}, which is neither "
                "LoRA's nor of a module without submodules: freeze it"
            )
        own = {*module._parameters, *module._buffers} - module._non_persistent_buffers_set
        tensors |= {place: values[place] for key in own if (place := join(path, key)) in values}
    config = _config(model, layers)
    config |= {"bias": "lora_only" if biases else "none", "modules_to_save": sorted(modules) or None}
    data = {PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write(Path(directory) / TENSORS, save(data, {"format": "pt", "alpha": _alpha(config)}))
    write(Path(directory) / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _values(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the model's tensors by all their names, with the values of `parameters` among them."""
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, value in parameters.items():
        if name not in state:
            raise ValueError(f"save_lora: parameters must have names of model's state dict, got {name!r}")
        if value.shape != state[name].shape:
            shapes = f"{list(state[name].shape)} as in model, got {list(value.shape)}"
            raise ValueError(f"save_lora: {name} must have shape {shapes}: give the parameters of one task")
    return state | dict(parameters)


def _config(model: Any, layers: Mapping[str, LoraLinear]) -> dict[str, Any]:
    """Returns adapter_config.json: the most frequent rank and alpha, patterns for layers that differ, most dropout."""
    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: layer.alpha for path, layer in layers.items()}
    ((rank, _),), ((alpha, _),) = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    causal = getattr(model, "can_generate", bool)() and not getattr(model.config, "is_encoder_decoder", False)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "target_modules": list(layers),
        "fan_in_fan_out": any(is_conv1d(layer) for layer in layers.values()),
        "inference_mode": True,
    }


def _alpha(config: Mapping[str, Any]) -> str:
    """Returns the alphas of a config, which the tensors' file repeats so that files of two saves are noticed."""
    return json.dumps([config.get("lora_alpha"), config.get("alpha_pattern")])


def load_lora(model: nn.Module, directory: str | Path) -> list[str]:
    """Reads adapters in PEFT's format into `model`, in place.

    A model without LoRA layers gets those of the files. Then the parameters that were read learn, and all others are
    frozen. A model with LoRA layers must have the same layers, ranks and alphas, and its parameters learn as before.

    Args:
        model: The model that the adapters were trained for.
        directory: The folder with `adapter_config.json` and `adapter_model.safetensors`. New A and B have the wider of
            the dtypes of the file and of the first layer's weight.

    Returns:
        The names of the LoRA layers that were read, in the model's order.

    Raises:
        TypeError: If `model` is no `nn.Module`.
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, if the files are of two saves with different alphas, if they hold no LoRA
            layers or a variant that `metakern.nn.LoraLinear` does not compute, or if they do not fit the model, which
            is left as it was.

    >>> import metakern as mk, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> _ = mk.lora(model, rank=2)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     mk.save_lora(model, directory)
    ...     mk.load_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), directory)
    ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_lora: model must be a torch.nn.Module, got {type(model).__name__}")
    config, tensors = _read(Path(directory))
    factors, rest = _by_layer(tensors)
    settings = {path: _settings(config, path, A.shape[0]) for path, (A, _) in factors.items()}
    adapted = {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear)}
    obstacles = dict.fromkeys(adapted) if adapted else adaptable("load_lora", model)
    for path, (A, B) in factors.items():
        if path not in obstacles or obstacles[path]:
            why = obstacles.get(path, f"is no {'LoRA' if adapted else 'linear'} layer of model")
            raise ValueError(f"load_lora: layers must be those of model, got {path!r}, which {why}")
        out, size = matrix(model.get_submodule(path)).shape
        if A.shape[1] != size or B.shape != (out, A.shape[0]):
            shapes = f"[rank, {size}] and [{out}, rank], got {list(A.shape)} and {list(B.shape)}"
            raise ValueError(f"load_lora: lora_A and lora_B of {path!r} must have shapes {shapes}")
    for path, layer in adapted.items():
        found = settings.get(path)
        if found is None or (found.rank, found.alpha) != (layer.rank, layer.alpha):
            got = "nothing" if found is None else f"{found.rank} and {found.alpha:g}"
            wanted = f"rank {layer.rank} and alpha {layer.alpha:g} as in model"
            raise ValueError(f"load_lora: {path!r} must have {wanted}, got {got}")
    state, bases = model.state_dict(), {join(path, "weight") for path in factors}
    for name, value in rest.items():
        if name not in state or name in bases or state[name].shape != value.shape:
            got = "none" if name not in state else "a frozen weight" if name in bases else f"{list(state[name].shape)}"
            raise ValueError(f"load_lora: {name!r} must have shape {list(value.shape)} in model, got {got}")
    layers = [path for path in obstacles if path in factors]  # in the model's order
    if not adapted:
        dtype = torch.promote_types(factors[layers[0]][0].dtype, matrix(model.get_submodule(layers[0])).dtype)
        learning = [name for name, _ in model.named_parameters() if name in rest]
        adapt(model, {path: settings[path] for path in layers}, learning, dtype, seed=0)
    state = model.state_dict()  # now with A and B; its tensors share the model's memory
    for path, pair in factors.items():
        for name, value in zip(FACTORS, pair, strict=True):
            state[join(path, name)].copy_(value)
    for name, value in rest.items():
        state[name].copy_(value)
    return layers


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads both files and returns the config and the tensors; raises if they are missing, damaged or of two saves."""
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_lora: directory must hold {name}, got {str(folder)!r}")
    try:
        name = CONFIG
        config = json.loads(read(folder / name, LARGEST_CONFIG))
        name = TENSORS
        with safe_open(folder / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a mapping
            alpha = (file.metadata() or {}).get("alpha")
        patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
        if not all(isinstance(pattern, dict) and len(pattern) <= MOST for pattern in patterns):
            raise TypeError
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, SafetensorError):
        raise ValueError(f"load_lora: files must be readable, got a damaged {name} in {str(folder)!r}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"load_lora: peft_type must be LORA, got {reprlib.repr(config.get('peft_type'))}")
    if alpha not in (None, _alpha(config)):
        raise ValueError(f"load_lora: files must be of one save, got two with different alphas in {str(folder)!r}")
    foreign = {key: config[key] for key in FOREIGN if config.get(key)}
    if config.get("init_lora_weights") not in STARTS:
        foreign["init_lora_weights"] = config["init_lora_weights"]
    if foreign:
        raise ValueError(
            f"load_lora: config must be of plain LoRA, got {reprlib.repr(foreign)}: merge the adapter with PEFT instead"
        )
    return config, tensors


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Returns (A, B) by layer, and the other tensors by their names in the model."""
    pairs: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        path, _, factor = name.removesuffix(".weight").rpartition(".")
        if name == key or (
            "lora_" in factor and not (factor in FACTORS and name.endswith(".weight") and tensor.dim() == 2)
        ):
            raise ValueError(f"load_lora: tensors must be named and shaped as LoRA's, got {key!r} {list(tensor.shape)}")
        floating = tensor.is_floating_point()
        if (
            (factor in FACTORS and not floating)
            or tensor.is_complex()
            or (floating and not tensor.float().isfinite().all())
        ):
            raise ValueError(f"load_lora: tensors must be finite floating-point numbers, got {key!r} of {tensor.dtype}")
        if factor in FACTORS:
            pairs.setdefault(path, {})[factor] = tensor
        else:
            rest[name.replace("base_layer.", "")] = tensor
    for path, pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(
                f"load_lora: lora_A and lora_B must come together, got {next(iter(pair))} of {path!r} alone"
            )
    if not pairs:
        raise ValueError("load_lora: files must hold LoRA layers, got none")
    return {path: (pair["lora_A"], pair["lora_B"]) for path, pair in pairs.items()}, rest


def _settings(config: Mapping[str, Any], path: str, rank: int) -> Settings:
    """Returns the settings of the layer at `path`; a pattern matches the end of the path, as in PEFT."""

    def of(name: str, pattern: str) -> Any:
        patterns = config.get(pattern) or {}
        return next((v for key, v in patterns.items() if _matches(key, path)), config.get(name))

    if of("r", "rank_pattern") != rank:
        raise ValueError(f"load_lora: the rank of {path!r} must be {reprlib.repr(of('r', 'rank_pattern'))}, got {rank}")
    alpha, dropout = of("lora_alpha", "alpha_pattern"), config.get("lora_dropout") or 0.0
    if alpha is None:
        raise ValueError("load_lora: config must have lora_alpha, got none")
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if not isinstance(value, (int, float)) or not abs(value) < LARGEST:
            raise ValueError(f"load_lora: {name} must be a number, got {reprlib.repr(value)}")
    alpha = alpha * rank**0.5 if config.get("use_rslora") else alpha  # rsLoRA divides by sqrt(rank)
    return Settings(rank, float(alpha), dropout)


def _matches(pattern: str, path: str) -> bool:
    """Whether a regular expression of an adapter's config matches the end of a layer's name.

    Raises:
        ValueError: If it is none, or could take very long.
    """
    simple = re.sub(r"\\\W|\\[dw]", "", pattern)  # without escapes
    if (
        len(pattern) > LONGEST
        or len(re.findall(r"[*+{]", simple)) > REPEATS
        or len(re.findall(r"[|?]", simple)) > FORKS
    ):
        raise ValueError(f"load_lora: patterns must be short and simple, got {reprlib.repr(pattern)}: name the layers")
    if re.search(r"\)[*+?{]|\(\?(?!:)|\\\d", simple):
        raise ValueError(f"load_lora: patterns must not repeat groups, got {reprlib.repr(pattern)}: name the layers")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except (re.error, OverflowError) as error:
        raise ValueError(f"load_lora: patterns must be regular expressions, got {pattern!r}: {error}") from None
