"""Tiny GPT-2 and Llama models with a real tokenizer, made from their configurations, and what is done with them."""

import hashlib
import socket
from types import SimpleNamespace

import pytest
import torch
from tiny_models import EOS, PAD, V, write_model
from transformers import LogitsProcessor, LogitsProcessorList

from lm_trust.core.seeding import make_generator
from lm_trust.lm.generation import ExponentialRace, sample_completions
from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.lm.prompts import Prompts
from lm_trust.lm.rewards import WeightedRewards
from lm_trust.lm.rollout import LanguageTask, PromptSet

TEXTS = ["the film", "a", "I saw the plot and it was", "we never liked", "it is very very bright", "but the plot"]
TARGETS = {"gpt2": "c_attn", "llama": "q_proj"}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """The folder of a tiny model, (architecture, own_pad) -> path, made once."""
    made = {}

    def folder(architecture, own_pad=False):
        key = (architecture, own_pad)
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp(f"{architecture}-{own_pad}"), architecture, own_pad=own_pad)
        return made[key]

    return folder


@pytest.fixture(params=["gpt2", "llama"])
def architecture(request):
    return request.param


@pytest.fixture
def model_folder(architecture, model_folders):
    """Without a pad token: the end of sequence pads."""
    return model_folders(architecture)


@pytest.fixture
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


@pytest.fixture
def make_policy(model_folder):
    """A policy on the tiny model; `moved` gives its adapter random weights, so that it is not the base."""

    def make(*, moved=True, dtype=torch.float64, r=2, **settings):
        policy = load_policy(str(settings.pop("path", model_folder)), r=r, alpha=4, **settings).to(dtype)
        return move(policy) if moved else policy

    return make


@torch.no_grad()
def move(policy, seed=1, scale=0.3):
    """Random steps on the trained adapter's weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))
    return policy


def sample(policy, tokenizer, texts=TEXTS, *, steps=6, seed=0, ends=None):
    """Completions of prompts of mixed lengths."""
    return sample_completions(
        policy,
        [tokenizer(text)["input_ids"] for text in texts],
        max_new_tokens=steps,
        eos_ids=[tokenizer.eos_token_id] if ends is None else ends,
        pad_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(seed),
    )


def record_scores(policy):
    """A list that fills with what each token is drawn from: `generate`'s logits after every processor but the draw."""
    generate, drawn_from = policy.causal_lm.generate, []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids, scores):
            drawn_from.append(scores / policy.temperature)
            return scores

    def recorded(*, logits_processor, **given):
        *others, race = logits_processor
        assert isinstance(race, ExponentialRace)
        return generate(logits_processor=LogitsProcessorList([*others, Recorder(), race]), **given)

    policy.causal_lm.generate = recorded
    return drawn_from


def plain_log_probs(policy, observations, temperature):
    """(B, T, V) log-probabilities, row by row without padding, from the transformers model's own logits."""
    width, rows = observations.prompt_width, []
    for ids, real in zip(observations.input_ids, observations.attention_mask, strict=True):
        start = int(real[:width].logical_not().sum())  # padding on the left of the prompt
        logits = policy.causal_lm(input_ids=ids[start:].unsqueeze(0)).logits[0]
        rows.append(torch.log_softmax(logits[width - 1 - start : -1] / temperature, -1))
    return torch.stack(rows)


def checksum(module, *, trainable):
    """Of the parameters with requires_grad, or of those without."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad == trainable:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def letters(prompts, completions, bonus, **_):
    """A reward that depends on prompt, completion and a field."""
    pairs = zip(prompts, completions, bonus, strict=True)
    return [0.01 * len(prompt) + 0.1 * len(completion) + extra for prompt, completion, extra in pairs]


def completion_text(tokenizer, prompt, completion):
    """What the completion's ids add to the text of the prompt's: the tiny tokenizer writes a space between words."""
    whole, start = (tokenizer.decode(ids, skip_special_tokens=True) for ids in ([*prompt, *completion], prompt))
    return whole.removeprefix(start)


def task_of(tokenizer, *, rewards=((letters, 1.0),), **settings):
    """A language task on the tiny prompts; the last two are held out."""
    prompts = Prompts(TEXTS, {"bonus": [0.5 * i for i in range(len(TEXTS))]}, "made.jsonl", "line", list(range(1, 7)))
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings = {"batch_size": 6, "max_new_tokens": 5} | settings
    return LanguageTask(
        tokenizer,
        WeightedRewards(rewards),
        training=PromptSet(prompts.select(range(4)), ids[:4]),
        heldout=PromptSet(prompts.select([4, 5]), ids[4:]),
        **settings,
    )


@pytest.fixture(scope="session")
def lm():
    """The helpers of this file, by name."""
    return SimpleNamespace(
        EOS=EOS,
        PAD=PAD,
        V=V,
        TEXTS=TEXTS,
        TARGETS=TARGETS,
        write_model=write_model,
        move=move,
        sample=sample,
        record_scores=record_scores,
        plain_log_probs=plain_log_probs,
        checksum=checksum,
        letters=letters,
        completion_text=completion_text,
        task=task_of,
        generator=lambda seed=0: make_generator(seed, "test"),
    )


@pytest.fixture(autouse=True)
def network_attempts(monkeypatch):
    """No test here touches the network; one that provokes it clears the list of attempts."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield attempts
    assert not attempts


@pytest.fixture
def global_streams(monkeypatch):
    """The global generators, a GPU's too, must be as they were at the end of the test."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    yield
    assert torch.equal(torch.get_rng_state(), before)
    assert not reseeded
