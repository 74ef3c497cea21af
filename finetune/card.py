"""The merged model's card: what it is, what it was made from, under which licence."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from finetune.config import Config
from finetune.run import versions
from merge import Certificate

LICENCE_NOTES = {
    "deepseek": (
        "The base is under the DeepSeek Model License. Its use restrictions (Attachment A) pass on to every derivative: whoever "
        "gives this model on must include them and a copy of the licence, and say that the files were changed."
    ),
    "llama3.2": (
        "The base is under the Llama 3.2 Community License: give a copy of it with the model, show \"Built with Llama\", and start "
        "the model's name with \"Llama\"."
    ),
}
"""What a licence asks of those who give a derived model on."""

CARD = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string("""\
---
license: {{ "other" if note else licence }}
{% if note %}
license_name: {{ licence }}
{% endif %}
base_model: {{ base_name }}
tags: [lora, merged, mathematics, tutoring]
---
# {{ base_name }}, fine-tuned

A LoRA adapter (rank {{ config.lora.r }}, alpha {{ config.lora.alpha }}, {{ config.lora.variant }}) trained with recipe `{{ config.recipe }}`
and folded into the {{ "dequantised NF4" if config.merge.onto == "nf4" else "full-precision" }} base. The tokenizer and the chat template are those of the training.

## Lineage
| part | SHA-256 |
|---|---|
{% for name, digest in certificate.base.items() %}
| base `{{ name }}` | `{{ digest }}` |
{% endfor %}
{% for adapter in certificate.adapters %}
{% for name, digest in adapter.items() %}
| adapter `{{ name }}` | `{{ digest }}` |
{% endfor %}
{% endfor %}

{{ certificate.changed }} of {{ certificate.total }} tensors changed, {{ certificate.expected }} expected; details in `certificate.json`.
Trained on `{{ config.data.path }}`, stages {{ config.stages | join(" -> ") }}, seed {{ config.seed }}.
Made with {% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}.

## Licence
Base model: {{ licence }}. {{ note }}
The licence of the training data holds as well; see its source.
""")


def model_card(config: Config, base: Path, certificate: Certificate) -> str:
    """README.md of the merged folder, with the hub's metadata block at its head."""
    return CARD.render(
        config=config, certificate=certificate, versions=versions(), licence=config.model.licence,
        note=LICENCE_NOTES.get(config.model.licence, ""),
        base_name=config.model.path.removeprefix("embedded:") or base.name,
    )
