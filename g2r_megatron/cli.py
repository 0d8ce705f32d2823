"""The ``g2r`` command: parse, check, call, print.

Commands import torch and Megatron-Core only after their options have been checked, so that ``--help`` and mistakes
are answered at once.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from g2r_megatron.config import parsing
from g2r_megatron.config.checks import (
    check_eval_config,
    check_judge_config,
    check_probe_config,
    check_train_config,
)
from g2r_megatron.config.command_options import EvalConfig, OfflineJudgeConfig, ProbeConfig
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.config.presets import PRESETS, fill_from_preset, resolve_preset
from g2r_megatron.config.serve_checks import check_serve_config, fill_judge
from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.errors import AlarmError, Preempted, RunError, UserError
from g2r_megatron.parallel import preemption
from g2r_megatron.records.failures import announce, is_announced

USAGE = """usage: g2r COMMAND [options]

commands:
  train   train a policy on its judge's gradients        g2r train --config FILE [--policy.layout.tp 2 ...]
  judge   judge responses of a file, token by token      g2r judge --judge.model DIR --input FILE --output FILE
  probe   is this judge's credit true?                   g2r probe --judge.model DIR --input FILE --output DIR
  eval    is this model better? HealthBench and others   g2r eval --policy.model DIR --data FILE... --judge.model DIR --output DIR
  serve   the judge as an HTTP service                   g2r serve --judge.model DIR [--serve.port 8000]
  plan    memory and time of a job before it is queued   g2r plan --config FILE --nodes 2 [--suggest] [options of train]
  doctor  what is installed, and what is missing         g2r doctor
  report  compare runs: a table and a self-contained page  g2r report RUN_DIR [RUN_DIR ...] --output report.html

"g2r COMMAND --help" lists every option. Several ranks: torchrun --nproc-per-node N -m g2r_megatron.cli COMMAND ...

new here?
  make quickstart                                  a whole training on a CPU, in minutes
  g2r doctor                                       is everything installed?
  g2r train --print_config > my.yaml               a config to fill in: policy.model, data.train, output_dir
  g2r train --config my.yaml                       train
"""

# What a command without any option is answered.
FIRST_STEPS = {
    "g2r train": (
        "policy.model, data.train, output_dir",
        "write a config with `g2r train --print_config > my.yaml`, fill these in, and run `g2r train --config my.yaml` "
        "(an example: examples/quickstart/config.yaml; g2r train --help)",
    ),
    "g2r judge": (
        "judge.model, input, output",
        "give them as in `g2r judge --judge.model DIR --input rows.jsonl --output judged.jsonl` "
        "(an example: g2r judge --config examples/quickstart/judge.yaml --output judged.jsonl; g2r judge --help)",
    ),
    "g2r probe": (
        "judge.model, input, output",
        "give them as in `g2r probe --judge.model DIR --input rows.jsonl --output probe` (g2r probe --help)",
    ),
    "g2r eval": (
        "policy.model or responses, data, judge.model, output",
        "give them as in `g2r eval --policy.model DIR --data rows.jsonl --judge.model DIR --output eval`, or compare two "
        "evaluations with `g2r eval compare A B` (g2r eval --help)",
    ),
    "g2r serve": (
        "judge.model",
        "give it as in `g2r serve --judge.model DIR` "
        "(an example: g2r serve --config examples/quickstart/serve.yaml; g2r serve --help)",
    ),
    "g2r plan": (
        "policy.model",
        "give the config of the training and its nodes, as in `g2r plan --config my.yaml --nodes 2` (g2r plan --help)",
    ),
}


def _import_megatron() -> None:
    from g2r_megatron.parallel.cpu import import_megatron

    import_megatron()


def _parsed(config_class: type[parsing.Config], prog: str, argv: list[str]) -> parsing.Config:
    """The config that ``argv`` asks for; ``UserError`` with the first steps if there is no option at all."""
    if not argv:
        missing, remedy = FIRST_STEPS[prog]
        raise UserError(missing, "missing", remedy)
    return parsing.parse(config_class, prog, argv)


def train_command(argv: list[str]) -> None:
    """``g2r train``."""
    config = resolve_preset(_parsed(TrainConfig, "g2r train", argv))
    check_train_config(config, _world_size())
    with preemption.listening():
        _import_megatron()
        from g2r_megatron.launch import train

        train(config)


def judge_command(argv: list[str]) -> None:
    """``g2r judge``."""
    config = _parsed(OfflineJudgeConfig, "g2r judge", argv)
    config.judge = fill_from_preset(config.judge, PRESETS[config.preset]["judge"])
    check_judge_config(config, _world_size())
    _import_megatron()
    from g2r_megatron.judge.offline import judge_file

    judge_file(config)


def probe_command(argv: list[str]) -> None:
    """``g2r probe``."""
    config = _parsed(ProbeConfig, "g2r probe", argv)
    check_probe_config(config, _world_size())
    config.judge = fill_from_preset(config.judge, PRESETS["robust"]["judge"])
    _import_megatron()
    from g2r_megatron.probe.command import probe_judge

    probe_judge(config)


def compare_command(argv: list[str]) -> None:
    """``g2r eval compare``."""
    parser = OneLineParser(
        "g2r eval compare",
        description="Is B better than A on the same rows? Paired bootstrap, wins and losses, the rows that changed most. "
        "Next: open the page, and read what changed.",
    )
    for name in ("A", "B"):
        parser.add_argument(name, type=Path, help="output of g2r eval, or RUN/eval/step_... of a training")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="page to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of the bootstrap (%(default)s)")
    parser.add_argument("--most_changed", type=int, default=10, help="rows to show (%(default)s)")
    arguments = parser.parse_args(argv)
    from g2r_megatron.eval.compare import compare

    compare(arguments.A, arguments.B, arguments.output, arguments.seed, arguments.most_changed)


def eval_command(argv: list[str]) -> None:
    """``g2r eval``."""
    if argv[:1] == ["compare"]:
        compare_command(argv[1:])
        return
    argv = parsing.with_lists(argv, ("data", "responses"))
    config = _parsed(EvalConfig, "g2r eval", argv)
    check_eval_config(config, _world_size())
    _import_megatron()
    from g2r_megatron.eval.command import evaluate_model

    evaluate_model(config)


def serve_command(argv: list[str]) -> int | None:
    """``g2r serve``: the HTTP front, or one of the judge's ranks that it has started."""
    config = fill_judge(_parsed(ServeConfig, "g2r serve", argv))
    from g2r_megatron.serve.protocol import SOCKET_VARIABLE

    if SOCKET_VARIABLE not in os.environ:
        check_serve_config(config, _world_size() if not config.serve.launcher else None)
        from g2r_megatron.serve.front import serve

        return serve(config, argv)
    check_serve_config(config, _world_size())
    _import_megatron()
    from g2r_megatron.serve.worker import serve_as_rank

    serve_as_rank(config)
    return None


