"""FSDP2 and the other wrappers: which Fisher method works under which, and runs whose model is spread."""

import contextlib
import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import PeftModel
from spread import Workers
from tiny_models import write_model
from tiny_runs import metrics, prepare, write_config
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lm_trust
from lm_trust.cli import main
from lm_trust.core.batch import Batch, Rollout
from lm_trust.core.fisher import FisherOperator
from lm_trust.core.parameters import flatten, trainable_parameters
from lm_trust.core.processes import process_index, share_of
from lm_trust.errors import UserError
from lm_trust.lm.checkpointing import checkpoint_layers
from lm_trust.lm.generation import sample_completions
from lm_trust.lm.loading import load_policy
from lm_trust.lm.policy import TokenObservations
from lm_trust.lm.saving import save_adapter
from lm_trust.lm.sharding import shard
from lm_trust.lm.value_model import adapter_critic
from lm_trust.training.sequence_critic import SequenceCritic
from lm_trust.updates import TRPO, PPOClip, TRPOPenalty

CONFIGS = Path(lm_trust.__file__).parents[1] / "configs/accelerate"
ROWS, WIDTH, PROMPT = 5, 9, 4
MICROBATCH = 2  # so that one of two processes has two passes over its rows and the other has one
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model"), "gpt2"))


def make(model, wrapper, r=2):
    """A policy in float64 away from its start, the same in every process."""
    policy = load_policy(model, r=r, microbatch_size=MICROBATCH).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(policy) if r else ():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if "checkpointing" in wrapper:
        checkpoint_layers(policy.causal_lm)
    if "fsdp2" in wrapper:
        shard(policy, plugin(), "cpu")
    return policy


def plugin():
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")


def rows():
    """Observations, advantages and mask of all rows, completions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    mask[0, :2], mask[1, 6:], mask[4, 7:] = False, False, False
    observations = TokenObservations(torch.randint(1, 20, (ROWS, WIDTH), generator=generator), mask, PROMPT)
    return observations, torch.randn(ROWS, WIDTH - PROMPT, generator=generator, dtype=torch.float64), mask[:, PROMPT:]


def direction(count):
    return torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def product(model, method, wrapper):
    """F v by the operator, of this process's share of the rows, and its method; what it said where it refuses."""
    policy = make(model, wrapper, r=None if method == "kl_hessian" else 2)
    observations, _, mask = rows()
    own = share_of(ROWS).slice
    try:
        fisher = FisherOperator(policy, observations[own], mask=mask[own], method=method, microbatch_size=MICROBATCH)
    except ValueError as error:
        return str(error)
    return fisher.undamped(direction(flatten(trainable_parameters(policy)).numel())), fisher.method


def independent(model, method):
    """F v as the second derivative of the KL between plain softmaxes over all logits, by autograd alone."""
    policy = make(model, "", r=None if method == "kl_hessian" else 2)
    observations, _, mask = rows()
    parameters = trainable_parameters(policy)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hidden = policy.step_states(observations)
    log_probs = (hidden @ policy.causal_lm.get_output_embeddings().weight.T).log_softmax(-1)
    old = log_probs.detach()
    kl = (old.exp() * (old - log_probs)).sum(-1)[mask].mean()
    gradient = flatten(torch.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True))
    vector = direction(gradient.numel())
    return flatten(torch.autograd.grad(gradient, parameters, vector, materialize_grads=True))


