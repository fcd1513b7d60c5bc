"""How strong the products in a LoRA file are: alpha, wherever files say it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import BadInput
from sfumato.foreign import read_json, reading, shaped, shortened

PEFT = "adapter_model.safetensors"
"""peft's name for a file of one network, which does not say which."""
_HALF = 2.0**-8
"""Trainers that save in half precision round the alphas beside the layers too, to 8 bits in bfloat16."""


class Strengths:
    """What is said of alpha elsewhere than beside the layers: in a file's header, or in peft's configuration beside it.

    Raises:
        BadInput: what is told cannot be read, or says that the file holds another kind of adapter.
    """

    def __init__(self, path: Path, header: Mapping[str, str]):
        self.path = path
        self.single: dict[str, float] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.vague: dict[str, str] = {}
        for name in ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha"):
            if header.get(name, "None") in ("None", ""):
                continue
            if name == "ss_network_alpha" and header[name] == "Dynamic":  # of kohya's resizing: each layer has its own
                self.vague[name] = header[name]
            else:
                self.single[f"its header's {name}"] = self._number(header[name], name)
        for name in ("network_alphas", "lora_adapter_metadata"):
            if name in header:
                with reading(path):
                    where, told = f"its header's {name}", json.loads(header[name])
                    told = shaped(told, dict, f"{path}: {where}")
                    (self.tables if name == "network_alphas" else self.configs)[where] = told
        beside = path.parent / "adapter_config.json"
        if path.name == PEFT and beside.is_file():
            self.configs[beside.name] = read_json(beside)
        for where, config in self.configs.items():
            kinds = (str(x) for k, x in config.items() if re.fullmatch(r"(.*\.)?peft_type", k) and x is not None)
            if kind := next((kind for kind in kinds if kind != "LORA"), ""):
                told = f"{shortened(kind, 40)} of peft by {where}, which cannot be attached"
                raise BadInput(f"{path} holds an adapter of the kind {told}: take a plain LoRA")

    def alpha(self, part: str, name: str, rank: int, beside: float | None, mixed: bool) -> float:
        """Of one layer of a part ("unet", "text_encoder").

        Args:
            beside: what stands beside the layer's factors.
            mixed: whether the layers' own alphas differ, so that one word for all of them can only be a default.

        Raises:
            BadInput: several places say different things; the rank is another than they say.
        """
        said = {} if beside is None else {"the tensors": beside}
        said |= {} if said and mixed else self.single
        for where, table in self.tables.items():
            values = {str(v): v for k, v in table.items() if _flat(k).endswith(_flat(name))}
            values = values or {str(v): v for v in table.values()}
            if len(values) > 1:
                raise BadInput(f"{self.path} says several alphas in {where}: which is meant for {name} cannot be known")
            for value in values.values():
                said[where] = self._number(value, where)
        for where, config in self.configs.items():
            found = self._configured(config, where, part, name, rank)
            said |= {} if found is None else {where: found}
        if any(not math.isclose(a, b, rel_tol=_HALF) for a in said.values() for b in said.values()):
            told = ", ".join(f"{value:g} in {where}" for where, value in said.items())
            raise BadInput(f"{self.path} says several alphas, {told}: which is meant cannot be known")
        if not said and self.vague:
            where, value = next(iter(self.vague.items()))
            told = f"{self.path} says {value!r} as its {where}, and {name} has no alpha of its own"
            raise BadInput(f"{told}: fetch it again")
        return next(iter(said.values()), float(rank))

    def _configured(self, config: Mapping[str, Any], where: str, part: str, name: str, rank: int) -> float | None:
        own = {k.removeprefix(f"{part}."): x for k, x in config.items() if k.startswith(f"{part}.") or "." not in k}
        if own.get("use_dora"):
            raise BadInput(f"{self.path} is a DoRA by {where}, which cannot be attached: take a plain LoRA")
        ranks, alphas = (self._pattern(own.get(k), name, where) for k in ("rank_pattern", "alpha_pattern"))
        r = own.get("r") if ranks is None else ranks
        if r not in (None, rank):
            raise BadInput(f"{self.path} has rank {rank}, and {where} says {shortened(str(r), 40)}: write it again")
        alpha = own.get("lora_alpha") if alphas is None else alphas
        if alpha is None:
            return None
        return self._number(alpha, where) * (rank**0.5 if own.get("use_rslora") else 1)

    def _pattern(self, table: Any, name: str, where: str) -> Any:
        """peft's value for a layer: of the first key that is its name or the end of it; all keys are expressions."""
        for key, value in table.items() if isinstance(table, dict) else ():
            try:
                if re.match(rf"(.*\.)?({key})$", name):
                    return value
            except re.error:
                told = f"{shortened(key, 60)!r} in {where}, which is no expression for the names of layers"
                raise BadInput(f"{self.path} has {told}: write it again") from None
        return None

    def _number(self, value: Any, where: str) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise BadInput(f"{self.path} says {shortened(str(value), 40)!r} as its alpha ({where}), which is no number")
        return found


def _flat(name: str) -> str:
    return re.sub(r"\W", "_", name.removesuffix(".alpha"))
