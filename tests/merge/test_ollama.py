"""The Modelfile's Go template against the chat template that transformers renders."""

import shutil
from pathlib import Path

import pytest

from merge import MergeError
from merge.gguf import to_gguf
from merge.ollama import modelfile, render_go

# Chat templates as models publish them; <|im_end|> and <|im_start|> are the tiny tokenizer's special tokens.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' }}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "{{ '[' + m['role'] + ']' + m['content'] | trim + ('<|im_end|>' if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def exported(model: Path, folder: Path, template: str | None, **settings: object) -> tuple[Path, Path]:
    """A copy of a model folder with a chat template (and tokenizer settings), and its GGUF."""
    import json

    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder, to_gguf(folder, folder / "model.gguf", "F16")


def template_of(text: str) -> str:
    return text.partition('TEMPLATE """')[2].partition('"""')[0]


def test_a_default_system_prompt_and_chatml(tiny_model: Path, tmp_path: Path) -> None:
    text = modelfile(*exported(tiny_model, tmp_path / "m", SMOLLM2))
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1.0\n' in text
    template = template_of(text)
    hi = {"role": "user", "content": "hi"}
    assert render_go(template, [hi]) == (
        "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = [{"role": "system", "content": "S"}, hi, {"role": "assistant", "content": "A"}, hi]
    assert render_go(template, chat) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_deepseek_s_form_with_and_without_a_bos_that_the_engine_adds(tiny_model: Path, tmp_path: Path) -> None:
    expected = "User: hi\n\nAssistant:"
    for add_bos, prefix in ((True, ""), (False, "<|im_start|>")):
        folder, file = exported(tiny_model, tmp_path / f"m{add_bos}", DEEPSEEK, add_bos_token=add_bos)
        template = template_of(modelfile(folder, file))
        assert render_go(template, [{"role": "user", "content": "hi"}]) == prefix + expected


def test_notes_say_what_ollama_does_otherwise(tiny_model: Path, tmp_path: Path) -> None:
    lines = modelfile(*exported(tiny_model, tmp_path / "m", NO_SYSTEM)).splitlines()
    assert lines[0].startswith("# The chat template strips white space")
    assert lines[1].startswith("# The chat template takes no system message")


def test_sampling_follows_generation_config(tiny_model: Path, tmp_path: Path) -> None:
    folder, file = exported(tiny_model, tmp_path / "m", SMOLLM2)
    config = '{"do_sample": true, "temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.05}'
    (folder / "generation_config.json").write_text(config)
    text = modelfile(folder, file)
    assert "temperature 0.7\nPARAMETER top_p 0.95\nPARAMETER repeat_penalty 1.05\nPARAMETER num_ctx 512\n" in text


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (None, {}, "no chat template"),
        (SMOLLM2.replace("message['content']", "message['content'] * 2"), {}, "writes a message 2 times"),
        (SMOLLM2.replace("loop.first and", "loop.last and"), {}, "beginning changes with what follows"),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + (m.content | upper if loop.index > 3 else m.content) }}"
            "<|im_end|>{% endfor %}",
            {},
            "cannot be written for Ollama.*Ollama would give",
        ),
        (SMOLLM2.replace("'<|im_end|>' +", "'' +"), {}, "would never stop"),
        (SMOLLM2.replace("'<|im_start|>' +", "'{{' +"), {}, "contains {{"),
        (SMOLLM2.replace("<|im_start|>", "<s>"), {"add_bos_token": True}, "adds '<|im_start|>' to every prompt"),
    ],
    ids=["none", "twice", "unstable", "unequal", "never-stops", "braces", "bos"],
)
def test_a_template_that_ollama_could_not_follow_is_refused(
    tiny_model: Path, tmp_path: Path, template: str | None, settings: dict, message: str
) -> None:
    folder, file = exported(tiny_model, tmp_path / "m", template, **settings)
    with pytest.raises(MergeError) as refusal:
        modelfile(folder, file)
    import re

    assert re.search(message.replace("|", r"\|").replace("{{", r"\{\{"), str(refusal.value))


def test_a_gguf_with_another_template_or_none_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder, file = exported(tiny_model, tmp_path / "m", SMOLLM2)
    (folder / "chat_template.jinja").write_text(DEEPSEEK)
    with pytest.raises(MergeError, match="another chat template"):
        modelfile(folder, file)
    with pytest.raises(MergeError, match="does not exist; export it first"):
        modelfile(folder, tmp_path / "absent.gguf")


@pytest.mark.parametrize("template", ["{{ .Prompt }}", '{{ if gt .Role "x" }}a{{ end }}', "a{{ end }}b"])
def test_the_renderer_refuses_what_it_does_not_know(template: str) -> None:
    with pytest.raises(ValueError):
        render_go(template, [{"role": "user", "content": "hi"}])