# The table of docs/wrappers.md.
REFUSED = {("gauss_newton", "fsdp2"), ("kl_hessian", "fsdp2"), ("gauss_newton", "fsdp2 checkpointing")}
REFUSED |= {("kl_hessian", "fsdp2 checkpointing")}
WRAPPERS = ["one process", "two processes", "checkpointing", "fsdp2", "fsdp2 checkpointing"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", ["auto", "gauss_newton", "kl_hessian", "finite_difference"])
def test_a_fisher_method_under_a_wrapper(workers, model, method, wrapper):
    spread = "fsdp2" in wrapper or wrapper == "two processes"
    found = workers.run(product, 2, model, method, wrapper) if spread else [product(model, method, wrapper)]
    if (method, wrapper) in REFUSED:
        assert all("use the method finite_difference: it is sharded" in words for words in found)
        return
    expected = independent(model, method)
    chosen = method
    if method == "auto":
        chosen = "finite_difference" if "fsdp2" in wrapper else "gauss_newton"
    tolerance = 1e-6 if chosen == "finite_difference" else 1e-11
    for each, used in found:
        assert used == chosen
        torch.testing.assert_close(each, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def batch_of(policy):
    observations, advantages, mask = rows()
    own = share_of(ROWS).slice
    observations, actions = observations[own], observations.input_ids[own, PROMPT:]
    with torch.no_grad():
        old = policy.distribution(observations).detach()
        with policy.as_reference():
            reference = policy.distribution(observations).detach()
    return Batch(observations, actions, old, old.log_prob(actions), advantages[own], mask[own], reference)


RULES = {
    # The Fisher is of one row: the second process makes its passes without any.
    "trpo": lambda: TRPO(
        max_kl=0.01,
        cg_iterations=4,
        fisher_fraction=0.2,
        fisher_method="finite_difference",
        reference_budget=5.0,
        microbatch_size=MICROBATCH,
    ),
    "ppo_clip": lambda: PPOClip(epochs=1, minibatches=3, learning_rate=0.01, microbatch_size=1),
    "trpo_penalty": lambda: TRPOPenalty(epochs=1, minibatches=3, coefficient=0.1, learning_rate=0.01),
}


def stepped(model, name, wrapper):
    policy = make(model, wrapper)
    reports = [RULES[name]().step(policy, batch_of(policy)).as_metrics() for _ in range(2)]
    return flatten(trainable_parameters(policy)).detach(), [report["step_kl"] for report in reports]


@pytest.mark.parametrize("name", RULES)
def test_a_step_is_that_of_one_process_that_holds_the_model(workers, model, name):
    expected, divergences = stepped(model, name, "")
    assert min(divergences) > 0
    for vector, found in workers.run(stepped, 2, model, name, "fsdp2"):
        # A finite difference takes rounding for a difference.
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-6 if name == "trpo" else 1e-11)
        assert found == pytest.approx(divergences, rel=1e-5)


def written_and_valued(model, wrapper):
    """Completions, a critic on an adapter of its own, and how many frozen numbers this process holds of how many."""
    policy = make(model, wrapper)
    own = share_of(ROWS).slice
    completions = sample_completions(
        policy,
        [[1, 2, 3], [4], [5, 6], [7, 8], [9]][own],
        max_new_tokens=1 if process_index() else 6,
        eos_ids=[0],
        pad_id=0,
        generator=torch.Generator().manual_seed(7),
    )
    network = adapter_critic(policy, r=2).double()
    critic = SequenceCritic(network, learning_rate=0.01, epochs=2, minibatches=2, microbatch_size=1)
    observations, returns, mask = rows()
    ends = torch.zeros_like(mask[own])
    rollout = Rollout(observations[own], ends, returns[own], ends, ends, mask[own])
    fitted = critic.fit(rollout, returns[own], critic.values(rollout)[0])
    spread = [parameter for parameter in policy.parameters() if isinstance(parameter, DTensor)]
    assert not any(parameter.requires_grad for parameter in spread)
    held = sum(each.to_local().numel() for each in spread), sum(each.numel() for each in spread)
    return completions.tokens, fitted, [each.detach() for each in critic.parameters()], held


def test_completions_and_critics_under_fsdp2(workers, model):
    _, fitted, parameters, _ = written_and_valued(model, "")
    plain = workers.run(written_and_valued, 2, model, "two processes")
    sharded = workers.run(written_and_valued, 2, model, "fsdp2")
    for (tokens, *_), (theirs, their_fit, their_parameters, held) in zip(plain, sharded, strict=True):
        assert torch.equal(theirs[:, : tokens.shape[1]], tokens)
        assert their_fit == pytest.approx(fitted, rel=1e-9)
        torch.testing.assert_close(their_parameters, parameters, rtol=0, atol=1e-9)
        assert 0 < held[0] < 0.6 * held[1]


def half_precision(model, adapter, autocast, wrapper):
    """Log-probabilities by policy, reference and base, and a gradient, of a policy that started from an adapter."""
    policy = load_policy(model, adapter=adapter, autocast=autocast)
    if wrapper == "fsdp2":
        shard(policy, plugin(), "cpu")
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.mul_(1.5)
    observations = rows()[0][share_of(ROWS).slice]
    actions = observations.input_ids[:, PROMPT:]
    found = []
    for side in (nullcontext, policy.as_reference, policy.as_base):
        with side(), torch.no_grad():
            found.append(policy.distribution(observations).log_prob(actions))
    total = policy.distribution(observations).log_prob(actions).sum()
    return [*found, *torch.autograd.grad(total, trainable_parameters(policy))]


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_half_precision_and_the_start_from_an_adapter(workers, model, tmp_path, autocast):
    save_adapter(make(model, ""), tmp_path / "adapter")
    given = (model, str(tmp_path / "adapter"), autocast)
    plain = workers.run(half_precision, 2, *given, "two processes")
    sharded = workers.run(half_precision, 2, *given, "fsdp2")
    for found, expected in zip(sharded, plain, strict=True):
        own, reference, base, *_ = expected
        assert not torch.equal(own, reference) and not torch.equal(reference, base)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- Runs.


def command(folder, environment, *arguments):
    """The command line in this process; its status and its complaints."""
    os.chdir(folder)
    sys.modules.pop("tiny_run_rewards", None)
    os.environ["RANK"] = str(process_index())
    os.environ.update(environment)
    complained = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complained):
            return main(list(arguments)), complained.getvalue()
    finally:
        for name in environment:
            del os.environ[name]


