"""A tiny Qwen3-MoE checkpoint whose routing is skewed and follows the topic of the prompt."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TinyMoE:
    """Sizes of the checkpoint. `topics` split the vocabulary into equal parts."""

    layers: int = 4
    experts: int = 16
    top_k: int = 4
    hidden: int = 64
    expert_width: int = 64
    vocabulary: int = 512
    topics: int = 4
    seed: int = 11

    def topic_tokens(self, topic: int) -> range:
        """Token ids that belong to `topic`."""
        share = self.vocabulary // self.topics
        return range(topic * share, (topic + 1) * share)


def _write_tokenizer(size: TinyMoE, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_checkpoint(folder: Path, size: TinyMoE | None = None) -> Path:
    """Write the checkpoint (float32, fixed seed) to `folder` unless it is there; return it.

    The folder is there whole or not at all, whatever ends this.

    Embeddings and output rows of a topic share a direction, and in each layer the router rows of
    `top_k` experts, drawn at random, lean towards it: prompts of one topic keep a few experts
    hot, and another topic moves the heat to others.

    Raises:
        OSError: something else stands there, or it cannot be written.
    """
    size = size or TinyMoE()
    if (folder / "config.json").exists():
        return folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and is no checkpoint of the demo")
    import torch
    from safetensors import SafetensorError
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    generator = torch.Generator().manual_seed(size.seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(size.seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=size.experts,
            num_experts_per_tok=size.top_k,
            moe_intermediate_size=size.expert_width,
            norm_topk_prob=True,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            dtype="float32",
        )
    )
    direction = torch.nn.functional.normalize(noise(size.topics, size.hidden), dim=1) * 8
    token_topic = torch.arange(size.vocabulary) * size.topics // size.vocabulary
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(noise(*parameter.shape) * parameter.shape[-1] ** -0.5)
        model.model.embed_tokens.weight.copy_(
            noise(size.vocabulary, size.hidden) + direction[token_topic] * 0.6
        )
        model.lm_head.weight.copy_(
            noise(size.vocabulary, size.hidden) * 0.5 + direction[token_topic] * 0.2
        )
        for layer in model.model.layers:
            router = noise(size.experts, size.hidden) * 0.05
            for topic in range(size.topics):
                hot = torch.randperm(size.experts, generator=generator)[: size.top_k]
                router[hot] += direction[topic] * 0.1
            layer.mlp.gate.weight.copy_(router)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as name:
        whole = Path(name) / folder.name
        try:
            model.to(torch.float32).save_pretrained(whole)
        except SafetensorError as error:  # which says of a full disk what others say by OSError
            raise OSError(str(error)) from error
        _write_tokenizer(size, whole)
        whole.rename(folder)
    return folder
