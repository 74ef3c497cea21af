"""The decoding loop against transformers' generate, and the distribution it draws from."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from finetune import generation

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 11], [12] * 9, [5, 6, 11]]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def test_greedy_equals_generate(model: PreTrainedModel, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = {}
    settings = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected[tuple(prompt)] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :]
    # The second token of the first prompt ends a completion now: rows finish at different times and leave the batch.
    stop = int(expected[tuple(PROMPTS[0])][1])
    model.generation_config.eos_token_id = [stop]
    for batch_size in (1, 4):
        done: list[int] = []
        found = generation.generate(model, tokenizer, PROMPTS, 20, batch_size, advance=done.append)
        assert sum(done) == len(PROMPTS)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            full = expected[tuple(prompt)].tolist()
            end = next((index for index, token in enumerate(full) if token in (stop, tokenizer.eos_token_id)), len(full) - 1)
            assert completion.ids == full[: end + 1]
            assert completion.finished == (completion.ids[-1] in (stop, tokenizer.eos_token_id))
            assert len(completion.logprobs) == len(completion.ids)
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def test_sample_draws_from_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, float("-inf"), -1.0]])
    expected = (logits[0] / 0.7).softmax(0)
    tokens, logprobs, entropies = generation.sample(logits.repeat(20_000, 1), 0.7, 1.0, 0)
    counts = torch.bincount(tokens, minlength=5) / 20_000
    assert counts[3] == 0
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])
    entropy = -(expected[expected > 0] * expected[expected > 0].log()).sum()
    torch.testing.assert_close(entropies, entropy.expand(20_000))


def test_top_k_and_top_p_cut_the_tail_and_keep_the_proportions() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert generation.cut(probabilities, 1.0, 2).tolist() == [[0.0, pytest.approx(0.4), 0.0, pytest.approx(0.3)]]
    # 0.4 is below 0.5, so the next likeliest is in; a set that already holds top_p takes no more.
    assert generation.cut(probabilities, 0.5, 0).tolist() == [[0.0, pytest.approx(0.4), 0.0, pytest.approx(0.3)]]
    assert generation.cut(probabilities, 0.05, 0).tolist() == [[0.0, pytest.approx(0.4), 0.0, 0.0]]


def test_sampling_repeats_with_the_seed_and_keeps_the_mode(model: PreTrainedModel, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model.train()
    torch.manual_seed(3)
    first = generation.generate(model, tokenizer, PROMPTS, 8, 4, temperature=1.0)
    second = generation.generate(model, tokenizer, PROMPTS, 8, 4, temperature=1.0)
    torch.manual_seed(3)
    again = generation.generate(model, tokenizer, PROMPTS, 8, 4, temperature=1.0)
    assert [completion.ids for completion in first] == [completion.ids for completion in again]
    assert [completion.ids for completion in first] != [completion.ids for completion in second]
    assert first[1].ids != first[3].ids, "equal prompts get completions of their own"
    assert model.training
    model.eval()