def plan_command(argv: list[str]) -> int:
    """``g2r plan``."""
    from g2r_megatron.plan.config import PlanConfig

    config = resolve_preset(_parsed(PlanConfig, "g2r plan", argv))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models are built on no device at all, also where there is a GPU
    _import_megatron()
    from g2r_megatron.plan.command import run_plan

    return run_plan(config)


class OneLineParser(argparse.ArgumentParser):
    """argparse, with mistakes raised as ``UserError``."""

    def error(self, message: str) -> NoReturn:
        raise UserError(self.prog, message, f"see {self.prog} --help")


def report_command(argv: list[str]) -> None:
    """``g2r report``."""
    parser = OneLineParser(
        "g2r report",
        description="Compare runs: a table, and a self-contained HTML page with curves, hazards and token heat maps. "
        "A run may still be in training. Next: open the page, and read docs/metrics.md for what is marked.",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir of a g2r train run")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write (%(default)s)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write each figure of the page to files in DIR too")
    parser.add_argument("--format", nargs="+", choices=("svg", "png", "csv"), help="of --figures (default: svg csv)")
    arguments = parser.parse_args(argv)
    if arguments.format and not arguments.figures:
        raise UserError("--format", " ".join(arguments.format), "give --figures DIR, where they are to be written")
    from g2r_megatron.report import summary_table, write_figures, write_report

    print(summary_table(arguments.run_dirs))
    write_report(arguments.run_dirs, arguments.output)
    print(f"report: {arguments.output}")
    if arguments.figures:
        formats = list(dict.fromkeys(arguments.format or ("svg", "csv")))
        names = write_figures(arguments.run_dirs, arguments.figures, formats)
        print(f"figures: {len(names)} in {arguments.figures}, each as {', '.join(formats)}")


def doctor_command(argv: list[str]) -> int:
    """``g2r doctor``."""
    parser = OneLineParser(
        "g2r doctor",
        description="What is installed and used, and what is missing for what. "
        "Next: make quickstart, or tools/install_gpu.sh --dry-run for the GPU stack.",
    )
    parser.parse_args(argv)
    from g2r_megatron.plan.doctor import examine

    return examine()


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train_command,
    "judge": judge_command,
    "probe": probe_command,
    "eval": eval_command,
    "serve": serve_command,
    "plan": plan_command,
    "doctor": doctor_command,
    "report": report_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: ``sys.argv``) and return its exit code (see ``exit_code``)."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _dispatch(argv))


def exit_code(command: Callable[[], int | None]) -> int:
    """Run ``command``; the exit code of the process.

    Its own (0 for None); 2 and one line for bad input; 75 for a run that has saved and wants to be started again; 3 for
    one ended by an alarm; 1 for one that cannot go on; 130 for Ctrl-C. Any other exception is raised, with its traceback.

    torchrun answers 1 whatever code its ranks end with, and takes 75 for a failure, for which it ends the other ranks
    with a page of text. So with G2R_EXIT_CODES, a directory, each rank leaves its code there for the script that
    started it all, and 75 becomes 0.
    """
    _silence_libraries()
    code = _exit_code(command)
    if directory := os.environ.get("G2R_EXIT_CODES"):
        Path(directory, f"rank_{os.environ.get('RANK', 0)}").write_text(f"{code}\n")
        return 0 if code == preemption.EXIT_CODE else code
    return code


def _exit_code(command: Callable[[], int | None]) -> int:
    try:
        code = command()
    except Preempted:
        code = preemption.EXIT_CODE
    except (UserError, RunError) as error:
        announce(error)
        return 2 if isinstance(error, UserError) else 3 if isinstance(error, AlarmError) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_announced(error):
            raise
        return 1
    _leave_world()
    return code or 0


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] not in COMMANDS:
        return _usage(argv)
    return COMMANDS[argv[0]](argv[1:])


def _usage(argv: list[str]) -> int:
    if not argv:
        print(USAGE, end="", file=sys.stderr)
        return 2
    if argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    raise UserError("command", repr(argv[0]), f"must be one of {', '.join(COMMANDS)} (g2r --help)")


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _leave_world() -> None:
    """Close torchrun's process group; NCCL complains when it is left open at exit."""
    distributed = sys.modules.get("torch.distributed")
    if "RANK" in os.environ and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _silence_libraries() -> None:
    """Hide what libraries warn of at import (absent optional packages, their own deprecations)."""
    for module in ("megatron", "torch", "vllm"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")


if __name__ == "__main__":
    sys.exit(main())
