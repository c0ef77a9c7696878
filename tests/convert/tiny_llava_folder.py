"""A TinyLLaVA folder of tiny parts, as TinyLLaVA_Factory writes it: imported by the tests of convert."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from switchkd.models.tiny import tiny_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes/distill_tinyllava.py"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TOWERS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, SiglipImageProcessorPil),
    "clip": (CLIPVisionModel, CLIPVisionConfig, CLIPImageProcessorPil),
}
LANGUAGE_MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, "<|endoftext|>"),
    "llama": (LlamaForCausalLM, LlamaConfig, "</s>"),
    "stablelm": (StableLmForCausalLM, StableLmConfig, "<|endoftext|>"),
}
ROWS = 420


def text_tokenizer(end):
    """The package's words without `<image>`, and the special tokens of a base language model."""
    words = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] == "<|endoftext|>"]
    gone = {"<|im_start|>": "<a>", "<|im_end|>": "<b>", "<image>": "<c>"}
    words["model"]["vocab"] = {gone.get(word, word): row for word, row in words["model"]["vocab"].items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<|im_end|>")])
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": "<|endoftext|>"})
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{% endfor %}"  # not what it was trained with
    return tokenizer


class TinyLlava:
    """The parts as TinyLLaVA holds them, its forward, and its way of saving them."""

    def __init__(self, tower="siglip", language_model="qwen2", *, rows=ROWS, tied=False, dtype=torch.float32, **fields):
        tower_class, tower_config, self.image_processor = TOWERS[tower]
        text_class, text_config, self.end = LANGUAGE_MODELS[language_model]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.tower = tower_class(tower_config(**sizes, image_size=32, patch_size=8)).to(dtype).eval()
        sizes = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"vocab_size": rows, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": tied}
        text |= {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
        self.language_model = text_class(text_config(**sizes, **text)).to(dtype).eval()
        self.connector = nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 40)).to(dtype)
        self.tokenizer = text_tokenizer(self.end)
        self.fields = {
            "architectures": ["TinyLlavaForConditionalGeneration"],
            "auto_map": {"AutoModelForCausalLM": "modeling_tinyllava.TinyLlavaForConditionalGeneration"},
            "model_type": "tinyllava",
            "llm_model_name_or_path": "Qwen/Qwen2.5-3B",
            "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
            "connector_type": "mlp2x_gelu",
            "image_aspect_ratio": "square",
            "image_token_index": -200,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "patch",
            "tune_type_llm": "full",
            # As transformers 4 wrote them: without the values that are the class's defaults, rope_theta on its own.
            "text_config": {"model_type": language_model, "_name_or_path": "Qwen/Qwen2.5-3B", **sizes, **text},
            "vision_config": {
                "model_type": f"{tower}_vision_model",
                "model_name_or_path": "google/siglip-so400m-patch14-384",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
            },
            **fields,
        }

    def weights(self, *, prefix="vision_model.", head=True):
        names = {f"language_model.{name}": weight for name, weight in self.language_model.state_dict().items()}
        if not head:
            del names["language_model.lm_head.weight"]
        for name, weight in self.tower.state_dict().items():
            names[f"vision_tower._vision_tower.{prefix}{name.removeprefix('vision_model.')}"] = weight
        for name, weight in self.connector.state_dict().items():
            names[f"connector._connector.{name}"] = weight
        return {name: weight.clone() for name, weight in names.items()}

    def save(self, folder, weights=None, *, shards=1):
        folder.mkdir()
        weights = self.weights() if weights is None else weights
        (folder / "config.json").write_text(json.dumps(self.fields))
        (folder / "modeling_tinyllava.py").write_text("raise RuntimeError('remote code ran')")
        self.tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["auto_map"] = {"AutoTokenizer": ["modeling_tinyllava.Tokenizer", None]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        files = {
            name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(weights)
        }
        for file in set(files.values()):
            save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return folder

    def forward(self, before, after, picture):
        """Logits of ids `before` the image, its visual tokens, and ids `after`."""
        states = self.tower(picture, output_hidden_states=True).hidden_states[self.fields["vision_feature_layer"]]
        if self.fields["vision_feature_select_strategy"] == "patch":
            states = states[:, 1:]
        words = self.language_model.get_input_embeddings()
        rows = [words(before), self.connector(states), words(after)]
        return self.language_model(inputs_embeds=torch.cat(rows, dim=1)).logits


def ids(tokenizer, text):
    return torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def talk():
    turns = [("Is there a scratch?", "Yes, one."), ("Where is it?", "at the edge")]
    messages = []
    for question, answer in turns:
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def picture(width=50, height=30):
    return Image.frombytes("RGB", (width, height), bytes(7 * i % 251 for i in range(3 * width * height)))


@torch.no_grad()
def check_same_logits(tiny, folder, atol=1e-5):
    """The model in `folder`, loaded by plain transformers, against TinyLLaVA's own steps on the same conversation."""
    model, processor = load(folder)
    text = processor.apply_chat_template(talk()[:1], add_generation_prompt=True, tokenize=False)
    batch = processor(text=[text], images=[picture()], return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    own = tiny.image_processor(**pictures_of(tiny))(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(own.to(model.dtype), batch["pixel_values"])
    before, after = (ids(tiny.tokenizer, part) for part in text.split("<image>"))
    expected = tiny.forward(before, after, own.to(model.dtype))
    found = model(**batch).logits
    assert found.shape[1] == expected.shape[1]
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=atol, rtol=0)
    return model, processor


def pictures_of(tiny):
    square = {"height": 32, "width": 32}
    return (
        {"size": {"shortest_edge": 32}, "crop_size": square}
        if tiny.tower.config.model_type.startswith("clip")
        else {"size": square}
    )
