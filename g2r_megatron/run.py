"""A training run as it is seen from outside: what it shows, writes, saves and says of itself."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from g2r_megatron import experience
from g2r_megatron.alarms.watch import Watch
from g2r_megatron.config.alarm_options import ALARMS
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.credit.faithfulness import PAIRS, RunningFaithfulness
from g2r_megatron.credit.judgements import JudgementRow
from g2r_megatron.errors import AlarmError, RunError, UserError
from g2r_megatron.experience import Experience, Rollouts
from g2r_megatron.policy.checkpoint import Checkpointer, complete_checkpoints
from g2r_megatron.policy.log_probs import UpdateLogProbs
from g2r_megatron.records.bad_steps import DIRECTORY, write_bad_step
from g2r_megatron.records.files import replace_text
from g2r_megatron.records.heartbeat import Heartbeat
from g2r_megatron.records.metrics_log import METRICS_FILE, MetricsLog, read_metrics
from g2r_megatron.records.progress_bar import Progress
from g2r_megatron.rollout.recording import Dump, step_name
from g2r_megatron.runs_on import line_of, record, runs_on
from g2r_megatron.workers import Inputs

CONFIG_FILE = "config.yaml"
MEASURED_SHARE, MOST_MEASURED = 8, 4  # faithfulness: of one response in 8, at most 4


class Run:
    """Progress, records, heartbeat and checkpoints of one start of a run. Only rank 0 writes and shows anything."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        done: int,
        heartbeat: Heartbeat,
        checkpointer: Checkpointer,
        sampling: dict[str, Any] | None = None,
    ):
        """``done``: the last finished step, whose checkpoint has been loaded; 0 for none. ``sampling``: rollout/facts.py, for a dump."""
        self.config, self.output, self.heartbeat, self.checkpointer = config, output, heartbeat, checkpointer
        self.done = self.saved = done
        self.first = done + 1  # the first step of this start
        self.is_writer = dist.get_rank() == 0
        self.progress = Progress(config.steps, enabled=self.is_writer)
        self.records = None
        self.rollouts: Dump | None = None
        self._save_times: dict[str, float] = {}  # for the next line of metrics
        self._said_answer_mass = self._said_faithless = False  # once a start is enough
        if self.is_writer:
            plain = asdict(config)
            self.records = MetricsLog(output, config.log, plain)
            replace_text(output / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False), sync=True)
            self.records.truncate_after(done if done else -1)
            if config.rollout.dump:
                self.rollouts = Dump(Path(config.rollout.dump), sampling or {}, done)
        history = [read_metrics(output) if self.is_writer and (output / METRICS_FILE).exists() else []]
        dist.broadcast_object_list(history, src=0)  # all ranks act on alarms alike
        self.watch = Watch(config.alarms, history[0])
        self._scores: list[tuple[int, float]] = []  # step, value of checkpoint.keep_best, of each evaluation
        for past in history[0]:
            self._note(past["step"], past)
        self._kept = {self.best_step}  # checkpoints that are not deleted
        measured = [record for record in history[0] if record.get(PAIRS) is not None]
        self.faithfulness = RunningFaithfulness(measured[-1] if measured else {})

    def __enter__(self) -> "Run":
        self.progress.__enter__()
        self.heartbeat.beat(state="running", step=self.done, saved_step=self.saved)
        for where, problem in self.checkpointer.damaged:
            self.progress.message(f"warning: {where}: {problem}; it is left as it is, and an earlier one is used")
        if self.done >= self.config.steps:
            self.progress.message(f"finished already, at step {self.done}")
        elif self.is_out_of_patience:
            self.progress.message(f"finished already: {self._patience_line}")
        elif self.done:
            self.progress.message(f"resuming after step {self.done}")
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)
        if self.records is not None:
            self.records.close()

    def tell_what_it_runs_on(self, inputs: Inputs, optimizer: torch.optim.Optimizer) -> None:
        """One line on the terminal, and one in the run's record."""
        if self.is_writer and self.done < self.config.steps:
            facts = runs_on(self.config, inputs.policy, inputs.judge, optimizer)
            record(self.output, facts)
            self.progress.message(line_of(facts))

    def phase(self, name: str) -> None:
        """What happens now: sample, judge, update, eval, save."""
        self.progress.phase(name)
        self.heartbeat.beat(phase=name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` is finished (collective). ``time/save`` is the time that training has waited for saves since the last."""
        if self.records is not None and metrics:
            self.records.log(step, metrics | self._save_times)
        self._save_times = {}
        self.progress.step(step, metrics)
        for alarm in self.watch.observe(step, metrics):
            self.progress.message(f"warning: {alarm.text}")
            if self.records is not None:
                self.records.alarm(alarm.record)
        self.done = step
        self.heartbeat.beat(step=step)
        self.finish_save(wait=False)

    def record(
        self, step: int, batch: Experience, inputs: Inputs, log_probs: UpdateLogProbs, metrics: dict[str, float]
    ) -> None:
        """What is kept of a step beside its metrics: samples, the batch of a skipped update, warnings."""
        if metrics["optimizer/skipped_steps"]:
            self.keep_bad_step(step, batch, log_probs, metrics)
        if bad := metrics["attribution/zero_or_nonfinite"]:  # it carries no credit: say so, never silently
            self.progress.message(
                f"warning: step {step}: {bad:.0f} of {metrics['attribution/passes']:.0f} judge gradients were zero or not "
                "finite; their tokens share the item's credit evenly"
            )
        self.sample(step, batch, inputs)
        self.dump_batch(step_name(step), batch, batch.judgements, step)

    def dump_batch(self, name: str, rollouts: Rollouts, judgements: list[JudgementRow], step: int) -> None:
        """Write the responses of a batch, with ``rollout.dump``."""
        if self.rollouts is not None:
            self.rollouts.write(name, *experience.dumped(rollouts, judgements, step))

    def sample(self, step: int, batch: Experience, inputs: Inputs) -> None:
        """Keep a few of the step's responses for the report: the first of each of the first groups."""
        if self.records is None or not self._is_sampled(step):
            return
        for group in batch.groups[: self.config.log.samples_per_step]:
            self.records.sample(experience.sample_record(batch, inputs, group.start, step))

    def stop_on_alarm(self) -> None:
        """Raise ``AlarmError`` on every rank if an alarm of ``alarms.stop_on`` is on; what was being saved is finished first."""
        wanted = ALARMS if "all" in self.config.alarms.stop_on else self.config.alarms.stop_on
        alarms = [self.watch.on[name] for name in wanted if name in self.watch.on]
        if not alarms:
            return
        self.finish_save(wait=True)
        good = [step for step, _ in complete_checkpoints(self.checkpointer.directory) if step < alarms[0].step]
        last = f"the last checkpoint before it is of step {good[-1]}" if good else "there is no checkpoint before it"
        raise AlarmError(f"alarms.stop_on: {alarms[0].text}; {last} (in {self.checkpointer.directory})")

    def _is_sampled(self, step: int) -> bool:
        every = self.config.log.samples_every
        return bool(every) and (step - 1) % every == 0

    def measured_responses(self, step: int) -> int:
        """Of how many responses ``step`` measures the faithfulness of their credit: few, so that it costs little."""
        rollout = self.config.rollout
        batch = rollout.prompts_per_step * rollout.responses_per_prompt
        return max(1, min(MOST_MEASURED, batch // MEASURED_SHARE)) if self._is_sampled(step) else 0

    # ---- checkpoints (collective) ----------------------------------------------------------------------------------

    def wants_checkpoint(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether ``step`` is to be saved: its turn, or the best evaluation so far by ``checkpoint.keep_best``."""
        every = self.config.checkpoint.save_every
        self._note(step, metrics)
        if self._scores and self.best_step == step:
            self._kept.add(step)  # the best one before is kept until this one is there
            return True
        return bool(every) and step % every == 0

    def check_keep_best(self, metrics: dict[str, float]) -> None:
        """Raise ``UserError`` unless ``metrics``, of the evaluation before training, have what ``checkpoint.keep_best`` names."""
        name = self.config.checkpoint.keep_best
        if name and name not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("eval/")))
            raise UserError(
                "checkpoint.keep_best", f"{name!r} is not measured by this run's evaluations", f"give one of {known}"
            )
        self._note(0, metrics)

    def _note(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Take in an evaluation; one whose value is not finite is no improvement."""
        if self.config.checkpoint.keep_best in metrics:
            value = metrics[self.config.checkpoint.keep_best]
            is_number = value is not None and math.isfinite(value)
            self._scores.append((step, value if is_number else -math.inf))

    @property
    def best_step(self) -> int:
        """Of the evaluation with the highest value of ``checkpoint.keep_best``, of equals the first; 0: before training, or none."""
        return max(self._scores, key=lambda score: (score[1], -score[0]), default=(0, 0.0))[0]

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the last ``eval.patience`` evaluations were no better than one before them."""
        patience = self.config.eval.patience
        return bool(patience) and sum(step > self.best_step for step, _ in self._scores) >= patience

    @property
    def _patience_line(self) -> str:
        name, best = self.config.checkpoint.keep_best, self.best_step
        value = dict(self._scores)[best]
        where = f"its checkpoint is in {self.checkpointer.directory}" if best else "the policy before training"
        return (
            f"eval.patience {self.config.eval.patience}: {name} {value:.4g} of step {best} was not exceeded up to step "
            f"{self.done}; {where}"
        )

    def stop_out_of_patience(self) -> None:
        """End the run early, as one that is finished: the last step is saved, so that a longer patience can go on."""
        self._save_last_step()
        self.progress.message(self._patience_line)

    def is_ready_to_export(self) -> bool:
        """Load the weights to export: of the last step, or of the best one where ``eval.patience`` has ended the run.

        False where that is the policy before training, of which there is no checkpoint.
        """
        if self.is_out_of_patience and self.best_step:
            self.checkpointer.load(self.best_step)
        return not self.is_out_of_patience or self.best_step > 0

    def save(self) -> None:
        """A checkpoint of the last finished step, in the background if so configured."""
        self.phase("save")
        in_background, start = self.config.checkpoint.asynchronous, time.perf_counter()
        earlier = self.checkpointer.begin(self.done, in_background, self._kept)
        if earlier is not None or not in_background:
            self._has_saved(earlier if in_background else self.done)
        self._waited_since(start)

    def finish_save(self, wait: bool) -> None:
        """Make a checkpoint of what has been written in the background, when all ranks are done or ``wait``."""
        start = time.perf_counter()
        step = self.checkpointer.finish(wait)
        if step is not None:
            self._has_saved(step)
            self._waited_since(start)

    def leave(self) -> None:
        """All ranks have agreed to leave: the last finished step is saved."""
        self._save_last_step()
        self.progress.message(f"asked to leave: saved after step {self.done}")
        self.heartbeat.beat(state="preempted")

    def _save_last_step(self) -> None:
        """Wait until the last finished step has its checkpoint."""
        self.finish_save(wait=True)
        if self.done > self.saved:
            self.save()
            self.finish_save(wait=True)

    def _has_saved(self, step: int) -> None:
        self.saved = step
        if step == self.best_step:
            self._kept = {step}
        self.heartbeat.beat(saved_step=step)
        if self.config.checkpoint.asynchronous and self.checkpointer.background_seconds:
            self._save_times["time/save_background"] = self.checkpointer.background_seconds[-1]

    def _waited_since(self, start: float) -> None:
        torch.cuda.synchronize()
        self._save_times["time/save"] = self._save_times.get("time/save", 0.0) + time.perf_counter() - start

    # ---- steps whose loss or gradients are not finite --------------------------------------------------------------

    def keep_bad_step(self, step: int, batch: Experience, log_probs: UpdateLogProbs, metrics: dict) -> None:
        """Write the batch of a step that was skipped, and say so."""
        if self.is_writer:
            path = write_bad_step(self.output, step, *experience.plain_batch(batch, log_probs), metrics)
            self.progress.message(
                f"warning: step {step}: loss {metrics['loss/policy']:g}, gradient norm {metrics['optimizer/grad_norm']:g}: "
                f"{metrics['optimizer/skipped_steps']:.0f} optimizer steps skipped; the batch is in {path}"
            )

    def stop_after_bad_steps(self, in_a_row: int) -> None:
        """Raise ``RunError`` on every rank; what was being saved is finished first."""
        self.finish_save(wait=True)
        raise RunError(
            f"optimizer.max_bad_steps: {in_a_row} optimizer steps in a row were skipped, up to step {self.done}, because "
            f"loss or gradients were not finite; look at the batches in {self.output / DIRECTORY}, lower optimizer.lr or "
            f"correct the data; the last checkpoint is of step {self.saved}"
        )
