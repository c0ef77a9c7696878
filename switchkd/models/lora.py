"""LoRA (arXiv 2106.09685) on parts of a student, through peft; merged, it is a stock model again.

peft's own interface, not transformers' wrapper around it (`add_adapter`), whose newest release refuses the newest peft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from switchkd.config import Stage
from switchkd.models.pathway import LlavaPathway, pathway_of

PARTS, HEAD = LlavaPathway.parts, "lm_head"


def add_lora(
    model: LlavaForConditionalGeneration,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    parts: Sequence[str] | None = None,
) -> None:
    """Adapters on every linear layer of the named parts, in place; the class of `model` stays.

    rank: width of the adapters; alpha: their scale is alpha / rank; None: twice the rank. dropout: of what they read.
    parts: "vision_tower" (the layers that an output depends on), "projector", "language_model"; None: the last alone.
    The own weights of these parts are frozen, and with the language model its head, which has no adapter; the other
    parts stay as they were (`freeze`). The start, which changes no output, follows torch's seed. Raises ValueError for
    an unknown part or none, and where there are adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    parts = ("language_model",) if parts is None else tuple(parts)
    if not parts or not set(parts) <= PARTS.keys():
        raise ValueError(f"LoRA is asked for on {list(parts)}: name one or more of {', '.join(PARTS)}")
    if hasattr(model, "peft_config"):
        raise ValueError("the model has LoRA adapters already: call merge_lora before adding others")
    before = {name: (weight, weight.requires_grad) for name, weight in model.named_parameters()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = {name: module for name, module in linear.items() if _part(name) in parts and name != HEAD}
    unread = [each for each in pathway_of(model).unread() if isinstance(each, nn.Module)]
    unused = {inner for module in unread for inner in module.modules()}
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules="|".join(sorted({_pattern(name) for name in linear})),
            exclude_modules="|".join(re.escape(name) for name, module in linear.items() if module in unused) or None,
        ),
        model,
    )
    for name, (weight, trained) in before.items():  # peft freezes the whole model
        weight.requires_grad_(trained and _part(name) not in parts)


def merge_lora(model: LlavaForConditionalGeneration) -> None:
    """Adds the adapters to the weights they sit on and removes them, in place.

    Class, key names and configuration are stock afterwards, and `save_pretrained` writes a whole checkpoint. What was
    frozen stays frozen (`freeze` decides anew). A collective under ZeRO-3. Raises ValueError where there are no
    adapters, and where a merged weight would not be finite.
    """
    from peft.utils.integrations import gather_params_ctx

    for name, layer in _adapted(model, "merge").items():
        with gather_params_ctx(layer.parameters()):
            layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def save_adapter(model: LlavaForConditionalGeneration, folder: str | Path, write: bool = True) -> None:
    """Writes what was trained since `add_lora` as a PEFT folder: adapter_config.json, adapter_model.safetensors.

    `peft.PeftModel.from_pretrained(start, folder)`, where `start` is the model as it was then, gives the logits of
    `model`: beside the adapters the folder holds, as PEFT's `modules_to_save`, every other part in which something is
    trained, whole. `model` keeps its adapters. A collective under ZeRO-3, where only ranks with `write` write. Raises
    ValueError where there are no adapters.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.integrations import gather_params_ctx

    adapted = {_part(name) for name in _adapted(model, "save")}
    trained = {_part(name) for name, weight in model.named_parameters() if weight.requires_grad} - adapted
    whole = [module for module in (*PARTS.values(), HEAD) if _part(module) in trained]
    within = tuple(f"{module}." for module in whole)
    kept = [each for name, each in model.named_parameters() if each.requires_grad or name.startswith(within)]
    with gather_params_ctx(kept, modifier_rank=None):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        state |= {name: weight for name, weight in model.state_dict().items() if name.startswith(within)}
        state = {f"base_model.model.{name}": weight.detach().cpu().clone() for name, weight in state.items()}
    if not write:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = replace(
        model.peft_config["default"],
        base_model_name_or_path=model.name_or_path or None,
        modules_to_save=whole or None,
        inference_mode=True,
    )
    config.save_pretrained(folder)


def check_lora(model: LlavaForConditionalGeneration, stages: Iterable[Stage]) -> None:
    """Tries on the built student what the stages' LoRA will need, before any trains: adapters are put on and merged.

    Weights, what is trained, and torch's random state stay as they are. Raises ValueError naming the field and what
    peft says.
    """
    for stage in stages:
        train = stage.train
        if not train.lora_rank:
            continue
        trained = [weight.requires_grad for weight in model.parameters()]
        try:
            with torch.random.fork_rng(devices=[]):
                add_lora(model, 1, parts=train.lora_parts)  # any rank tells the same
                merge_lora(model)
        except Exception as error:  # whatever an unfit peft raises
            raise ValueError(
                f"{stage.field('train')}.lora_rank is {train.lora_rank}, but LoRA does not work here "
                f"({type(error).__name__}: {error}): install the versions of constraints-cpu.txt, or leave it out"
            ) from error
        for weight, was_trained in zip(model.parameters(), trained, strict=True):
            weight.requires_grad_(was_trained)


def _adapted(model: LlavaForConditionalGeneration, purpose: str) -> dict[str, nn.Module]:
    """The layers with adapters by name; ValueError saying that there is nothing to `purpose` where there are none."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"the model has no LoRA adapters: there is nothing to {purpose}")
    return layers


def _part(name: str) -> str | None:
    """The part that a module or parameter of this name belongs to; the head is the language model's."""
    for part, prefix in (*PARTS.items(), ("language_model", HEAD)):
        if f"{name}.".startswith(f"{prefix}."):
            return part
    return None


def _pattern(name: str) -> str:
    """A regular expression of a module's name in every layer of its number."""
    return r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in name.split("."))
