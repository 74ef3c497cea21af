"""Tokenizers, templates, where a model is, the embedded model, adapters in fp32."""

import json
import shutil

import pytest
import torch

from finetune import hardware, models
from finetune.config import Config, LoraConfig, ModelConfig
from finetune.errors import UserError

CPU = hardware.Choices("cpu", "float32", "sdpa", "none", ())


def test_a_path_that_does_not_exist_and_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        models.resolve(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no config.json"):
        models.resolve(str(tmp_path))
    with pytest.raises(UserError, match="the hub did not give it"):
        models.resolve("nobody/no-such-model")
    with pytest.raises(UserError, match="expected one of smollm2"):
        models.resolve("embedded:other")


def test_the_embedded_model_is_unpacked_once_and_checked(smollm2, monkeypatch):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 30
    before = (smollm2 / "model.safetensors").stat().st_mtime_ns
    assert models.resolve("embedded:smollm2") == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before


def test_the_embedded_tokenizer_cuts_digits_singly_as_its_gguf_says(smollm2):
    tokenizer = models.load_tokenizer(smollm2, ModelConfig())
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("12 + 345")["input_ids"])
    assert [piece for piece in pieces if any(character.isdigit() for character in piece)] == ["1", "2", "3", "4", "5"]


def test_a_tokenizer_that_loses_spaces_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "broken")
    path = tmp_path / "broken" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not give text back"):
        models.load_tokenizer(tmp_path / "broken", ModelConfig())


def test_a_template_with_two_bos_is_refused(tiny_model, tmp_path):
    template = tmp_path / "double.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="two BOS"):
        models.load_tokenizer(tiny_model, ModelConfig(chat_template=str(template)))


def test_no_template_and_an_unknown_one(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        models.load_tokenizer(tmp_path / "bare", ModelConfig())
    with pytest.raises(UserError, match="model.chat_template=nope"):
        models.load_tokenizer(tiny_model, ModelConfig(chat_template="nope"))


def test_an_adapter_stays_in_fp32_to_the_bit_through_trl_s_cast(tiny_model):
    model = models.new_adapter(models.load_base(tiny_model, ModelConfig(), CPU), LoraConfig(r=4))
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    with models.fp32_adapter(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    for name, value in model.state_dict().items():
        if "lora_" in name:
            assert value.dtype == torch.float32 and torch.equal(value, before[name])


def test_an_adapter_of_another_base_is_refused(tiny_model, tmp_path):
    from tests.conftest import make_model

    other = make_model(tmp_path / "other", hidden_size=32)
    model = models.new_adapter(models.load_base(other, ModelConfig(), CPU), LoraConfig(r=4))
    models.save_adapter(model, models.load_tokenizer(other, ModelConfig()), tmp_path / "adapter")
    with pytest.raises(UserError, match="does not fit the base model"):
        models.load_adapter(models.load_base(tiny_model, ModelConfig(), CPU), tmp_path / "adapter")
    with pytest.raises(UserError, match="no adapter_config.json"):
        models.load_adapter(models.load_base(tiny_model, ModelConfig(), CPU), tmp_path)


def test_an_adapter_with_nan_is_not_saved(tiny_model, tmp_path):
    model = models.new_adapter(models.load_base(tiny_model, ModelConfig(), CPU), LoraConfig(r=4))
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        models.save_adapter(model, models.load_tokenizer(tiny_model, ModelConfig()), tmp_path / "adapter")


def test_the_base_is_in_nf4_where_asked_and_dense_where_not(tiny_model):
    from bitsandbytes.nn import Linear4bit

    config = Config()
    nf4 = models.load_base(tiny_model, config.model, hardware.Choices("cpu", "bfloat16", "sdpa", "nf4", ()))
    assert sum(isinstance(module, Linear4bit) for module in nf4.modules()) == 14
    assert not isinstance(nf4.lm_head, Linear4bit)
    dense = models.load_base(tiny_model, config.model, CPU)
    assert not any(isinstance(module, Linear4bit) for module in dense.modules())