@pytest.mark.slow
def test_a_launched_run_under_fsdp2(workers, tmp_path, monkeypatch):
    """By accelerate's launcher and the file that is handed out, beside the same run without it."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    sections = {
        "iterations": 2,
        "critic": {"kind": "model", "r": 2, "epochs": 1, "minibatches": 5},
        "rollout": {"batch_size": 5, "max_new_tokens": 4, "microbatch_size": 2},
        "update": {"kind": "trpo", "max_kl": 0.05, "cg_iterations": 3, "fisher_method": "finite_difference"},
        "checkpoint": {"every": 1},
    }
    model = {"path": "llama", "lora": {"r": 2, "alpha": 8}}
    config = write_config("plain", **sections)
    assert workers.run(command, 2, tmp_path, {}, "train", config) == [(0, "")] * 2
    config = write_config("run", **sections, model=model | {"gradient_checkpointing": True})
    launch = ["launch", "--accelerate-config", str(CONFIGS / "fsdp2_cpu.yaml"), "train", config]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{CONFIGS.parents[1]}:{tmp_path}"}
    launched = subprocess.run(
        [sys.executable, "-m", "lm_trust", *launch], env=environment, capture_output=True, text=True, check=False
    )
    assert launched.returncode == 0 and "Run folder" in launched.stdout, launched.stderr
    for plain, line in zip(metrics("plain"), metrics("run"), strict=True):
        for key in ("steps", "reward_mean", "accepted"):
            assert line[key] == plain[key], key
        for key in ("step_kl", "surrogate_gain", "reference_kl", "entropy", "value_loss"):
            assert line[key] == pytest.approx(plain[key], rel=0.02, abs=1e-6), key

    base = AutoModelForCausalLM.from_pretrained("llama")
    adapted = PeftModel.from_pretrained(base, "run/adapter")
    moved = [value for name, value in adapted.named_parameters() if "lora_B" in name]
    assert moved and all(value.abs().max() > 0 for value in moved)
    assert main(["train", "--resume", "run", "--iterations", "3"]) == 0  # on one process, that holds the model
    assert [line["iteration"] for line in metrics("run")] == [1, 2, 3]
    assert json.loads(Path("run/evaluation.json").read_text())["after"]["count"] == 2


@pytest.mark.parametrize(
    ("environment", "sections", "words"),
    [
        ({}, {"update": {"kind": "trpo", "fisher_method": "gauss_newton"}}, "update.fisher_method: under FSDP"),
        ({}, {"update": {"kind": "natural_gradient", "fisher_method": "gauss_newton"}}, "update.fisher_method: under"),
        ({}, {"model": {"path": "llama", "lora": None}}, "model.lora: under FSDP only frozen weights are spread"),
        ({}, {"model": {"path": "llama", "autocast": "bfloat16"}}, "model.autocast: under FSDP trpo takes finite"),
        (
            {},
            {"rollout": {"batch_size": 6, "max_new_tokens": 4, "engine": "continuous_batching"}},
            "rollout.engine: under FSDP continuous_batching does not wait",
        ),
        ({"FSDP_VERSION": "1"}, {}, "accelerate's fsdp_version: must be 2, got 1"),
        (
            {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
            {},
            "fsdp_auto_wrap_policy: must be transformer_based_wrap, got no_wrap",
        ),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading: must be false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: must be false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "model.gradient_checkpointing does it"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed_precision: must be no, got bf16"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "ask for DeepSpeed, which is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "ask for Megatron-LM"),
    ],
)
def test_what_was_never_run_is_refused(tmp_path, monkeypatch, capsys, environment, sections, words):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    for name, value in (FSDP | environment).items():
        monkeypatch.setenv(name, value)
    assert main(["train", write_config(**sections)]) == 2
    assert words in capsys.readouterr().err and not Path("run").exists()


def test_a_control_run_is_refused():
    from lm_trust.training.config import ControlConfig
    from lm_trust.training.wrappers import check_wrappers

    config = ControlConfig(total_steps=10, environment={"id": "CartPole-v1"})
    check_wrappers(config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FSDP.items():
            patch.setenv(name, value)
        with pytest.raises(UserError, match="environment: under FSDP there is no language model"):
            check_wrappers(config)
