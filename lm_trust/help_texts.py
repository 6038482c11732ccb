"""What `lm-trust --help` and `lm-trust COMMAND --help` say, in at most 80 columns."""

from __future__ import annotations

DESCRIPTION = """\
Train a language model or a control policy with updates that keep to a bound,
in nats, on how far the policy may move.
"""
EXAMPLES = """\
examples:
  lm-trust train configs/control/cartpole_trpo.yaml
  lm-trust train configs/lm/sentiment_trpo.yaml --update.max_kl 0.02
  lm-trust evaluate runs/sentiment_trpo
  lm-trust generate runs/sentiment_trpo "The film was"
  lm-trust plot runs/cartpole_trpo runs/cartpole_ppo
  lm-trust compare configs/compare/cartpole.yaml
  lm-trust sft configs/lm/pipeline/sft.yaml
  lm-trust reward-model configs/lm/pipeline/reward_model.yaml

`lm-trust COMMAND --help` tells more of each.
"""
TRAIN = """\
Train as the YAML file CONFIG says and write a run folder: config.yaml
(resolved), metrics.jsonl (a line an iteration), evaluations.jsonl (one for each
on the way), evaluation.json, learning_curve.png, checkpoints/ and the policy
(adapter/, model/ or policy.safetensors; that of the best evaluation is in
best/). TensorBoard's files are in tensorboard/ (see the key trackers), a
language run's tables in completions/, and a control run's finished episodes in
monitor.csv.

Every key of the config can be set here too, by its dotted name; the value is
YAML. Setting another `kind` replaces that section with the kind's defaults.
`lm-trust config language` and `lm-trust config control` list all keys.

Ctrl-C and SIGTERM finish the iteration, write a checkpoint and exit with
status 130 or 143. What --resume goes on with is the same run: it may be made
longer (iterations, total_steps), be evaluated, stopped, logged and noted
otherwise, call its rewards otherwise, and find models and prompts that have
moved. Any other key that is set to something else is refused.
"""
TRAIN_EXAMPLES = """\
examples:
  lm-trust train configs/lm/sentiment_trpo.yaml
  lm-trust train configs/lm/sentiment_trpo.yaml --seed 1 --output runs/second
  lm-trust train configs/control/cartpole_trpo.yaml --update.kind ppo_clip
  lm-trust train configs/control/cartpole_trpo.yaml --policy.log_std -0.5
  lm-trust train configs/lm/sentiment_trpo.yaml --rewards.0.weight 2
  lm-trust train --resume runs/sentiment_trpo
  lm-trust train --resume runs/sentiment_trpo --iterations 60
"""
LAUNCH = """\
Train in several processes, by accelerate's launcher: they share out prompts or
environments, and every sum of an update is over all of them, so that an update
is that of one process on the whole batch. The first process writes the run
folder, which can be resumed with another number of processes.

Without a file of `accelerate config` they are on this machine, one a GPU, or
as many as --processes says.
"""
LAUNCH_EXAMPLES = """\
examples:
  lm-trust launch --processes 2 train configs/lm/sentiment_trpo.yaml
  lm-trust launch --processes 2 train --resume runs/sentiment_trpo
  lm-trust launch --accelerate-config machines.yaml train CONFIG
  lm-trust launch --accelerate-config configs/accelerate/fsdp2.yaml train CONFIG
"""
EVALUATE = """\
Evaluate a trained policy again: a language model on the held-out prompts of
its run, beside the model it started from; a control policy on fresh episodes,
without exploration. Prompts and rewards are those of the run's config.yaml.
"""
EVALUATE_EXAMPLES = """\
examples:
  lm-trust evaluate runs/sentiment_trpo
  lm-trust evaluate runs/cartpole_trpo --count 100
  lm-trust evaluate runs/cartpole_trpo --videos 3
  lm-trust evaluate runs/cartpole_trpo --render
  lm-trust evaluate runs/cartpole_trpo --best
"""
GENERATE = """\
Print completions of a prompt by the language model of a run.
"""
GENERATE_EXAMPLES = """\
examples:
  lm-trust generate runs/sentiment_trpo "The film was"
  lm-trust generate runs/sentiment_trpo "The film was" --count 4 --seed 1
  lm-trust generate runs/sentiment_trpo "The film was" --reference
  lm-trust generate runs/sentiment_trpo -- "-- a prompt that starts with a dash"
"""
MERGE = """\
Add the adapter of a language run into its base model's weights and write the
result as a plain model: safetensors, tokenizer and generation config, which
`AutoModelForCausalLM.from_pretrained` and `generate` take alone.
"""
MERGE_EXAMPLES = """\
examples:
  lm-trust merge runs/sentiment_trpo
  lm-trust merge runs/sentiment_trpo --best --output models/sentiment
"""
PLOT = """\
Draw learning curves of several runs into one picture. Runs that differ in
nothing but their seed are one curve: their mean, with its 95 % interval
(Student's t). The legend names what differs between the curves.
"""
PLOT_EXAMPLES = """\
examples:
  lm-trust plot runs/cartpole_trpo runs/cartpole_ppo
  lm-trust plot runs/hopper_* --output hopper.png --x seconds
  lm-trust plot runs/hopper_* --metric evaluation/reward_mean
"""
SFT = """\
Fine-tune a language model on texts, by trl's SFTTrainer, and write a run
folder: config.yaml (resolved), metrics.jsonl (a line an update),
evaluation.json (held-out loss and perplexity, before and after),
learning_curve.png and adapter/, a plain PEFT adapter that `lm-trust train`
starts from by --model.adapter (model/ where model.lora is null).

A row of the data is a `text`, a `prompt` with its `completion` (which alone is
learnt), or a list of chat `messages`. Every key of the config can be set here
too, by its dotted name; `lm-trust config sft` lists them all.

Ctrl-C and SIGTERM finish the update, write the adapter as it is and exit with
status 130 or 143.
"""
SFT_EXAMPLES = """\
examples:
  lm-trust sft configs/lm/pipeline/sft.yaml
  lm-trust sft my.yaml --data.path my.jsonl --training.epochs 3
  lm-trust sft my.yaml --training.max_steps 5 --output runs/trial
  lm-trust train configs/lm/pipeline/trpo.yaml --model.adapter runs/sft/adapter
"""
REWARD_MODEL = """\
Train a reward model on preference pairs, by trl's RewardTrainer, and write a
run folder: config.yaml (resolved), metrics.jsonl (a line an update),
evaluation.json (held-out accuracy and margin, before and after),
learning_curve.png and adapter/, a plain PEFT adapter with its score head and
tokenizer (model/ where model.lora is null), which is a reward by itself:

  rewards: [{kind: classifier, path: runs/reward_model/adapter}]

A row of the data has `chosen` and `rejected` and, where both go on from one, a
`prompt`: texts or lists of chat messages. Every key of the config can be set
here too, by its dotted name; `lm-trust config reward-model` lists them all.

Ctrl-C and SIGTERM finish the update, write the adapter as it is and exit with
status 130 or 143.
"""
REWARD_MODEL_EXAMPLES = """\
examples:
  lm-trust reward-model configs/lm/pipeline/reward_model.yaml
  lm-trust reward-model my.yaml --data.path pairs.jsonl --model.path gpt2
  lm-trust reward-model my.yaml --training.max_steps 5 --output runs/trial
"""
COMPARE = """\
Compare update rules: train every rule at every value of its knob with every
seed, each as a run of `lm-trust train` in a process of its own, and write
report.html, a page that opens from disk, with report.json and results.parquet
beside it. Runs that are finished are never made again, and one that was stopped
goes on: the same command continues a comparison, and one with more rules,
values or seeds makes what is missing; other settings need another --output.

Every key of the config can be set here too, by its dotted name;
`lm-trust config compare` lists them all.

Ctrl-C and SIGTERM finish the iterations under way, write checkpoints and exit
with status 130 or 143; a comparison in which a run failed exits with 1.
"""
COMPARE_EXAMPLES = """\
examples:
  lm-trust compare configs/compare/cartpole.yaml
  lm-trust compare configs/compare/sentiment.yaml --seeds "[0]" --jobs 2
  lm-trust compare configs/compare/sentiment.yaml --shared.iterations 8
  lm-trust compare configs/compare/cartpole.yaml --plot-only
"""
CONFIG = """\
List every key of a config with its default and its meaning. A config with an
`environment` section is a control run, one with a `model` section a language
run; the configs of `lm-trust sft` and `lm-trust reward-model` have a `data`
section. In a file the keys nest; on the command line they are dotted:
`update: {max_kl: 0.02}` is --update.max_kl 0.02.

`extends: other.yaml` at the top of a file takes that file's keys. Sections
merge; lists, values and sections of another `kind` replace. That name and a
comparison's `base` are relative to the file, all other paths to the working
directory.
"""
CONFIG_EXAMPLES = """\
examples:
  lm-trust config language
  lm-trust config control
  lm-trust config sft
"""
