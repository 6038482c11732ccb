"""Supervised fine-tuning from end to end on a tiny model: what it learns, writes and refuses."""

import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm_trust.training.config_file import load_config
from lm_trust.training.config_stages import SftConfig
from lm_trust.training.run_folder import RunFolder

KEYS = ["step", "epoch", "loss", "token_accuracy", "learning_rate", "gradient_norm", "tokens", "tokens_per_second"]


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_it_learns_and_writes_a_run_folder(curve, stage, texts, models, capsys, evaluation, lines):
    models()  # transformers shows a bar where it writes one
    capsys.readouterr()
    assert stage("sft", texts, **{"training.epochs": 4, "evaluation.every": 5}) == 0
    assert [list(line)[:8] for line in lines()] == [KEYS] * 12
    assert [line["step"] for line in lines()] == list(range(1, 13))
    record = evaluation()
    assert record["after"]["loss"] < record["before"]["loss"] - 0.5
    assert record["after"]["perplexity"] == pytest.approx(math.exp(record["after"]["loss"]))
    assert record["after"]["count"] == 16
    assert [line["step"] for line in lines("run/evaluations.jsonl")] == [5, 10]
    assert load_config("run/config.yaml", root=SftConfig).training.epochs == 4
    assert Path("run/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("run/checkpoints").exists()
    out, err = capsys.readouterr()
    assert "perplexity" in out
    assert "Run folder: run" in out
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


@pytest.mark.parametrize("microbatch", [16, 4])
def test_the_held_out_loss_is_that_of_plain_transformers(stage, texts, models, microbatch, evaluation):
    """Token by token over all rows, whatever the batches; and the saved adapter is the model that was measured."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [*texts, {"text": "a film"}, {"text": "I saw the plot and it was very dull but I liked it"}]
    heldout = Path("heldout.jsonl")
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows[-9:]))
    keys = {"training.max_steps": 3, "training.microbatch_size": microbatch, "data.heldout": heldout}
    assert stage("sft", rows[:-9], **keys) == 0

    tokenizer = AutoTokenizer.from_pretrained("run/adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models()), "run/adapter").eval()
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows[-9:]:
            ids = tokenizer(row["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            nats -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
            tokens += ids.shape[1] - 1
    assert evaluation()["after"]["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert evaluation()["after"]["tokens"] == tokens


def test_of_a_prompt_and_its_completion_the_completion_is_learnt(stage, evaluation):
    rows = [{"prompt": "I saw the", "completion": f" film {word}"} for word in ("good", "bad", "dull", "bright")]
    assert stage("sft", rows, **{"training.max_steps": 1, "training.batch_size": 2}) == 0
    assert evaluation()["before"]["tokens"] == 3  # film, its quality, the end


def around(folder, target, single):
    """The model with a tokenizer that puts tokens around every text by itself; the first word stands for a start."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target, bos_token=WORDS[0])
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("single", ["$A <eos>", "the $A <eos>"])
def test_a_tokenizer_that_ends_texts_by_itself_has_one_end_learnt(stage, models, tmp_path, evaluation, lines, single):
    keys = {"model.path": around(models(), tmp_path / "ended", single), "training.max_steps": 1}
    rows = [{"prompt": "I saw", "completion": f" film {word}"} for word in ("good", "bad", "dull", "bright")]
    assert stage("sft", rows, **keys, **{"training.batch_size": 2}) == 0
    assert evaluation()["before"]["tokens"] == 3
    assert lines()[0]["tokens"] == 2 * (4 + single.count(" "))  # the start stays


def test_a_tokenizer_that_cannot_leave_texts_open_is_refused(stage, models, texts, tmp_path, capsys):
    model = around(models(), tmp_path / "wrapped", "good $A bad")
    assert stage("sft", texts, **{"model.path": model}) == 2
    assert "model.path: the tokenizer of" in (told := capsys.readouterr().err) and "behind every text (bad)" in told


def test_a_tokenizer_that_knows_few_characters_is_no_error(stage, models, tmp_path, evaluation):
    model = shutil.copytree(models(), tmp_path / "digits")
    digits = {str(digit): digit for digit in range(10)} | {"<eos>": 10}
    core = Tokenizer(BPE(digits, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>").save_pretrained(model)
    rows = [{"text": f"{number} and {number}"} for number in range(4)]
    assert stage("sft", rows, **{"model.path": model, "training.max_steps": 1, "training.batch_size": 2}) == 0
    assert evaluation()["before"]["tokens"] == 2  # a text's second digit, the end


def test_chat_messages_are_learnt_as_the_template_writes_them(stage, chat_model, evaluation):
    rows = [
        {"messages": [{"role": "user", "content": "the film was"}, {"role": "assistant", "content": word}]}
        for word in ("good", "bad", "dull", "bright")
    ]
    assert stage("sft", rows, **{"model.path": chat_model, "training.max_steps": 1, "training.batch_size": 2}) == 0
    assert evaluation()["before"]["tokens"] == 3


def test_its_adapter_records_the_revision_of_its_base(stage, texts):
    assert stage("sft", texts, **{"training.max_steps": 1, "model.revision": "v1"}) == 0
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["revision"] == "v1"


def test_the_same_seed_gives_the_same_bits(stage, texts, models):
    """GPT-2 has dropout, so every stream of a run takes part."""
    keys = {"model.path": models("gpt2"), "training.max_steps": 3}
    for output, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert stage("sft", texts, output=output, seed=seed, **keys) == 0
    one, two, three = (digest(f"{name}/adapter/adapter_model.safetensors") for name in ("one", "two", "three"))
    assert one == two != three


def test_the_order_of_the_rows_is_the_seeds(stage, texts, lines):
    heldout = Path("heldout.jsonl")
    heldout.write_text('{"text": "a film"}\n')
    for output, seed in (("one", 0), ("two", 1)):
        keys = {"model.lora": "null", "data.heldout": heldout, "training.max_steps": 1}
        assert stage("sft", texts, output=output, seed=seed, **keys) == 0
    one, two = (lines(f"{name}/metrics.jsonl")[0] for name in ("one", "two"))
    assert one["loss"] != two["loss"]


def test_accumulated_microbatches_take_the_full_batchs_step(stage, texts, models, lines):
    folder = Path(shutil.copytree(models(), "without_dropout"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.0}))
    rows = [*texts[:40], *({"text": "a film"} for _ in range(24))]  # of unequal lengths
    for output, size in (("whole", 16), ("parts", 4)):
        keys = {"training.microbatch_size": size, "training.max_steps": 3, "training.warmup_ratio": 0}
        assert stage("sft", rows, output=output, **keys, **{"model.path": folder.absolute()}) == 0
    whole, parts = (lines(f"{name}/metrics.jsonl") for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


def test_without_lora_the_whole_model_is_trained_and_saved(stage, texts, models, capsys):
    from transformers import AutoModelForCausalLM

    models()
    capsys.readouterr()
    assert stage("sft", texts, **{"model.lora": "null", "training.max_steps": 2}) == 0
    assert capsys.readouterr().err == ""
    assert not Path("run/adapter").exists()
    trained, base = (AutoModelForCausalLM.from_pretrained(path) for path in ("run/model", models()))
    changed = [not torch.equal(one, other) for one, other in zip(trained.parameters(), base.parameters(), strict=True)]
    assert all(changed)


def test_training_starts_from_the_adapter(stage, texts, models):
    """The reference of a policy that starts from it is the fine-tuned model."""
    from lm_trust.lm.loading import load_policy

    assert stage("sft", texts, **{"training.epochs": 4}) == 0
    policy = load_policy(str(models()), adapter="run/adapter")
    ids = torch.tensor([[1, 3, 5]])
    with torch.no_grad():
        probability = policy.causal_lm(input_ids=ids).logits[0, -1].softmax(-1)
        with policy.as_reference():
            reference = policy.causal_lm(input_ids=ids).logits[0, -1].softmax(-1)
        base = load_policy(str(models())).causal_lm(input_ids=ids).logits[0, -1].softmax(-1)
    assert torch.allclose(probability, reference)
    good = [WORDS.index(word) + 1 for word in ("good", "bright", "very", "liked")]
    assert probability[good].sum() > base[good].sum() + 0.1


def test_a_row_is_cut_at_the_context(stage, texts):
    long = {"text": " ".join(["film"] * 200)}
    assert stage("sft", [*texts, long], **{"training.max_steps": 1, "data.heldout_fraction": 0.9}) == 0


def test_a_row_of_one_token_has_none_to_learn(stage, texts, capsys):
    assert stage("sft", texts, **{"training.max_length": 1}) == 2
    assert "training.max_length: must be at least 2, got 1" in capsys.readouterr().err


def test_rows_without_room_for_a_completion_are_left_out_and_counted(stage, capsys):
    row = {"prompt": "the film was", "completion": "good"}
    rows = [{**row, "completion": word} for word in ("good", "bad", "dull", "bright")]
    long = [{"prompt": f"{' '.join(['film'] * 9)} {word}", "completion": "good"} for word in ("a", "is")]
    keys = {"training.max_length": 8, "training.max_steps": 1, "data.heldout_fraction": 0.34}
    assert stage("sft", [*rows, *long], **keys) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 rows were left out: a prompt of 8 tokens or more" in out and "nothing beyond" not in out
    assert stage("sft", long * 2, **keys, output="other") == 2
    error = capsys.readouterr().err
    assert "data.jsonl: no row can be used: a prompt of 8 tokens or more" in error


def test_rows_that_are_cut_are_counted(stage, capsys):
    rows = [{"text": f"the film was {word}"} for word in ("good", "bad", "dull")]
    rows += [{"text": f"{' '.join(['film'] * 9)} {word}"} for word in ("a", "is", "good")]
    assert stage("sft", rows, **{"training.max_length": 8, "training.max_steps": 1}) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3 of 6 rows reach 8 tokens (training.max_length, or what the model takes): nothing beyond is learnt" in out


def test_a_signal_stops_after_the_update_with_the_adapter_saved(stage, texts, monkeypatch, capsys, evaluation, lines):
    from lm_trust.training.run_folder import RunFolder

    append = RunFolder.append_metrics

    def kill(folder, metrics):
        append(folder, metrics)
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunFolder, "append_metrics", kill)
    assert stage("sft", texts, **{"training.epochs": 4}) == 130
    assert 2 <= len(lines()) <= 3
    assert Path("run/adapter/adapter_model.safetensors").is_file()
    assert set(evaluation()) == {"before"}
    assert "SIGINT: stopped after update" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(stage, texts, capsys):
    assert stage("sft", texts, **{"training.learning_rate": 1e30, "model.lora": "null", "training.epochs": 3}) == 2
    assert "the loss of update" in capsys.readouterr().err
    assert not Path("run/model").exists()


def test_a_finished_run_is_not_written_over(stage, texts, capsys):
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("{}\n")
    assert stage("sft", texts) == 2
    assert "run already holds a run; remove it, or choose another --output" in capsys.readouterr().err


def test_nothing_is_reported_to_anybody(stage, texts, monkeypatch):
    """trl would tell the hub that it is used."""
    from huggingface_hub.utils import _telemetry

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: pytest.fail("telemetry"))
    assert stage("sft", texts, **{"training.max_steps": 1}) == 0


def test_before_and_after_are_computed_in_the_same_precision(stage, texts, evaluation):
    keys = {"model.autocast": "bfloat16", "training.learning_rate": 1e-12, "training.max_steps": 1}
    assert stage("sft", texts, **keys) == 0
    record = evaluation()
    assert record["after"] == record["before"]


@pytest.mark.parametrize("command", ["sft", "reward-model"])
def test_a_run_folder_that_another_process_writes_to_is_refused(command, stage, texts, pairs, capsys, lines):
    with RunFolder(Path("run")).claimed():
        assert stage(command, texts if command == "sft" else pairs) == 2
    assert f"output: another process is writing to {Path('run').absolute()}" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not Path("run/metrics.jsonl").exists()


def test_an_output_with_brackets_is_named_as_it_is(stage, texts, capsys):
    assert stage("sft", texts, **{"training.max_steps": 1, "output": "runs/a[b]"}) == 0
    assert "Run folder: runs/a[b]" in capsys.readouterr().out
    assert [path.name for path in Path("runs").iterdir()] == ["a[b]"]
