"""LoRA (arXiv 2106.09685) on a student's language model, through peft; merged, it is a stock model again."""

from __future__ import annotations

from torch import nn
from transformers import LlavaForConditionalGeneration

LANGUAGE_MODEL = "model.language_model."


def add_lora(model: LlavaForConditionalGeneration, rank: int, alpha: float | None = None, dropout: float = 0.0) -> None:
    """Adapters on every linear layer of the language model, in place; the class of `model` stays.

    rank: width of the adapters; alpha: their scale is alpha / rank; None: twice the rank. dropout: of what they read.
    The language model's own weights and its head are frozen, adapters train, projector and vision tower stay as they
    were (`freeze`). The start, which changes no output, follows torch's seed. Raises ValueError where there are
    adapters already.
    """
    from peft import LoraConfig

    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has LoRA adapters already: call merge_lora before adding others")
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(LANGUAGE_MODEL)
    }
    # peft freezes the whole model.
    others = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    trained = [parameter.requires_grad for parameter in others]
    model.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(linear))})",
        )
    )
    for parameter, was_trained in zip(others, trained, strict=True):
        parameter.requires_grad_(was_trained)


def merge_lora(model: LlavaForConditionalGeneration) -> None:
    """Adds the adapters to the weights they sit on and removes them, in place.

    Class, key names and configuration are stock afterwards, and `save_pretrained` writes a whole checkpoint. What was
    frozen stays frozen (`freeze` decides anew). Raises ValueError where there are no adapters, and where a merged
    weight would not be finite.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError("the model has no LoRA adapters: there is nothing to merge")
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config, model._hf_peft_config_loaded
