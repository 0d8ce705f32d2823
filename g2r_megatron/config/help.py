"""What the --help of a command says first: how to begin, and the options that most people set."""

from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass

from jsonargparse import ArgumentParser, DefaultHelpFormatter


@dataclass(frozen=True)
class Guide:
    """``usage``: one line. ``start``: what to do next, shown under it. ``common``: dotted options of the first group."""

    usage: str
    start: str
    common: tuple[str, ...]


TRAIN_OPTIONS = (
    "output_dir",
    "policy.model",
    "judge.model",
    "data.train",
    "eval.data",
    "grpo.preset",
    "steps",
    "eval.every",
    "rollout.prompts_per_step",
    "rollout.responses_per_prompt",
    "rollout.max_response_tokens",
    "grpo.kl_coef",
    "optimizer.lr",
    "checkpoint.save_every",
)

GUIDES = {
    "g2r train": Guide(
        "g2r train --config FILE [--option VALUE ...]",
        "Train a policy on its judge's gradients. The same command goes on with a run that was stopped.\n"
        "Write a config:    g2r train --print_config > my.yaml     (an example: examples/quickstart/config.yaml)\n"
        "Fill in:           policy.model, data.train, output_dir\n"
        "Does it fit:       g2r plan --config my.yaml --nodes 1\n"
        "Run:               g2r train --config my.yaml\n"
        "Several ranks:     torchrun --nproc-per-node N -m g2r_megatron.cli train --config my.yaml\n"
        "Look at it:        g2r report OUTPUT_DIR",
        TRAIN_OPTIONS,
    ),
    "g2r judge": Guide(
        "g2r judge --judge.model DIR --input FILE --output FILE [--option VALUE ...]",
        "Judge the responses of a file: verdicts, attributions and token rewards, one output line a row.\n"
        "Try it:            g2r judge --config examples/quickstart/judge.yaml --output judged.jsonl\n"
        "Your own rows:     a query in any format of data.format, and its \"response\"\n"
        "Several ranks:     torchrun --nproc-per-node N -m g2r_megatron.cli judge ...",
        ("judge.model", "input", "output", "preset", "format", "shards", "shard", "dump_inputs", "judge.template"),
    ),
    "g2r probe": Guide(
        "g2r probe --judge.model DIR --input FILE --output DIR [--sample N] [--option VALUE ...]",
        "Is this judge's credit true? Attributions against what the verdict loses when a sentence is really hidden or deleted.\n"
        "Rows:              as of g2r judge: a query in any format of data.format, and its \"response\"\n"
        "Without responses: --policy.model DIR samples them\n"
        "Several ranks:     torchrun --nproc-per-node N -m g2r_megatron.cli probe ...\n"
        "Look at it:        OUTPUT/probe.html; what the numbers mean: docs/probe.md",
        (
            *("judge.model", "input", "output", "sample", "false_sample", "attributions", "seed", "format"),
            *("judge.template", "policy.model", "rollout.max_response_tokens"),
        ),
    ),
    "g2r eval": Guide(
        "g2r eval --policy.model DIR --data FILE... --judge.model DIR --output DIR [--option VALUE ...]",
        "Is this model better? Responses to held-out rows, judged and scored as their data sets define it.\n"
        "Rows:              HealthBench, RaR, ResearchQA or your own, in any format of data.format\n"
        "Of a file:         g2r eval --responses FILE... [--data FILE...] --judge.model DIR --output DIR\n"
        "Two of them:       g2r eval compare OUTPUT_A OUTPUT_B\n"
        "Several ranks:     torchrun --nproc-per-node N -m g2r_megatron.cli eval ...\n"
        "Look at it:        OUTPUT/eval.html; what the numbers mean: docs/eval.md",
        (
            *("policy.model", "data", "responses", "judge.model", "output", "samples", "greedy", "seed"),
            *("rollout.max_response_tokens", "rollout.engine", "judge.template"),
        ),
    ),
    "g2r serve": Guide(
        "g2r serve --judge.model DIR [--serve.port N] [--option VALUE ...]",
        "The judge as an HTTP service: scores, verdicts and token credit for responses that are sent to it.\n"
        "Try it:            g2r serve --config examples/quickstart/serve.yaml, then open http://127.0.0.1:8000/\n"
        "From Python:       g2r_megatron.client.Judge(\"http://127.0.0.1:8000\").credit(...)\n"
        "Several ranks:     g2r serve ... --serve.launcher \"torchrun --standalone --nproc-per-node N\"\n"
        "As a job:          sbatch slurm/serve.sh; everything else: docs/serve.md",
        ("judge.model", "preset", "serve.host", "serve.port", "serve.launcher", "serve.tokenizers", "judge.template"),
    ),
    "g2r plan": Guide(
        "g2r plan --config FILE --nodes N [--suggest] [--option VALUE ...]",
        "Memory and time of a training job before it is queued. Needs each model's config.json; no GPU, weights or data.\n"
        "Does it fit:       g2r plan --config my.yaml --nodes 2\n"
        "What would fit:    g2r plan --config my.yaml --nodes 2 --suggest\n"
        "Then:              sbatch slurm/train_30b.sh, or g2r train --config my.yaml",
        ("nodes", "gpus_per_node", "suggest", "json", *TRAIN_OPTIONS),
    ),
}  # fmt: skip


class GuideFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the lines of ``Guide.start`` as they are."""


def apply_guide(parser: ArgumentParser, guide: Guide) -> None:
    """Begin the help with ``guide`` and its options; every other group of options is named by its section."""
    parser.usage, parser.description, parser.formatter_class = guide.usage, guide.start, GuideFormatter
    common, rest, *sections = parser._action_groups[1:]  # the group before is argparse's of positional arguments
    common.title, rest.title = "common options", "further options of the run"
    actions = {action.dest: action for action in parser._actions}
    for group in sections:
        section = group._group_actions[0]
        group.title = f"{section.dest}: {group.title}"
        section.help = f"a YAML file of the options of {section.dest}"
    for group in (rest, *sections):
        group._group_actions[:] = [action for action in group._group_actions if action.dest not in guide.common]
    common._group_actions += [actions[name] for name in guide.common]
